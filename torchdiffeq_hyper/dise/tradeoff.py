"""What could be gained: by an oracle, and by selectors fitted at other costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchdiffeq_hyper.dise.labels import Labels


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
        head = table_head(("method", "mean NFE", "right", "selected"))
        shares = [f"{self.shares[name]:.0%}" for name in self.labels.names]
        rows = [
            f"| {name} | {nfe:.2f} | {right:.4f} | {share} |"
            for (name, nfe, right), share in zip(singles(self.labels), shares, strict=True)
        ]
        return "\n".join(
            [*head, *rows, f"| oracle | {self.mean_nfe:.2f} | {self.accuracy:.4f} | |"]
        )


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
            f"| alpha {p.alpha:g}, M {p.penalty:g} | {p.mean_nfe:.2f} | {p.accuracy:.4f} | "
            + ", ".join(f"{name} {share:.0%}" for name, share in p.shares.items() if share)
            + " |"
            for p in self.points
        ]
        rows += [f"| {name} | {nfe:.2f} | {right:.4f} | |" for name, nfe, right in self.singles]
        rows.append(f"| oracle | {self.oracle[0]:.2f} | {self.oracle[1]:.4f} | |")
        return "\n".join([*table_head(("setting", "mean NFE", "right", "selected")), *rows])


def singles(labels: Labels) -> tuple[tuple[str, float, float], ...]:
    """Return name, mean calls of func and share of right answers of each candidate alone."""
    nfe, right = (matrix.double().mean(dim=0).tolist() for matrix in (labels.nfe, labels.is_right))
    return tuple(zip(labels.names, nfe, right, strict=True))


def table_head(names: tuple[str, ...]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
