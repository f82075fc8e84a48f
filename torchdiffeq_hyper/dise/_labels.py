"""What every candidate takes and achieves on every sample."""

from __future__ import annotations

from collections.abc import Sequence
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
from torchdiffeq_hyper._state import State, VectorField, parts_of
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.dise._costs import Cost
from torchdiffeq_hyper.dise._dispatch import (
    GroupField,
    are_finite,
    concatenate,
    count,
    solve_group,
    take,
)
from torchdiffeq_hyper.errors import (
    NoisyFieldError,
    NonFiniteError,
    OptionError,
    UnfinishedSolveError,
    explain,
)
from torchdiffeq_hyper.fitting._context import Starts, bind
from torchdiffeq_hyper.fitting._guard import left_as_found
from torchdiffeq_hyper.solvers._grid import check_times
from torchdiffeq_hyper.solvers.per_sample import PerSampleDopri5

PROBES = 4
"""Samples on which a solve of all samples together is held against solves alone."""

_CONTROLS = {field.name for field in fields(PerSampleDopri5)}
# How torchdiffeq's adaptive methods say that they cannot go on.
_BROKEN = ("underflow in dt", "non-finite values in state", "max_num_steps exceeded")


@dataclass(frozen=True)
class Alone:
    """A batch whose samples are solved one by one.

    Methods on a grid take the whole batch at once and ``dopri5`` goes by
    ``dopri5_per_sample``; both are held against solves of a few samples alone, which
    decide. All other methods, and those that fail or differ, go sample by sample.

    Attributes:
        func: the vector field of the batch.
        y0: the states, samples along dim 0.
        t: times.
        rtol: relative tolerance of candidates that have none.
        atol: absolute tolerance of candidates that have none.
        bar: counts solved samples.
    """

    func: VectorField
    y0: State
    t: Tensor
    rtol: Any
    atol: Any
    bar: tqdm[Any]

    def solve(self, candidate: Candidate) -> tuple[State, Tensor]:
        """Return a candidate's solution of every sample, and its calls of func (batch,).

        A sample that the candidate cannot solve is nan, at the calls made until then.
        """
        batch = count(self.y0)
        together = self._together(candidate)
        if together is not None:
            solution, nfe = together
            probes = _probes(batch)
            alone, calls = self._one_by_one(candidate, probes)
            index = torch.tensor(probes, device=nfe.device)
            if torch.equal(nfe[index], calls) and _are_close(take(solution, index, 1), alone):
                self.bar.update(batch)
                return together
        return self._one_by_one(candidate, list(range(batch)), self.bar)

    def _together(self, candidate: Candidate) -> tuple[State, Tensor] | None:
        """Return the solution of all samples in one go, or None where that cannot be."""
        func, y0, rtol, atol = self.func, self.y0, self.rtol, self.atol
        known = _CONTROLS - ({"time"} if candidate.method == "dopri5" else set())
        try:
            if candidate.follows_grid or candidate.solver is not None:
                field = GroupField(func, y0, None)
                solution = solve_group(candidate, field, self.t, rtol=rtol, atol=atol)
                nfe = torch.full((count(y0),), field.calls, device=parts_of(y0)[0].device)
                return solution, nfe
            if candidate.method in _BY_SAMPLE and candidate.options.keys() <= known:
                rtol = rtol if candidate.rtol is None else candidate.rtol
                atol = atol if candidate.atol is None else candidate.atol
                solver = PerSampleDopri5(**candidate.options)
                return solver.run(func, y0, self.t, rtol=rtol, atol=atol)
        except (NonFiniteError, UnfinishedSolveError, OptionError):
            pass  # sample by sample it shows which one fails, or whether func minds vmap only
        return None

    def _one_by_one(
        self, candidate: Candidate, samples: list[int], bar: tqdm[Any] | None = None
    ) -> tuple[State, Tensor]:
        device = parts_of(self.y0)[0].device
        solutions, nfe = [], []
        for sample in samples:
            field = GroupField(self.func, self.y0, torch.tensor([sample], device=device))
            solutions.append(self._one(candidate, field))
            nfe.append(field.calls)
            if bar is not None:
                bar.update()
        return concatenate(solutions), torch.tensor(nfe, device=device)

    def _one(self, candidate: Candidate, field: GroupField) -> State:
        try:
            return solve_group(candidate, field, self.t, rtol=self.rtol, atol=self.atol)
        except (NonFiniteError, UnfinishedSolveError):
            pass
        except AssertionError as error:
            if not str(error).startswith(_BROKEN):
                raise
        nothing = tuple(
            part.new_full((len(self.t), 1, *part.shape[1:]), torch.nan)
            for part in parts_of(self.y0)
        )
        return nothing if isinstance(self.y0, tuple) else nothing[0]


_BY_SAMPLE = ("dopri5", "dopri5_per_sample")


def check_field(func: VectorField, y0: State, t: Tensor) -> None:
    """Refuse a field whose samples cannot be solved alone.

    Raises:
        NoisyFieldError: func answers differently the second time.
        StateShapeError: func returned another shape, or cannot take a sample alone.
        CoupledSamplesError: a sample alone has another derivative than in the batch.
    """
    first = parts_of(y0)[0]
    # As the host does: a func may concatenate its time with its state.
    t0 = t[0].to(first.abs().dtype)
    whole = GroupField(func, y0, None)
    together = _as_solution(whole(t0, y0))
    if not _are_close(together, _as_solution(whole(t0, y0))):
        raise NoisyFieldError(
            explain(
                f"func answers differently twice at t = {float(t0):.6g} and the same y: it draws "
                "fresh noise (or changes) at each call.",
                "the same answer at each call, so that an answer can be right or wrong.",
                f"draw the noise once, before the solve, and keep it:\n{HOW_TO_RESTRICT}",
            )
        )
    samples = torch.tensor(_probes(count(y0)), device=first.device)
    check_independence(func, y0, t, groups=samples.split(1))


def _as_solution(k: State) -> State:
    return k.unsqueeze(0) if isinstance(k, Tensor) else tuple(part.unsqueeze(0) for part in k)


def _probes(batch: int) -> list[int]:
    probes: list[int] = torch.linspace(0, batch - 1, min(PROBES, batch)).long().unique().tolist()
    return probes


def _are_close(solution: State, other: State) -> bool:
    """Return whether solutions differ by no more than other kernels' rounding would explain."""
    for part, alone in zip(parts_of(solution), parts_of(other), strict=True):
        slack = min(0.1, 10 * torch.finfo(part.dtype).eps ** 0.5)
        if not torch.allclose(part, alone, rtol=slack, atol=slack * _size(alone), equal_nan=True):
            return False
    return True


def _size(y: Tensor) -> float:
    finite = y[torch.isfinite(y)].abs()
    return float(finite.max()) if finite.numel() else 0.0


@dataclass(frozen=True)
class Labels:
    """What was found out about every sample and candidate; all matrices (batch, candidates).

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
        calls = self.nfe.double() * self.weight.double()
        if len(calls) and penalty < float(calls.max()):
            raise OptionError(
                explain(
                    f"penalty M is {penalty:g}, and {self._dearest(calls)} costs "
                    f"{float(calls.max()):g}: a wrong answer would be cheaper than a right one.",
                    "a penalty larger than what any right answer costs.",
                    f"penalty={10 * float(calls.max()):.3g}",
                )
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
        return float(self._chosen(self.nfe, selection).double().mean())

    def accuracy(self, selection: Tensor) -> float:
        """Return the share of right answers of a choice of candidates (batch,)."""
        return float(self._chosen(self.is_right, selection).double().mean())

    def shares(self, selection: Tensor) -> dict[str, float]:
        """Return for each candidate the share of samples that a choice sends to it."""
        counts = torch.bincount(selection, minlength=len(self.names)).tolist()
        return {
            name: n / max(1, len(selection)) for name, n in zip(self.names, counts, strict=True)
        }

    def of(self, index: Tensor) -> Labels:
        """Return the labels of some samples."""
        return Labels(self.names, self.nfe[index], self.is_right[index], self.weight[index])

    @staticmethod
    def _chosen(matrix: Tensor, selection: Tensor) -> Tensor:
        return matrix.gather(1, selection.unsqueeze(1)).squeeze(1)

    def _dearest(self, calls: Tensor) -> str:
        return self.names[int(calls.amax(dim=0).argmax())]


def collect(
    candidates: Sequence[Candidate],
    func: VectorField,
    y0: State,
    t: Tensor,
    cost: Cost,
    *,
    rtol: Any,
    atol: Any,
    progress: bool,
) -> Labels:
    """Solve every sample with every candidate, alone, and judge the answers.

    Modules in func are put in evaluation mode meanwhile, and come back as found.

    Raises:
        OptionError: y0 is empty.
        StateShapeError: ``cost`` is for another number of samples, or func has a wrong shape.
        NoisyFieldError: func draws fresh noise at each call.
        CoupledSamplesError: func makes samples depend on each other.
    """
    batch = count(y0)
    if batch == 0:
        raise OptionError(
            explain("y0 is an empty batch.", "at least one sample.", "y0 = torch.randn(256, 2)")
        )
    cost.check(batch)
    t = check_times(t, parts_of(y0)[0])
    index = torch.arange(batch, device=t.device)
    field = bind(vector_field(func), Starts(y0))
    columns = []
    total = batch * len(candidates)
    with (
        left_as_found(func),
        model_as_found(field),
        left_as_found(getattr(cost, "predict", None) or getattr(cost, "error", None)),
        torch.no_grad(),
        tqdm(total=total, disable=not progress, unit="solve", desc="solving alone") as bar,
    ):
        check_field(field, y0, t)
        alone = Alone(field, y0, t, rtol, atol, bar)
        for candidate in candidates:
            solution, nfe = alone.solve(candidate)
            is_right, weight = cost.judge(solution, index)
            is_right = is_right & are_finite(solution)
            columns.append((nfe, is_right, weight))
    nfe, right, weight = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return Labels(tuple(_distinct(candidates)), nfe, right, weight)


def _distinct(candidates: Sequence[Candidate]) -> list[str]:
    """Return the candidates' labels, numbered where they are the same."""
    names: list[str] = []
    for candidate in candidates:
        taken = sum(name.split(" #")[0] == candidate.label for name in names)
        names.append(candidate.label + (f" #{taken + 1}" if taken else ""))
    return names
