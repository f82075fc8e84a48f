r"""The times of a bespoke solve, and its dense output: states between the ends of the span.

The states that the stages are taken at need not lie on the solution; only the last one
is fitted to. But its value at any time is close to a combination of the derivatives, as
the last one is. So the n + 1 knots of a cubic Hermite, at equal distances, have values and slopes

.. math:: y(s_i) \approx y_0 + T \sum_j v_{ij} k_j, \qquad y'(s_i) \approx \sum_j d_{ij} k_j

in which all n derivatives take part, and no call of func is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import is_half, time_dtype, values_of
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.solvers.bespoke._weights import check_matrix, is_differentiated, stage_times
from torchdiffeq_hyper.tableaus import StageCall

Span = tuple[float, float]
"""Start and end."""

Knots = tuple[Tensor, Tensor]
"""Values (n - 1, n) at the inner knots, and slopes (n + 1, n) at all."""

DEGREE = 3
"""Degree of the polynomials in time that stand in for fitted knots."""
NEAR = 1e-6
"""Share of the span within which two times are one."""


def is_whole_span(t: Tensor, span: Span | None, calls: int) -> bool:
    """Return whether ``t`` is known to be the two ends of the span and no more.

    Not where something is differentiated by it: then the state at the end moves with it.
    Where the solver has no span, any two times are one. Refuses times that start elsewhere,
    leave the span, or turn back.
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
    is_inside = all(min(span) - slack <= point <= max(span) + slack for point in points)
    if abs(points[0] - start) > slack or not is_inside:
        first = repr(float(f"{start:.6g}"))
        fix = f"t = torch.tensor([{first}, {float(f'{end:.6g}')!r}])\n"
        if is_inside:
            fix += "or put the span's start in front: "
            fix += f"t = torch.cat([t.new_tensor([{first}]), t])\n"
        raise OptionError(
            problem=f"t goes from {points[0]:.6g} to {points[-1]:.6g}; the solver was fitted from "
            f"{start:.6g} to {end:.6g}.",
            expected=f"times that start at {start:.6g} and stay in that span: all weights and "
            'times of method "bns" belong to it.',
            fix=fix + _another_fit(points, span, slack, calls),
        )
    forward = 1 if end > start else -1
    if any(forward * (after - before) < 0 for before, after in pairwise(points)):
        raise OptionError(
            problem="t turns back on its way.",
            expected=f"times that only {'grow' if forward > 0 else 'fall'}.",
            fix=f"t = t.sort(descending={forward < 0}).values",
        )
    return len(t) == 2 and abs(points[1] - end) <= slack and not is_differentiated(t)


def _another_fit(points: list[float], span: Span, slack: float, calls: int) -> str:
    """Return the call that fits a solver for these points."""
    first, last = points[0], points[-1]
    if first == last:  # t turns back, or is one point: no span
        return f"or a fit from {first:.6g} on"
    more, states = "", "at the first of the two"
    if abs(first - span[1]) <= slack and abs(last - span[0]) <= slack:
        (first, last), more, states = span, ', direction="reverse"', f"at {span[0]:.6g}"
    call = f'tdh.fit(func, y0, ({first:.6g}, {last:.6g}), base="bns", steps={calls}{more})'
    return f"or a fit of its own: {call}   # y0: states {states}"


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


def differentiable_start(call: StageCall, t: Tensor, start: float, y: Tensor) -> Tensor:
    r"""Return the state at the fitted start s, as a function of the time ``t[0]`` of ``y``.

    .. math:: y - (t_0 - s) f(s, y)

    The weights belong to the span and stay where they are; instead the solution is followed
    back to s, to first order: :math:`t_0 - s` is 0 to rounding, but its derivative is 1.
    Costs one call of func.
    """
    t_dtype = time_dtype(y.dtype)
    time = torch.full((), start, dtype=t.dtype, device=t.device)
    return y - (t[0] - time).to(t_dtype) * call(time.to(t_dtype), y)


def _polynomial_knots(weights: Tensor) -> Knots:
    """Return knots that need no fit: a low polynomial in time through the derivatives."""
    n = len(weights)
    times = stage_times(weights)
    degree = min(DEGREE, len(times.unique()) - 1)
    powers = torch.arange(degree + 1, dtype=times.dtype, device=times.device)
    solve = torch.linalg.pinv(times[:, None] ** powers)
    knots = torch.linspace(0, 1, n + 1, dtype=times.dtype, device=times.device)[:, None]
    values = knots ** (powers + 1) / (powers + 1) @ solve
    return values[1:-1].clone(), knots**powers @ solve


def default_knots(weights: Tensor) -> Knots:
    """Return the knots of weights that none were fitted for.

    Weights that are some steps of a method, one after the other, give those of the
    steps' ends; others a polynomial through all derivatives.
    """
    starts = [] if weights.is_meta else step_starts(weights)
    return _composed_knots(weights, starts) if len(starts) > 1 else _polynomial_knots(weights)


def step_starts(weights: Tensor) -> list[int]:
    """Return the calls of func that begin a step: all later ones start from their state.

    Call m does if the first m weights are those of row m - 1 in every later row. Steps that
    take no time are left out.
    """
    n = len(weights)
    # Leading weights that a row has in common with the one before it, then the least of all
    # later rows.
    common = (weights[1:] == weights[:-1]).long().cumprod(1).sum(1)
    least = common.flip(0).cummin(0).values.flip(0).tolist() if n > 1 else []
    times = stage_times(weights).tolist()
    starts = [0]
    for m in range(1, n):
        if least[m - 1] >= m and times[starts[-1]] + NEAR < times[m] < 1 - NEAR:
            starts.append(m)
    return starts


def _composed_knots(weights: Tensor, starts: list[int]) -> Knots:
    """Return knots that lie on the cubic Hermite through the ends of a composition's steps.

    So what is read off has the order of the steps, up to 4. The derivative at the start of a
    step is its first stage. At the end of the span there is none: it is that of the
    polynomial through the states and derivatives of the last two steps and the last state.
    ``starts`` are the calls that begin a step, from `step_starts`.
    """
    n = len(weights)
    first = torch.tensor(starts, device=weights.device)
    values = torch.cat([torch.zeros_like(weights[:1]), weights[first[1:] - 1], weights[-1:]])
    slopes = torch.eye(n, dtype=weights.dtype, device=weights.device)[first]
    times = torch.cat([stage_times(weights)[first], weights.new_ones(1)])
    last = _slope_at_end(times[-3:], values[-3:], slopes[-2:])
    slopes = torch.cat([slopes, last[None]])
    knots = torch.linspace(0, 1, n + 1, dtype=weights.dtype, device=weights.device)
    left = (torch.searchsorted(times, knots, right=True) - 1).clamp(0, len(starts) - 1)
    size = times.diff()[left][:, None]
    x = (knots - times[left])[:, None] / size
    y0, y1, f0, f1 = values[left], values[left + 1], slopes[left], slopes[left + 1]
    of_values, of_slopes = _hermite(x, (y0, y1), (f0, f1))
    slope = 6 * x * (1 - x) * (y1 - y0) / size + (1 - x) * (1 - 3 * x) * f0
    return (of_values + size * of_slopes)[1:-1].clone(), slope - x * (2 - 3 * x) * f1


def _hermite(
    x: Tensor, values: tuple[Tensor, Tensor], slopes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the two terms of the cubic with these values and slopes at 0 and 1.

    In this form all but the last value are exactly 0 at x = 1.
    """
    return (
        (1 - x) ** 2 * (1 + 2 * x) * values[0] + x**2 * (3 - 2 * x) * values[1],
        (1 - x) ** 2 * x * slopes[0] - x**2 * (1 - x) * slopes[1],
    )


def _slope_at_end(times: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the derivative at the last of three times, of the quartic through all but that one.

    ``values`` are (3, n) at all three, ``slopes`` (2, n) at the first two.
    """
    size = times[-1] - times[-2]
    x = ((times - times[-2]) / size)[:, None]
    powers = torch.arange(5, dtype=times.dtype, device=times.device)
    slope = powers * x ** (powers - 1).clamp(min=0)
    system = torch.cat([x**powers, slope[:2]])
    rows: Tensor = torch.linalg.solve(system.t(), slope[2])
    return rows[:3] @ values / size + rows[3:] @ slopes


def _hermite_weights(position: Tensor, weights: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the weights of the derivatives in the state at some positions.

    At position 1 they are the last row of ``weights`` to the last bit. ``position`` (m,) is the
    share of the span; values (n - 1, n) are those of the inner knots, slopes (n + 1, n) of all.
    """
    n = len(weights)
    knots = torch.cat([torch.zeros_like(weights[:1]), values, weights[-1:]])
    scaled = position.to(weights.dtype) * n
    left = scaled.detach().floor().clamp(0, n - 1).long()
    x = (scaled - left)[:, None]
    of_values, of_slopes = _hermite(
        x, (knots[left], knots[left + 1]), (slopes[left], slopes[left + 1])
    )
    return of_values + of_slopes / n


def dense_output(
    t: Tensor,
    ends: tuple[Any, Any],
    slacks: tuple[float, float],
    matrices: Sequence[Tensor],
    derivatives: tuple[Tensor, Sequence[Tensor]],
    *,
    added: Tensor | None,
) -> Tensor:
    """Return the states at all times but the first, (m, ...).

    nan where ``t`` starts elsewhere or leaves the span: in a compiled or exported solve, where
    values cannot be looked at, nothing can be raised.

    Args:
        t: (m + 1,) times.
        ends: start and end of the span.
        slacks: shares of the span, by which times miss it by rounding, and by which they may.
        matrices: weights, values and slopes of the knots.
        derivatives: flat state at the start, and the n derivatives.
        added: the correction at the end, which grows with the square of the share.
    """
    (start, end), (rounding, slack), (y, stages) = ends, slacks, derivatives
    passed = (t - start) / (end - start)
    share = passed[1:].to(matrices[0].dtype)
    missed = share - share.clamp(0, 1)
    share = share - torch.where(missed.abs() <= rounding, missed, 0).detach()
    weights = _hermite_weights(share, *matrices) * (end - start)
    missed = torch.cat([passed[:1], passed[1:] - passed[1:].clamp(0, 1)]).detach()
    weights = torch.where(missed.abs().amax() > slack, torch.nan, weights).to(y.dtype)
    matrix = torch.stack(list(stages)).reshape(len(stages), -1)
    states: Tensor = torch.addmm(y.reshape(-1), weights, matrix).reshape(len(share), *y.shape)
    if added is None:
        return states
    square: Tensor = (share**2).to(y.dtype).reshape(-1, *[1] * added.dim())
    return states + square * added


def check_knots(knots: Knots, weights: Tensor) -> Knots:
    """Return the knots, values and slopes, of a bespoke solver with these weights."""
    n = len(weights)
    fix = "tdh.BespokeSolver(weights)   # knots from a cubic in time"
    for name, knot, rows in zip(("values", "slopes"), knots, (n - 1, n + 1), strict=True):
        check_matrix(f"the knots' {name}", knot, fix, (rows, n))
    return knots
