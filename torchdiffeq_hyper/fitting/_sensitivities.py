"""Least squares in a bespoke solver's weights: sensitivities of its end, and normal equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._state import StateLayout, parts_of
from torchdiffeq_hyper.solvers.bespoke import stage_times

Call = Callable[[Tensor, Tensor], Tensor]


def n_weights(n: int) -> int:
    """Return the number of weights of a solver with n calls."""
    return n * (n + 1) // 2


def n_tangents(n: int) -> int:
    """Return the tangents that one roll-out's sensitivities keep: the memory they take."""
    return n * (n + 1) * (n + 2) // 6


def packed(weights: Tensor) -> Tensor:
    """Return the lower triangle of (n, n) weights, row by row."""
    return torch.cat([row[: i + 1] for i, row in enumerate(weights)])


def unpacked(vector: Tensor, n: int) -> Tensor:
    """Return the (n, n) weights whose lower triangle `packed` returned."""
    weights = vector.new_zeros(n, n)
    rows = vector.split([i + 1 for i in range(n)])
    for i, row in enumerate(rows):
        weights[i, : i + 1] = row
    return weights


@dataclass(frozen=True)
class RollOut:
    """A roll-out over a whole span, from one batch of starts.

    Attributes:
        call: the vector field on flat states.
        layout: how a state lies flat.
        start: start of the span: 0, or 1 or -1 where it ends at 0.
        width: end minus start, 1 or -1.
        y0: flat starts.
    """

    call: Call
    layout: StateLayout
    start: float
    width: float
    y0: Tensor

    def end(self, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the flat state at the end, and the n derivatives. Costs n calls."""
        times, narrow = self._narrow(weights)
        x, stages = self.y0, []
        for i, row in enumerate(narrow):
            stages.append(self.call(times[i], x))
            x = self._sum(row, stages)
        return x, stages

    def end_and_sensitivities(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flat end and its derivatives by each weight, (n_weights, ...).

        The products with the Jacobian of func are differences of two calls: func need not
        be differentiable, nor known to autograd, and the damped steps that these
        sensitivities serve are checked against true roll-outs. Costs n(n² + 5)/6 calls.
        """
        times, narrow = self._narrow(weights)
        x, tangents = self.y0, self.y0.new_zeros(0, *self.y0.shape)
        stages: list[Tensor] = []
        moved: list[Tensor] = []
        for i, row in enumerate(narrow):
            k = self.call(times[i], x)
            stages.append(k)
            if i == 0:
                sizes = self._sizes(k)
            moved.append(self._moved((times[i], x), k, tangents, i, sizes))
            earlier = len(tangents)
            tangents = self.y0.new_zeros(earlier + i + 1, *self.y0.shape)
            for weight, dk in zip(row.tolist(), moved, strict=False):
                tangents[: len(dk)].add_(dk, alpha=weight)
            torch.mul(torch.stack(stages), self.width, out=tangents[earlier:])
            x = self._sum(row, stages)
        return x, tangents

    def _narrow(self, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return times, and rows of weights in the state's dtype, the rows times the width."""
        times = self.start + self.width * stage_times(weights)
        rows = (self.width * weights).to(self.y0.dtype).unbind()
        return list(times.unbind()), list(rows)

    def _sum(self, row: Tensor, stages: list[Tensor]) -> Tensor:
        matrix = torch.stack(stages).flatten(1)
        flat = torch.addmv(self.y0.reshape(-1), matrix.t(), row[: len(stages)])
        return flat.reshape(self.y0.shape)

    def _sizes(self, k: Tensor) -> list[float]:
        """Return for each part of the state how large its values are."""
        return [
            float(y.square().mean().sqrt() + abs(self.width) * dy.square().mean().sqrt())
            for y, dy in zip(self._parts(self.y0), self._parts(k), strict=True)
        ]

    def _moved(
        self, at: tuple[Tensor, Tensor], k: Tensor, tangents: Tensor, n_own: int, sizes: list[float]
    ) -> Tensor:
        """Return how the derivative k moves along each tangent of its state.

        The last ``n_own`` weights are the stage's own: its time moves with them.
        """
        t, x = at
        out = torch.empty_like(tangents)
        # Rounding and curvature of func weigh the same at about this distance.
        step = 3 * torch.finfo(k.dtype).eps ** 0.5
        for p, distance in enumerate(self._distances(tangents, sizes)):
            is_own = p >= len(tangents) - n_own
            if is_own:
                far = step * min(distance or 1.0, 1.0)
            elif distance == 0:
                out[p] = 0
                continue
            else:
                far = step * distance
            t_moved = t + far * self.width if is_own else t
            out[p] = (self.call(t_moved, torch.add(x, tangents[p], alpha=far)) - k) / far
        return out

    def _distances(self, tangents: Tensor, sizes: list[float]) -> list[float]:
        """Return by what each tangent must be multiplied to be as large as the state.

        That is in the part where it is largest; 0 where it vanishes.
        """
        relative = [
            part.flatten(1).square().mean(1).sqrt() / size
            for part, size in zip(self._parts(tangents), sizes, strict=True)
            if size > 0
        ]
        if not relative:
            return [0.0] * len(tangents)
        largest = torch.stack(relative).amax(0)
        return torch.where(largest > 0, 1 / largest, 0.0).tolist()

    def _parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        return parts_of(self.layout.split(flat))


class NormalEquations(NamedTuple):
    """Curvature H and gradient g of a batch, float64; those of more add up."""

    curvature: Tensor  # (n_weights, n_weights)
    gradient: Tensor  # (n_weights,)

    @classmethod
    def of(cls, residual: Tensor, sensitivities: Tensor) -> NormalEquations:
        """Return those of weighted residuals, and of their derivatives (n_weights, ...)."""
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

    def forgotten(self, factor: float, moved: Tensor) -> NormalEquations:
        """Return the equations after the weights have moved, times a forgetting factor."""
        return NormalEquations(
            factor * self.curvature,
            factor * (self.gradient + self.curvature @ moved),
        )

    def step(self, vector: Tensor, n: int, damping: float) -> Tensor | None:
        """Return the packed weights after a damped step; None where there is none.

        The last time stays 1, and no time comes to lie before the one before it: an active
        set, to which the bounds that a step would cross are added as long as it crosses any.
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
