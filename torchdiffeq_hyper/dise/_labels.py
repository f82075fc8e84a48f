"""The calls of func and the right answers of every candidate on every sample, solved alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_hyper._fields import (
    HOW_TO_RESTRICT,
    check_independence,
    model_as_found,
    vector_field,
)
from torchdiffeq_hyper._state import State, VectorField, map_parts, parts_of, take
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.dise._costs import Cost
from torchdiffeq_hyper.dise._dispatch import Batch, GroupField, are_finite, count_samples, joined
from torchdiffeq_hyper.errors import (
    NoisyFieldError,
    NonFiniteError,
    OptionError,
    UnfinishedSolveError,
)
from torchdiffeq_hyper.fitting._batches import Starts, bind
from torchdiffeq_hyper.fitting._guard import left_as_found
from torchdiffeq_hyper.fitting._reference import BROKEN_DOWN
from torchdiffeq_hyper.solvers.per_sample import PerSampleDopri5


@dataclass(frozen=True)
class Labels:
    """What each candidate takes and achieves on each sample; matrices are (batch, candidates).

    Attributes:
        names: the candidates, as tables call them.
        nfe: calls of func for each sample solved alone. In float32 that of an adaptive
            method may be a step off: samples are measured together where that agrees, and
            rounding can tip whether a step is accepted.
        is_right: whether the answer is good enough.
        weight: what a call counts for in a right answer (1; for regression, the error).
    """

    names: tuple[str, ...]
    nfe: Tensor
    is_right: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.nfe)

    def costs(self, alpha: float, penalty: float) -> Tensor:
        r"""Return :math:`(\Delta \Gamma)^\alpha` of right answers, :math:`M^\alpha` of wrong ones.

        Raises:
            OptionError: ``penalty`` is smaller than what a right answer costs.
        """
        calls = self.weighted_nfe
        if len(calls) and penalty < float(calls.max()):
            most, costliest = calls.amax(dim=0).max(dim=0)
            raise OptionError(
                problem=f"penalty M is {penalty:g}, and {self.names[int(costliest)]} costs "
                f"{float(most):g}: a wrong answer would be cheaper than a right one.",
                expected="a penalty larger than what any right answer costs.",
                fix=f"penalty={10 * float(most):.3g}",
            )
        return torch.where(self.is_right, calls, penalty) ** alpha

    def oracle(self) -> Tensor:
        """Return for each sample the right candidate with the fewest calls of func.

        Where none is right, the one with the fewest calls.
        """
        worst = self.nfe.max() + 1 if len(self) else 0
        return (self.nfe + worst * ~self.is_right).argmin(dim=1)

    def mean_nfe(self, selection: Tensor) -> float:
        """Return the mean calls of func of a choice of candidates (batch,)."""
        return float(chosen(self.nfe, selection).double().mean())

    def accuracy(self, selection: Tensor) -> float:
        """Return the share of right answers of a choice of candidates (batch,)."""
        return float(chosen(self.is_right, selection).double().mean())

    def shares(self, selection: Tensor) -> dict[str, float]:
        """Return for each candidate the share of samples that a choice sends to it."""
        counts = torch.bincount(selection, minlength=len(self.names)).tolist()
        return {
            name: n / max(1, len(selection)) for name, n in zip(self.names, counts, strict=True)
        }

    def of(self, index: Tensor) -> Labels:
        """Return the labels of some samples."""
        return Labels(self.names, self.nfe[index], self.is_right[index], self.weight[index])

    @property
    def weighted_nfe(self) -> Tensor:
        r"""What right answers cost at alpha = 1, :math:`\Delta \Gamma` (batch, candidates)."""
        return self.nfe.double() * self.weight.double()


def chosen(matrix: Tensor, selection: Tensor) -> Tensor:
    """Return the entry of each sample's candidate, (batch,), from (batch, candidates)."""
    return matrix.gather(1, selection.unsqueeze(1)).squeeze(1)


def collect(
    candidates: Sequence[Candidate],
    func: VectorField,
    y0: State,
    t: Tensor,
    cost: Cost,
    *,
    known: Labels | None = None,
    rtol: Any,
    atol: Any,
    progress: bool,
) -> Labels:
    """Solve every sample with every candidate, alone, and return calls and right answers.

    Modules in func are put in evaluation mode meanwhile, and come back as found. What is
    ``known`` from an earlier call is returned if it belongs to so many samples and candidates.

    Raises:
        OptionError: y0 is empty, or what is known belongs to others.
        StateShapeError: ``cost`` is for another number of samples, or func has a wrong shape.
        NoisyFieldError: func draws fresh noise at each call.
        CoupledSamplesError: func makes samples depend on each other.
    """
    if known is not None:
        return _checked(known, count_samples(y0), len(candidates))
    if count_samples(y0) == 0:
        raise OptionError(
            problem="y0 is an empty batch.",
            expected="at least one sample.",
            fix="y0 = torch.randn(256, 2)",
        )
    cost.check(count_samples(y0))
    field = bind(vector_field(func), Starts(y0))
    batch = Batch.of(field, y0, t, rtol=rtol, atol=atol)
    index = torch.arange(len(batch), device=batch.device)
    total, columns = len(batch) * len(candidates), []
    with (
        left_as_found(func),
        model_as_found(field),
        left_as_found(getattr(cost, "predict", None) or getattr(cost, "error", None)),
        torch.no_grad(),
        tqdm(total=total, disable=not progress, unit="solve", desc="solving alone") as bar,
    ):
        _check_field(batch)
        for candidate in candidates:
            solution, nfe = _solve_alone(candidate, batch, bar.update)
            is_right, weight = cost.judge(solution, index)
            columns.append((nfe, is_right & are_finite(solution), weight))
    nfe, right, weight = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return Labels(_distinct([candidate.label for candidate in candidates]), nfe, right, weight)


def _checked(labels: Labels, batch: int, n_candidates: int) -> Labels:
    if labels.nfe.shape == (batch, n_candidates):
        return labels
    of_samples, of_candidates = labels.nfe.shape
    raise OptionError(
        problem=f"labels are of {of_samples} samples and {of_candidates} candidates.",
        expected=f"those of these {batch} samples and {n_candidates} candidates.",
        fix="labels=dise.suggest(func, y0, t, cost=cost).labels",
    )


def _distinct(labels: list[str]) -> tuple[str, ...]:
    """Return labels, numbered where they are the same."""
    earlier = [labels[:position].count(label) for position, label in enumerate(labels)]
    pairs = zip(labels, earlier, strict=True)
    return tuple(f"{label} #{count + 1}" if count else label for label, count in pairs)


def _check_field(batch: Batch) -> None:
    """Refuse a field that draws fresh noise, or whose samples cannot be solved alone."""
    # As the host does: a func may concatenate its time with its state.
    t0 = batch.t[0].to(parts_of(batch.y0)[0].abs().dtype)
    field = batch.field(None)
    if not _are_close(field(t0, batch.y0), field(t0, batch.y0)):
        raise NoisyFieldError(
            problem=f"func answers differently twice at t = {float(t0):.6g} and the same y: it "
            "draws fresh noise (or changes) at each call.",
            expected="the same answer at each call, so that an answer can be right or wrong.",
            fix=f"draw the noise once, before the solve, and keep it:\n{HOW_TO_RESTRICT}",
        )
    check_independence(batch.func, batch.y0, batch.t, groups=_some_samples(batch).split(1))


def _solve_alone(
    candidate: Candidate, batch: Batch, tick: Callable[[int], object]
) -> tuple[State, Tensor]:
    """Return a candidate's solution of every sample alone, and its calls of func (batch,).

    Methods on a grid take the whole batch at once and ``dopri5`` goes by
    ``dopri5_per_sample``; both are held against solves of a few samples alone, which
    decide. All other methods, and those that fail or differ, go sample by sample. A sample
    that the candidate cannot solve is nan, at the calls made until then. ``tick`` is told the
    number of samples solved.
    """
    together = _together(candidate, batch)
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
    """Return the solution of all samples in one go, or None where that cannot be."""
    known = _CONTROLS - ({"time"} if candidate.method == "dopri5" else set())
    try:
        if candidate.follows_grid or candidate.solver is not None:
            field = batch.field(None)
            solution = batch.solve(candidate, field)
            return solution, torch.full((len(batch),), field.calls, device=batch.device)
        if candidate.method in _BY_SAMPLE and candidate.options.keys() <= known:
            rtol, atol = candidate.tolerances(batch.rtol, batch.atol)
            solver = PerSampleDopri5(**candidate.options)
            return solver.run(batch.func, batch.y0, batch.t, rtol=rtol, atol=atol)
    except (NonFiniteError, UnfinishedSolveError, OptionError):
        pass  # sample by sample it shows which one fails, or whether func minds vmap only
    return None


def _one_by_one(
    candidate: Candidate,
    batch: Batch,
    samples: Tensor,
    tick: Callable[[int], object] | None = None,
) -> tuple[State, Tensor]:
    solutions, nfe = [], []
    for index in samples.split(1):
        field = batch.field(index)
        solutions.append(_solve_or_nan(candidate, batch, field))
        nfe.append(field.calls)
        if tick is not None:
            tick(1)
    return joined(solutions), torch.tensor(nfe, device=batch.device)


def _solve_or_nan(candidate: Candidate, batch: Batch, field: GroupField) -> State:
    try:
        return batch.solve(candidate, field)
    except (NonFiniteError, UnfinishedSolveError):
        pass
    except AssertionError as error:
        if not str(error).startswith(BROKEN_DOWN):
            raise
    shape = (len(batch.t), 1)
    return map_parts(lambda part: part.new_full((*shape, *part.shape[1:]), torch.nan), batch.y0)


def _some_samples(batch: Batch) -> Tensor:
    """Return the positions of up to four samples, on which shortcuts are held against solves."""
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
