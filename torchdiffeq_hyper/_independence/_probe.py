"""func's answers for a batch and for parts of it, compared at one time and state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._independence._parts import Alone, halves
from torchdiffeq_hyper._independence._state import (
    difference,
    moved,
    n_samples,
    nudged,
    own,
    relative_slack,
    scaled,
    shapes,
    size,
    take,
)
from torchdiffeq_hyper._layout import is_half, parts_of
from torchdiffeq_hyper._types import State, VectorField

SLACK = 1e-5
"""Relative difference that other kernels for another batch size, or the tolerance of a solver
inside func, explain in float32 and float64."""
COARSE = 0.05
"""The same where func computes in fewer digits than the state has (TF32, autocast)."""


@dataclass(frozen=True)
class Probe:
    """func at one time and state of a batch.

    Attributes:
        func: the vector field of the batch.
        t: the time, in the state's own precision.
        y: the state.
        answer: func's answer, like ``y``.
    """

    func: VectorField
    t: Tensor
    y: State
    answer: State

    @classmethod
    def of(cls, func: VectorField, t: Tensor, y: State) -> Probe | None:
        """Return it, or None where func does not take the batch as it is."""
        first = parts_of(y)[0]
        # As the host does: a func may concatenate its time with its state.
        t = t.to(first.device, first.dtype.to_real() if first.dtype.is_complex else first.dtype)
        try:
            answer = func(t, y)
        except Exception:  # noqa: BLE001 - the solve says so, if it matters there
            return None
        return cls(func, t, y, own(answer)) if shapes(answer) == shapes(y) else None

    def moved(self, span: float) -> State:
        """Return the state a little along func's answer."""
        return moved(self.y, self.answer, span)

    def first_coupled(self, alone: Alone, parts: Sequence[Tensor]) -> int | None:
        """Return the first sample whose derivative depends on others, None if there is none.

        Args:
            alone: calls func on some of the samples; takes positions in this batch.
            parts: positions of the samples to call it on, one call each.

        Raises:
            StateShapeError: func takes the whole batch only.
            CoupledSamplesError: the same, and the state may be a single sample.
        """
        slack = relative_slack(self.y, SLACK)
        for index in parts:
            among, apart = take(self.answer, index), alone(self.t, take(self.y, index), index)
            off, scale = difference(among, apart), size(among, apart)
            # What is not finite compares False: it says nothing about coupling.
            suspects = off > slack * scale
            if bool(suspects.any()):
                suspects = suspects & ~self._is_explained(index, off, scale, slack)
                if bool(suspects.any()):
                    return int(index[suspects.any(dim=1).nonzero()[0, 0]])
        return None

    def _is_explained(self, index: Tensor, off: Tensor, scale: Tensor, slack: Tensor) -> Tensor:
        """Return which differences noise or rounding explain, (samples, parts)."""
        noise = self._change(self.y, index)
        digits, factor = (2, 4) if is_half(parts_of(self.y)[0].dtype) else (4, 16)
        rounding = self._change(nudged(self.y, digits), index)
        explained = (off <= 10 * noise) | (off <= factor * rounding)
        # Fewer digits inside func than the state has: then it gives a sample the same answer
        # whatever the others are, as long as they are as many.
        coarse = off <= COARSE * scale
        if bool((coarse & ~explained).any()):
            explained = explained | (coarse & (4 * self._change_by_others(index) <= slack * scale))
        return explained

    def _change_by_others(self, index: Tensor) -> Tensor:
        """Return how far samples' derivatives move when half of the others become other ones.

        Those are smaller copies of samples: where func can be called, and unlike what was.
        """
        batch = n_samples(self.y)
        change = torch.zeros_like(difference(self.answer, self.answer))
        one, two = halves(batch, index.device)
        for stay, leave in ((one, two), (two, one)):
            order = torch.arange(batch, device=index.device)
            order[leave] = stay[torch.arange(len(leave), device=index.device) % len(stay)]
            change[stay] = self._change(scaled(take(self.y, order), leave, 0.5), stay)
        return change[index]

    def _change(self, y: State, index: Tensor) -> Tensor:
        """Return how far samples' derivatives are from those at another state."""
        return difference(take(self.answer, index), take(self.func(self.t, y), index))
