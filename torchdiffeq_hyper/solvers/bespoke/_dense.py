r"""States between the ends of a solve: cubic Hermite through knots made of the stages.

The states that the stages are taken at need not lie on the solution; only the last one
is fitted to. But its value at any time is close to a combination of the derivatives, as
the last one is. So the n + 1 knots, at equal distances, have values and slopes

.. math:: y(s_i) \approx y_0 + T \sum_j v_{ij} k_j, \qquad y'(s_i) \approx \sum_j d_{ij} k_j

in which all n derivatives take part, and no call of func is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.solvers._stepping import Correction

DEGREE = 3
"""Degree of the polynomials in time that stand in for fitted knots."""
NEAR = 1e-6
"""Share of the span within which two times are one."""


def polynomial_knots(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return knots that need no fit: a low polynomial in time through the derivatives.

    Args:
        weights: (n, n) the solver's.

    Returns:
        Values (n - 1, n) at the inner knots and slopes (n + 1, n) at all.
    """
    n = len(weights)
    times = stage_times(weights)
    degree = min(DEGREE, len(times.unique()) - 1)
    powers = torch.arange(degree + 1, dtype=times.dtype, device=times.device)
    solve = torch.linalg.pinv(times[:, None] ** powers)
    knots = torch.linspace(0, 1, n + 1, dtype=times.dtype, device=times.device)[:, None]
    values = knots ** (powers + 1) / (powers + 1) @ solve
    return values[1:-1].clone(), knots**powers @ solve


def default_knots(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the knots of weights that none were fitted for: values and slopes.

    Weights that are some steps of a method, one after the other, give those of the
    steps' ends; others a polynomial through all derivatives.
    """
    starts = [] if weights.is_meta else step_starts(weights)
    return composed_knots(weights, starts) if len(starts) > 1 else polynomial_knots(weights)


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


def composed_knots(weights: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Return knots that lie on the cubic Hermite through the ends of a composition's steps.

    So what is read off has the order of the steps, up to 4. The derivative at the start of a
    step is its first stage. At the end of the span there is none: it is that of the
    polynomial through the states and derivatives of the last two steps and the last state.

    Args:
        weights: (n, n) the solver's.
        starts: calls that begin a step, from `step_starts`.
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
    at = (1 + 2 * x) * (1 - x) ** 2 * y0 + x**2 * (3 - 2 * x) * y1
    at = at + size * (x * (1 - x) ** 2 * f0 - x**2 * (1 - x) * f1)
    slope = 6 * x * (1 - x) * (y1 - y0) / size + (1 - x) * (1 - 3 * x) * f0
    return at[1:-1].clone(), slope - x * (2 - 3 * x) * f1


def _slope_at_end(times: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the derivative at the last time, of the quartic through all but that one.

    Args:
        times: (3,).
        values: (3, n) there.
        slopes: (2, n) at the first two.
    """
    size = times[-1] - times[-2]
    x = ((times - times[-2]) / size)[:, None]
    powers = torch.arange(5, dtype=times.dtype, device=times.device)
    slope = powers * x ** (powers - 1).clamp(min=0)
    system = torch.cat([x**powers, slope[:2]])
    rows: Tensor = torch.linalg.solve(system.t(), slope[2])
    return rows[:3] @ values / size + rows[3:] @ slopes


def passed_share(share: Tensor, rounding: float) -> Tensor:
    """Return shares of the span with what misses its ends by rounding set to these.

    Args:
        share: (m,) shares of the span.
        rounding: what counts as such.
    """
    missed = share - share.clamp(0, 1)
    return share - torch.where(missed.abs() <= rounding, missed, 0).detach()


def blank_outside(weights: Tensor, share: Tensor, slack: float) -> Tensor:
    """Return the weights, or nan for all where times start elsewhere or leave the span.

    Where values cannot be looked at, in a compiled or exported solve, nothing can be raised.

    Args:
        weights: (m, n) of the derivatives.
        share: (m + 1,) shares of the span passed, the first one of the start.
        slack: by which they may miss it.
    """
    missed = torch.cat([share[:1], share[1:] - share[1:].clamp(0, 1)]).detach()
    return torch.where(missed.abs().amax() > slack, torch.nan, weights)


def stage_times(weights: Tensor) -> Tensor:
    """Return the share of the span passed at each call of func, (n,), the first one 0."""
    return torch.cat([weights.new_zeros(1), weights[:-1].sum(1)])


def hermite_weights(position: Tensor, weights: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the weights of the derivatives in the state at some positions.

    At position 1 they are the last row of ``weights`` to the last bit.

    Args:
        position: (m,) shares of the span, from 0 to 1.
        weights: (n, n) the solver's.
        values: (n - 1, n) of the inner knots.
        slopes: (n + 1, n) of all knots.

    Returns:
        (m, n), in the dtype of ``weights``.
    """
    n = len(weights)
    knots = torch.cat([torch.zeros_like(weights[:1]), values, weights[-1:]])
    scaled = position.to(weights.dtype) * n
    left = scaled.detach().floor().clamp(0, n - 1).long()
    x = (scaled - left)[:, None]
    # In this form all terms but one are exactly 0 at x = 1.
    return (
        (1 - x) ** 2 * (1 + 2 * x) * knots[left]
        + x**2 * (3 - 2 * x) * knots[left + 1]
        + ((1 - x) ** 2 * x * slopes[left] - x**2 * (1 - x) * slopes[left + 1]) / n
    )


def added_at_end(
    correction: Correction, x: Tensor, stages: Sequence[Tensor], span: tuple[Any, Any]
) -> Tensor:
    """Return what a hypernet adds to the state at the end of the span, flat.

    Args:
        correction: the hypernet, of order 1, bound to the solve.
        x: flat state at the end.
        stages: the n derivatives.
        span: its start and end, numbers or 0-d tensors.
    """
    t_dtype = x.dtype.to_real() if x.dtype.is_complex else x.dtype
    start, end = span
    # The difference before the cast: far from zero the ends are rounded to a part of the span.
    t0, dt = (torch.as_tensor(s, dtype=t_dtype, device=x.device) for s in (start, end - start))
    out = correction.evaluate(t0, dt, x, tuple(stages))
    if x.device.type == "cpu":
        correction.look_at(dt, x.dtype)
    return correction.add(torch.zeros_like(x), out, *correction.factors(dt, x.dtype))


def between(
    share: Tensor, weights: Tensor, y: Tensor, stages: Sequence[Tensor], added: Tensor | None
) -> Tensor:
    """Return the states at some shares of the span, (m, ...).

    Args:
        share: (m,) shares of the span.
        weights: (m, n) of the derivatives, times the span.
        y: flat state at the start.
        stages: the n derivatives.
        added: the correction at the end, which grows with the square of the share.
    """
    matrix = torch.stack(list(stages)).reshape(len(stages), -1)
    states = torch.addmm(y.reshape(-1), weights, matrix).reshape(len(share), *y.shape)
    if added is None:
        return states
    return states + (share**2).to(y.dtype).reshape(-1, *[1] * added.dim()) * added
