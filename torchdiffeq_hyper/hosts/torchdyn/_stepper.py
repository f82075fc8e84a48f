"""A method, or a fitted part, as one of torchdyn's solver objects."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError, StateTypeError
from torchdiffeq_hyper.hosts.torchdyn import _field, _upstream
from torchdiffeq_hyper.hosts.torchdyn._adjoint import AdjointCall
from torchdiffeq_hyper.hosts.torchdyn._field import HostCall
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method
from torchdiffeq_hyper.solvers._binding import Times, resolve
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver

Tolerances: TypeAlias = tuple[float, float]
"""(rtol, atol)."""


def part_classes() -> tuple[type[Any], ...]:
    """Return the classes whose objects torchdyn may be given as ``solver=``."""
    kinds = [method.kind for method in _registry.methods().values()]
    return tuple(dict.fromkeys([HyperSolver, *(kind for kind in kinds if kind is not None)]))


class Stepper:
    """What torchdyn makes of ``solver="hypereuler"``, and what stands for a solver object.

    torchdyn's loops hand it the whole problem. Where a solver is used without them, `step`
    solves one interval.

    Args:
        method: the method.
        part: the fitted part; None: found for each call.
        adjoint: the call under an adjoint sensitivity that this object serves alone.
    """

    def __init__(
        self, method: Method, part: Any = None, adjoint: AdjointCall | None = None
    ) -> None:
        self.method = method
        self.part = part
        self._adjoint = adjoint

    @classmethod
    def of(cls, solver: Any) -> Stepper | None:
        """Return what stands for torchdyn's ``solver=``; None where that is not ours."""
        if isinstance(solver, Stepper):
            return solver
        return cls.of_part(solver) if isinstance(solver, part_classes()) else None

    @classmethod
    def of_part(cls, part: Any) -> Stepper:
        """Return what stands for a fitted part.

        Raises:
            OptionError: its method is no longer registered.
        """
        method = _registry.method_for(part)
        if method is None:
            raise OptionError(
                problem=f"the solver is a {type(part).__name__}, which serves no registered "
                "method.",
                expected="a HyperSolver, or a part of a registered method.",
                fix="tdh.register_plugin(...) again",
            )
        return cls(method, part)

    @classmethod
    def named(cls, name: str) -> Stepper:
        """Return what stands for ``solver=name``."""
        return cls(_registry.find(name))

    def for_adjoint(
        self, tolerances: Tolerances, *, is_trained: bool, is_interpolated: bool
    ) -> Stepper:
        """Return an object for one call under an adjoint sensitivity; see `AdjointCall`."""
        adjoint = AdjointCall(self.method.tableau, *tolerances, is_trained, is_interpolated)
        return Stepper(self.method, self.part, adjoint)

    @property
    def who(self) -> Any:
        """Who is to be warned: the fitted part, or this object where it is found by name."""
        return self if self.part is None else self.part

    @property
    def is_whole(self) -> bool:
        """Whether the part solves the whole problem, not step by step."""
        return self.method.tableau is None

    @property
    def stepping_class(self) -> str:
        """Which of torchdyn's loops to use.

        "adaptive" for methods whose only options are the tolerances: the loop for fixed
        steps is told of none. (torchdyn calls func twice before its adaptive loop.)
        """
        return "adaptive" if self.method.option is None else "fixed"

    @property
    def order(self) -> int:
        """Order of convergence; torchdyn takes it for the first step size."""
        return self.method.order

    def sync_device_dtype(self, x: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, on one device.

        Raises:
            StateTypeError: the state is not one tensor.
        """
        if not isinstance(x, Tensor):
            raise StateTypeError(
                problem=f"the state is a {type(x).__name__}.",
                expected="one tensor, as torchdyn's own methods take.",
                fix='torchdiffeq.odeint(func, (x, z), t, method="...")   # for tuple states',
            )
        return x, t_span.to(x.device)

    def step(  # noqa: PLR0917 - torchdyn's signature
        self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None
    ) -> tuple[None, Tensor, None]:
        """Solve from t to t + dt, as between two points: in the fitted number of steps."""
        ends = torch.stack([t, t + dt]).reshape(2)
        call = HostCall.of(f, ends)
        part = self._part_for(call)
        solution = self._solve(call, part, x, args, None)
        return None, solution[-1], None

    def run(
        self,
        f: Any,
        x: Tensor,
        t_span: Tensor,
        *,
        save_at: Any = (),
        args: Any = None,
        tolerances: Tolerances | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Solve the whole problem, as torchdyn's loops do.

        Args:
            f: the field that the host gives to its loops.
            x: the state.
            t_span: the host's times, negated in reverse time.
            save_at: true times to return, points of t_span; none: all of it.
            args: passed on to a func that takes it.
            tolerances: (rtol, atol), where the host tells.

        Returns:
            ``t_span`` or ``save_at``, and the states there.
        """
        call = HostCall.of(f, t_span)
        if call.is_adjoint_backward:
            rtol, atol = tolerances or _upstream.default_tolerances()
            adjoint = self._adjoint or AdjointCall(
                self.method.tableau, rtol, atol, is_trained=False, is_interpolated=False
            )
            return t_span, adjoint.solve_backward(call, x)
        part = self._part_for(call)
        saved = _saved_points(save_at, call.t) if len(save_at) else None
        if self._adjoint is not None:
            self._adjoint.begin(call, part)
        if args and _upstream.drops_args(call.func):
            _upstream.warn("args", part)

        def solve(call: HostCall) -> Tensor:
            return self._solve(call, part, x, args, tolerances)

        solution = (
            solve(call) if self._adjoint is None else self._adjoint.solve_forward(call, solve)
        )
        if saved is not None:
            return saved[0], solution[saved[1]]
        if call.negated:
            _upstream.warn("t_eval", part)
        return t_span, solution

    def _part_for(self, call: HostCall) -> Any:
        if self.part is not None:
            return self.part
        times = Times(-call.t if call.negated else call.t, is_negated=call.negated)
        return resolve(self.method, call.func, times)

    def _solve(
        self, call: HostCall, part: Any, x: Tensor, args: Any, tolerances: Tolerances | None
    ) -> Tensor:
        solution: Tensor
        if self.is_whole:
            rtol, atol = tolerances or _upstream.default_tolerances()
            field = _field.of_samples(call.func, args, len(x) if x.dim() else 0)
            solution = part.solve(field, x, call.t, rtol=rtol, atol=atol)
        else:
            solution = part.solve(_field.with_args(call.func, args), x, call.t)
        return solution

    def __repr__(self) -> str:
        return f'Stepper("{self.method.name}")' if self.part is None else repr(self.part)

    def __reduce__(self) -> Any:
        return (
            (Stepper.named, (self.method.name,))
            if self.part is None
            else (Stepper.of_part, (self.part,))
        )


def _saved_points(save_at: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``save_at`` as a tensor, and where its times lie in ``t``.

    Raises:
        OptionError: a time is not in ``t``.
    """
    wanted = torch.as_tensor(save_at, dtype=t.dtype, device=t.device)
    is_same = torch.isclose(wanted.reshape(-1, 1), t.detach())
    missing = wanted[~is_same.any(dim=1)]
    if len(missing):
        raise OptionError(
            problem=f"save_at holds {missing[0].item():.6g}, which is not in t_span.",
            expected="times of t_span.",
            fix="odeint(f, x, t_span, solver, save_at=t_span[[0, -1]])",
        )
    return wanted, is_same.int().argmax(dim=1)
