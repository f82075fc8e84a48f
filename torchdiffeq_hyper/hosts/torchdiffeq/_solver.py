"""The learned fixed-grid solver that torchdiffeq is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._answers import check_answer, own
from torchdiffeq_hyper._fields._wrappers import context_of
from torchdiffeq_hyper._state import Hypernet, check_dtype, is_finite, is_half, time_dtype
from torchdiffeq_hyper.errors import OptionError, StateTypeError
from torchdiffeq_hyper.hosts._host import warn_if_untrained
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import (
    FixedGridODESolver,
    HostCall,
    Perturb,
    PerturbFunc,
    known_options,
)
from torchdiffeq_hyper.methods._method import SteppingMethod, base_of
from torchdiffeq_hyper.solvers._grid import equal_steps, points_between
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._stepping import (
    Correction,
    Step,
    cast_back,
    raise_non_finite,
)
from torchdiffeq_hyper.tableaus import Edge, Tableau, second_order

_GRID = ("step_size", "grid_constructor", "interp", "perturb")
_PERTURB = {Edge.INSIDE: Perturb.NONE, Edge.START: Perturb.NEXT, Edge.END: Perturb.PREV}


class HyperGridSolver(FixedGridODESolver):  # type: ignore[misc]
    """A base of `tableaus` plus its fitted correction, on the host's own time grid.

    The grid, the interpolation, the callbacks and the events are the host's; only the
    step is ours. Subclasses, one a method, set ``entry`` and ``order``.
    """

    entry: ClassVar[SteppingMethod]
    also_accepted: ClassVar[frozenset[str]] = frozenset()
    func: Any
    step_size: Any
    grid_constructor: Any

    def __init__(self, func: Any, y0: Tensor, rtol: Any, atol: Any, **options: Any) -> None:
        options.pop("norm", None)
        # Under `override` a name of ours may mean something else to the overridden method.
        own = [name for name in ("hypernet", "solver") if name not in self.also_accepted]
        known = [*own, *_GRID, *(["alpha"] if self.entry.tableau.alpha is not None else [])]
        options = known_options(options, known, self.entry.name, self.also_accepted)
        _check_values(options)
        self._options = options
        self._call = HostCall.of(func)
        check_dtype(y0.dtype, is_tuple=self._call.layout.shapes is not None)
        self._dtype = y0.dtype
        if is_half(y0.dtype):
            func, y0 = _InHalf(func, y0.dtype), y0.float()
        grid = {name: options[name] for name in _GRID if name in options}
        super().__init__(func=func, y0=y0, rtol=rtol, atol=atol, **grid)
        # The host's outermost wrapper (not its subclasses) only casts t, in several small kernels.
        is_plain = type(self.func) is PerturbFunc and not self.perturb
        self._direct = self.func.base_func if is_plain else None
        self._has_grid_option = "step_size" in grid or "grid_constructor" in grid
        self._solver: HyperSolver | None = None
        self._taken: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._ends: _CachedEnds | None = None
        if self.interp == "cubic":
            self.func = self._ends = _CachedEnds(self.func)

    def _prepare(self, t: Tensor) -> None:
        """Choose the step, by the host's times: those of the call, or an event's start."""
        call = self._call
        if call.is_adjoint_backward:  # the base alone, stepping as the forward solve did
            tableau, grid_between = call.plan() or (self.entry.tableau, None)
            if grid_between is not None and not self._has_grid_option:
                self.grid_constructor = lambda func, y0, t: grid_between(t)
            self._step = Step(tableau, self._evaluate, None)
            return
        net, tableau = self._bound_net(t)
        if call.is_adjoint_forward:
            warn_if_untrained(net, "hypernet", "odeint_adjoint", "odeint")
        part, solver = None, self._solver
        if solver is not None and not self._has_grid_option:
            n_steps = solver.n_steps
            self.grid_constructor = lambda func, y0, t: equal_steps(t, n_steps)
        if solver is not None and solver.domain is not None:
            part = solver.domain.corrected_part(call.layout.split(self.y0))
        correction = Correction(
            net,
            tableau.order,
            call.layout,
            self.y0,
            negated=call.negated,
            part=part,
            context=context_of(call.func),
        )
        self._step = Step(tableau, self._evaluate, correction)

    def _bound_net(self, t: Tensor) -> tuple[Hypernet, Tableau]:
        """Return g and the base that it corrects; note the solver that g belongs to."""
        alpha, net = self._options.get("alpha"), self._options.get("hypernet")
        tableau = self.entry.tableau if alpha is None else second_order(alpha)
        if net is not None:
            return _checked_net(net, self.entry.name, self._options), tableau
        self._solver = solver = self._call.find_part(self.entry, t, self._options)
        return solver.hypernet, solver.tableau if alpha is None else tableau

    def _check_sizes(
        self, sizes: Tensor, readable: str | None = None, starts: Tensor | None = None
    ) -> None:
        """Look at all steps beforehand, once: the fit's range, dt^(p+1), times of known grids."""
        if self._solver is not None:
            self._solver.warn_outside_fit(sizes, self._call.sign, readable)
        if self._step.correction is not None and len(sizes):
            self._step.correction.look_at(sizes, self.y0, starts)

    def _evaluate(self, t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        try:
            if self._ends is not None and self._ends.y is y and not self.perturb:
                k: Tensor = self._ends.k
            elif self._direct is None:
                k = self.func(t, y, perturb=_PERTURB[edge] if self.perturb else Perturb.NONE)
            else:
                k = self._direct(t.to(time_dtype(y.dtype)), y)
        except (TypeError, AttributeError):
            self._check_answer(t, y)
            raise
        check_answer(k, y)
        return k.to(y.dtype) if is_half(k.dtype) else k

    @torch.no_grad()
    def _check_answer(self, t: Tensor, y: Tensor) -> None:
        """Refuse a func whose answer the host's wrappers choke on."""
        state = self._call.layout.split(y.to(self._dtype))
        times = self._call.sign * t.to(time_dtype(self._dtype))
        check_answer(self._call.func(times, state), state)

    def _step_func(
        self, func: Any, t0: Tensor, dt: Any, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        dy, f0 = self._step.increment(t0, dt, t1, y0)
        if self._taken is not None:
            self._taken.append((t0, t1, dy))
        # The host's cubic calls func once more before it uses f0.
        return dy, f0 if self.interp == "linear" else own(f0)

    def integrate(self, t: Tensor) -> Tensor:
        """Return the state at every point of ``t``, as the host's solvers do."""
        self._prepare(t)
        if self.y0.numel() == 0:
            empty: Tensor = self.y0.expand(len(t), *self.y0.shape)
            return empty.to(self._dtype, copy=True)
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        grid: Tensor = self.grid_constructor(self.func, self.y0, t)
        self.grid_constructor = lambda func, y0, t: grid
        follows_t = len(t) > 2 and not self._has_grid_option
        readable = "options={..., {options}}" if follows_t else None
        self._check_sizes(grid.diff(), readable, grid[:-1])
        if self._call.is_adjoint_forward:
            grid_between = partial(points_between, -grid.detach())  # backward time runs negated
            self._call.leave_plan((self._step.tableau, grid_between))
        solution: Tensor = super().integrate(t)
        if self._step.correction is not None and not is_finite(solution[-1]):
            pairs = zip(grid[:-1], grid[1:], strict=True)
            raise_non_finite(self._step, pairs, self.y0, self._dtype, self._call.sign)
        return cast_back(solution, self._dtype)

    def integrate_until_event(
        self, t0: Tensor, event_fn: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the event's time and the states at start and event, as the host's do."""
        self._prepare(t0)
        if self.step_size is None:
            self.step_size = self._fitted_step_size()
        time_dtype = torch.promote_types(t0.dtype, torch.float32)
        self._check_sizes(torch.as_tensor(self.step_size, dtype=time_dtype).reshape(1))
        if self._call.is_adjoint_forward:
            size = float(self.step_size)

            def grid_between(t: Tensor) -> Tensor:
                return equal_steps(t, max(1, round(float(t[-1] - t[0]) / size)))

            self._call.leave_plan((self._step.tableau, grid_between))
        dtype = self._dtype
        cast = (lambda t, y: event_fn(t, y.to(dtype))) if is_half(dtype) else event_fn
        self._taken = []
        event_time, solution = super().integrate_until_event(t0, cast)
        # A state that is not a number ends the host's search as if it were the event.
        if not is_finite(self._taken[-1][2]):
            pairs = [(t0, t1) for t0, t1, _ in self._taken]
            raise_non_finite(self._step, pairs, self.y0, dtype, self._call.sign)
        return event_time, cast_back(solution, dtype)

    def _fitted_step_size(self) -> float:
        solver = self._solver
        if solver is None or solver.domain is None or solver.n_steps is None:
            raise OptionError(
                problem="an event was asked for without a step size.",
                expected="step_size, or a solver that knows its fitted span and steps.",
                fix='options={"step_size": 0.1, ...}',
            )
        start, end = solver.domain.span
        return abs(end - start) / solver.n_steps


class _InHalf:
    """A func of half-precision states, called on float32 ones."""

    def __init__(self, func: Any, dtype: torch.dtype) -> None:
        self.func = func
        self._dtype = dtype

    def __call__(self, t: Tensor, y: Tensor, **perturb: Any) -> Tensor:
        k: Tensor = self.func(t, y.to(self._dtype), **perturb)
        return k.to(y.dtype)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.func.callback_step(t0, y0.to(self._dtype), dt)


class _CachedEnds:
    """The host's func, called once at the end of a step, where each cubic and the next step ask."""

    def __init__(self, func: Any) -> None:
        self._func = func
        self.y: Tensor | None = None
        self.k: Any = None

    def __call__(self, t: Tensor, y: Tensor, **perturb: Any) -> Any:
        if perturb:
            return self._func(t, y, **perturb)
        if self.y is not y:
            self.y, self.k = y, self._func(t, y)
        return self.k

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)


def _checked_net(net: Any, method: str, options: dict[str, Any]) -> Hypernet:
    """Return the option "hypernet", which must be one, and given alone."""
    if options.get("solver") is not None:
        raise OptionError(
            problem='options hold both "hypernet" and "solver".',
            expected="one of them.",
            fix='drop "hypernet"',
        )
    if base_of(net) is not None or not callable(net):
        raise StateTypeError(
            problem=f'options["hypernet"] is a {type(net).__name__}.',
            expected="a callable g(step) -> correction like step.y.",
            fix=f'odeint(..., method="{method}", options={{"solver": solver}})',
        )
    hypernet: Hypernet = net
    return hypernet


def _check_values(options: dict[str, Any]) -> None:
    size = options.get("step_size")
    if size is not None and not (isinstance(size, int | float | Tensor) and size > 0):
        raise OptionError(
            problem=f"step_size is {size!r}.",
            expected="a number above 0, also in reverse time.",
            fix='options={"step_size": 0.1, ...}',
        )
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise OptionError(
            problem=f"interp is {interp!r}.",
            expected='"linear" or "cubic".',
            fix='options={"interp": "cubic", ...}',
        )
