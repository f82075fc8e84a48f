"""What is known of every candidate on every sample, and the reports made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.evaluation._table import markdown


@dataclass(frozen=True)
class Labels:
    """What each candidate takes and achieves on each sample; matrices are (batch, candidates).

    Attributes:
        names: the candidates, as tables call them.
        nfe: calls of func for each sample solved alone. In float32 that of an adaptive method
            may be a step off: rounding can tip whether a step is accepted.
        is_right: whether the answer is good enough.
        weight: what a call counts for in a right answer (1; for regression, the error).
    """

    names: tuple[str, ...]
    nfe: Tensor
    is_right: Tensor
    weight: Tensor

    def costs(self, alpha: float, penalty: float) -> Tensor:
        r"""Return :math:`(\Delta \Gamma)^\alpha` of right answers, :math:`M^\alpha` of wrong ones.

        Raises:
            OptionError: ``penalty`` is smaller than what a right answer costs.
        """
        calls = self.weighted_nfe
        if len(calls) and penalty < float(calls.max()):
            most, costliest = calls.amax(dim=0).max(dim=0)
            name = self.names[int(costliest)]
            raise OptionError(
                problem=f"penalty M is {penalty:g}, and {name} costs {float(most):g}.",
                expected="a penalty larger than what any right answer costs.",
                fix=f"penalty={10 * float(most):.3g}",
            )
        return torch.where(self.is_right, calls, penalty) ** alpha

    def oracle(self) -> Tensor:
        """Return each sample's candidate with the fewest calls: of the right ones, if any is."""
        worst = self.nfe.max() + 1 if len(self.nfe) else 0
        return (self.nfe + worst * ~self.is_right).argmin(dim=1)

    def of(self, index: Tensor) -> Labels:
        """Return the labels of some samples."""
        return Labels(self.names, self.nfe[index], self.is_right[index], self.weight[index])

    @property
    def weighted_nfe(self) -> Tensor:
        r"""What right answers cost at alpha = 1, :math:`\Delta \Gamma` (batch, candidates)."""
        return self.nfe.double() * self.weight.double()

    @property
    def singles(self) -> tuple[tuple[str, float, float], ...]:
        """Name, mean calls of func and share of right answers of each candidate alone."""
        means = (matrix.double().mean(dim=0).tolist() for matrix in (self.nfe, self.is_right))
        return tuple(zip(self.names, *means, strict=True))


def _table(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """Return a table of names, mean calls, shares of right answers, and further cells."""
    cells = [(name, f"{nfe:.2f}", f"{right:.4f}", *rest) for name, nfe, right, *rest in rows]
    return markdown([(columns[0], "mean NFE", "right", *columns[1:]), *cells])


@dataclass(frozen=True)
class Choice:
    """A candidate for each sample, and what they achieve.

    Attributes:
        labels: calls of func and right answers of every candidate on every sample.
        selection: the choices (batch,); `Dise.dispatch` takes them.
    """

    labels: Labels
    selection: Tensor

    @property
    def _counted(self) -> Tensor | slice:
        """Positions of the samples that means and shares are over."""
        return slice(None)

    def mean(self, matrix: Tensor) -> float:
        """Return the mean entry of the chosen candidates in a matrix (batch, candidates)."""
        chosen = matrix.gather(1, self.selection.unsqueeze(1))
        return float(chosen[self._counted].double().mean())

    @property
    def mean_nfe(self) -> float:
        """Mean calls of func with these choices, each sample solved alone."""
        return self.mean(self.labels.nfe)

    @property
    def accuracy(self) -> float:
        """Share of right answers with these choices."""
        return self.mean(self.labels.is_right)

    @property
    def shares(self) -> dict[str, float]:
        """Share of samples sent to each candidate."""
        chosen, names = self.selection[self._counted], self.labels.names
        shares = torch.bincount(chosen, minlength=len(names)).double() / max(1, len(chosen))
        return dict(zip(names, shares.tolist(), strict=True))


class Oracle(Choice):
    """For each sample the right candidate with the fewest calls of func."""

    def __str__(self) -> str:
        """Return a table of the candidates and of the oracle beside them."""
        rows = [(*single, f"{self.shares[single[0]]:.0%}") for single in self.labels.singles]
        rows.append(("oracle", self.mean_nfe, self.accuracy, ""))
        return _table(("method", "selected"), rows)


@dataclass(frozen=True)
class TradeOffPoint(Choice):
    """One setting of a sweep: alpha, M, and a selector's choices for held-out samples."""

    alpha: float
    penalty: float


@dataclass(frozen=True)
class TradeOff:
    """What a sweep over alpha and M found.

    Attributes:
        points: one a setting, in the order of the mean calls of func.
        singles: name, mean calls of func and share of right answers of each candidate alone.
        oracle: mean calls of func and share of right answers of the oracle.
        labels: what was measured of every sample; `Dise.fit` takes it to spare the solves.
    """

    points: tuple[TradeOffPoint, ...]
    singles: tuple[tuple[str, float, float], ...]
    oracle: tuple[float, float]
    labels: Labels

    def __str__(self) -> str:
        """Return a table."""
        rows: list[tuple[Any, ...]] = []
        for p in self.points:
            chosen = ", ".join(f"{name} {share:.0%}" for name, share in p.shares.items() if share)
            rows.append((f"alpha {p.alpha:g}, M {p.penalty:g}", p.mean_nfe, p.accuracy, chosen))
        rows += [(*single, "") for single in (*self.singles, ("oracle", *self.oracle))]
        return _table(("setting", "selected"), rows)


@dataclass(frozen=True)
class DiseReport(Choice):
    """What a fit of a selector measured; all means are over held-out samples.

    Attributes:
        labels: calls of func and right answers of every candidate on every sample.
        selection: the candidate that v chooses for each sample (batch,).
        alpha: of the cost, as is M, the ``penalty``.
        held_out: positions of the samples that v was not fitted on.
        losses: (iteration, training loss, held-out loss), squared errors of the costs in
            units of their variance.
        label_seconds: wall time of solving every sample alone.
        seconds: wall time of the fit, all included.
    """

    alpha: float
    penalty: float
    held_out: Tensor
    losses: tuple[tuple[int, float, float], ...]
    label_seconds: float
    seconds: float

    @property
    def nfe(self) -> Tensor:
        """Calls of func for each sample solved alone (batch, candidates)."""
        return self.labels.nfe

    @property
    def costs(self) -> Tensor:
        """The cost matrix (batch, candidates)."""
        return self.labels.costs(self.alpha, self.penalty)

    @property
    def _counted(self) -> Tensor:
        return self.held_out

    @property
    def regret(self) -> float:
        """Mean cost of v's choices above that of an oracle's; 0 is perfect."""
        return self.mean(self.costs) - float(self.costs[self.held_out].amin(dim=1).mean())

    @property
    def regret_to_single(self) -> float:
        """Mean cost of v's choices above that of the best single candidate; below 0 is a gain."""
        return self.mean(self.costs) - float(self._single_costs.min())

    @property
    def best_single(self) -> str:
        """The candidate with the smallest mean cost."""
        return self.labels.names[int(self._single_costs.argmin())]

    @property
    def _single_costs(self) -> Tensor:
        return self.costs[self.held_out].mean(dim=0)

    def __str__(self) -> str:
        """Return a table of the candidates and of v beside them."""
        costs, shares, singles = self.costs, self.shares, self.labels.of(self.held_out).singles
        rows: list[tuple[Any, ...]] = [
            (*single, f"{cost:.4g}", f"{shares[single[0]]:.0%}")
            for single, cost in zip(singles, self._single_costs.tolist(), strict=True)
        ]
        oracle = replace(self, selection=costs.argmin(dim=1))
        for name, choice in (("selector", self), ("oracle", oracle)):
            mean_cost = f"{choice.mean(costs):.4g}"
            rows.append((name, choice.mean_nfe, choice.accuracy, mean_cost, ""))
        return (
            f"{_table(('method', 'mean cost', 'selected'), rows)}\n\n"
            f"{len(self.held_out)} held-out samples, alpha {self.alpha:g}, M {self.penalty:g}; "
            f"regret {self.regret:.3g} against the oracle, {self.regret_to_single:+.3g} against "
            f"{self.best_single} alone; {self.seconds:.1f} s ({self.label_seconds:.1f} s for "
            "solving every sample alone)"
        )


def one_candidate(labels: Labels, position: int, alpha: float, penalty: float) -> str:
    """Return the warning that a selector always takes one candidate, and how to change that."""
    text = f"the selector sends every sample to {labels.names[position]!r}. "
    if bool((labels.costs(alpha, penalty).argmin(dim=1) == position).all()):
        return text + (
            "It is the cheapest right one for each, at any alpha and M: there is nothing to "
            "select. Use that method by itself, or add cheaper candidates."
        )
    _, nfe, right = zip(*labels.singles, strict=True)
    is_most_accurate, is_cheapest = right[position] == max(right), nfe[position] == min(nfe)
    if is_most_accurate or not is_cheapest:
        text += (
            f"To save calls of func, turn alpha down from {alpha:g}, or penalty M down from "
            f"{penalty:g} (towards the largest NFE, {int(labels.nfe.max())}). "
        )
    if is_cheapest or not is_most_accurate:
        ways = f"alpha up (alpha={2 * alpha:g}), or penalty M up (penalty={10 * penalty:g})"
        text += f"To get more right answers, turn {ways}. "
    return text + "dise.suggest(...) shows the trade-off."
