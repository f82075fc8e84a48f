r"""Damped Gauss-Newton steps for the weights of a bespoke solver.

n(n + 1)/2 weights are few beside the numbers in a batch of states, and a roll-out is
nearly linear in them once they are near: a step of

.. math:: (H + \lambda\,\mathrm{diag} H)\,\delta = -g, \qquad H = J^\top J,\; g = J^\top r

with the residuals r of the end and their sensitivities J does what thousands of steps
along the gradient do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper.fitting.bespoke.sensitivities import n_weights


class NormalEquations(NamedTuple):
    """Curvature H and gradient g of a batch; those of more add up.

    Attributes:
        curvature: (n_weights, n_weights) float64.
        gradient: (n_weights,) float64.
    """

    curvature: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, residual: Tensor, sensitivities: Tensor) -> NormalEquations:
        """Return those of one batch.

        Args:
            residual: the weighted residuals, any shape.
            sensitivities: (n_weights, ...) the same of their derivatives.
        """
        rows = sensitivities.flatten(1)
        return cls(
            curvature=(rows @ rows.t()).double().cpu(),
            gradient=(rows @ residual.flatten()).double().cpu(),
        )

    def plus(self, other: NormalEquations) -> NormalEquations:
        """Return the equations of both together."""
        return NormalEquations(
            self.curvature + other.curvature,
            self.gradient + other.gradient,
        )

    def faded(self, share: float, moved: Tensor) -> NormalEquations:
        """Return the equations as they are after the weights have moved, with a lower weight."""
        return NormalEquations(
            share * self.curvature,
            share * (self.gradient + self.curvature @ moved),
        )

    def step(self, vector: Tensor, n: int, damping: float) -> Tensor | None:
        """Return the packed weights after a damped step; None where there is none.

        The last time stays 1, and no time comes to lie before the one before it: of the
        bounds that a step would cross, those crossed are made equalities, as long as any
        are crossed.

        Args:
            vector: packed weights, (n_weights,) float64.
            n: calls of func.
            damping: lambda.
        """
        diagonal = self.curvature.diagonal()
        if not bool(torch.isfinite(self.curvature).all()) or float(diagonal.max()) <= 0:
            return None
        damped = self.curvature + torch.diag(damping * diagonal + 1e-12 * diagonal.max())
        gaps = gap_rows(n)
        total = gaps.sum(0, keepdim=True)
        active: list[int] = []
        while True:
            rows = torch.cat([total, gaps[active]])
            wanted = torch.cat([1 - total @ vector, -(gaps[active] @ vector)])
            moved = _constrained(damped, self.gradient, rows, wanted)
            if moved is None:
                return None
            crossed = [i for i, gap in enumerate((gaps @ (vector + moved)).tolist()) if gap < -1e-9]
            new = [i for i in crossed if i not in active]
            if not new:
                return vector + moved
            active = sorted([*active, *new])
            if len(active) == n:  # all times cannot stay where they are
                return None


def gap_rows(n: int) -> Tensor:
    """Return the matrix that makes packed weights the n gaps between the n + 1 times."""
    sums = torch.zeros(n, n_weights(n), dtype=torch.float64)
    for i in range(n):
        sums[i, n_weights(i) : n_weights(i + 1)] = 1
    return torch.cat([sums[:1], sums[1:] - sums[:-1]])


def _constrained(
    curvature: Tensor, gradient: Tensor, rows: Tensor, wanted: Tensor
) -> Tensor | None:
    """Return the minimum of the quadratic model on ``rows @ step = wanted``."""
    size, extra = len(gradient), len(rows)
    # Scaled to a unit diagonal: the curvatures of early and late weights differ by powers of ten.
    scale = curvature.diagonal().rsqrt()
    system = torch.zeros(size + extra, size + extra, dtype=torch.float64)
    system[:size, :size] = scale[:, None] * curvature * scale
    system[:size, size:] = (rows * scale).t()
    system[size:, :size] = rows * scale
    solution, info = torch.linalg.solve_ex(system, torch.cat([-gradient * scale, wanted]))
    if int(info) != 0 or not bool(torch.isfinite(solution).all()):
        return None
    step: Tensor = scale * solution[:size]
    return step
