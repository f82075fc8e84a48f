"""What a fit of a selector measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.dise._labels import Labels
from torchdiffeq_hyper.dise._tradeoff import table_head


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
        return float(self._held_costs.gather(1, self._chosen.unsqueeze(1)).mean())

    def __str__(self) -> str:
        """Return a table of the candidates and of v beside them."""
        held, costs = self._held, self._held_costs
        rows = []
        for position, name in enumerate(held.names):
            always = torch.full_like(self._chosen, position)
            share = f"{self.shares[name]:.0%}"
            rows.append(_row(name, held, always, float(costs[:, position].mean()), share))
        rows.append(_row("selector", held, self._chosen, self._mean_cost, ""))
        rows.append(_row("oracle", held, costs.argmin(dim=1), self._mean_cost - self.regret, ""))
        summary = (
            f"{len(held)} held-out samples, alpha {self.alpha:g}, M {self.penalty:g}; regret "
            f"{self.regret:.3g} against the oracle, {self.regret_to_single:+.3g} against "
            f"{self.best_single} alone; {self.seconds:.1f} s ({self.label_seconds:.1f} s for "
            "solving every sample alone)"
        )
        head = table_head(("method", "mean NFE", "right", "mean cost", "selected"))
        return "\n".join([*head, *rows, "", summary])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the matrices and vectors, by name."""
        labels = self.labels
        return {
            "nfe": labels.nfe,
            "is_right": labels.is_right,
            "weight": labels.weight,
            "selection": self.selection,
            "held_out": self.held_out,
        }

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
        matrices = (tensors[name] for name in ("nfe", "is_right", "weight"))
        return cls(
            labels=Labels(tuple(map(str, data["names"])), *matrices),
            alpha=float(data["alpha"]),
            penalty=float(data["penalty"]),
            selection=tensors["selection"],
            held_out=tensors["held_out"],
            losses=tuple((int(n), float(a), float(b)) for n, a, b in data["losses"]),
            label_seconds=float(data["label_seconds"]),
            seconds=float(data["seconds"]),
        )


def _row(name: str, labels: Labels, selection: Tensor, cost: float, share: str) -> str:
    nfe, right = labels.mean_nfe(selection), labels.accuracy(selection)
    return f"| {name} | {nfe:.2f} | {right:.4f} | {cost:.4g} | {share} |"
