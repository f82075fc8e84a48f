"""Regression of costs on starts: how a selector learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from torchdiffeq_hyper._fields import frozen_or_restored, own_random_state
from torchdiffeq_hyper._state import State, parts_of, take
from torchdiffeq_hyper.dise._costs import check_settings
from torchdiffeq_hyper.dise._report import Labels, TradeOff, TradeOffPoint
from torchdiffeq_hyper.dise._solves import count_samples
from torchdiffeq_hyper.dise.selectors import ReadySelector, ready
from torchdiffeq_hyper.errors import (
    FitDivergedError,
    MissingHypernetError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
)


@dataclass(frozen=True)
class SelectorConfig:
    """How `Dise.fit` trains a selector: AdamW on the squared error of its costs.

    Attributes:
        iterations: batches trained on.
        lr: initial learning rate, annealed to a hundredth of it along a cosine.
        weight_decay: weight decay of AdamW.
        batch_size: samples in a batch.
        validation: fraction of the samples that is held out; the best state on them is kept.
        seed: seeds the split, the batches, the net's start and its dropout. Global random
            state is not touched.

    Raises:
        OptionError: a value is impossible; the text names it.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> tdh.SelectorConfig(iterations=500, seed=1).validation
        0.2
    """

    iterations: int = 1500
    lr: float = 3e-3
    weight_decay: float = 1e-3
    batch_size: int = 64
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name, low in (("iterations", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, is_int and value >= low, f"an int of at least {low}", low)
        for name, lowest in (("lr", 1e-9), ("weight_decay", 0.0)):
            value = getattr(self, name)
            is_number = isinstance(value, float | int) and math.isfinite(value)
            self._require(name, is_number and value >= lowest, "a finite number above 0", 1e-3)
        share = self.validation
        is_share = isinstance(share, float) and 0 < share < 1
        self._require("validation", is_share, "a fraction between 0 and 1, both excluded", 0.2)

    def _require(self, name: str, is_valid: object, expected: str, example: float) -> None:
        if not is_valid:
            raise OptionError(
                problem=f"{name} is {getattr(self, name)!r}.",
                expected=f"{expected}.",
                fix=f"tdh.SelectorConfig({name}={example})",
            )


VALIDATIONS = 50


@dataclass(frozen=True)
class Scale:
    """The unit in which a selector predicts: costs are ``shift + scale * prediction``.

    Mean and standard deviation of all costs: one unit for all candidates, so that the smallest
    prediction is the smallest cost. (A logarithm would not do: v estimates a mean, and wrong
    answers must weigh in it.)
    """

    shift: float
    scale: float


def split(y0: State, config: SelectorConfig) -> tuple[Tensor, Tensor]:
    """Return the positions of the samples to train on and of those held out, at random."""
    batch = count_samples(y0)
    if batch < 2:
        raise OptionError(
            problem=f"y0 has {batch} sample{'s' * (batch != 1)}: none would be left to measure "
            "the fit on.",
            expected="at least two samples along dim 0, better hundreds.",
            fix="y0 = torch.randn(256, 2)   # starts like those the selector will meet",
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(batch, generator=generator).to(parts_of(y0)[0].device)
    held = min(max(1, round(config.validation * batch)), batch - 1)
    return order[held:], order[:held]


def predict(selector: Callable[[State], Tensor] | None, y0: State, n_candidates: int) -> Tensor:
    """Return a selector's predictions (batch, candidates), in its own unit, checked."""
    if selector is None:
        raise MissingHypernetError(
            problem="this Dise has no selector.",
            expected="a fitted one, or one of your own.",
            fix="dise.fit(func, y0, t, cost=cost)   # see tdh.ClassificationCost\n"
            "tdh.Dise(candidates, selector=v)\n"
            "dise.dispatch(func, y0, t, selection)   # with choices of your own",
        )
    out = selector(y0)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise StateTypeError(
            problem=f"the selector returned {got}.",
            expected="a floating-point tensor of predicted costs.",
            fix="return self.head(features)",
        )
    wanted = (count_samples(y0), n_candidates)
    if out.shape != wanted:
        raise StateShapeError(
            problem=f"the selector returned shape {tuple(out.shape)}.",
            expected=f"{wanted}: for every sample, the predicted cost of every candidate.",
            fix=f"a last layer with {n_candidates} outputs",
        )
    if not bool(torch.isfinite(out).all()):
        raise NonFiniteError(
            problem="the selector predicted inf or nan costs.",
            expected="finite costs.",
            fix="torch.isfinite(y0).all()   # or fit the selector again with a lower lr",
        )
    return out


def fittable(selector: object, y0: State, n_candidates: int, config: SelectorConfig) -> nn.Module:
    """Return a selector that has something to fit; a new ready one for None."""
    if selector is None:
        with own_random_state(config.seed):
            return ready(y0, n_candidates)
    if isinstance(selector, nn.Module) and any(True for _ in selector.parameters()):
        return selector
    raise StateTypeError(
        problem=f"the selector is a {type(selector).__name__}, which has nothing to fit.",
        expected="an nn.Module with parameters.",
        fix="tdh.Dise(candidates)   # fit makes a ready selector",
    )


def train_selector(
    selector: nn.Module,
    y0: State,
    costs: Tensor,
    config: SelectorConfig,
    *,
    progress: bool,
) -> tuple[Scale, list[tuple[int, float, float]]]:
    """Train a selector in place on costs (batch, candidates); return its unit and the losses.

    It ends in the state that was best on held-out samples, in evaluation mode and frozen; on an
    error it is as it was before. The losses are those of `DiseReport`.
    """
    train, held_out = split(y0, config)
    unit = Scale(float(costs[train].mean()), float(costs[train].std(correction=0)) or 1.0)
    targets = (costs - unit.shift) / unit.scale

    def loss_on(index: Tensor) -> Tensor:
        out = predict(selector, take(y0, index), targets.shape[1])
        return (out.to(targets.dtype) - targets[index]).square().mean()

    every = max(1, config.iterations // VALIDATIONS)
    losses: list[tuple[int, float, float]] = []
    best_loss = math.inf
    bar = tqdm(total=config.iterations, disable=not progress, unit="it", desc="selector")
    with frozen_or_restored(selector), own_random_state(config.seed), bar, torch.enable_grad():
        if isinstance(selector, ReadySelector):
            selector.calibrate(take(y0, train))
        if not any(parameter.requires_grad for parameter in selector.parameters()):
            selector.requires_grad_(requires_grad=True)  # an earlier fit froze it
        best = copy.deepcopy(selector.state_dict())
        optimizer = AdamW(selector.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        schedule = CosineAnnealingLR(optimizer, config.iterations, eta_min=config.lr / 100)
        numbers = range(1, config.iterations + 1)
        for iteration, index in zip(numbers, _batches(train, config), strict=False):
            selector.train()
            loss = loss_on(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if iteration % every and iteration != config.iterations:
                continue
            selector.eval()
            with torch.no_grad():
                held = _checked(loss_on(held_out), iteration)
            losses.append((iteration, _checked(loss, iteration), held))
            if held < best_loss:
                best, best_loss = copy.deepcopy(selector.state_dict()), held
        selector.load_state_dict(best)
    return unit, losses


def _batches(train: Tensor, config: SelectorConfig) -> Iterator[Tensor]:
    """Yield positions of training samples, epoch after epoch in new orders."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    while True:
        order = torch.randperm(len(train), generator=generator).to(train.device)
        # Nearly equal sizes: batch norm fails on a last batch of one sample.
        yield from train[order].tensor_split(-(-len(train) // config.batch_size))


def _checked(loss: Tensor, iteration: int) -> float:
    if math.isfinite(loss.item()):
        return loss.item()
    raise FitDivergedError(
        problem=f"the selector's loss is {loss.item()} at iteration {iteration}.",
        expected="a finite loss.",
        fix="tdh.SelectorConfig(lr=3e-4)",
    )


def sweep(
    labels: Labels,
    y0: State,
    unfitted: nn.Module,
    config: SelectorConfig,
    *,
    alphas: Iterable[float],
    penalties: Iterable[float] | None,
    progress: bool,
) -> TradeOff:
    """Fit copies of a selector, one at every alpha and M; see `Dise.suggest`."""
    if penalties is None:
        dearest = float(labels.weighted_nfe.max())
        penalties = [1.5 * dearest, 10 * dearest, 100 * dearest]
    settings = [check_settings(alpha, penalty) for alpha in alphas for penalty in penalties]
    matrices = [labels.costs(alpha, penalty) for alpha, penalty in settings]
    _, held_out = split(y0, config)
    held = labels.of(held_out)
    points = []
    for (alpha, penalty), costs in zip(settings, matrices, strict=True):
        selector = copy.deepcopy(unfitted)
        train_selector(selector, y0, costs, config, progress=progress)
        with torch.no_grad():
            out = predict(selector, take(y0, held_out), len(labels.names))
        choice = out.argmin(dim=1)
        means = held.mean_nfe(choice), held.accuracy(choice), held.shares(choice)
        points.append(TradeOffPoint(alpha, penalty, *means))
    best = held.oracle()
    return TradeOff(
        points=tuple(sorted(points, key=lambda point: point.mean_nfe)),
        singles=held.singles,
        oracle=(held.mean_nfe(best), held.accuracy(best)),
        labels=labels,
    )
