"""Fits of the weights from several starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torchdiffeq_hyper.bespoke import BespokeSolver, compositions
from torchdiffeq_hyper.fitting.bespoke.loop import WeightLoop
from torchdiffeq_hyper.fitting.bespoke.pieces import Piece, cut, samples_needed
from torchdiffeq_hyper.fitting.bespoke.problem import BespokeProblem
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.checkpoint import FitState
from torchdiffeq_hyper.fitting.data import Batch, Data
from torchdiffeq_hyper.fitting.loop import snapshot
from torchdiffeq_hyper.fitting.progress import Progress

MOST_STARTS = 3
"""Classical methods that weights start from, where there is time."""
SLOWER = 1.5
"""Times as long as the one before that a further start may take."""


class Descents:
    """Fits the weights from the best start, and from others where there is time for it.

    A fit ends in the valley it began in, and the best start is not always in the lowest.

    Args:
        problem: what to fit.
        solver: whose weights.
        data: the samples.
        held_out: what is judged by.
        rows: samples in a piece, None for whole batches.
        deadline: when to end, in the budget's seconds.
        budget: the time there is.
        progress: where to show it.
        save: called with the state after each iteration.
    """

    def __init__(
        self,
        problem: BespokeProblem,
        solver: BespokeSolver,
        data: Data,
        held_out: Sequence[Piece],
        *,
        rows: int | None,
        deadline: float,
        budget: Budget,
        progress: Progress,
        save: Callable[[FitState], None],
    ) -> None:
        self._problem = problem
        self._solver = solver
        self._data = data
        self._held_out = held_out
        self._rows = rows
        self._deadline = deadline
        self._budget = budget
        self._progress = progress
        self._save = save
        self._pieces: list[Piece] = []
        self._measured: list[Batch] = []

    def run(self, starts: Sequence[str], state: FitState) -> None:
        """Fit the weights; the solver ends with those of the smallest held-out error.

        Args:
            starts: classical methods, the best one first.
            state: where to begin; updated in place.
        """
        first = 0 if state.optimizer is None else int(state.optimizer["number"])
        for number, name in enumerate(starts[:MOST_STARTS]):
            if number < first:
                continue
            began = self._budget.seconds
            if number > first:
                self._solver.set_weights(compositions(self._problem.calls)[name])
                state.net, state.optimizer, state.since_best = snapshot(self._solver), None, 0
            self._loop(state, number).run()
            now = self._budget.seconds
            if state.stopped != "patience" or now + SLOWER * (now - began) > self._deadline:
                break
        state.phase = 1

    def _loop(self, state: FitState, number: int) -> WeightLoop:
        config, team = self._problem.config, self._problem.team
        needed = samples_needed(self._data.held_out.y0, self._problem.calls)
        first = self._training(0)
        assert first is not None
        together = len(first.scale) * team.size
        return WeightLoop(
            self._solver,
            state,
            self._training,
            self._held_out,
            number=number,
            first_count=team.from_first(lambda: math.ceil(needed / together)),
            iterations=config.iterations,
            patience=config.patience,
            deadline=self._deadline,
            team=team,
            budget=self._budget,
            progress=self._progress,
            save=self._save,
        )

    def _training(self, number: int) -> Piece | None:
        """Return a piece of the training batches, None beyond the last."""
        while number >= len(self._pieces):
            batch = self._data[len(self._measured)]
            if any(batch is known for known in self._measured):
                return None
            self._measured.append(batch)
            func, size = self._problem.func, self._problem.team.size
            self._pieces += cut(batch, func, self._budget, self._rows, size)
        return self._pieces[number]
