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

from torchdiffeq_hyper._stepping import Correction

DEGREE = 3
"""Degree of the polynomials in time that stand in for fitted knots."""


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
    return correction.add(torch.zeros_like(x), correction.power(dt), out)


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
