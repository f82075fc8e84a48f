"""Groups of samples, each solved by its candidate on the compacted sub-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from torchdiffeq_hyper._state import State, VectorField, is_half, parts_of
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.errors import HyperError, OptionError, StateShapeError, explain, first_line
from torchdiffeq_hyper.solvers._finite import cast_back
from torchdiffeq_hyper.solvers.per_sample._rows import RowLayout


def count(y0: State) -> int:
    """Return the number of samples in a state.

    Raises:
        StateTypeError: not a state.
        StateShapeError: no batch dimension, or parts with different numbers of samples.
    """
    RowLayout.of(y0)
    return len(parts_of(y0)[0])


def take(y: State, index: Tensor, dim: int = 0) -> State:
    """Return the samples at some positions."""
    if isinstance(y, Tensor):
        return y.index_select(dim, index)
    return tuple(part.index_select(dim, index) for part in y)


def concatenate(solutions: Sequence[State]) -> State:
    """Return solutions (times, samples, ...) as one, samples behind each other."""
    if isinstance(solutions[0], Tensor):
        return torch.cat([parts_of(solution)[0] for solution in solutions], dim=1)
    return tuple(torch.cat(group, dim=1) for group in zip(*map(parts_of, solutions), strict=True))


def cast(y: State, dtype: torch.dtype) -> State:
    """Return a state in another dtype."""
    return y.to(dtype) if isinstance(y, Tensor) else tuple(part.to(dtype) for part in y)


def last(solution: State) -> State:
    """Return the state at the last point of a solution."""
    return solution[-1] if isinstance(solution, Tensor) else tuple(part[-1] for part in solution)


def are_finite(solution: State) -> Tensor:
    """Return for each sample of a solution whether it holds no inf and no nan."""
    flags = [
        torch.isfinite(part).transpose(0, 1).flatten(1).all(dim=1) for part in parts_of(solution)
    ]
    return torch.stack(flags).all(dim=0)


class GroupField:
    """The vector field of some samples of a batch: checked, counted, and cast for.

    Args:
        func: the field of the whole batch.
        y0: the state of the whole batch, in the dtype that func takes.
        index: the samples' positions; None for all.

    Attributes:
        base_func: the field of these samples; what is attached to it is found.
        y0: the state of the whole batch.
        index: the samples' positions; None for all.
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
        """Return the derivatives; those of half-precision states come and go in float32.

        Raises:
            StateShapeError: func returned another shape, or cannot take part of the batch.
        """
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
                reason = first_line(error)
                clash = self._clash(f"fails ({reason})")
                raise clash from error
            raise
        check_kind(k, y)
        expected = [tuple(part.shape) for part in parts_of(y)]
        got = [tuple(getattr(part, "shape", ())) for part in parts_of(k)]
        if got != expected or isinstance(k, tuple) != isinstance(y, tuple):
            what = f"returned shapes {got} for {expected}"
            raise self._clash(what)
        wide = parts_of(y)[0].dtype
        if any(is_half(part.dtype) for part in parts_of(k)):
            return cast(k, wide)
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
            explain(
                f"func {what}.",
                "a derivative of the state's own shape.",
                "check func(t[0], y0).shape == y0.shape",
            )
        )


# What is restricted is a copy; what is attached to the whole serves its samples.
look_through(GroupField, "base_func", "_func")


def solve_group(
    candidate: Candidate, field: GroupField, t: Tensor, *, rtol: Any, atol: Any
) -> State:
    """Return a candidate's solution for the samples of a field.

    Args:
        candidate: the method.
        field: the samples' field.
        t: times.
        rtol: relative tolerance where the candidate has none; see `Dise.solve`.
        atol: absolute tolerance, the same way.
    """
    y0, index = field.y0, field.index
    start = y0 if index is None else take(y0, index)
    rtol, atol = (_restricted(tolerance, y0, index) for tolerance in (rtol, atol))
    dtype, t = parts_of(y0)[0].dtype, t.to(torch.promote_types(t.dtype, torch.float32))
    if not is_half(dtype):
        return candidate.solve(field, start, t, rtol=rtol, atol=atol)
    start = cast(start, torch.float32)
    solution = candidate.solve(field, start, t, rtol=rtol, atol=atol)
    if isinstance(solution, Tensor):
        return cast_back(solution, dtype)
    return tuple(cast_back(part, dtype) for part in solution)


def dispatch(
    candidates: Sequence[Candidate],
    func: VectorField,
    y0: State,
    t: Tensor,
    selection: Tensor,
    *,
    rtol: Any,
    atol: Any,
    draft: recording.Draft | None = None,
) -> State:
    """Return the solution.

    Args:
        candidates: the methods.
        func: the field of the whole batch.
        y0: the state; its samples lie along dim 0.
        t: times.
        selection: for each sample, the position of its candidate.
        rtol: relative tolerance where a candidate has none.
        atol: absolute tolerance where a candidate has none.
        draft: the record of this solve, which learns of the groups; None if none is kept.

    Raises:
        CoupledSamplesError: there are several groups, and samples that depend on each other.
        StateShapeError: func cannot take part of the batch.
    """
    batch = count(y0)
    selection = _check_selection(selection, batch, len(candidates)).to(parts_of(y0)[0].device)
    order = selection.argsort(stable=True)
    groups = order.split(torch.bincount(selection, minlength=len(candidates)).tolist())
    if max(map(len, groups)) < batch:
        check_independence(func, y0, t, groups=groups)
    solutions, calls, sample_nfe = [], 0, torch.zeros_like(selection)
    for candidate, group in zip(candidates, groups, strict=True):
        if len(group) == 0:
            continue
        field = GroupField(func, y0, None if len(group) == batch else group)
        solutions.append(solve_group(candidate, field, t, rtol=rtol, atol=atol))
        calls += field.calls
        if draft is not None and draft.recorders:
            # The group's own record tells its samples apart where they step on their own.
            sample_nfe[group] = draft.recorders[-1].solves[-1].sample_nfe
    if draft is not None:
        draft.nfe, draft.sample_nfe, draft.selection = calls, sample_nfe, selection
    if len(solutions) == 1:
        return solutions[0]
    return take(concatenate(solutions), order.argsort(), dim=1)


def _check_selection(selection: Tensor, batch: int, n_candidates: int) -> Tensor:
    is_fitting = (
        isinstance(selection, Tensor)
        and selection.shape == (batch,)
        and not selection.is_floating_point()
        and not selection.is_complex()
    )
    if not is_fitting or bool(((selection < 0) | (selection >= n_candidates)).any()):
        raise OptionError(
            explain(
                "selection is "
                + (
                    f"a {selection.dtype} tensor of shape {tuple(selection.shape)}."
                    if isinstance(selection, Tensor)
                    else f"a {type(selection).__name__}."
                ),
                f"for each of the {batch} samples, the position of its candidate, 0 to "
                f"{n_candidates - 1}.",
                "dise.dispatch(func, y0, t, dise.select(y0))",
            )
        )
    return selection.long()


def _restricted(tolerance: Any, y0: State, index: Tensor | None) -> Any:
    """Return a tolerance for some samples: what has a batch dimension loses the others."""
    if isinstance(tolerance, tuple | list):
        n_parts = len(y0) if isinstance(y0, tuple) else 0
        if len(tolerance) != n_parts:
            raise OptionError(
                explain(
                    f"rtol or atol has {len(tolerance)} entries.",
                    f"a number, or one a part: {n_parts}."
                    if n_parts
                    else "a number or a tensor: the state is one tensor.",
                    "rtol=1e-3, atol=1e-3",
                )
            )
        pairs = zip(tolerance, parts_of(y0), strict=True)
        parts = (_restricted(part, y, index) for part, y in pairs)
        # The host wants what belongs to a part of a tuple state flat.
        return tuple(part.flatten() if isinstance(part, Tensor) else part for part in parts)
    if index is None or not isinstance(tolerance, Tensor) or not isinstance(y0, Tensor):
        return tolerance
    has_batch = tolerance.dim() == y0.dim() and len(tolerance) > 1
    return tolerance.index_select(0, index) if has_batch else tolerance
