"""What is read off between the ends of a bespoke solver: a least-squares fit of its knots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-8
"""Pull towards small weights, relative to the derivatives' mean square."""


@dataclass(frozen=True)
class KnotData:
    """Derivatives of some roll-outs and the solution beside them, weighted alike.

    Attributes:
        stages: (n, N) the derivatives.
        values: (n - 1, N) the solution's way from the start to the inner knots, divided by
            the span.
        slopes: (n + 1, N) the solution's derivative at all knots.
    """

    stages: Tensor
    values: Tensor
    slopes: Tensor


def fit_knots(data: Iterable[KnotData]) -> tuple[Tensor, Tensor]:
    """Return the weights of the derivatives in the knots' values and slopes.

    Least squares over all data, with sums that keep constant derivatives exact: i/n for
    the i-th value, 1 for slopes.

    Returns:
        Values (n - 1, n) and slopes (n + 1, n), float64.
    """
    gram, value_products, slope_products = (
        sum(parts) for parts in zip(*map(_products, data), strict=True)
    )
    n = len(gram)
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    inner = torch.linspace(0, 1, n + 1, dtype=gram.dtype)[1:-1]
    return (
        _solve(gram, value_products, inner),
        _solve(gram, slope_products, torch.ones(n + 1, dtype=gram.dtype)),
    )


def _products(data: KnotData) -> tuple[Tensor, Tensor, Tensor]:
    stages = data.stages.double()
    gram, values, slopes = (
        (other.double() @ stages.t()).cpu() for other in (stages, data.values, data.slopes)
    )
    return gram, values, slopes


def _solve(gram: Tensor, products: Tensor, sums: Tensor) -> Tensor:
    """Return the rows w with ``w gram = products`` as near as their given sums allow."""
    n = len(gram)
    system = torch.zeros(n + 1, n + 1, dtype=gram.dtype)
    scale = gram.diagonal().mean()
    system[:n, :n] = gram / scale
    system[:n, n] = system[n, :n] = 1
    wanted = torch.cat([products.t() / scale, sums[None]])
    solution: Tensor = torch.linalg.solve(system, wanted)
    return solution[:n].t().contiguous()
