"""A method, or a fitted part, as one of torchdyn's solver objects (checked against 1.0.6)."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import is_half
from torchdiffeq_hyper.errors import HostWarning, OptionError, StateTypeError
from torchdiffeq_hyper.hosts._host import warn_if_untrained, warn_once
from torchdiffeq_hyper.hosts.torchdyn._field import ODEINT, HostCall, as_called, drops_args
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method, base_of
from torchdiffeq_hyper.solvers._binding import Times, resolve
from torchdiffeq_hyper.solvers._grid import equal_steps, points_between
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._stepping import Step
from torchdiffeq_hyper.tableaus import Edge

SENSITIVITY = "torchdyn.numerics.sensitivity"


def part_classes() -> tuple[type[Any], ...]:
    """Return the classes whose objects torchdyn may be given as ``solver=``."""
    kinds = [method.kind for method in _registry.methods().values()]
    return tuple(dict.fromkeys([HyperSolver, *(kind for kind in kinds if kind is not None)]))


class Stepper:
    """What torchdyn makes of ``solver="hypereuler"``, and what stands for a solver object.

    Without a ``part``, one is found for each call.
    """

    def __init__(self, method: Method, part: Any = None) -> None:
        self.method = method
        self.part = part
        self.is_whole = method.tableau is None  # the part solves the whole problem at once
        self.order = method.order  # torchdyn takes it for the first step size
        # Which of torchdyn's loops to use: the one for fixed steps is told of no tolerances.
        self.stepping_class = "adaptive" if method.option is None else "fixed"

    @classmethod
    def of(cls, solver: Any) -> Stepper | None:
        """Return what stands for torchdyn's ``solver=``; None where that is not ours."""
        if isinstance(solver, Stepper):
            return solver
        return cls.of_part(solver) if isinstance(solver, part_classes()) else None

    @classmethod
    def of_part(cls, part: Any) -> Stepper:
        """Return what stands for a fitted part; refuse one whose method is gone."""
        method = _registry.method_for(part)
        if method is None:
            raise OptionError(
                problem=f"solver is a {type(part).__name__}, which serves no registered method.",
                expected="a HyperSolver, or a part of a registered method.",
                fix="tdh.register_plugin(...) again",
            )
        return cls(method, part)

    @classmethod
    def named(cls, name: str) -> Stepper:
        """Return what stands for ``solver=name``."""
        return cls(_registry.find(name))

    def sync_device_dtype(self, x: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, on one device; refuse states that are not one tensor."""
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
        """Solve from t to t + dt in the fitted number of steps."""
        call = HostCall.of(f, torch.stack([t, t + dt]).reshape(2))
        return None, self._solve(call, self._part_for(call), x, args, None)[-1], None

    def run(  # noqa: PLR0917 - torchdyn's order
        self, f: Any, x: Tensor, t_span: Tensor, save_at: Any, args: Any, tolerances: Any
    ) -> tuple[Tensor, Tensor]:
        """Return ``t_span``, or the true times ``save_at`` of it, and the states there."""
        call = HostCall.of(f, t_span)
        part = self._part_for(call)
        saved = _saved_points(save_at, call.t) if len(save_at) else None
        if args and drops_args(call.func):
            _warn("args", part)
        solution = self._solve(call, part, x, args, tolerances)
        if saved is not None:
            return saved[0], solution[saved[1]]
        if call.negated:
            _warn("t_eval", part)
        return t_span, solution

    def _part_for(self, call: HostCall) -> Any:
        times = Times(-call.t if call.negated else call.t, is_negated=call.negated)
        return resolve(self.method, call.func, times) if self.part is None else self.part

    def _solve(self, call: HostCall, part: Any, x: Tensor, args: Any, tolerances: Any) -> Any:
        if not self.is_whole:
            return part.solve(as_called(call.func, args), x, call.t)
        # torchdyn's loop for fixed steps is told of no tolerances.
        rtol, atol = tolerances or sys.modules[ODEINT].odeint.__defaults__[1::-1]
        field = as_called(call.func, args, len(x) if x.dim() else 0)
        return part.solve(field, x, call.t, rtol=rtol, atol=atol)

    def __repr__(self) -> str:
        return f'Stepper("{self.method.name}")'

    def __reduce__(self) -> Any:
        return Stepper.named, (self.method.name,)  # of no part: models hold that itself


class AdjointStepper(Stepper):
    """One forward solve under an adjoint sensitivity, and the backward solves that follow.

    torchdyn keeps a solver object for both: what backward needs of forward is kept here, so
    that it needs no scope, no global and no particular thread.
    """

    def __init__(self, tolerances: Any, stepper: Stepper, *, is_interpolated: bool) -> None:
        super().__init__(stepper.method, stepper.part)
        self._rtol, self._atol = tolerances  # of the adjoint
        self._is_trained = torch.is_grad_enabled()  # the host's Function switches gradients off
        # Whether backward reads the states off a spline through the forward's.
        self._is_interpolated = is_interpolated
        # The base that backward solves run, uncorrected; None for torchdyn's dopri5.
        self._tableau = self.method.tableau
        self._grid: Tensor | None = None  # true times of the forward's steps
        self._states: Tensor | None = None  # there, where the spline needs more than the solution
        self._whole: tuple[HostCall, Tensor] | None = None  # a solve without a grid, and its start

    def run(self, f: Any, x: Tensor, t_span: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        """Solve the problem, or the adjoint's."""
        call = HostCall.of(f, t_span)
        names = (getattr(call.func, name, None) for name in ("__module__", "__name__"))
        if tuple(names) == (SENSITIVITY, "adjoint_dynamics"):
            return t_span, self._solve_backward(call, x)
        return super().run(f, x, t_span, *given)

    def _solve(self, call: HostCall, part: Any, x: Tensor, args: Any, tolerances: Any) -> Any:
        """Solve; keep the states between two points, through which a spline would be a line."""
        if not self.is_whole:
            self._tableau = part.tableau
            self._grid = equal_steps(call.t.detach(), part.n_steps)
        if self._is_trained:
            if base_of(part) is not None:
                warn_if_untrained(part, "solver", "torchdyn's adjoint", 'sensitivity="autograd"')
            if call.negated:
                _warn("reverse adjoint", part)
        needs_states = self._is_interpolated and not call.negated
        if needs_states and self._grid is not None and len(self._grid) > len(call.t):
            call = replace(call, t=self._grid)
            self._states = super()._solve(call, part, x, args, tolerances).detach()
            return self._states[[0, -1]]
        solution = super()._solve(call, part, x, args, tolerances)
        if needs_states and self._grid is None:
            self._whole = call, solution[0].detach()
        return solution

    def _solve_backward(self, call: HostCall, y0: Tensor) -> Any:
        """Return the adjoint state at the points of ``call.t``, its two ends."""
        odeint = sys.modules[ODEINT].odeint
        own = {"solver": "dopri5", "rtol": self._rtol, "atol": self._atol}
        if self._whole is not None and self._states is None:
            # Which steps a whole solve took is its own affair; its spline goes through dopri5's.
            forward, start = self._whole
            span = forward.t[[0, -1]].detach()
            self._grid, self._states = odeint(
                forward.func, start, span, return_all_eval=True, **own
            )
        if self._states is not None:
            assert self._grid is not None
            _refine_spline(call.func, self._grid.to(self._states), self._states)
        if self._tableau is None:
            return odeint(call.func, y0, call.t, **own)[1]

        def stage_call(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
            # The host marks the t it is given as requiring a gradient.
            k: Tensor = call.func(t.detach(), y.to(y0.dtype))
            return k.to(y.dtype)

        grid = call.t if self._grid is None else points_between(self._grid, call.t)
        y = y0.float() if is_half(y0.dtype) else y0
        step = Step(self._tableau, stage_call, None)
        for t0, t1 in zip(grid[:-1], grid[1:], strict=True):
            y = y + step.increment(t0, t1 - t0, t1, y)[0]
        return torch.stack([y0, y.to(y0.dtype)])


def checked_function(function: Any, part: Any) -> Any:
    """Return an adjoint's `torch.autograd.Function` that looks at what the host would lose."""

    def apply(vf_params: Tensor, x: Tensor, t_span: Tensor, *rest: Any) -> Any:
        save_at, args = (*rest, (), ())[:2]
        if args is not None and len(args):
            raise OptionError(
                problem=f"args is {args!r}: torchdyn cannot hand it to the vector field here.",
                expected="no args under an adjoint sensitivity, for any solver.",
                fix='sensitivity="autograd"   # or let the vector field hold them itself',
            )
        if save_at is not None and len(save_at):
            _warn("save_at", part)
        return function.apply(vf_params, x, t_span, *rest)

    return SimpleNamespace(apply=apply)


def _refine_spline(func: Any, t: Tensor, states: Tensor) -> None:
    """Have an interpolated adjoint's field read states off a spline through (n, batch, d)."""
    host = sys.modules[SENSITIVITY]
    coefficients = host.natural_cubic_coeffs(x=states.permute(1, 0, 2), t=t)
    cells = dict(zip(func.__code__.co_freevars, func.__closure__, strict=True))
    cells["x_spline"].cell_contents = host.CubicSpline(coeffs=coefficients, t=t)


def _saved_points(save_at: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``save_at`` as a tensor, and where its times lie in ``t``."""
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


_TEXTS = {
    "t_eval": "torchdyn returns the times of a reverse-time solve negated, for every solver. The "
    "solution is right, and belongs to t_span as you gave it: use that in place of t_eval.",
    "reverse adjoint": "torchdyn's adjoint gradients of a reverse-time solve are wrong, for every "
    'solver; the solution is right. Use sensitivity="autograd", or torchdiffeq\'s odeint_adjoint.',
    "save_at": "torchdyn ignores save_at under adjoint sensitivities, for every solver, and "
    'returns all of t_span. Use sensitivity="autograd", or pick points out of the solution.',
    "args": "torchdyn keeps args from the vector field where order > 1 or an integral loss is "
    "set, for every solver. Let the vector field hold them itself.",
}


def _warn(what: str, part: Any) -> None:
    """Warn, once a solver, of a defect of the host."""
    warn_once(part, what, _TEXTS[what], HostWarning)
