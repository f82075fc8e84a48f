"""Groups of samples, each solved by its candidate on the compacted sub-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields import check_independence
from torchdiffeq_hyper._state import (
    RowLayout,
    State,
    VectorField,
    batch_size,
    cast,
    is_half,
    map_parts,
    parts_of,
    take,
)
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.errors import NonFiniteError, OptionError
from torchdiffeq_hyper.evaluation._measure import Counted
from torchdiffeq_hyper.solvers._finite import cast_back
from torchdiffeq_hyper.solvers._grid import check_times


def count_samples(y0: State) -> int:
    """Return the number of samples, after checking that they lie along dim 0 of every part."""
    RowLayout.of(y0)
    return batch_size(y0)


@dataclass(frozen=True)
class Batch:
    """The problem of a batch, of which some samples can be solved without the others.

    The tolerances are those of candidates without their own.
    """

    func: VectorField
    y0: State
    t: Tensor
    rtol: Any
    atol: Any

    @classmethod
    def of(cls, func: VectorField, y0: State, t: Tensor, *, rtol: Any, atol: Any) -> Batch:
        """Return the problem, after checking its state and times."""
        count_samples(y0)
        return cls(func, y0, check_times(t, parts_of(y0)[0]), rtol, atol)

    def __len__(self) -> int:
        return batch_size(self.y0)

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return parts_of(self.y0)[0].device

    @property
    def is_empty(self) -> bool:
        """Whether there are no numbers to solve for."""
        return not any(part.numel() for part in parts_of(self.y0))

    def unchanged(self) -> State:
        """Return the solution that stays at y0: that of an empty batch."""
        return map_parts(lambda part: part.expand(len(self.t), *part.shape).clone(), self.y0)

    def field(self, index: Tensor | None = None) -> Counted:
        """Return the field of the samples at ``index``; of all for None."""
        return Counted(self.func, index, dtype=parts_of(self.y0)[0].dtype)

    def solve(self, candidate: Candidate, field: Counted, index: Tensor | None = None) -> State:
        """Return a candidate's solution for some samples; half precision in float32."""
        y0, dtype = self.y0, parts_of(self.y0)[0].dtype
        start = y0 if index is None else take(y0, index)
        rtol, atol = (_restricted(tolerance, y0, index) for tolerance in (self.rtol, self.atol))
        if is_half(dtype):
            start = cast(start, torch.float32)
        solution = candidate.solve(field, start, self.t, rtol=rtol, atol=atol)
        return (
            map_parts(lambda part: cast_back(part, dtype), solution) if is_half(dtype) else solution
        )


def joined(solutions: Sequence[State]) -> State:
    """Return solutions (times, samples, ...) as one, samples behind each other."""
    return map_parts(lambda *parts: torch.cat(parts, dim=1), *solutions)


def dispatch(
    candidates: Sequence[Candidate],
    batch: Batch,
    selection: Tensor,
    draft: recording.Draft | None = None,
) -> State:
    """Return the solution of each sample by the candidate at its position in ``selection``.

    ``draft`` is the record of this solve, which learns of the groups; None if none is kept.
    """
    if batch.is_empty:
        return batch.unchanged()
    selection = _check_selection(selection, len(batch), len(candidates)).to(batch.device)
    order = selection.argsort(stable=True)
    groups = order.split(torch.bincount(selection, minlength=len(candidates)).tolist())
    if max(map(len, groups)) < len(batch):
        check_independence(batch.func, batch.y0, batch.t, groups=groups)
    solutions, calls, sample_nfe = [], 0, torch.zeros_like(selection)
    for candidate, group in zip(candidates, groups, strict=True):
        if len(group) == 0:
            continue
        index = None if len(group) == len(batch) else group
        field = batch.field(index)
        solutions.append(batch.solve(candidate, field, index))
        calls += field.calls
        if draft is not None and draft.recorders:
            # The group's own record tells its samples apart where they step on their own.
            sample_nfe[group] = draft.recorders[-1].solves[-1].sample_nfe
    if draft is not None:
        draft.nfe, draft.sample_nfe, draft.selection = calls, sample_nfe, selection
    if len(solutions) == 1:
        return solutions[0]
    return take(joined(solutions), order.argsort(), dim=1)


def are_finite(solution: State) -> Tensor:
    """Return for each sample of a solution whether it holds no inf and no nan."""
    finite = [torch.isfinite(part).transpose(0, 1).flatten(1) for part in parts_of(solution)]
    return torch.cat(finite, dim=1).all(dim=1)


def raise_non_finite(
    solution: State, candidates: Sequence[Candidate], selection: Tensor
) -> NoReturn:
    """Name the first sample whose end is not finite, and its candidate."""
    end = map_parts(lambda part: part[-1:], solution)
    sample = int((~are_finite(end)).nonzero()[0])
    label = candidates[int(selection[sample])].label
    raise NonFiniteError(
        problem=f"the solution of sample {sample} by {label} ended in inf or nan.",
        expected="a candidate that stays finite on the samples that are sent to it.",
        fix='more steps for that candidate, or tdh.Candidate("dopri5_per_sample")',
    )


def _check_selection(selection: Tensor, batch: int, n_candidates: int) -> Tensor:
    is_tensor = isinstance(selection, Tensor)
    is_index = is_tensor and not selection.is_floating_point() and not selection.is_complex()
    is_fitting = is_index and selection.shape == (batch,)
    if not is_fitting or bool(((selection < 0) | (selection >= n_candidates)).any()):
        got = f"{selection.dtype}, {tuple(selection.shape)}" if is_tensor else repr(selection)
        raise OptionError(
            problem=f"selection is {got}.",
            expected=f"for each of the {batch} samples, the position of its candidate, 0 to "
            f"{n_candidates - 1}.",
            fix="dise.dispatch(func, y0, t, dise.select(y0))",
        )
    return selection.long()


def _restricted(tolerance: Any, y0: State, index: Tensor | None) -> Any:
    """Return a tolerance for some samples: what has a batch dimension loses the others."""
    if isinstance(tolerance, tuple | list):
        n_parts = len(y0) if isinstance(y0, tuple) else 0
        if len(tolerance) != n_parts:
            each = f"one a part: {n_parts}" if n_parts else "a tensor: the state is one tensor"
            raise OptionError(
                problem=f"rtol or atol has {len(tolerance)} entries.",
                expected=f"a number, or {each}.",
                fix="rtol=1e-3, atol=1e-3",
            )
        pairs = zip(tolerance, parts_of(y0), strict=True)
        parts = (_restricted(part, y, index) for part, y in pairs)
        # The host wants what belongs to a part of a tuple state flat.
        return tuple(part.flatten() if isinstance(part, Tensor) else part for part in parts)
    if index is None or not isinstance(tolerance, Tensor) or not isinstance(y0, Tensor):
        return tolerance
    has_batch = tolerance.dim() == y0.dim() and len(tolerance) > 1
    return tolerance.index_select(0, index) if has_batch else tolerance
