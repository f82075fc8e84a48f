r"""Levenberg-Marquardt steps for the weights of a bespoke solver.

.. math:: (H + \lambda\,\mathrm{diag} H)\,\delta = -g, \qquad H = J^\top J,\; g = J^\top r

with the residuals r of the end and their sensitivities J by the n(n + 1)/2 weights, in which
a roll-out is nearly linear once they are near.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._files import refused
from torchdiffeq_hyper._rules import Maybe, Real, Row, Rule, TensorOf, Whole
from torchdiffeq_hyper.errors import FitDivergedError
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import PhaseState
from torchdiffeq_hyper.fitting._chunks import Chunk, TrainingChunks
from torchdiffeq_hyper.fitting._phases import Phase
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver, compositions

Equations: TypeAlias = tuple[Tensor, Tensor]
"""Curvature H (n_weights, n_weights) and gradient g of some samples, float64; they add up."""

DAMPING = 1e-3
LEAST_DAMPING = 1e-9
FORGETTING = 0.7  # forgetting factor: share of older equations that an iteration still counts
RECENT = 4  # iterations whose samples tell whether a step is taken
TRIES = 6  # dampings tried in an iteration, each four times the one before
GAIN = 0.03  # fall of the held-out error that counts, relative
STALLED = 4  # iterations without such a gain after which more samples are looked at
MOST_GROWTH = 8  # times as many samples as in the beginning, at most
LAST_PATIENCE = 10  # iterations without a gain, with all these samples, that end the descent
SLOWER = 1.5  # times as long as the one before that the descent from a further start may take

_FLOAT64 = (torch.float64,)


@dataclass
class LevenbergMarquardtState(PhaseState):
    """How far a descent is."""

    kind: ClassVar[str] = "levenberg-marquardt"
    rules: ClassVar[Mapping[str, Rule]] = {
        "damping": Real(above=0.0),
        "count": Whole(1),
        "memory": Maybe(Row(TensorOf(_FLOAT64, (None, None)), TensorOf(_FLOAT64, (None,)))),
    }

    start: int = 0  # number of the start that the weights come from
    damping: float = DAMPING
    count: int = 1  # chunks in an iteration
    position: int = 0  # number of the next chunk
    recent: list[int] = field(default_factory=list)  # numbers of the last iterations' chunks
    memory: tuple[Tensor, Tensor] | None = None  # earlier equations, where the weights are now


@dataclass(eq=False)
class LevenbergMarquardt(Phase):
    """Improves a solver's weights step by step, from one classical start or more in turn."""

    solver: BespokeSolver
    starts: Sequence[str]
    chunks: TrainingChunks
    held_out: Sequence[Chunk]
    problem: Problem
    share_of_time: float  # of the time left

    name = "trajectory"
    gain = GAIN
    training: LevenbergMarquardtState = field(init=False)

    def __post_init__(self) -> None:
        self.wanted, self._group = self.problem.config.iterations, self.problem.group
        self._n = len(self.solver.weights)

    def begin(self, saved: PhaseState | None, budget: Budget) -> bool:
        """Begin at the first start, or go on."""
        self._budget = budget
        self.pace = budget.start_phase(self.wanted, self.share_of_time)
        self._first_count = self._group.from_first(self.chunks.needed)
        self._descend_from(0)
        if saved is not None:
            assert isinstance(saved, LevenbergMarquardtState)
            self.training, size = saved, len(packed(self.solver.weights))
            with refused("the checkpoint"):
                rule = Maybe(Row(TensorOf(shape=(size, size)), TensorOf(shape=(size,))))
                rule.check(saved.memory, "state.training.memory")
        return False

    def _descend_from(self, start: int) -> None:
        self._began = self._budget.seconds
        self.training = LevenbergMarquardtState(self.wanted, start=start, count=self._first_count)

    @torch.no_grad()
    def iterate(self, number: int, done: int) -> float:
        """Try steps with more and more damping, until one lowers the error."""
        training, weights = self.training, self.solver.weights.detach()
        vector, chunks = packed(weights.double().cpu()), self._next_chunks()
        found = self._group.gather_in_time(
            lambda: reduce(_added, (_equations_of(chunk, weights) for chunk in chunks))
        )
        remembered = [] if training.memory is None else [training.memory]
        curvature, gradient = reduce(_added, [*found, *remembered])
        recent = [self.chunks.get(position) for position in training.recent]
        compared = [chunk for chunk in recent if chunk is not None]
        loss = before = self._loss(compared, vector)
        moved = torch.zeros_like(vector)
        for tried in range(TRIES):
            new = damped_step(curvature, gradient, vector, training.damping)
            after = self._loss(compared, new)
            if new is not None and after < before:
                loss, moved = after, new - vector
                self.solver.set_weights(unpacked(new, self._n))
                if tried == 0:
                    training.damping = max(training.damping / 4, LEAST_DAMPING)
                break
            training.damping *= 4
        training.memory = (FORGETTING * curvature, FORGETTING * (gradient + curvature @ moved))
        return loss

    def _loss(self, chunks: Sequence[Chunk], vector: Tensor | None) -> float:
        """Return the mean error with packed weights, inf without any."""
        if vector is None:
            return math.inf
        weights = unpacked(vector, self._n).to(self.solver.weights)
        found = self._group.gather_in_time(lambda: errors_of(chunks, weights))
        sums, counts = zip(*chain.from_iterable(found), strict=True)
        return float(sum(sums) / sum(counts))

    def _next_chunks(self) -> list[Chunk]:
        """Return the next chunks in turn, each at most once."""
        training, position = self.training, self.training.position
        chosen: dict[int, Chunk] = {}
        for _ in range(training.count):
            chunk = self.chunks.get(position)
            if chunk is None:
                position, chunk = 0, self.chunks.get(0)
            if position in chosen or chunk is None:
                break
            chosen[position] = chunk
            position += 1
        training.position = position
        older = [p for p in training.recent if p not in chosen]
        if not older:  # the same samples again: what was remembered of them is only staler
            training.memory = None
        training.recent = [*older, *chosen][-RECENT * training.count :]
        return list(chosen.values())

    def error(self) -> float:
        return mean_error(self.held_out, self.solver.weights.detach())

    def validated(self, done: int) -> None:
        """Where nothing more is gained, look at more samples, then go to the next start."""
        training, most = self.training, MOST_GROWTH * self._first_count
        if training.count < most and training.since_best >= STALLED:
            training.count, training.since_best = min(2 * training.count, most), 0
        elif self.has_converged(done) and done < self.wanted:
            # The best start may lead into no good minimum.
            start, now = training.start + 1, self._budget.seconds
            is_in_time = now + SLOWER * (now - self._began) <= self.pace.deadline
            if start < len(self.starts) and is_in_time:
                self.solver.set_weights(compositions(self._n)[self.starts[start]])
                self._descend_from(start)

    def has_converged(self, done: int) -> bool:
        return self.training.since_best >= min(self.problem.config.patience, LAST_PATIENCE)


@torch.no_grad()
def mean_error(chunks: Sequence[Chunk], weights: Tensor) -> float:
    """Return the mean relative error at the end; inf if a roll-out blew up."""
    sums, counts = zip(*errors_of(chunks, weights), strict=True)
    error = float(sum(sums) / sum(counts))
    return error if math.isfinite(error) else math.inf


def errors_of(chunks: Sequence[Chunk], weights: Tensor) -> list[tuple[float, int]]:
    """Return the sum of each chunk's relative errors at the end, and its number of samples."""
    return [(float(c.end_errors(weights).sum()), len(c.scale)) for c in chunks]


def best_starts(held_out: Sequence[Chunk], like: Tensor) -> list[str]:
    """Return the classical methods that stay finite, the smallest held-out error first."""
    n = len(like)
    classical = {name: weights.to(like) for name, weights in compositions(n).items()}
    errors = {name: mean_error(held_out, weights) for name, weights in classical.items()}
    finite = [name for name in sorted(errors, key=errors.__getitem__) if errors[name] < math.inf]
    if not finite:
        total = sum(len(chunk.scale) for chunk in held_out)
        ends = ([c.end_errors(weights) for c in held_out] for weights in classical.values())
        blown_up = min(total - int(torch.isfinite(torch.cat(errors)).sum()) for errors in ends)
        raise FitDivergedError(
            problem=f"every classical method with {n} calls of func blows up on held-out samples, "
            f"at best on {blown_up} of {total}: there is nothing to start from.",
            expected="a method that stays finite on all of them.",
            fix=f"a shorter span, starts without those, or more calls: steps={2 * n}",
        )
    return finite


def packed(weights: Tensor) -> Tensor:
    """Return the lower triangle of (n, n) weights, row by row."""
    rows, columns = torch.tril_indices(*weights.shape)
    return weights[rows, columns]


def unpacked(vector: Tensor, n: int) -> Tensor:
    """Return the (n, n) weights whose lower triangle `packed` returned."""
    rows, columns = torch.tril_indices(n, n)
    return vector.new_zeros(n, n).index_put((rows, columns), vector)


def _equations_of(chunk: Chunk, weights: Tensor) -> Equations:
    residual, sensitivities = chunk.residual_and_sensitivities(weights)
    rows = sensitivities.flatten(1)
    return (rows @ rows.t()).double().cpu(), (rows @ residual.flatten()).double().cpu()


def _added(one: Equations, other: Equations) -> Equations:
    return one[0] + other[0], one[1] + other[1]


def damped_step(
    curvature: Tensor, gradient: Tensor, vector: Tensor, damping: float
) -> Tensor | None:
    """Return the packed weights after a damped step; None where there is none.

    The last time stays 1, and no time comes to lie before the one before it: an active
    set, to which the bounds that a step would cross are added as long as it crosses any.
    """
    diagonal, active = curvature.diagonal(), list[int]()
    if not bool(torch.isfinite(curvature).all()) or float(diagonal.max()) <= 0:
        return None
    damped = curvature + torch.diag(damping * diagonal + 1e-12 * diagonal.max())
    gaps = gap_rows(math.isqrt(2 * len(vector)))
    total = gaps.sum(0, keepdim=True)
    while len(active) < len(gaps):  # all times cannot stay where they are
        rows = torch.cat([total, gaps[active]])
        wanted = torch.cat([1 - total @ vector, -(gaps[active] @ vector)])
        moved = _constrained(damped, gradient, rows, wanted)
        if moved is None:
            return None
        crossed = torch.nonzero(gaps @ (vector + moved) < -1e-9).flatten().tolist()
        if set(crossed) <= set(active):
            return vector + moved
        active = sorted({*active, *crossed})
    return None


def gap_rows(n: int) -> Tensor:
    """Return the matrix that makes packed weights the n gaps between the n + 1 times."""
    sums = (torch.arange(n)[:, None] == torch.tril_indices(n, n)[0]).double()
    return torch.cat([sums[:1], sums.diff(dim=0)])


def _constrained(
    curvature: Tensor, gradient: Tensor, rows: Tensor, wanted: Tensor
) -> Tensor | None:
    """Return the minimum of the quadratic model on ``rows @ step = wanted``."""
    size, extra = len(gradient), len(rows)
    # Scaled to a unit diagonal: the curvatures of early and late weights differ by powers of ten.
    scale = curvature.diagonal().rsqrt()
    scaled = rows * scale
    top = torch.cat([scale[:, None] * curvature * scale, scaled.t()], 1)
    system = torch.cat([top, torch.cat([scaled, scaled.new_zeros(extra, extra)], 1)])
    solution, info = torch.linalg.solve_ex(system, torch.cat([-gradient * scale, wanted]))
    if int(info) != 0 or not bool(torch.isfinite(solution).all()):
        return None
    step: Tensor = scale * solution[:size]
    return step
