"""Starts and ends that a bespoke solver is fitted to, in pieces small enough to hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, VectorField, parts_of, sample_norms
from torchdiffeq_hyper.fitting._batches import n_samples, select
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting.bespoke._correction import KnotData
from torchdiffeq_hyper.fitting.bespoke._gauss_newton import (
    NormalEquations,
    RollOut,
    n_tangents,
    n_weights,
)

EASIEST = 0.1
"""Smallest error that a sample is weighted as, as a share of the mean."""
RESIDUALS_PER_WEIGHT = 20
"""Numbers to fit a weight to, so that it is not fitted to the samples themselves."""
FEWEST = 4
"""Samples in a step at least."""
MOST_BYTES = 2**29
"""Memory that the sensitivities of a piece may take."""


@dataclass(frozen=True)
class Piece:
    """Some samples of a batch, in the units of `Units`: the span is 1 long.

    Attributes:
        roll_out: the solver's task: starts, span and field.
        path: (n + 1, ...) the solution, flat, on equidistant times from the start on.
        slopes: (n, ...) its derivative at all of these but the last.
        scale: (batch,) what errors are divided by.
    """

    roll_out: RollOut
    path: Tensor
    slopes: Tensor
    scale: Tensor

    def errors(self, x: Tensor) -> Tensor:
        """Return the relative errors of flat ends, (batch,)."""
        difference = self.roll_out.layout.split((x - self.path[-1]).unsqueeze(0))
        return sample_norms(difference)[0] / self.scale

    def loss(self, weights: Tensor) -> float:
        """Return the sum of the relative errors; not finite where the roll-out is not."""
        return float(self.errors(self.roll_out.end(weights)[0]).sum())

    def equations(self, weights: Tensor) -> NormalEquations:
        """Return the normal equations, for the mean of errors, not of their squares.

        Dividing a squared error by the error itself, as it is now, makes the one the
        other, and lets no outlier rule.
        """
        x, sensitivities = self.roll_out.end_and_sensitivities(weights)
        errors = self.errors(x)
        mean = errors.mean()
        tamed = (errors / torch.where(mean > 0, mean, 1.0)).clamp_min(EASIEST)
        factor = self._spread(tamed.rsqrt() / self.scale)
        residual = factor * (x - self.path[-1])
        return NormalEquations.of(residual, sensitivities.mul_(factor))

    def knot_data(self, weights: Tensor, added: Tensor | None) -> KnotData:
        """Return what the knots are fitted to.

        Args:
            weights: the solver's.
            added: the correction at the end, flat; it grows with the square of time.
        """
        task = self.roll_out
        _, stages = task.end(weights)
        factor = self._spread(1 / self.scale)
        n = len(stages)
        way = (self.path[1:-1] - task.y0) / task.width
        if added is not None:
            share = torch.linspace(0, 1, n + 1).to(way)[1:-1]
            way = way - (share**2).reshape(-1, *[1] * added.dim()) * added / task.width
        end = torch.as_tensor(task.start + task.width, dtype=way.dtype, device=way.device)
        last = task.call(end, self.path[-1])
        slopes = torch.cat([self.slopes, last.unsqueeze(0)])
        flat = (torch.stack(stages), way, slopes)
        return KnotData(*((factor * part).reshape(len(part), -1) for part in flat))

    def _spread(self, values: Tensor) -> Tensor:
        """Return per-sample values as a flat state."""
        layout = self.roll_out.layout
        state = layout.split(self.path[-1])
        parts = parts_of(state)
        spread = tuple(values.reshape(-1, *[1] * (p.dim() - 1)).expand_as(p) for p in parts)
        return layout.join(spread if isinstance(state, tuple) else spread[0])


def cut(
    batch: Batch, func: VectorField, budget: Budget, rows: int | None, n_processes: int = 1
) -> list[Piece]:
    """Return a batch in pieces of at most ``rows`` samples, as many in every process."""
    count = n_samples(batch.y0)
    whole = round(count / batch.weight) if batch.weight else 1
    share = math.ceil(whole / n_processes)
    n_pieces = 1 if rows is None else math.ceil(share / rows)
    positions = torch.arange(count).tensor_split(min(n_pieces, count))
    samples, units = batch.grids[0], batch.units
    # 0 and plus or minus 1: large times in float32 need not be.
    first, last = (round(units.time_of(float(samples.times[i]))) for i in (0, -1))
    scale = batch.end_sizes()
    pieces = []
    for index in positions:
        starts = select(batch.starts, index)
        layout = StateLayout.of(starts.y0)
        path = _rows(batch.layout, samples.y, index) / units.state
        call = Field(func, starts, budget, units)
        slopes = _rows(batch.layout, samples.stages[0], index) * (units.time / units.state)
        pieces.append(
            Piece(
                roll_out=RollOut(call, layout, first, last - first, path[0]),
                path=path,
                slopes=slopes,
                scale=scale[index.to(scale.device)],
            )
        )
    return pieces


def _rows(layout: StateLayout, flat: Tensor, index: Tensor) -> Tensor:
    """Return some samples of flat states (m, ...)."""
    state = layout.split(flat)
    index = index.to(flat.device)
    if isinstance(state, Tensor):
        return state[:, index]
    return torch.cat([part[:, index].reshape(len(part), -1) for part in state], dim=1)


def samples_needed(y0: State, n: int) -> int:
    """Return how many samples a step should look at."""
    per_sample = _numel(y0) / n_samples(y0)
    return max(FEWEST, math.ceil(RESIDUALS_PER_WEIGHT * n_weights(n) / per_sample))


def rows_of(y0: State, n: int) -> int:
    """Return how many samples a piece may have."""
    per_sample = _numel(y0) / n_samples(y0)
    most = int(MOST_BYTES / (4 * n_tangents(n) * per_sample))
    return max(2, min(most, samples_needed(y0, n)))


def _numel(y0: State) -> int:
    return sum(part.numel() for part in parts_of(y0))
