"""What could be gained: by an oracle, and by selectors fitted at other costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._state import State, parts_of
from torchdiffeq_hyper.dise._costs import check_settings
from torchdiffeq_hyper.dise._dispatch import take
from torchdiffeq_hyper.dise._labels import Labels
from torchdiffeq_hyper.dise._training import SelectorConfig, Split, predict, train


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


_PENALTIES = (1.5, 10.0, 100.0)
"""M in units of the dearest right answer, where none is given."""


def sweep(
    labels: Labels,
    y0: State,
    new_selector: Callable[[], nn.Module],
    config: SelectorConfig,
    *,
    alphas: Iterable[float],
    penalties: Iterable[float] | None,
    progress: bool,
) -> TradeOff:
    """Fit a selector at every alpha and M; return accuracy against calls, on held-out samples.

    Args:
        labels: what every candidate takes and achieves.
        y0: the starts.
        new_selector: makes an unfitted selector.
        config: how each selector is trained.
        alphas: values of alpha.
        penalties: values of M; None takes 1.5, 10 and 100 times the dearest right answer.
        progress: whether to show bars.

    Raises:
        OptionError: a value is not above 0, or an M is too small.
    """
    if penalties is None:
        dearest = float((labels.nfe.double() * labels.weight.double()).max())
        penalties = [factor * dearest for factor in _PENALTIES]
    settings = [check_settings(alpha, penalty) for alpha in alphas for penalty in penalties]
    split = Split.of(len(labels), config, parts_of(y0)[0].device)
    held = labels.of(split.held_out)
    matrices = [labels.costs(alpha, penalty) for alpha, penalty in settings]
    points = []
    for (alpha, penalty), costs in zip(settings, matrices, strict=True):
        selector = new_selector()
        train(selector, y0, costs, split, config, progress=progress)
        with torch.no_grad():
            out = predict(selector, take(y0, split.held_out), len(labels.names))
        chosen = out.argmin(dim=1)
        points.append(
            TradeOffPoint(
                alpha, penalty, held.mean_nfe(chosen), held.accuracy(chosen), held.shares(chosen)
            )
        )
    best = held.oracle()
    return TradeOff(
        points=tuple(sorted(points, key=lambda point: point.mean_nfe)),
        singles=singles(held),
        oracle=(held.mean_nfe(best), held.accuracy(best)),
        labels=labels,
    )


def one_candidate(labels: Labels, chosen: int, alpha: float, penalty: float) -> str:
    """Return a warning's text: what happened, and which of alpha and M to move where.

    Args:
        labels: what every candidate takes and achieves.
        chosen: the candidate that every sample goes to.
        alpha: of the cost.
        penalty: M of the cost.
    """
    name = labels.names[chosen]
    text = f"the selector sends every sample to {name!r}. "
    costs = labels.costs(alpha, penalty)
    if bool((costs.argmin(dim=1) == chosen).all()):
        return text + (
            "It is the cheapest right one for each of them, at any alpha and M: there is nothing "
            "to select. Use that method by itself, or add cheaper candidates."
        )
    everyone = torch.full((len(labels),), chosen, device=labels.nfe.device)
    is_most_accurate = labels.accuracy(everyone) >= float(labels.is_right.double().mean(0).max())
    is_cheapest = labels.mean_nfe(everyone) <= float(labels.nfe.double().mean(0).min())
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
