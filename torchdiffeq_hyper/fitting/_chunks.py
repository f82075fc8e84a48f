"""Starts and ends that a bespoke solver is fitted to, in chunks small enough to hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, VectorField, parts_of, sample_norms
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._field import Field, Timer
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._sensitivities import (
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
"""Memory that the sensitivities of a chunk may take."""


@dataclass(frozen=True)
class Chunk:
    """Some samples of a batch, in the units of `Units`: the span is 1 long.

    Attributes:
        roll_out: the solver's task: starts, span and field.
        path: (n + 1, ...) the solution, flat, on equidistant times from the start on.
        scale: (batch,) what errors are divided by.
    """

    roll_out: RollOut
    path: Tensor
    scale: Tensor

    def errors(self, x: Tensor) -> Tensor:
        """Return the relative errors of flat ends, (batch,)."""
        difference = self.roll_out.layout.split((x - self.path[-1]).unsqueeze(0))
        return sample_norms(difference)[0] / self.scale

    def loss(self, weights: Tensor) -> float:
        """Return the sum of the relative errors; not finite where the roll-out is not."""
        return float(self.errors(self.roll_out.end(weights)[0]).sum())

    def blown_up(self, weights: Tensor) -> int:
        """Return the number of samples whose end is not finite."""
        return int((~torch.isfinite(self.errors(self.roll_out.end(weights)[0]))).sum())

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

    def knot_products(self, weights: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        """Return the products of the n derivatives with themselves and with what knots are.

        These are the solution's way from the start to the inner knots, over the span, and its
        slopes at all knots. Costs 2 n + 1 calls.

        Args:
            weights: the solver's.
            added: the correction at the end, flat; it grows with the square of time.
        """
        task = self.roll_out
        stages = torch.stack(task.end(weights)[1])
        factor = self._spread(1 / self.scale)
        share = torch.linspace(0, 1, len(self.path)).to(self.path)
        way = (self.path[1:-1] - task.y0) / task.width
        if added is not None:
            way = way - (share[1:-1] ** 2).reshape(-1, *[1] * added.dim()) * added / task.width
        times = task.start + task.width * share
        slopes = torch.stack([task.call(t, x) for t, x in zip(times, self.path, strict=True)])
        flat = [(factor * each).flatten(1).double() for each in (stages, way, slopes)]
        return tuple((each @ flat[0].t()).cpu() for each in flat)

    def _spread(self, values: Tensor) -> Tensor:
        """Return per-sample values as a flat state."""
        layout = self.roll_out.layout
        state = layout.split(self.path[-1])
        parts = parts_of(state)
        spread = tuple(values.reshape(-1, *[1] * (p.dim() - 1)).expand_as(p) for p in parts)
        return layout.join(spread if isinstance(state, tuple) else spread[0])


def cut(
    batch: Batch,
    func: VectorField,
    budget: Timer,
    rows: int | None,
    n_processes: int = 1,
) -> list[Chunk]:
    """Return a batch in chunks of at most ``rows`` samples, as many in every process."""
    count = n_samples(batch.y0)
    whole = round(count / batch.weight) if batch.weight else 1
    share = math.ceil(whole / n_processes)
    n_chunks = 1 if rows is None else math.ceil(share / rows)
    units, times, scale = batch.units, batch.grids[0].times, batch.end_sizes()
    # 0 and plus or minus 1: large times in float32 need not be.
    first, last = (round(units.time_of(float(times[i]))) for i in (0, -1))
    chunks = []
    for index in torch.arange(count).tensor_split(min(n_chunks, count)):
        part = batch.some(index)
        path = part.grids[0].y / units.state
        call = Field(func, part.starts, budget, units)
        roll_out = RollOut(call, part.layout, first, last - first, path[0])
        chunks.append(Chunk(roll_out, path, scale[index.to(scale.device)]))
    return chunks


class TrainingChunks:
    """The training batches in chunks, by number, each cut when first asked for.

    Args:
        data: the batches.
        problem: the field and the processes.
        rows: samples in a chunk, None for whole batches.
    """

    def __init__(self, data: Data, problem: Problem, rows: int | None) -> None:
        self._data = data
        self._problem = problem
        self._rows = rows
        self._chunks: list[Chunk] = []
        self._batches: list[Batch] = []

    @property
    def first(self) -> Chunk:
        """The first chunk."""
        chunk = self.get(0)
        assert chunk is not None
        return chunk

    def get(self, number: int) -> Chunk | None:
        """Return a chunk, None beyond the last."""
        data, problem = self._data, self._problem
        while number >= len(self._chunks):
            batch = data[len(self._batches)]
            if any(batch is known for known in self._batches):
                return None
            self._batches.append(batch)
            self._chunks += cut(batch, problem.func, data.budget, self._rows, problem.group.size)
        return self._chunks[number]

    def needed(self) -> int:
        """Return how many chunks a step should look at."""
        in_one = len(self.first.scale) * self._problem.group.size
        n = len(self.first.path) - 1
        return math.ceil(samples_needed(self._data.held_out.y0, n) / in_one)


def samples_needed(y0: State, n: int) -> int:
    """Return how many samples a step should look at."""
    per_sample = _numel(y0) / n_samples(y0)
    return max(FEWEST, math.ceil(RESIDUALS_PER_WEIGHT * n_weights(n) / per_sample))


def rows_of(y0: State, n: int) -> int:
    """Return how many samples a chunk may have."""
    per_sample = _numel(y0) / n_samples(y0)
    most = int(MOST_BYTES / (4 * n_tangents(n) * per_sample))
    return max(2, min(most, samples_needed(y0, n)))


def _numel(y0: State) -> int:
    return sum(part.numel() for part in parts_of(y0))


RIDGE = 1e-8
"""Pull towards small weights, relative to the derivatives' mean square."""


@torch.no_grad()
def fit_knots(
    chunks: Sequence[Chunk], weights: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the weights of the derivatives in the knots' values and slopes, in float64.

    They are (n - 1, n) and (n + 1, n): least squares over all chunks, with sums that keep
    constant derivatives exact: i/n for the i-th value, 1 for slopes.
    """
    products = zip(*(chunk.knot_products(weights, added) for chunk in chunks), strict=True)
    gram, values, slopes = (torch.stack(each).sum(0) for each in products)
    n = len(gram)
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    inner = torch.linspace(0, 1, n + 1, dtype=gram.dtype)[1:-1]
    slope_sums = torch.ones(n + 1, dtype=gram.dtype)
    return _solve(gram, values, inner), _solve(gram, slopes, slope_sums)


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
