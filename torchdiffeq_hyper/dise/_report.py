"""What was measured: by a fit of a selector, by an oracle, and at other costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchdiffeq_hyper.dise._labels import Labels, chosen


@dataclass(frozen=True)
class Oracle:
    """For each sample the right candidate with the fewest calls of func.

    Attributes:
        labels: calls of func and right answers of every candidate on every sample.
        selection: the oracle's choices (batch,); `Dise.dispatch` takes them.
    """

    labels: Labels
    selection: Tensor

    @property
    def mean_nfe(self) -> float:
        """Mean calls of func with the oracle's choices."""
        return self.labels.mean_nfe(self.selection)

    @property
    def accuracy(self) -> float:
        """Share of right answers with the oracle's choices."""
        return self.labels.accuracy(self.selection)

    @property
    def shares(self) -> dict[str, float]:
        """Share of samples sent to each candidate."""
        return self.labels.shares(self.selection)

    def __str__(self) -> str:
        """Return a table of the candidates and of the oracle beside them."""
        rows = [
            (name, *_means(nfe, right), f"{self.shares[name]:.0%}")
            for name, nfe, right in singles(self.labels)
        ]
        own = ("oracle", *_means(self.mean_nfe, self.accuracy), "")
        return _table(("method", "mean NFE", "right", "selected"), *rows, own)


@dataclass(frozen=True)
class TradeOffPoint:
    """One setting of a sweep; means over held-out samples.

    Attributes:
        alpha: of the cost.
        penalty: M of the cost.
        mean_nfe: mean calls of func with the choices of a selector fitted at this setting.
        accuracy: share of right answers with them.
        shares: share of samples sent to each candidate.
    """

    alpha: float
    penalty: float
    mean_nfe: float
    accuracy: float
    shares: dict[str, float]


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

    def cheapest(self, accuracy: float) -> TradeOffPoint | None:
        """Return the setting with the fewest calls among those at least so accurate, if any."""
        return next((point for point in self.points if point.accuracy >= accuracy), None)

    def __str__(self) -> str:
        """Return a table."""
        rows = [
            (
                f"alpha {p.alpha:g}, M {p.penalty:g}",
                *_means(p.mean_nfe, p.accuracy),
                ", ".join(f"{name} {share:.0%}" for name, share in p.shares.items() if share),
            )
            for p in self.points
        ]
        rows += [(name, *_means(nfe, right), "") for name, nfe, right in self.singles]
        rows.append(("oracle", *_means(*self.oracle), ""))
        return _table(("setting", "mean NFE", "right", "selected"), *rows)


_MATRICES = ("nfe", "is_right", "weight")


@dataclass(frozen=True)
class DiseReport:
    """What a fit of a selector measured; all means are over held-out samples.

    Attributes:
        labels: calls of func and right answers of every candidate on every sample.
        alpha: of the cost.
        penalty: M of the cost.
        selection: the candidate that v chooses for each sample (batch,).
        held_out: positions of the samples that v was not fitted on.
        losses: (iteration, training loss, held-out loss), squared errors of the costs in
            units of their variance.
        label_seconds: wall time of solving and judging every sample alone.
        seconds: wall time of the fit, all included.
    """

    labels: Labels
    alpha: float
    penalty: float
    selection: Tensor
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
    def mean_nfe(self) -> float:
        """Mean calls of func with v's choices, each sample solved alone."""
        return self._held.mean_nfe(self._chosen)

    @property
    def accuracy(self) -> float:
        """Share of right answers with v's choices."""
        return self._held.accuracy(self._chosen)

    @property
    def shares(self) -> dict[str, float]:
        """Share of samples sent to each candidate."""
        return self._held.shares(self._chosen)

    @property
    def regret(self) -> float:
        """Mean cost of v's choices above that of an oracle's; 0 is perfect."""
        return self._mean_cost - float(self._held_costs.amin(dim=1).mean())

    @property
    def regret_to_single(self) -> float:
        """Mean cost of v's choices above that of the best single candidate; below 0 is a gain."""
        return self._mean_cost - float(self._held_costs.mean(dim=0).min())

    @property
    def best_single(self) -> str:
        """The candidate with the smallest mean cost."""
        return self.labels.names[int(self._held_costs.mean(dim=0).argmin())]

    @property
    def _held(self) -> Labels:
        return self.labels.of(self.held_out)

    @property
    def _chosen(self) -> Tensor:
        return self.selection[self.held_out]

    @property
    def _held_costs(self) -> Tensor:
        return self.costs[self.held_out]

    @property
    def _mean_cost(self) -> float:
        return float(chosen(self._held_costs, self._chosen).mean())

    def __str__(self) -> str:
        """Return a table of the candidates and of v beside them."""
        held, costs = self._held, self._held_costs
        best = costs.argmin(dim=1)
        rows = [
            (name, *_means(nfe, right), f"{cost:.4g}", f"{self.shares[name]:.0%}")
            for (name, nfe, right), cost in zip(
                singles(held), costs.mean(dim=0).tolist(), strict=True
            )
        ]
        for name, choice in (("selector", self._chosen), ("oracle", best)):
            means = _means(held.mean_nfe(choice), held.accuracy(choice))
            rows.append((name, *means, f"{float(chosen(costs, choice).mean()):.4g}", ""))
        summary = (
            f"{len(held)} held-out samples, alpha {self.alpha:g}, M {self.penalty:g}; regret "
            f"{self.regret:.3g} against the oracle, {self.regret_to_single:+.3g} against "
            f"{self.best_single} alone; {self.seconds:.1f} s ({self.label_seconds:.1f} s for "
            "solving every sample alone)"
        )
        table = _table(("method", "mean NFE", "right", "mean cost", "selected"), *rows)
        return f"{table}\n\n{summary}"

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the matrices and vectors, by name."""
        matrices = {name: getattr(self.labels, name) for name in _MATRICES}
        return {**matrices, "selection": self.selection, "held_out": self.held_out}

    def to_dict(self) -> dict[str, Any]:
        """Return all other fields as JSON-ready values."""
        return {
            "names": list(self.labels.names),
            "alpha": self.alpha,
            "penalty": self.penalty,
            "losses": [list(point) for point in self.losses],
            "label_seconds": self.label_seconds,
            "seconds": self.seconds,
        }

    @classmethod
    def from_parts(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> DiseReport:
        """Rebuild from what `to_dict` and `to_tensors` returned."""
        numbers = ("alpha", "penalty", "label_seconds", "seconds")
        return cls(
            labels=Labels(tuple(data["names"]), *(tensors[name] for name in _MATRICES)),
            selection=tensors["selection"],
            held_out=tensors["held_out"],
            losses=tuple((n, float(a), float(b)) for n, a, b in data["losses"]),
            **{name: float(data[name]) for name in numbers},
        )


def singles(labels: Labels) -> tuple[tuple[str, float, float], ...]:
    """Return name, mean calls of func and share of right answers of each candidate alone."""
    nfe, right = (matrix.double().mean(dim=0).tolist() for matrix in (labels.nfe, labels.is_right))
    return tuple(zip(labels.names, nfe, right, strict=True))


def _means(nfe: float, right: float) -> tuple[str, str]:
    return f"{nfe:.2f}", f"{right:.4f}"


def _table(head: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def one_candidate(labels: Labels, position: int, alpha: float, penalty: float) -> str:
    """Return the warning that a selector always takes one candidate, and how to change that.

    Args:
        labels: what every candidate takes and achieves.
        position: the candidate's position.
        alpha: of the cost.
        penalty: M of the cost.
    """
    name = labels.names[position]
    text = f"the selector sends every sample to {name!r}. "
    costs = labels.costs(alpha, penalty)
    if bool((costs.argmin(dim=1) == position).all()):
        return text + (
            "It is the cheapest right one for each of them, at any alpha and M: there is nothing "
            "to select. Use that method by itself, or add cheaper candidates."
        )
    _, nfe, right = zip(*singles(labels), strict=True)
    is_most_accurate, is_cheapest = right[position] == max(right), nfe[position] == min(nfe)
    fewer_calls = (
        f"to save calls of func, make wrong answers weigh less: penalty M down from {penalty:g} "
        f"(towards the largest NFE, {int(labels.nfe.max())}) or alpha down from {alpha:g}"
    )
    more_right = (
        "to get more right answers, make wrong ones weigh more: penalty M up "
        f"(penalty={10 * penalty:g}) or alpha up (alpha={2 * alpha:g})"
    )
    if is_most_accurate and not is_cheapest:
        advice = fewer_calls
    elif is_cheapest and not is_most_accurate:
        advice = more_right
    else:
        advice = f"{fewer_calls}; {more_right}"
    return text + advice[0].upper() + advice[1:] + ". dise.suggest(...) shows the trade-off."
