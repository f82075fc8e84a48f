"""The backward solves of torchdyn's adjoint sensitivities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import is_half
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.hosts._host import warn_if_untrained
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.hosts.torchdyn._field import HostCall
from torchdiffeq_hyper.methods._method import base_of
from torchdiffeq_hyper.solvers._grid import equal_steps, points_between
from torchdiffeq_hyper.solvers._stepping import Step
from torchdiffeq_hyper.tableaus import Edge, Tableau


@dataclass
class AdjointCall:
    """One forward solve under an adjoint sensitivity, and the backward solves that follow.

    It lives in the solver object that torchdyn keeps for both, so that backward needs no
    scope, no global and no particular thread.

    Attributes:
        tableau: the base that backward solves run, uncorrected; None for torchdyn's dopri5.
        rtol: relative tolerance of that dopri5.
        atol: absolute tolerance of that dopri5.
        is_trained: whether gradients are wanted.
        is_interpolated: whether backward reads the states off a spline through the forward's.
        grid: the true times of the forward's steps, once there are any.
        states: the states there, where the spline needs more than the forward returned.
        whole: the forward solve of a method without a grid: what backward takes its own from.
    """

    tableau: Tableau | None
    rtol: float
    atol: float
    is_trained: bool
    is_interpolated: bool
    grid: Tensor | None = None
    states: Tensor | None = None
    whole: tuple[HostCall, Tensor] | None = None

    def begin(self, call: HostCall, part: Any) -> None:
        """Note how the forward solve steps; warn of gradients that will be wrong or missing."""
        if self.tableau is not None:
            self.tableau = part.tableau
            self.grid = equal_steps(call.t.detach(), part.n_steps)
        if self.is_trained:
            if base_of(part) is not None:
                warn_if_untrained(part, "torchdyn")
            if call.negated:
                _upstream.warn("reverse adjoint", part)

    def solve_forward(self, call: HostCall, solve: Callable[[HostCall], Tensor]) -> Tensor:
        """Return ``solve(call)``; keep the states between two points for a spline.

        (torchdyn's spline through two points alone is a straight line.)
        """
        grid = self.grid
        if not self.is_interpolated or call.negated:
            return solve(call)
        if grid is None:
            solution = solve(call)
            self.whole = call, solution[0].detach()
            return solution
        if len(grid) == len(call.t):
            return solve(call)
        self.states = solve(replace(call, t=grid)).detach()
        return self.states[[0, -1]]

    def solve_backward(self, call: HostCall, y0: Tensor) -> Tensor:
        """Return the adjoint state at the points of ``call.t``, its two ends."""
        if self.whole is not None and self.states is None:
            # Which steps a whole solve took is its own affair; its spline goes through dopri5's.
            forward, start = self.whole
            span = forward.t[[0, -1]].detach()
            self.grid, self.states = _upstream.solve_dopri5(
                forward.func, start, span, rtol=self.rtol, atol=self.atol, return_all_eval=True
            )
        if self.states is not None:
            assert self.grid is not None
            _upstream.refine_spline(call.func, self.grid.to(self.states), self.states)
        if self.tableau is None:
            return _upstream.solve_dopri5(call.func, y0, call.t, rtol=self.rtol, atol=self.atol)[1]
        grid = call.t if self.grid is None else points_between(self.grid, call.t)
        y = y0.float() if is_half(y0.dtype) else y0
        step = Step(self.tableau, _stage_call(call.func, y0.dtype), None)
        for t0, t1 in zip(grid[:-1], grid[1:], strict=True):
            y = y + step.increment(t0, t1 - t0, t1, y)[0]
        return torch.stack([y0, y.to(y0.dtype)])


def _stage_call(func: Any, dtype: torch.dtype) -> Any:
    def call(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        # The host marks the t it is given as requiring a gradient.
        k: Tensor = func(t.detach(), y.to(dtype))
        return k.to(y.dtype)

    return call


class CheckedFunction:
    """The `torch.autograd.Function` of an adjoint, called as the host means to call it.

    Args:
        function: the host's Function.
        part: who is to be warned.
    """

    def __init__(self, function: Any, part: Any) -> None:
        self._function = function
        self._part = part

    def apply(self, vf_params: Tensor, x: Tensor, t_span: Tensor, *rest: Any) -> Any:
        """Call the function, after a look at what the host would lose on the way.

        Raises:
            OptionError: ``args`` is given.
        """
        save_at, args = (*rest, (), ())[:2]
        if args is not None and len(args):
            raise OptionError(
                problem=f"args is {args!r}: torchdyn cannot hand it to the vector field under an "
                "adjoint sensitivity.",
                expected="no args, for any solver.",
                fix='sensitivity="autograd"   # or let the vector field hold them itself',
            )
        if save_at is not None and len(save_at):
            _upstream.warn("save_at", self._part)
        return self._function.apply(vf_params, x, t_span, *rest)
