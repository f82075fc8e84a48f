"""Solves of parts of a batch: of each group by its candidate, of each sample by every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields import check_independence, left_as_found, vector_field
from torchdiffeq_hyper._state import (
    RowLayout,
    State,
    StateLayout,
    VectorField,
    batch_size,
    cast,
    is_half,
    map_parts,
    parts_of,
    take,
)
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.dise._costs import Cost
from torchdiffeq_hyper.dise._report import Labels
from torchdiffeq_hyper.errors import NonFiniteError, OptionError
from torchdiffeq_hyper.evaluation._measure import Counted, unless_broken
from torchdiffeq_hyper.evaluation._trials import distinct
from torchdiffeq_hyper.fitting._batches import Starts, bind
from torchdiffeq_hyper.fitting._field import check_repeatable
from torchdiffeq_hyper.solvers._grid import check_times
from torchdiffeq_hyper.solvers._stepping import cast_back
from torchdiffeq_hyper.solvers.per_sample import PerSampleDopri5


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
    def dtype(self) -> torch.dtype:
        """The dtype of the state's first part."""
        return parts_of(self.y0)[0].dtype

    @property
    def is_empty(self) -> bool:
        """Whether there are no numbers to solve for."""
        return not any(part.numel() for part in parts_of(self.y0))

    def constant(self, y0: State) -> State:
        """Return the solution that stays at a state."""
        return map_parts(lambda part: part.expand(len(self.t), *part.shape).clone(), y0)

    def field(self, index: Tensor | None = None) -> Counted:
        """Return the field of the samples at ``index``; of all for None."""
        return Counted(self.func, index, dtype=self.dtype)

    def solve(self, candidate: Candidate, field: Counted, index: Tensor | None = None) -> State:
        """Return a candidate's solution for some samples; half precision in float32."""
        start = self.y0 if index is None else take(self.y0, index)
        rtol, atol = (_restricted(given, self.y0, index) for given in (self.rtol, self.atol))
        if not is_half(self.dtype):
            return candidate.solve(field, start, self.t, rtol=rtol, atol=atol)
        start = cast(start, torch.float32)
        solution = candidate.solve(field, start, self.t, rtol=rtol, atol=atol)
        return map_parts(partial(cast_back, dtype=self.dtype), solution)


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
        return batch.constant(batch.y0)
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


def labels_of(
    candidates: Sequence[Candidate],
    batch: Batch,
    cost: Cost,
    *,
    known: Labels | None = None,
    progress: bool,
) -> Labels:
    """Solve every sample with every candidate, alone, and return calls and right answers.

    Modules in func are put in evaluation mode meanwhile, and come back as found. What is
    ``known`` from an earlier call is returned if it belongs to so many samples and candidates.
    """
    if known is not None:
        if known.nfe.shape == (len(batch), len(candidates)):
            return known
        raise OptionError(
            problem="labels are of {} samples and {} candidates.".format(*known.nfe.shape),
            expected=f"those of these {len(batch)} samples and {len(candidates)} candidates.",
            fix="labels=dise.suggest(func, y0, t, cost=cost).labels",
        )
    if len(batch) == 0:
        raise OptionError(
            problem="y0 is an empty batch.",
            expected="at least one sample.",
            fix="y0 = torch.randn(256, 2)",
        )
    cost.check(len(batch))
    func, field = batch.func, bind(vector_field(batch.func), Starts(batch.y0))
    batch = replace(batch, func=field)
    index = torch.arange(len(batch), device=batch.device)
    total, columns = len(batch) * len(candidates), []
    with (
        left_as_found(func),
        left_as_found(getattr(cost, "predict", None) or getattr(cost, "error", None)),
        torch.no_grad(),
        tqdm(total=total, disable=not progress, unit="solve", desc="solving alone") as bar,
    ):
        _check_field(batch)
        for candidate in candidates:
            solution, nfe = _solve_alone(candidate, batch, bar.update)
            is_right, weight = cost.judge(solution, index)
            columns.append((nfe, is_right & are_finite(solution), weight))
    names: list[str] = []
    for candidate in candidates:
        names.append(distinct(candidate.label, names))
    matrices = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return Labels(tuple(names), *matrices)


def _check_field(batch: Batch) -> None:
    """Refuse a field that draws fresh noise, or whose samples cannot be solved alone."""
    # As the host does: a func may concatenate its time with its state.
    t0 = batch.t[0].to(batch.dtype.to_real())
    field, join = batch.field(), StateLayout.of(batch.y0).join
    first, second = (join(field(t0, batch.y0)) for _ in range(2))
    check_repeatable(first, second, batch.dtype, float(t0))
    check_independence(batch.func, batch.y0, batch.t, groups=_some_samples(batch).split(1))


def _solve_alone(
    candidate: Candidate, batch: Batch, tick: Callable[[int], object]
) -> tuple[State, Tensor]:
    """Return a candidate's solution of every sample alone, and its calls of func (batch,).

    All are solved together where that gives the same for a few samples, else one by one. A
    sample that the candidate cannot solve is nan, at the calls made until then. ``tick`` is
    told the number of samples solved.
    """
    try:
        together = unless_broken(lambda: _together(candidate, batch))
    except OptionError:  # one by one it shows whether func minds vmap only
        together = None
    if together is not None:
        solution, nfe = together
        some = _some_samples(batch)
        alone, calls = _one_by_one(candidate, batch, some)
        if torch.equal(nfe[some], calls) and _are_close(take(solution, some, 1), alone):
            tick(len(batch))
            return together
    return _one_by_one(candidate, batch, torch.arange(len(batch), device=batch.device), tick)


_BY_SAMPLE = ("dopri5", "dopri5_per_sample")
_CONTROLS = {field.name for field in fields(PerSampleDopri5)}


def _together(candidate: Candidate, batch: Batch) -> tuple[State, Tensor] | None:
    """Return the solution of all samples in one go, or None where the method has none."""
    if candidate.follows_grid or candidate.solver is not None:
        field = batch.field()
        solution = batch.solve(candidate, field)
        return solution, torch.full((len(batch),), field.calls, device=batch.device)
    known = _CONTROLS - ({"time"} if candidate.method == "dopri5" else set())
    if candidate.method in _BY_SAMPLE and candidate.options.keys() <= known:
        rtol, atol = candidate.tolerances(batch.rtol, batch.atol)
        solver = PerSampleDopri5(**candidate.options)
        return solver.run(batch.func, batch.y0, batch.t, rtol=rtol, atol=atol)
    return None


def _one_by_one(
    candidate: Candidate,
    batch: Batch,
    samples: Tensor,
    tick: Callable[[int], object] = lambda _: None,
) -> tuple[State, Tensor]:
    solutions, nfe = [], []
    for index in samples.split(1):
        field = batch.field(index)
        solution = unless_broken(partial(batch.solve, candidate, field, index))
        if solution is None:
            nans = map_parts(lambda part: part * torch.nan, take(batch.y0, index))
            solution = batch.constant(nans)
        solutions.append(solution)
        nfe.append(field.calls)
        tick(1)
    return joined(solutions), torch.tensor(nfe, device=batch.device)


def _some_samples(batch: Batch) -> Tensor:
    """Return the positions of up to four samples, to compare solves together and alone on."""
    n = len(batch)
    positions: Tensor = torch.linspace(0, n - 1, min(4, n)).long().unique()
    return positions.to(batch.device)


def _are_close(solution: State, other: State) -> bool:
    """Return whether states differ by no more than other kernels' rounding would explain."""
    for part, alone in zip(parts_of(solution), parts_of(other), strict=True):
        slack = min(0.1, 10 * torch.finfo(part.dtype).eps ** 0.5)
        sizes = torch.where(torch.isfinite(alone), alone, 0).abs()
        atol = slack * float(sizes.max()) if sizes.numel() else 0.0
        if not torch.allclose(part, alone, rtol=slack, atol=atol, equal_nan=True):
            return False
    return True
