"""A sweep over alpha and M: what a selector would save, and what it would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.config import SelectorConfig
from torchdiffeq_hyper.dise.costs import check_settings
from torchdiffeq_hyper.dise.labels import Labels
from torchdiffeq_hyper.dise.samples import take
from torchdiffeq_hyper.dise.tradeoff import TradeOff, TradeOffPoint, singles
from torchdiffeq_hyper.dise.training import Split, predict, train

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
