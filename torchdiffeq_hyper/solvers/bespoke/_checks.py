"""Refusals of a bespoke solver: weights, times, states that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import own
from torchdiffeq_hyper._state import is_half
from torchdiffeq_hyper.errors import (
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
    explain,
)
from torchdiffeq_hyper.solvers._finite import is_finite, wider_dtype
from torchdiffeq_hyper.solvers.bespoke._dense import stage_times
from torchdiffeq_hyper.solvers.bespoke._rollout import is_differentiated
from torchdiffeq_hyper.solvers.bespoke._weights import SLACK
from torchdiffeq_hyper.tableaus import StageCall


def check_weights(weights: Tensor) -> Tensor:
    """Return the weights of a bespoke solver, detached.

    Raises:
        StateTypeError: not a floating-point tensor.
        StateShapeError: not square.
        OptionError: not finite or lower triangular, or times that decrease or leave the span.
    """
    fix = 'tdh.BespokeSolver.classical("rk4", 8)'
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise StateTypeError(explain(f"weights is {got}.", "a floating-point tensor.", fix))
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1] or len(weights) == 0:
        raise StateShapeError(
            explain(f"weights has shape {tuple(weights.shape)}.", "(n, n), n at least 1.", fix)
        )
    weights = weights.detach().clone()
    if weights.is_meta:
        return weights
    if not is_finite(weights) or bool(weights.triu(1).any()):
        raise OptionError(
            explain(
                "weights has entries above its diagonal, or some that are not finite.",
                "zeros there: a state is made of the derivatives known before it.",
                fix,
            )
        )
    times = torch.cat([stage_times(weights), weights[-1:].sum(1)])
    is_rising = bool((times.diff() >= -SLACK).all())
    if not is_rising or abs(float(times[-1]) - 1) > SLACK:
        raise OptionError(
            explain(
                f"the rows of weights add up to {[round(t, 6) for t in times[1:].tolist()]}.",
                "times that never decrease, from 0 on, the last one 1: each sum is the share of "
                "the span passed.",
                fix,
            )
        )
    return weights


def check_knots(knots: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the knots of a bespoke solver with these weights.

    Raises:
        StateTypeError: not floating-point tensors.
        StateShapeError: not (n - 1, n) and (n + 1, n).
        OptionError: not finite.
    """
    n = len(weights)
    fix = "tdh.BespokeSolver(weights)   # knots from a cubic in time"
    for name, knot, rows in zip(("values", "slopes"), knots, (n - 1, n + 1), strict=True):
        if not isinstance(knot, Tensor) or not knot.is_floating_point():
            got = knot.dtype if isinstance(knot, Tensor) else type(knot).__name__
            raise StateTypeError(
                explain(f"the knots' {name} is {got}.", "a floating-point tensor.", fix)
            )
        if knot.shape != (rows, n):
            raise StateShapeError(
                explain(
                    f"the knots' {name} has shape {tuple(knot.shape)}.",
                    f"{(rows, n)}, weights being {(n, n)}.",
                    fix,
                )
            )
        if not knot.is_meta and not is_finite(knot):
            raise OptionError(
                explain(f"the knots' {name} holds inf or nan.", "finite numbers.", fix)
            )
    return knots


def is_whole_span(t: Tensor, span: tuple[float, float] | None, calls: int) -> bool:
    """Return whether ``t`` is known to be the two ends of the span and no more.

    Not where something is differentiated by it: then the state at the end moves with it.

    Args:
        t: the times of a solve.
        span: where the solver starts and ends, None where any span will do.
        calls: the solver's calls of func.

    Raises:
        OptionError: ``t`` starts elsewhere, or leaves the span.
    """
    if not isinstance(t, Tensor) or t.dim() != 1 or len(t) == 0:
        return False  # refused elsewhere
    if span is None:
        return len(t) == 2
    is_capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or is_capturing:
        return False
    try:
        points = t.detach().tolist()
    except RuntimeError:  # no values to look at: vmap, fake and meta tensors
        return False
    start, end = span
    slack = slack_of(span, t.dtype) * abs(end - start)
    low, high = min(span) - slack, max(span) + slack
    if abs(points[0] - start) > slack or not all(low <= point <= high for point in points):
        raise OptionError(
            explain(
                f"t goes from {points[0]:.6g} to {points[-1]:.6g}; the solver was fitted from "
                f"{start:.6g} to {end:.6g}.",
                f"times that start at {start:.6g} and stay in that span: all weights and times "
                'of method "bns" belong to it.',
                f"t = torch.tensor([{_plain(start)}, {_plain(end)}])\n"
                + _with_start(points, (start, end), slack)
                + _fit_of_its_own(points, (start, end), slack, calls),
            )
        )
    forward = 1 if end > start else -1
    if any(forward * (after - before) < 0 for before, after in pairwise(points)):
        raise OptionError(
            explain(
                "t turns back on its way.",
                f"times that only {'grow' if forward > 0 else 'fall'}.",
                f"t = t.sort(descending={forward < 0}).values",
            )
        )
    return len(t) == 2 and abs(points[1] - end) <= slack and not is_differentiated(t)


def _plain(time: float) -> str:
    """Return a time as a float that can be pasted."""
    return repr(float(f"{time:.6g}"))


def _with_start(points: list[float], span: tuple[float, float], slack: float) -> str:
    """Return how to ask for points of the span alone, where the first is not its start."""
    low, high = min(span) - slack, max(span) + slack
    if not all(low <= point <= high for point in points):
        return ""
    start = _plain(span[0])
    return f"or put the span's start in front: t = torch.cat([t.new_tensor([{start}]), t])\n"


def _fit_of_its_own(
    points: list[float], span: tuple[float, float], slack: float, calls: int
) -> str:
    """Return the call that fits a solver for these points."""
    first, last = points[0], points[-1]
    if first == last:  # t turns back, or is one point: no span
        return f"or a fit from {first:.6g} on"
    ends = f"{first:.6g}, {last:.6g}"
    comment = "   # y0: states at the first of the two"
    more = ""
    if abs(first - span[1]) <= slack and abs(last - span[0]) <= slack:
        ends = f"{span[0]:.6g}, {span[1]:.6g}"
        more, comment = ', direction="reverse"', f"   # y0: states at {span[0]:.6g}"
    call = f'tdh.fit(func, y0, ({ends}), base="bns", steps={calls}{more})'
    return f"or a fit of its own: {call}{comment}"


def slack_of(span: tuple[float, float] | None, dtype: torch.dtype) -> float:
    """Return the share of a span by which times may miss it: those of float32 do.

    Args:
        span: start and end.
        dtype: of the times as the user gave them; half precision rounds the span's ends more.
    """
    if span is None:
        return math.inf  # any times will do
    start, end = span
    rounding = torch.finfo(dtype).eps if is_half(dtype) else 1e-6
    return 1e-5 + rounding * max(abs(start), abs(end)) / abs(end - start)


def rounding_of(span: tuple[float, float] | None, dtype: torch.dtype) -> float:
    """Return the share of a span by which times of that dtype miss it by rounding alone."""
    if span is None:
        return math.inf
    start, end = span
    return 8 * torch.finfo(dtype).eps * (1 + max(abs(start), abs(end)) / abs(end - start))


@torch.no_grad()
def raise_non_finite(
    call: StageCall,
    schedule: tuple[Sequence[Tensor], Sequence[Tensor]],
    y0: Tensor,
    dtype: torch.dtype,
) -> None:
    """Replay a solve that ended in inf or nan, and say where that began.

    Args:
        call: evaluates func.
        schedule: times and weights.
        y0: flat state at the start.
        dtype: of the user's state.

    Raises:
        NonFiniteError: always; the text names the stage, the time and the culprit.
    """
    if not is_finite(y0):
        raise NonFiniteError(
            explain("y0 holds inf or nan.", "a finite start.", "torch.isfinite(y0).all()")
        )
    x, stages = y0, []
    for i, (t, row) in enumerate(zip(*schedule, strict=True)):
        stages.append(own(call(t, x)))
        x = y0 + torch.tensordot(row, torch.stack(stages), 1)
        if not is_finite(stages[-1]) or not is_finite(x):
            raise NonFiniteError(
                explain(
                    f"the solve left the finite range at call {i} of func, t = {float(t):.6g}.",
                    "finite derivatives along the solution.",
                    "starts like those the solver was fitted on\n"
                    "or a reference, outside of tdh.override: odeint(func, y0, t, method='dopri5')"
                    + wider_dtype(dtype),
                )
            )
    raise NonFiniteError(
        explain(
            "the n calls of func stay finite: the hypernet returned inf or nan, or one of the two "
            "answers differently each time.",
            "a finite correction, and a deterministic func and hypernet.",
            "fit again with a lower lr; func.eval(); hypernet.eval()",
        )
    )
