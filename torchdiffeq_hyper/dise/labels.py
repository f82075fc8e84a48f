"""What every candidate takes and achieves on every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_hyper._grid import check_times
from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.dise.alone import Alone, check_field
from torchdiffeq_hyper.dise.candidates import Candidate
from torchdiffeq_hyper.dise.costs import Cost
from torchdiffeq_hyper.dise.samples import are_finite, count
from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.fitting.context import Starts, bind
from torchdiffeq_hyper.fitting.guard import left_as_found
from torchdiffeq_hyper.fitting.neural_ode import attributes_kept, vector_field


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
        attributes_kept(field),
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
