"""The loop over damped steps: which samples, which damping, when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import OutOfTimeError
from torchdiffeq_hyper.fitting._loop import snapshot
from torchdiffeq_hyper.fitting._phases import Progress
from torchdiffeq_hyper.fitting.bespoke._gauss_newton import NormalEquations, packed, unpacked
from torchdiffeq_hyper.fitting.bespoke._pieces import Piece
from torchdiffeq_hyper.solvers._report import LossPoint
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver

T = TypeVar("T")

DAMPING = 1e-3
LEAST_DAMPING = 1e-9
MEMORY = 0.7
"""Share of an iteration's equations that the next one still counts."""
RECENT = 4
"""Iterations whose samples judge a step."""
TRIES = 6
"""Dampings tried in an iteration, each four times the one before."""
GAIN = 0.03
"""Fall of the held-out error that counts, relative."""
STALLED = 4
"""Iterations without such a gain after which more samples are looked at."""
MOST_GROWTH = 8
"""Times as many samples as in the beginning, at most."""
LAST_PATIENCE = 10
"""Iterations without a gain, with all these samples, that end the loop."""


class WeightLoop:
    """Improves a solver's weights step by step.

    Args:
        solver: ends with the weights that have the smallest held-out error.
        state: where to start; updated in place.
        training: the pieces by number, None beyond the last.
        held_out: what is judged by.
        number: number of the start that the weights come from.
        first_count: pieces in an iteration in the beginning.
        iterations: iterations wanted.
        patience: iterations without a gain that end it, if fewer than usual.
        deadline: when to end, in the budget's seconds.
        group: the processes that share the work.
        budget: the time there is.
        progress: where to show it.
        save: called with the state after each iteration.
    """

    def __init__(
        self,
        solver: BespokeSolver,
        state: FitState,
        training: Callable[[int], Piece | None],
        held_out: Sequence[Piece],
        *,
        number: int,
        first_count: int,
        iterations: int,
        patience: int,
        deadline: float,
        group: ProcessGroup,
        budget: Budget,
        progress: Progress,
        save: Callable[[FitState], None],
    ) -> None:
        self._solver = solver
        self._state = state
        self._training = training
        self._held_out = held_out
        self._number = number
        self._first_count = first_count
        self._iterations = iterations
        self._patience = min(patience, LAST_PATIENCE)
        self._deadline = deadline
        self._group = group
        self._budget = budget
        self._progress = progress
        self._save = save
        self._n = len(solver.weights)

    @torch.no_grad()
    def run(self) -> None:
        """Run until nothing is gained, or iterations or time are over."""
        state = self._state
        self._solver.load_state_dict(state.net)
        if state.optimizer is None:
            count = self._first_count
            state.optimizer = {
                "number": self._number,
                "damping": DAMPING,
                "count": count,
                "position": 0,
                "recent": [],
                "memory": [],
                "mark": math.inf,
            }
            state.planned = [self._iterations]
        state.stopped = "max_seconds"
        while self._budget.seconds < self._deadline:
            if state.iteration >= self._iterations:
                state.stopped = "iterations"
                break
            if not self._iterate():
                break
            if self._has_stalled():
                state.stopped = "patience"
                break
        self._solver.load_state_dict(state.best)

    def _iterate(self) -> bool:
        """Do one iteration; return whether it ended in time."""
        state, optimizer = self._state, self._state.optimizer
        assert optimizer is not None
        vector = packed(self._solver.weights.detach().double().cpu())
        try:
            pieces = self._next_pieces(optimizer)
        except OutOfTimeError:
            return False
        weights = self._solver.weights.detach()
        found = self._together(lambda: _added([piece.equations(weights) for piece in pieces]))
        if found is None:
            return False
        equations = _added([*found, *(NormalEquations(*m) for m in optimizer["memory"])])
        judges = self._recent(optimizer)
        before = self._loss(judges, vector)
        if before is None:
            return False
        loss, moved = before, torch.zeros_like(vector)
        for tried in range(TRIES):
            new = equations.step(vector, self._n, optimizer["damping"])
            after = self._loss(judges, new)
            if after is None:
                return False
            if new is not None and after < before:
                loss, moved = after, new - vector
                self._solver.set_weights(unpacked(new, self._n))
                if tried == 0:
                    optimizer["damping"] = max(optimizer["damping"] / 4, LEAST_DAMPING)
                break
            optimizer["damping"] *= 4
        optimizer["memory"] = [tuple(equations.faded(MEMORY, moved))]
        state.iteration += 1
        self._validate(loss)
        return True

    def _loss(self, pieces: Sequence[Piece], vector: Tensor | None) -> float | None:
        """Return the mean error with some weights, inf without any; None if time is over."""
        if vector is None:
            return math.inf
        weights = unpacked(vector, self._n).to(self._solver.weights)
        found = self._together(lambda: [(p.loss(weights), len(p.scale)) for p in pieces])
        if found is None:
            return None
        losses = [one for process in found for one in process]
        return sum(loss for loss, _ in losses) / sum(count for _, count in losses)

    def _together(self, measure: Callable[[], T]) -> list[T] | None:
        """Return what all processes measure, None if one has run out of time."""
        mine: T | None
        try:
            mine = measure()
        except OutOfTimeError:
            mine = None
        found = [one for one in self._group.gather(mine) if one is not None]
        return found if len(found) == self._group.size else None

    def _next_pieces(self, optimizer: dict[str, Any]) -> list[Piece]:
        """Return the next pieces in turn, each at most once."""
        position = optimizer["position"]
        chosen: dict[int, Piece] = {}
        for _ in range(optimizer["count"]):
            piece = self._training(position)
            if piece is None:
                position, piece = 0, self._training(0)
                assert piece is not None
            if position in chosen:
                break
            chosen[position] = piece
            position += 1
        optimizer["position"] = position
        older = [p for p in optimizer["recent"] if p not in chosen]
        if not older:  # the same samples again: what was remembered of them is only staler
            optimizer["memory"] = []
        optimizer["recent"] = [*older, *chosen][-RECENT * optimizer["count"] :]
        return list(chosen.values())

    def _recent(self, optimizer: dict[str, Any]) -> list[Piece]:
        """Return the pieces of this and the last iterations."""
        pieces = [self._training(position) for position in optimizer["recent"]]
        return [piece for piece in pieces if piece is not None]

    def _validate(self, loss: float) -> None:
        state = self._state
        weights = self._solver.weights.detach()
        error = self._group.from_first(lambda: mean_error(self._held_out, weights))
        state.history.append(LossPoint(state.iteration, "trajectory", loss, error))
        state.net = self._solver.state_dict()
        assert state.optimizer is not None
        state.since_best += 1
        if error < state.best_error:
            state.best, state.best_error = snapshot(self._solver), error
        if error < state.optimizer["mark"] * (1 - GAIN):
            state.optimizer["mark"], state.since_best = error, 0
        state.seconds = self._budget.seconds
        self._save(state)
        self._progress.show("trajectory", state.iteration, self._iterations, state)

    def _has_stalled(self) -> bool:
        """Return whether nothing more is gained; look at more samples before that."""
        state, optimizer = self._state, self._state.optimizer
        assert optimizer is not None
        most = MOST_GROWTH * self._first_count
        if optimizer["count"] < most and state.since_best >= STALLED:
            optimizer["count"] = min(2 * optimizer["count"], most)
            state.since_best = 0
            return False
        return state.since_best >= self._patience


@torch.no_grad()
def mean_error(pieces: Sequence[Piece], weights: Tensor) -> float:
    """Return the mean relative error at the end; inf if a roll-out blew up."""
    count = sum(len(piece.scale) for piece in pieces)
    error = sum(piece.loss(weights) for piece in pieces) / count
    return error if math.isfinite(error) else math.inf


def _added(equations: Sequence[NormalEquations]) -> NormalEquations:
    first, *others = equations
    for other in others:
        first = first.plus(other)
    return first
