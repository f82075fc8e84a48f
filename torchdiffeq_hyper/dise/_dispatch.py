"""Groups of samples, each solved by its candidate on the compacted sub-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields import (
    SHAPE_CLASHES,
    can_restrict,
    cannot_take_part,
    check_independence,
    check_kind,
    is_probing,
    look_through,
    own,
    restrict,
)
from torchdiffeq_hyper._state import (
    RowLayout,
    State,
    VectorField,
    batch_size,
    cast,
    is_half,
    map_parts,
    parts_of,
    shapes_of,
    take,
)
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.errors import (
    HyperError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    first_line,
)
from torchdiffeq_hyper.solvers._grid import check_times
from torchdiffeq_hyper.solvers._stepping import cast_back


def count_samples(y0: State) -> int:
    """Return the number of samples, after checking that they lie along dim 0 of every part."""
    RowLayout.of(y0)
    return batch_size(y0)


class GroupField:
    """The vector field of some samples of a batch: checked, counted, and cast for.

    Args:
        func: the field of the whole batch.
        y0: the state of the whole batch, in the dtype that func takes.
        index: the samples' positions; None for all.

    Attributes:
        base_func: the field of these samples; what is attached to it is found.
        calls: calls so far, but for those that only compare.
    """

    def __init__(self, func: VectorField, y0: State, index: Tensor | None) -> None:
        self.base_func = func if index is None else restrict(func, index)
        self.calls = 0
        self.y0 = y0
        self.index = index
        self._func = func
        dtype = parts_of(y0)[0].dtype
        self._half = dtype if is_half(dtype) else None
        if can_restrict(self.base_func):
            self.restrict = lambda index: GroupField(self.base_func, y0, index)

    def __call__(self, t: Tensor, y: State) -> State:
        """Return the derivatives; those of half-precision states come and go in float32."""
        self.calls += not is_probing()
        state = y
        if self._half is not None:
            t, state = t.to(self._half), cast(y, self._half)
        try:
            k = self.base_func(t, state)
        except HyperError:
            raise
        except SHAPE_CLASHES as error:
            if self._takes_the_whole(t):
                clash = self._clash(f"fails ({first_line(error)})")
                raise clash from error
            raise
        check_kind(k, y)
        if shapes_of(k) != shapes_of(y):
            what = f"returned shapes {shapes_of(k)[1]} for {shapes_of(y)[1]}"
            raise self._clash(what)
        if any(is_half(part.dtype) for part in parts_of(k)):
            return cast(k, parts_of(y)[0].dtype)
        # The host keeps stages over later calls of func, which may write into the same buffer;
        # those of tuples it copies itself.
        return own(k) if isinstance(k, Tensor) else k

    def _takes_the_whole(self, t: Tensor) -> bool:
        """Return whether func fails on this part of the batch only."""
        if self.index is None or can_restrict(self._func):
            return False
        try:
            with torch.no_grad():
                self._func(t, self.y0)
        except Exception:  # noqa: BLE001 - then func fails for a reason of its own
            return False
        return True

    def _clash(self, what: str) -> HyperError:
        if self.index is not None:
            return cannot_take_part(what, self.y0)
        return StateShapeError(
            problem=f"func {what}.",
            expected="a derivative of the state's own shape.",
            fix="check func(t[0], y0).shape == y0.shape",
        )


# What is restricted is a copy; what is attached to the whole serves its samples.
look_through(GroupField, "base_func", "_func")


@dataclass(frozen=True)
class Batch:
    """The problem of a batch, of which some samples can be solved without the others.

    Attributes:
        func: the vector field of all samples.
        y0: their states, samples along dim 0.
        t: times.
        rtol: relative tolerance of candidates that have none.
        atol: absolute tolerance of candidates that have none.
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

    def field(self, index: Tensor | None) -> GroupField:
        """Return the field of the samples at ``index``; of all for None."""
        return GroupField(self.func, self.y0, index)

    def solve(self, candidate: Candidate, field: GroupField) -> State:
        """Return a candidate's solution for the samples of a field; half precision in float32."""
        y0, index, dtype = self.y0, field.index, parts_of(self.y0)[0].dtype
        start = y0 if index is None else take(y0, index)
        rtol, atol = (_restricted(tolerance, y0, index) for tolerance in (self.rtol, self.atol))
        if is_half(dtype):
            start = cast(start, torch.float32)
        solution = candidate.solve(field, start, self.t, rtol=rtol, atol=atol)
        if is_half(dtype):
            return map_parts(lambda part: cast_back(part, dtype), solution)
        return solution


def joined(solutions: Sequence[State]) -> State:
    """Return solutions (times, samples, ...) as one, samples behind each other."""
    return map_parts(lambda *parts: torch.cat(parts, dim=1), *solutions)


def dispatch(
    candidates: Sequence[Candidate],
    batch: Batch,
    selection: Tensor,
    draft: recording.Draft | None = None,
) -> State:
    """Return the solution of each sample by its candidate.

    Args:
        candidates: the methods.
        batch: the problem.
        selection: for each sample, the position of its candidate.
        draft: the record of this solve, which learns of the groups; None if none is kept.

    Raises:
        CoupledSamplesError: there are several groups, and samples that depend on each other.
        StateShapeError: func cannot take part of the batch.
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
        field = batch.field(None if len(group) == len(batch) else group)
        solutions.append(batch.solve(candidate, field))
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
        got = f"a {type(selection).__name__}."
        if is_tensor:
            got = f"a {selection.dtype} tensor of shape {tuple(selection.shape)}."
        raise OptionError(
            problem=f"selection is {got}",
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
            raise OptionError(
                problem=f"rtol or atol has {len(tolerance)} entries.",
                expected=(
                    f"a number, or one a part: {n_parts}."
                    if n_parts
                    else "a number or a tensor: the state is one tensor."
                ),
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
