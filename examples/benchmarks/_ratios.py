"""What a table of measured solvers says: equal time, and equal accuracy.

Only measured points count: nothing is interpolated between two rows, neither for the
learned solvers nor for the classical ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

SLACK = 0.02


class Row(Protocol):
    """What is needed of a measured row; `tdh.evaluation.EvaluationRow` has it."""

    @property
    def method(self) -> str: ...

    @property
    def steps(self) -> int | None: ...

    @property
    def tolerance(self) -> float | None: ...

    @property
    def nfe(self) -> int: ...

    @property
    def ms(self) -> float: ...

    @property
    def relative_l2(self) -> float: ...

    @property
    def is_learned(self) -> bool: ...


@dataclass(frozen=True)
class EqualTime:
    """The best errors at the wall time of a classical fixed-step solver.

    Attributes:
        ms: that solver's time.
        classical: the best row that is not learned, within that time.
        learned: the best learned row within it; None where none is that fast.
    """

    nfe: int
    ms: float
    classical: Row
    learned: Row | None

    @property
    def error_ratio(self) -> float:
        """Learned error over classical error; below 1 the learned solver is better."""
        return math.nan if self.learned is None else _error_ratio(self.learned, self.classical)


@dataclass(frozen=True)
class EqualAccuracy:
    """The shortest times to the accuracy that dopri5 reaches at a tolerance.

    Attributes:
        dopri5: its row.
        fixed_step: the fastest classical fixed-step row that is as accurate, if there is one.
        learned: the fastest learned row that is.
    """

    tolerance: float
    dopri5: Row
    fixed_step: Row | None
    learned: Row | None

    @property
    def speedup(self) -> float:
        """dopri5's time over the learned solver's."""
        return math.nan if self.learned is None else self.dopri5.ms / self.learned.ms

    @property
    def speedup_over_fixed_step(self) -> float:
        """The best fixed-step solver's time over the learned one's; inf if it has none."""
        if self.learned is None:
            return math.nan
        return math.inf if self.fixed_step is None else self.fixed_step.ms / self.learned.ms


def equal_time(rows: Sequence[Row], nfe: int, slack: float = SLACK) -> EqualTime | None:
    """Compare errors at the time of the most accurate classical solver of ``nfe`` calls.

    Args:
        rows: all rows of one run.
        nfe: calls of func of the fixed-step solver whose time is given to everyone.
        slack: part of that time by which a row may exceed it: medians of equal work differ
            by this much. Learned and classical rows get the same.

    Returns:
        The comparison, None where no classical fixed-step row makes ``nfe`` calls.
    """
    of_cost = [row for row in rows if _is_fixed_step(row) and row.nfe == nfe]
    timer = _most_accurate(of_cost)
    if timer is None:
        return None
    within = [row for row in rows if row.ms <= timer.ms * (1 + slack)]
    classical = _most_accurate(row for row in within if not row.is_learned)
    assert classical is not None, "the timer itself is within its time"
    learned = _most_accurate(row for row in within if row.is_learned)
    return EqualTime(nfe, timer.ms, classical, learned)


def equal_accuracy(rows: Sequence[Row], tolerance: float) -> EqualAccuracy | None:
    """Compare times to the error of torchdiffeq's dopri5 at rtol = atol = ``tolerance``.

    Returns:
        The comparison, None where dopri5 was not measured at that tolerance.
    """
    dopri5 = next((r for r in rows if r.method == "dopri5" and r.tolerance == tolerance), None)
    if dopri5 is None:
        return None
    reached = [row for row in rows if row.relative_l2 <= dopri5.relative_l2]
    return EqualAccuracy(
        tolerance,
        dopri5,
        fixed_step=_fastest(row for row in reached if _is_fixed_step(row)),
        learned=_fastest(row for row in reached if row.is_learned),
    )


def _is_fixed_step(row: Row) -> bool:
    return row.steps is not None and not row.is_learned


def _most_accurate(rows: Iterable[Row]) -> Row | None:
    finite = [row for row in rows if math.isfinite(row.relative_l2)]
    return min(finite, key=lambda row: row.relative_l2, default=None)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row.ms, default=None)


def _error_ratio(learned: Row, classical: Row) -> float:
    if classical.relative_l2 == 0:
        return 1.0 if learned.relative_l2 == 0 else math.inf
    return learned.relative_l2 / classical.relative_l2
