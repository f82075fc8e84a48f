"""The steps of a solve as a record wants them: one row a round, nan where a sample is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._per_sample._rows import RowLayout


class StepLog:
    """Notes every round of steps.

    Args:
        batch: number of samples.
        layout: how they lie in rows.
        sign: -1 where the solver's time is the negated true time.
    """

    def __init__(self, batch: int, layout: RowLayout, sign: int) -> None:
        self._batch = batch
        self._layout = layout
        self._sign = sign
        self._rounds: list[tuple[Tensor, ...]] = []
        self._errors: list[list[Tensor]] = []
        self._marks: list[Any] = []

    def mark(self, f: Tensor) -> Tensor:
        """Return derivatives whose graph tells the record when it is freed."""
        marked, mark = recording.mark(f)
        self._marks += [] if mark is None else [mark]
        return marked

    def note(
        self,
        index: Tensor,
        columns: tuple[Tensor, Tensor, Tensor],
        is_accepted: Tensor,
        error: Tensor,
    ) -> None:
        """Keep a round.

        Args:
            index: the samples that step.
            columns: their times, step sizes and error ratios.
            is_accepted: which steps are.
            error: estimated errors, one row a sample.
        """
        t, dt, ratio = columns
        columns = (self._sign * t, self._sign * dt, ratio)
        self._rounds.append(
            (*(self._padded(index, values) for values in columns), self._flags(index, is_accepted))
        )
        parts = error.split(self._layout.widths, dim=1)
        norms = (torch.linalg.vector_norm(part, dim=1) for part in parts)
        self._errors.append(
            [self._padded(index, torch.where(is_accepted, n, n.detach())) for n in norms]
        )

    def steps(self, y0: Any) -> recording.Steps | None:
        """Return what was noted, None if nothing was."""
        if not self._rounds:
            return None
        t0, dt, ratio, is_accepted = map(torch.stack, zip(*self._rounds, strict=True))
        return recording.Steps(
            t0=t0,
            dt=dt,
            ratio=ratio,
            is_accepted=is_accepted,
            part_errors=tuple(map(torch.stack, zip(*self._errors, strict=True))),
            layout=StateLayout.of(y0),
            guard=recording.Guard(tuple(self._marks)),
        )

    def _padded(self, index: Tensor, values: Tensor) -> Tensor:
        return values.new_full((self._batch,), torch.nan).index_copy(0, index, values)

    def _flags(self, index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(self._batch).index_copy(0, index, values)
