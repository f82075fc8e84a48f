"""What a bespoke solver is fitted to: starts and ends in chunks, roll-outs and sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, VectorField, parts_of, sample_norms
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._field import Field, Timer
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.solvers.bespoke import stage_times

EASIEST = 0.1  # smallest error that a sample is weighted as, as a share of the mean
RESIDUALS_PER_WEIGHT = 20  # so that weights are not fitted to the samples themselves
FEWEST = 4  # samples in a step at least
MOST_BYTES = 2**29  # memory that the sensitivities of a chunk may take
RIDGE = 1e-8  # pull of knots towards small weights, relative to the derivatives' mean square


@dataclass(frozen=True)
class RollOut:
    """A roll-out over a whole span, with the field on flat states."""

    call: Callable[[Tensor, Tensor], Tensor]
    layout: StateLayout
    start: float  # 0; or 1 or -1, where the span ends at 0
    width: float  # end minus start, 1 or -1
    y0: Tensor

    def end(self, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the flat state at the end, and the n derivatives. Costs n calls."""
        x, stages = self.y0, []
        for t, row in self._schedule(weights):
            stages.append(self.call(t, x))
            x = self._sum(row, stages)
        return x, stages

    def end_and_sensitivities(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flat end and its derivatives by each weight, (n_weights, ...).

        Costs n(n² + 5)/6 calls: products with the Jacobian of func are differences of two. So
        func need not be known to autograd; steps are checked against true roll-outs.
        """
        x, tangents = self.y0, self.y0.new_zeros(0, *self.y0.shape)
        stages, moved = list[Tensor](), list[Tensor]()
        for i, (t, row) in enumerate(self._schedule(weights)):
            stages.append(self.call(t, x))
            moved.append(self._moved(t, x, stages, tangents))
            earlier = len(tangents)
            tangents = self.y0.new_zeros(earlier + i + 1, *self.y0.shape)
            for weight, dk in zip(row.tolist(), moved, strict=False):
                tangents[: len(dk)].add_(dk, alpha=weight)
            torch.mul(torch.stack(stages), self.width, out=tangents[earlier:])
            x = self._sum(row, stages)
        return x, tangents

    def _schedule(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the time of each call, and its weights in the state's dtype times the width."""
        times = self.start + self.width * stage_times(weights)
        return zip(times, (self.width * weights).to(self.y0.dtype), strict=True)

    def _sum(self, row: Tensor, stages: list[Tensor]) -> Tensor:
        matrix = torch.stack(stages).flatten(1)
        flat = torch.addmv(self.y0.reshape(-1), matrix.t(), row[: len(stages)])
        return flat.reshape(self.y0.shape)

    def _moved(self, t: Tensor, x: Tensor, stages: list[Tensor], tangents: Tensor) -> Tensor:
        """Return how the last derivative moves along each tangent of its state x."""
        out, k = torch.zeros_like(tangents), stages[-1]
        # The weights of the call before are the last: with these the time moves, too.
        first_own = len(tangents) - len(stages) + 1
        # Rounding and curvature of func weigh the same at about this distance.
        step = 3 * torch.finfo(k.dtype).eps ** 0.5
        for p, distance in enumerate(self._distances(tangents, stages[0])):
            if p >= first_own:
                far = step * min(distance or 1.0, 1.0)
                t_moved = t + far * self.width
            elif distance:
                far, t_moved = step * distance, t
            else:
                continue
            out[p] = (self.call(t_moved, torch.add(x, tangents[p], alpha=far)) - k) / far
        return out

    def _distances(self, tangents: Tensor, k: Tensor) -> list[float]:
        """Return what makes each tangent as large as the state where it is largest; 0 if it is 0.

        Sizes are those of the parts of the start and of the first derivative k, over the span.
        """
        relative = [tangents.new_zeros(len(tangents))]
        split = (parts_of(self.layout.split(flat)) for flat in (tangents, self.y0, k))
        for tangent, y, dy in zip(*split, strict=True):
            size = y.square().mean().sqrt() + abs(self.width) * dy.square().mean().sqrt()
            if size > 0:
                relative.append(tangent.flatten(1).square().mean(1).sqrt() / size)
        largest = torch.stack(relative).amax(0)
        return torch.where(largest > 0, 1 / largest, 0.0).tolist()


@dataclass(frozen=True)
class Chunk:
    """Some samples of a batch, in the units of `Units`: the span is 1 long."""

    roll_out: RollOut
    path: Tensor  # (n + 1, ...): the solution, flat, on equidistant times from the start on
    scale: Tensor  # (batch,): what errors are divided by

    def errors(self, x: Tensor) -> Tensor:
        """Return the relative errors of flat ends, (batch,)."""
        difference = self.roll_out.layout.split((x - self.path[-1]).unsqueeze(0))
        return sample_norms(difference)[0] / self.scale

    def end_errors(self, weights: Tensor) -> Tensor:
        """Return the relative errors of the roll-out, (batch,); not finite where it blows up."""
        return self.errors(self.roll_out.end(weights)[0])

    def residual_and_sensitivities(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the end's residual and its derivatives by each weight, (n_weights, ...).

        Iteratively reweighted least squares: a squared error over the error as it is now
        minimises the mean of errors, not of their squares.
        """
        x, sensitivities = self.roll_out.end_and_sensitivities(weights)
        errors = self.errors(x)
        mean = errors.mean()
        relative = (errors / torch.where(mean > 0, mean, 1.0)).clamp_min(EASIEST)
        factor = self._spread(relative.rsqrt() / self.scale)
        return factor * (x - self.path[-1]), sensitivities.mul_(factor)

    def knot_products(self, weights: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        """Return the products of the n derivatives with themselves, inner knots and all slopes.

        Knots count from the start, over the span, without the share of the correction ``added``
        at the end, flat, which grows with the square of time. Costs 2 n + 1 calls.
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
        parts = parts_of(layout.split(self.path[-1]))
        spread = tuple(values.reshape(-1, *[1] * (p.dim() - 1)).expand_as(p) for p in parts)
        return layout.join(spread if layout.shapes else spread[0])


def cut(
    batch: Batch, func: VectorField, budget: Timer, rows: int | None, n_processes: int = 1
) -> list[Chunk]:
    """Return a batch in chunks of at most ``rows`` samples, as many in every process."""
    count, n_chunks = n_samples(batch.y0), 1
    if rows is not None:
        whole = round(count / batch.weight) if batch.weight else 1
        n_chunks = math.ceil(math.ceil(whole / n_processes) / rows)
    units, times, scale = batch.units, batch.grids[0].times, batch.end_sizes()
    # 0 and plus or minus 1: large times in float32 need not be.
    first, last = map(round, units.times(times[[0, -1]].cpu().double()).tolist())
    chunks = []
    for index in torch.arange(count).tensor_split(min(n_chunks, count)):
        part = batch.some(index)
        call, path = Field(func, part.starts, budget, units), part.grids[0].y / units.state
        roll_out = RollOut(call, part.layout, first, last - first, path[0])
        chunks.append(Chunk(roll_out, path, scale[index.to(scale.device)]))
    return chunks


@dataclass(eq=False)
class TrainingChunks:
    """The training batches in chunks of ``rows`` samples, by number, cut when first asked for."""

    data: Data
    problem: Problem
    rows: int | None

    def __post_init__(self) -> None:
        self._chunks, self._batches = list[Chunk](), list[Batch]()

    def get(self, number: int) -> Chunk | None:
        """Return a chunk, None beyond the last."""
        data, problem = self.data, self.problem
        while number >= len(self._chunks):
            batch = data[len(self._batches)]
            if any(batch is known for known in self._batches):
                return None
            self._batches.append(batch)
            self._chunks += cut(batch, problem.func, data.budget, self.rows, problem.group.size)
        return self._chunks[number]

    def needed(self) -> int:
        """Return how many chunks a step should look at."""
        first = self.get(0)
        assert first is not None
        in_one = len(first.scale) * self.problem.group.size
        return math.ceil(samples_needed(self.data.held_out.y0, len(first.path) - 1) / in_one)


def samples_needed(y0: State, n: int) -> int:
    """Return how many samples a step should look at, for a solver with n calls."""
    return max(FEWEST, math.ceil(RESIDUALS_PER_WEIGHT * n * (n + 1) / 2 / _per_sample(y0)))


def rows_of(y0: State, n: int) -> int:
    """Return how many samples a chunk may have."""
    n_tangents = n * (n + 1) * (n + 2) // 6  # those that a roll-out's sensitivities keep
    most = int(MOST_BYTES / (4 * n_tangents * _per_sample(y0)))
    return max(2, min(most, samples_needed(y0, n)))


def _per_sample(y0: State) -> float:
    return sum(part.numel() for part in parts_of(y0)) / n_samples(y0)


@torch.no_grad()
def fit_knots(
    chunks: Sequence[Chunk], weights: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the knots' values (n - 1, n) and slopes (n + 1, n) in float64, by least squares.

    Their sums keep constant derivatives exact: i/n for the i-th value, 1 for slopes.
    """
    products = zip(*(chunk.knot_products(weights, added) for chunk in chunks), strict=True)
    gram, values, slopes = (torch.stack(each).sum(0) for each in products)
    n = len(gram)
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    scale = gram.diagonal().mean()
    system = torch.ones(n + 1, n + 1, dtype=gram.dtype)
    system[:n, :n], system[n, n] = gram / scale, 0

    def rows(products: Tensor, sums: Tensor) -> Tensor:
        # The w with w gram = products, as near as their given sums allow.
        solution: Tensor = torch.linalg.solve(system, torch.cat([products.t() / scale, sums[None]]))
        return solution[:n].t().contiguous()

    inner = torch.linspace(0, 1, n + 1, dtype=gram.dtype)[1:-1]
    return rows(values, inner), rows(slopes, torch.ones(n + 1, dtype=gram.dtype))
