"""The comparison of func on a batch with func on samples alone, and its refusal."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields._wrappers import HOW_TO_RESTRICT, SHAPE_CLASHES, restrict
from torchdiffeq_hyper._state import (
    State,
    VectorField,
    is_half,
    map_parts,
    n_samples,
    parts_of,
    shapes_of,
    take,
    time_dtype,
    values_of,
    wide_dtype,
)
from torchdiffeq_hyper.errors import CoupledSamplesError, HyperError, StateShapeError, first_line

SLACK = 1e-5  # relative difference that other kernels, or a solver inside func, explain
COARSE = 0.05  # the same where func computes in fewer digits than the state has (TF32, autocast)
SECOND_TIME = 0.3819
"""Where in the span couplings that vanish at the start, or at round numbers, are looked for."""
MOST = 16  # samples to look at: func has one rule for batches of all sizes

Alone: TypeAlias = Callable[[Tensor, State, Tensor], State]
"""``alone(t, y, index)``: the derivatives of the samples at ``index``, whose state is ``y``."""

_probing: contextvars.ContextVar[bool] = contextvars.ContextVar("probing", default=False)


def is_probing() -> bool:
    """Return whether func is called for a comparison only, which counts of calls leave out."""
    return _probing.get()


class Coupling(NamedTuple):
    """The position and time at which a sample's derivative depends on the other samples."""

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
    """Refuse a func whose samples depend on each other, for a solve of them apart at ``t``."""
    ends = t.detach()[[0, -1]]
    times = torch.stack([ends[0], torch.lerp(ends[0], ends[1], SECOND_TIME)])
    found = find_coupling(func, y0, times, groups=groups, alone=alone)
    if found is None:
        return
    raise CoupledSamplesError(
        problem=f"sample {found.sample} of y0 has another derivative in the batch than alone (at "
        f"t = {found.time:.6g}): func makes samples along dim 0 depend on each other.",
        expected="a func of each sample by itself.",
        fix=_ways_out(y0, is_vector=True),
    )


def find_coupling(
    func: VectorField,
    y0: State,
    times: Tensor,
    *,
    groups: Sequence[Tensor] | None = None,
    alone: Alone | None = None,
) -> Coupling | None:
    """Return a sample whose derivative depends on the others; None also without a comparison.

    Looks at 16 samples of a larger batch, at ``y0`` at the first of the times and a little along
    func's answer at the others: func is called once on all of these and once on each group of
    them (positions in the batch; two halves by default), by ``alone`` if given; where the answers
    differ a few times more, which tell a coupling from rounding and from noise. A func that takes
    the whole batch only is refused.
    """
    batch = n_samples(y0)
    if batch < 2 or values_of(parts_of(y0)[0].sum().isfinite()) is None:
        return None
    # Views: func may set requires_grad on what it is given.
    y0 = map_parts(lambda part: part.view_as(part), y0)
    positions = torch.linspace(0, batch - 1, min(batch, MOST), dtype=torch.float64).long()
    positions = positions.to(parts_of(y0)[0].device)
    restricted = _by_restricting(func, y0)
    groups = _groups_among(positions, groups or ())
    y = take(y0, positions)
    with recording.assigned(_probing, value=True), recording.paused():
        some = func if batch <= MOST else restrict(func, positions)
        for step, t in enumerate(times):
            together = _Together.of(some, t, y)
            if together is None:
                if batch > MOST and _Together.of(func, t, y0) is not None:
                    restricted(t, y, positions)  # says what is wrong
                return None
            try:
                sample = together.first_coupled(alone or restricted, positions, groups)
            except CoupledSamplesError:
                raise
            except Exception:
                # Batch norm in training mode fails on single samples, and a single sample's
                # numbers cannot be told apart: halves say so.
                sample = None
                with suppress(StateShapeError):
                    sample = together.first_coupled(restricted, positions, _halves(positions))
                if sample is None:
                    raise
            if sample is not None:
                return Coupling(int(positions[sample]), float(t))
            if step == 0 and len(times) > 1:
                y = _moved(y, together.answer, float(times[1] - times[0]))
    return None


def _by_restricting(func: VectorField, y0: State) -> Alone:
    """Return calls of func on some of the samples of ``y0``."""

    def alone(t: Tensor, y: State, index: Tensor) -> State:
        failed = None
        try:
            k: State = restrict(func, index)(t, y)
            if shapes_of(k) == shapes_of(y):
                return _copied(k)
            what = f"returned shapes {shapes_of(k)[1]} for {shapes_of(y)[1]}"
        except HyperError:
            raise
        except SHAPE_CLASHES as error:
            what, failed = f"fails ({first_line(error)})", error
        # A vector (D,) may be a single sample, whose numbers func needs together.
        is_vector = all(part.dim() == 1 for part in parts_of(y0))
        raise (CoupledSamplesError if is_vector else StateShapeError)(
            problem=f"func {what}, part of a batch of {len(parts_of(y0)[0])}.",
            expected="a derivative of the state's own shape for any part of the batch; a func that "
            "holds something of every sample (noise, controls) must say whose each row is.",
            fix=_ways_out(y0, is_vector=is_vector),
        ) from failed

    return alone


def _ways_out(y0: State, *, is_vector: bool) -> str:
    one = "tuple(part.unsqueeze(0) for part in y0)" if isinstance(y0, tuple) else "y0.unsqueeze(0)"
    lines = [
        f"y0 = {one}   # if y0 is a single sample: dim 0 counts the samples",
        'odeint(func, y0, t, method="dopri5")   # takes the whole batch as one',
        HOW_TO_RESTRICT,
        "func.eval()   # if batch norm in training mode couples the samples",
    ]
    return "\n".join(lines if is_vector else lines[2:])


def _groups_among(positions: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    """Return where in ``positions`` the samples of each group are; two halves without groups."""
    inside = [torch.isin(positions, group) for group in groups]
    found = [flags.nonzero().squeeze(1) for flags in inside if bool(flags.any())]
    # All in one group of several: the others were not among those looked at.
    is_one_of_several = len(groups) > 1 and len(found) == 1
    return _halves(positions) if not found or is_one_of_several else found


def _halves(positions: Tensor) -> list[Tensor]:
    """Return where both halves of a batch are, drawn at random against symmetries."""
    n = len(positions)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return [part.sort().values.to(positions.device) for part in order.tensor_split(2)]


@dataclass(frozen=True)
class _Together:
    """func's answer for a whole batch at one time and state."""

    func: VectorField
    t: Tensor
    y: State
    answer: State

    @classmethod
    def of(cls, func: VectorField, t: Tensor, y: State) -> _Together | None:
        """Return it, or None where func does not take the batch as it is."""
        first = parts_of(y)[0]
        # As the host does: a func may concatenate its time with its state.
        t = t.to(first.device, time_dtype(first.dtype))
        try:
            answer = func(t, y)
        except Exception:  # noqa: BLE001 - the solve says so, if it matters there
            return None
        return cls(func, t, y, _copied(answer)) if shapes_of(answer) == shapes_of(y) else None

    def first_coupled(
        self, alone: Alone, positions: Tensor, groups: Sequence[Tensor]
    ) -> int | None:
        """Return the first sample whose derivative is another in one of the groups, if any."""
        slack = _relative_slack(self.y)
        for index in groups:
            among = take(self.answer, index)
            apart = alone(self.t, take(self.y, index), positions[index])
            off, scale = _difference(among, apart), torch.maximum(_largest(among), _largest(apart))
            # What is not finite compares False: it says nothing about coupling.
            suspects = off > slack * scale
            if bool(suspects.any()):
                suspects &= ~self._is_explained(index, off, scale, slack)
            if bool(suspects.any()):
                return int(index[suspects.any(dim=1).nonzero()[0, 0]])
        return None

    def _is_explained(self, index: Tensor, off: Tensor, scale: Tensor, slack: Tensor) -> Tensor:
        """Return which differences noise or rounding explain, (samples, parts)."""
        noise = self._change(self.y, index)
        digits, factor = (2, 4) if is_half(parts_of(self.y)[0].dtype) else (4, 16)
        rounding = self._change(_nudged(self.y, digits), index)
        explained = (off <= 10 * noise) | (off <= factor * rounding)
        # Fewer digits inside func than the state has: then it gives a sample the same answer
        # whatever the others are, as long as they are as many.
        coarse = off <= COARSE * scale
        if bool((coarse & ~explained).any()):
            explained = explained | (coarse & (4 * self._change_by_others(index) <= slack * scale))
        return explained

    def _change_by_others(self, index: Tensor) -> Tensor:
        """Return how far samples' derivatives move when half of the others become other ones."""
        change = torch.zeros_like(_largest(self.answer))
        one, two = _halves(torch.arange(len(change), device=index.device))
        for stay, leave in ((one, two), (two, one)):
            # Copies at half their size: where func can be called, and unlike what was.
            others = take(self.y, stay[torch.arange(len(leave), device=index.device) % len(stay)])
            changed = map_parts(
                lambda part, other, at=leave: part.index_copy(0, at, 0.5 * other), self.y, others
            )
            change[stay] = self._change(changed, stay)
        return change[index]

    def _change(self, y: State, index: Tensor) -> Tensor:
        """Return how far samples' derivatives are from those at another state."""
        return _difference(take(self.answer, index), take(self.func(self.t, y), index))


def _copied(k: State) -> State:
    # func may write its next answer to the same memory.
    return map_parts(lambda part: part.detach().clone(), k)


def _difference(k: State, other: State) -> Tensor:
    """Return each sample's largest difference in each part that has numbers, (samples, parts)."""
    return _largest(map_parts(lambda a, b: _wide(a) - _wide(b), k, other))


def _largest(k: State) -> Tensor:
    """Return each sample's largest number in each part that has numbers, (samples, parts)."""
    rows = [_wide(part).reshape(len(part), -1) for part in parts_of(k) if part.numel()]
    return torch.stack([row.abs().amax(dim=1) for row in rows], dim=1)


def _wide(part: Tensor) -> Tensor:
    return part.detach().to(torch.complex128 if part.is_complex() else wide_dtype(part.device))


def _relative_slack(y: State) -> Tensor:
    """Return for each part with numbers what rounding explains."""
    parts = [part for part in parts_of(y) if part.numel()]
    slack = [4 * torch.finfo(p.dtype).eps if is_half(p.dtype) else SLACK for p in parts]
    return torch.tensor(slack, device=parts[0].device)


def _moved(y: State, k: State, span: float) -> State:
    """Return the state a little along ``k``: a tenth of the span, or of its own size at most."""
    largest, fastest = (
        max(float(part.detach().abs().max()) for part in parts_of(s) if part.numel())
        for s in (y, k)
    )
    h = 0.1 * span
    if largest > 0 and abs(h) * fastest > 0.1 * largest:
        h *= 0.1 * largest / (abs(h) * fastest)
    return map_parts(lambda part, slope: part + (h * slope).to(part.dtype), y, k)


def _nudged(y: State, digits: int) -> State:
    """Return the state changed in its last digits, up and down at random."""
    generator = torch.Generator().manual_seed(0)

    def nudge(part: Tensor) -> Tensor:
        signs = torch.randint(0, 2, part.shape, generator=generator).to(part.device) * 2 - 1
        return part * (1 + digits * torch.finfo(part.dtype).eps * signs.to(part.dtype))

    return map_parts(nudge, y)
