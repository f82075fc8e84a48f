"""The comparison of func on a batch with func on samples alone, and its refusal.

A state (D,) is one vector to torchdiffeq and D samples to a solver that takes samples apart:
where func couples them, solutions of samples alone are not the batch's. func's answer for the
batch is held against its answers for parts of it at the start, and at a second point, since
what couples samples may vanish at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._context import HOW_TO_RESTRICT, restrict
from torchdiffeq_hyper._fields._parts import (
    Alone,
    by_restricting,
    difference,
    halves,
    moved,
    nudged,
    own,
    probing,
    relative_slack,
    scaled,
    size,
    ways_of_one_sample,
)
from torchdiffeq_hyper._state import (
    State,
    VectorField,
    is_half,
    map_parts,
    n_samples,
    parts_of,
    shapes_of,
    take,
)
from torchdiffeq_hyper.errors import CoupledSamplesError, StateShapeError, explain

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
        return cls(func, t, y, own(answer)) if shapes_of(answer) == shapes_of(y) else None

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


SECOND_TIME = 0.3819
"""Where in the span the second point lies: no round number, where much is zero."""
MOST = 16
"""Samples to look at: func has one rule for batches of all sizes."""


@dataclass(frozen=True)
class Coupling:
    """Where a sample's derivative was found to depend on the other samples.

    Attributes:
        sample: its position.
        time: the time.
    """

    sample: int
    time: float


def check_independence(
    func: VectorField,
    y0: State,
    t: Tensor,
    *,
    groups: Sequence[Tensor] | None = None,
    alone: Alone | None = None,
) -> None:
    """Refuse a func whose samples depend on each other, before a solve that takes them apart.

    Args:
        func: the vector field of the batch.
        y0: the state, its samples along dim 0.
        t: the solve's times.
        groups: see `find_coupling`.
        alone: see `find_coupling`.

    Raises:
        CoupledSamplesError: they do.
        StateShapeError: func takes the whole batch only.
    """
    ends = t.detach()[[0, -1]]
    times = torch.stack([ends[0], torch.lerp(ends[0], ends[1], SECOND_TIME)])
    found = find_coupling(func, y0, times, groups=groups, alone=alone)
    if found is None:
        return
    raise CoupledSamplesError(
        explain(
            f"sample {found.sample} of y0 has another derivative in the batch than alone (at "
            f"t = {found.time:.6g}): func makes the samples along dim 0 depend on each other, and "
            "they are solved apart here.",
            "a func of each sample by itself.",
            ways_of_one_sample(y0)
            + "func.eval()   # if batch norm in training mode couples the samples\n"
            + HOW_TO_RESTRICT.splitlines()[0],
        )
    )


def find_coupling(
    func: VectorField,
    y0: State,
    times: Tensor,
    *,
    groups: Sequence[Tensor] | None = None,
    alone: Alone | None = None,
) -> Coupling | None:
    """Return a sample whose derivative depends on the others, or None.

    Looks at 16 samples of a larger batch: func is called at each time once on all of these and
    once on each group of them; where the answers differ a few times more, which tell a
    coupling from rounding and from noise.

    None too where there is nothing to compare: a single sample, a func that does not take the
    batch as it is (a solve says so better), values that cannot be looked at.

    Args:
        func: the vector field; one with a method ``restrict`` is restricted.
        y0: the state, its samples along dim 0.
        times: where to compare; the state is ``y0`` at the first, and a little along func's
            answer at the others.
        groups: positions in the batch of the samples that are called together; two halves by
            default.
        alone: calls func on some of the samples; by restricting it by default.

    Raises:
        StateShapeError: func takes the whole batch only.
        CoupledSamplesError: the same, and the state may be a single sample.
    """
    batch = n_samples(y0)
    if batch < 2 or not _has_values(y0):
        return None
    device = parts_of(y0)[0].device
    # Views: func may set requires_grad on what it is given.
    y0 = map_parts(lambda part: part.view_as(part), y0)
    looked_at = torch.linspace(0, batch - 1, min(batch, MOST), dtype=torch.float64).long()
    comparison = _Comparison(func, y0, looked_at.to(device), groups, alone)
    with probing():
        return comparison.run(times)


class _Comparison:
    """func on some samples of a batch, together and apart; see `find_coupling`.

    Args:
        func: the vector field of the batch.
        y0: the state.
        looked_at: positions of the samples to look at.
        groups: positions of those that are called together.
        alone: calls func on some of the samples.
    """

    def __init__(
        self,
        func: VectorField,
        y0: State,
        looked_at: Tensor,
        groups: Sequence[Tensor] | None,
        alone: Alone | None,
    ) -> None:
        self._func = func
        self._y0 = y0
        self._looked_at = looked_at
        self._restricted = by_restricting(func, y0)
        self._alone = self._restricted if alone is None else alone
        inside = [torch.isin(looked_at, group) for group in groups or ()]
        parts = [flags.nonzero().squeeze(1) for flags in inside if bool(flags.any())]
        self._halves = halves(len(looked_at), looked_at.device)
        # All in one group of several: the others were not among those looked at.
        is_one = len(groups or ()) > 1 and len(parts) == 1
        self._parts = parts if parts and not is_one else self._halves

    def run(self, times: Tensor) -> Coupling | None:
        """Return a coupling at any of some times, None if there is none."""
        y = take(self._y0, self._looked_at)
        for position, t in enumerate(times):
            probe = self._together(t, y)
            if probe is None:
                return None
            sample = self._first_coupled(probe)
            if sample is not None:
                return Coupling(int(self._looked_at[sample]), float(t))
            if position == 0 and len(times) > 1:
                y = probe.moved(float(times[1] - times[0]))
        return None

    def _together(self, t: Tensor, y: State) -> Probe | None:
        """Return func's answer for all that are looked at, None if it does not take the batch."""
        if len(self._looked_at) == n_samples(self._y0):
            return Probe.of(self._func, t, y)
        probe = Probe.of(restrict(self._func, self._looked_at), t, y)
        if probe is None and Probe.of(self._func, t, self._y0) is not None:
            self._restricted(t, y, self._looked_at)  # says what is wrong
        return probe

    def _first_coupled(self, probe: Probe) -> int | None:
        def local(alone: Alone) -> Alone:
            return lambda t, y, index: alone(t, y, self._looked_at[index])

        try:
            return probe.first_coupled(local(self._alone), self._parts)
        except CoupledSamplesError:
            raise
        except Exception:
            # Batch norm in training mode fails on single samples, and a single sample's
            # numbers cannot be told apart: halves say so.
            with suppress(StateShapeError):
                sample = probe.first_coupled(local(self._restricted), self._halves)
                if sample is not None:
                    return sample
            raise


def _has_values(y: State) -> bool:
    if torch.compiler.is_compiling():
        return False
    try:
        parts_of(y)[0].sum().item()
    except RuntimeError:  # no values to look at: vmap, fake and meta tensors
        return False
    return True
