"""Where a bespoke solver's weights start, and whether there is anything to gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, sample_norms
from torchdiffeq_hyper.errors import FitDivergedError, NoiseFloorError, explain
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._field import Field, state_dtype
from torchdiffeq_hyper.fitting._loop import snapshot
from torchdiffeq_hyper.fitting._phases import Progress
from torchdiffeq_hyper.fitting._reference import Tolerances, solve_reference
from torchdiffeq_hyper.fitting.bespoke._loop import WeightLoop, mean_error
from torchdiffeq_hyper.fitting.bespoke._pieces import Piece, cut, samples_needed
from torchdiffeq_hyper.fitting.bespoke._problem import BespokeProblem
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver, compositions

LOOSE = 1e3
"""Noise, in units of the dtype's rounding, that is more than rounding."""


def best_starts(held_out: Sequence[Piece], like: Tensor) -> list[str]:
    """Return the classical methods that stay finite, the smallest held-out error first.

    Args:
        held_out: what is judged by.
        like: weights (n, n) of the right size, on the right device.

    Raises:
        FitDivergedError: all of them leave the finite range.
    """
    n = len(like)
    errors = {
        name: mean_error(held_out, weights.to(like)) for name, weights in compositions(n).items()
    }
    finite = sorted(
        (name for name in errors if math.isfinite(errors[name])), key=errors.__getitem__
    )
    if not finite:
        total = sum(len(piece.scale) for piece in held_out)
        least = min(_blown_up(held_out, w.to(like)) for w in compositions(n).values())
        raise FitDivergedError(
            explain(
                f"no classical method stays finite with {n} calls of func on the held-out "
                f"samples: at best {least} of {total} blow up. There is nothing to start from.",
                "a method that stays finite on all of them.",
                f"a shorter span, starts without those, or more calls: steps={2 * n}",
            )
        )
    return finite


def _blown_up(held_out: Sequence[Piece], weights: Tensor) -> int:
    """Return the number of samples whose end is not finite."""
    return sum(
        int((~torch.isfinite(piece.errors(piece.roll_out.end(weights)[0]))).sum())
        for piece in held_out
    )


def default_start(n: int) -> str:
    """Return the classical method of the highest order in n calls of func."""
    return {1: "euler", 2: "midpoint", 3: "heun3"}.get(n, "rk4")


def noise_at_end(field: Field, y0: State, times: Tensor, tolerances: Tolerances) -> float:
    """Return the relative noise in the solution's end: of the reference, and of rounding.

    Args:
        field: the vector field, for states like ``y0``.
        y0: a few samples.
        times: start and end.
        tolerances: those of the reference solutions.
    """
    layout = StateLayout.of(y0)
    flat = layout.join(y0)
    tight = tolerances.tightened(10.0 if tolerances.rtol >= 1e-12 else 0.1)
    first, second = (solve_reference(field, flat, times, each)[-1:] for each in (tolerances, tight))
    size, noise = (
        float(sample_norms(layout.split(state)).mean()) for state in (first, first - second)
    )
    # Half a unit in the last place of the state, and half of one of the state in true units.
    return noise / (size or 1.0) + torch.finfo(state_dtype(flat.dtype)).eps


def refuse_exact(name: str, n: int, error: float, noise: float, dtype: torch.dtype) -> NoReturn:
    """Refuse to fit where a classical method is exact to rounding, or the reference too loose.

    Raises:
        NoiseFloorError: always.
    """
    if noise > LOOSE * torch.finfo(dtype).eps:
        raise NoiseFloorError(
            explain(
                f"the reference solution is too loose to fit to: the mean relative error of {name} "
                f"with {n} calls of func is {error:.3g}, the reference's own {noise:.3g}.",
                "noise below half of the error. The default atol is absolute: it suits states of "
                "size 1 and above.",
                "config=tdh.FitConfig(atol=1e-3 * 1e-6)   # for states of size 1e-3",
            )
        )
    raise NoiseFloorError(
        explain(
            f"{name} with {n} calls of func is already exact to this dtype, as far as can be "
            f"told: its mean relative error is {error:.3g}, the noise in it {noise:.3g} ({dtype}).",
            "noise below half of the error: nothing else could be learned.",
            f"{name} as it is\n"
            f"or fewer calls: steps={max(1, n // 2)}\n"
            "or, if the digits matter: func.double() and y0.double()\n"
            "or, if the reference is the loose part: FitConfig(rtol=..., atol=...), "
            "100 times smaller",
        )
    )


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
        config, group = self._problem.config, self._problem.group
        needed = samples_needed(self._data.held_out.y0, self._problem.calls)
        first = self._training(0)
        assert first is not None
        together = len(first.scale) * group.size
        return WeightLoop(
            self._solver,
            state,
            self._training,
            self._held_out,
            number=number,
            first_count=group.from_first(lambda: math.ceil(needed / together)),
            iterations=config.iterations,
            patience=config.patience,
            deadline=self._deadline,
            group=group,
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
            func, size = self._problem.func, self._problem.group.size
            self._pieces += cut(batch, func, self._budget, self._rows, size)
        return self._pieces[number]
