"""The time a fit may take, and how many iterations end in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_PHASE = 0.4
"""Share of the time left that a phase followed by another may take."""
LAST_PHASE = 0.97
"""Share that the last phase may take; the rest is for measuring the result."""
MOST_RESERVED = 0.25
"""Share of the time left that may be kept for measuring the result."""
REFERENCES = 0.3
"""Share of all time that new reference solutions may take."""
EARLIEST = 4
"""Timed iterations before the first estimate."""


class Budget:
    """Wall time, counted on over interruptions.

    Args:
        max_seconds: the time there is.
        shared_clock: in seconds, the same in all processes of a fit; this process's by default.

    Attributes:
        reserved: seconds wanted for measuring the result.
    """

    def __init__(self, max_seconds: float, shared_clock: Callable[[], float] | None = None) -> None:
        self.max_seconds = max_seconds
        self.reserved = 0.0
        self._clock = time.perf_counter if shared_clock is None else shared_clock
        self._began = self._clock()
        self._own_began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time used, the same in all processes."""
        return self._clock() - self._began

    @property
    def elapsed(self) -> float:
        """Wall time used, on this process's own clock.

        A shared one stands still between exchanges, as within a reference solution.
        """
        return time.perf_counter() - self._own_began

    def is_over(self) -> bool:
        """Return whether all the time is used."""
        return self.elapsed >= self.max_seconds

    def resume(self, used: float) -> None:
        """Count the time an interrupted run had used as well."""
        self._began -= used
        self._own_began -= used

    def affordable_batches(self, seconds_per_batch: float, spent: float = 0.0) -> int:
        """Return how many batches may be given reference solutions, at least one."""
        left = REFERENCES * self.max_seconds - spent
        return max(1, int(left / max(seconds_per_batch, 1e-6)))

    def start_phase(self, wanted: int, *, is_last: bool) -> Pace:
        """Return the pace of a phase of at most ``wanted`` iterations that begins now."""
        share = LAST_PHASE if is_last else FIRST_PHASE
        return Pace(self, self.seconds + share * self.to_train, wanted)

    @property
    def to_train(self) -> float:
        """Seconds left for iterations."""
        left = max(0.0, self.max_seconds - self.seconds)
        return left - min(self.reserved, MOST_RESERVED * left)


@dataclass(frozen=True)
class Deadline:
    """An earlier end of a budget's time, in its seconds."""

    budget: Budget
    at: float

    def is_over(self) -> bool:
        """Return whether that time is used."""
        return self.budget.elapsed >= min(self.at, self.budget.max_seconds)


class Pace:
    """How many iterations of a phase end in time.

    The number is estimated anew ever more rarely, so that the annealing of the learning
    rate comes to its end even where the machine's speed changes. As long as all that are
    wanted end in time, it does not change, and the fit is repeatable.
    """

    def __init__(self, budget: Budget, deadline: float, wanted: int) -> None:
        self._budget = budget
        self._deadline = deadline
        self._wanted = wanted
        self._timed = -1
        self._first = 0.0

    def is_over(self) -> bool:
        """Return whether the phase's time is up."""
        return self._budget.seconds >= self._deadline

    def plan(self, done: int, planned: int) -> int:
        """Return the iterations to plan for, after each one that was done."""
        self._timed += 1
        now = self._budget.seconds
        if self._timed == 0:  # the first one pays for what is set up once
            self._first = now
        if self._timed < EARLIEST or self._timed & (self._timed - 1):
            return planned
        each = (now - self._first) / self._timed
        return min(self._wanted, done + int(max(0.0, self._deadline - now) / max(each, 1e-9)))
