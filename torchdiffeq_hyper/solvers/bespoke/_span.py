"""The times of a bespoke solve: whether they lie in the fitted span, and how they follow it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from torchdiffeq_hyper._state import is_half, values_of
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.solvers.bespoke._weights import is_differentiated
from torchdiffeq_hyper.tableaus import StageCall

Span = tuple[float, float]
"""Start and end."""


def is_whole_span(t: Tensor, span: Span | None, calls: int) -> bool:
    """Return whether ``t`` is known to be the two ends of the span and no more.

    Not where something is differentiated by it: then the state at the end moves with it.
    Where the solver has no span, any two times are one; ``calls`` is its calls of func.

    Raises:
        OptionError: ``t`` starts elsewhere, leaves the span, or turns back.
    """
    if not isinstance(t, Tensor) or t.dim() != 1 or len(t) == 0:
        return False  # refused elsewhere
    if span is None:
        return len(t) == 2
    points = values_of(t)
    if points is None:
        return False
    start, end = span
    slack = slack_of(span, t.dtype) * abs(end - start)
    low, high = min(span) - slack, max(span) + slack
    is_inside = all(low <= point <= high for point in points)
    if abs(points[0] - start) > slack or not is_inside:
        ends = f"t = torch.tensor([{_plain(start)}, {_plain(end)}])\n"
        in_front = (
            "or put the span's start in front: "
            f"t = torch.cat([t.new_tensor([{_plain(start)}]), t])\n"
        )
        raise OptionError(
            problem=f"t goes from {points[0]:.6g} to {points[-1]:.6g}; the solver was fitted from "
            f"{start:.6g} to {end:.6g}.",
            expected=f"times that start at {start:.6g} and stay in that span: all weights and "
            'times of method "bns" belong to it.',
            fix=ends + (in_front if is_inside else "") + _another_fit(points, span, slack, calls),
        )
    forward = 1 if end > start else -1
    if any(forward * (after - before) < 0 for before, after in pairwise(points)):
        raise OptionError(
            problem="t turns back on its way.",
            expected=f"times that only {'grow' if forward > 0 else 'fall'}.",
            fix=f"t = t.sort(descending={forward < 0}).values",
        )
    return len(t) == 2 and abs(points[1] - end) <= slack and not is_differentiated(t)


def _plain(time: float) -> str:
    """Return a time as a float that can be pasted."""
    return repr(float(f"{time:.6g}"))


def _another_fit(points: list[float], span: Span, slack: float, calls: int) -> str:
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


def slack_of(span: Span | None, dtype: torch.dtype) -> float:
    """Return the share of a span by which the user's times of a dtype may miss it."""
    if span is None:
        return math.inf  # any times will do
    start, end = span
    # Times of float32 miss the ends; half precision rounds these more.
    rounding = torch.finfo(dtype).eps if is_half(dtype) else 1e-6
    return 1e-5 + rounding * max(abs(start), abs(end)) / abs(end - start)


def rounding_of(span: Span | None, dtype: torch.dtype) -> float:
    """Return the share of a span by which times of a dtype miss it by rounding alone."""
    if span is None:
        return math.inf
    start, end = span
    return 8 * torch.finfo(dtype).eps * (1 + max(abs(start), abs(end)) / abs(end - start))


def snapped_to_ends(share: Tensor, rounding: float) -> Tensor:
    """Return shares of the span; those that miss its ends by rounding are set to these."""
    missed = share - share.clamp(0, 1)
    return share - torch.where(missed.abs() <= rounding, missed, 0).detach()


def nan_outside(weights: Tensor, share: Tensor, slack: float) -> Tensor:
    """Return the weights, or nan for all where times start elsewhere or leave the span.

    Where values cannot be looked at, in a compiled or exported solve, nothing can be raised.

    Args:
        weights: (m, n) of the derivatives.
        share: (m + 1,) shares of the span passed, the first one of the start.
        slack: by which they may miss it.
    """
    missed = torch.cat([share[:1], share[1:] - share[1:].clamp(0, 1)]).detach()
    return torch.where(missed.abs().amax() > slack, torch.nan, weights)


def differentiable_start(call: StageCall, t: Tensor, start: float, y: Tensor) -> Tensor:
    r"""Return the state at the fitted start s, as a function of the time ``t[0]`` of ``y``.

    .. math:: y - (t_0 - s) f(s, y)

    The weights belong to the span and stay where they are; instead the solution is followed
    back to s, to first order: :math:`t_0 - s` is 0 to rounding, but its derivative is 1.
    Costs one call of func.
    """
    t_dtype = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    time = torch.full((), start, dtype=t.dtype, device=t.device)
    return y - (t[0] - time).to(t_dtype) * call(time.to(t_dtype), y)
