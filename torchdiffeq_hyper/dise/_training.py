"""Regression of costs on starts: how a selector learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.dise._dispatch import count, take
from torchdiffeq_hyper.dise.selectors import ReadySelector
from torchdiffeq_hyper.errors import (
    FitDivergedError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
    explain,
)
from torchdiffeq_hyper.fitting._guard import frozen_or_restored, own_random_state


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
                explain(
                    f"{name} is {getattr(self, name)!r}.",
                    f"{expected}.",
                    f"tdh.SelectorConfig({name}={example})",
                )
            )


VALIDATIONS = 50


@dataclass(frozen=True)
class Scale:
    """The unit in which a selector predicts: costs are ``shift + scale * prediction``.

    One unit for all candidates, so that the smallest prediction is the smallest cost. (A
    logarithm would not do: v estimates a mean, and wrong answers must weigh in it.)

    Attributes:
        shift: mean cost.
        scale: standard deviation of all costs.
    """

    shift: float
    scale: float

    @classmethod
    def of(cls, costs: Tensor) -> Scale:
        """Return the unit of a matrix of costs."""
        deviation = float(costs.std(correction=0))
        return cls(float(costs.mean()), deviation if deviation > 0 else 1.0)


@dataclass(frozen=True)
class Split:
    """Positions of the samples to train on and of those held out."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, batch: int, config: SelectorConfig, device: torch.device) -> Split:
        """Return a random split.

        Raises:
            OptionError: there are fewer than two samples.
        """
        if batch < 2:
            raise OptionError(
                explain(
                    f"y0 has {batch} sample{'s' * (batch != 1)}: none would be left to measure "
                    "the fit on.",
                    "at least two samples along dim 0, better hundreds.",
                    "y0 = torch.randn(256, 2)   # starts like those the selector will meet",
                )
            )
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(batch, generator=generator).to(device)
        held = min(max(1, round(config.validation * batch)), batch - 1)
        return cls(order[held:], order[:held])


def predict(selector: Callable[[State], Tensor], y0: State, n_candidates: int) -> Tensor:
    """Return a selector's output, checked.

    Raises:
        StateTypeError: it is not a real tensor.
        StateShapeError: its shape is not (batch, candidates).
        NonFiniteError: it holds inf or nan.
    """
    out = selector(y0)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise StateTypeError(
            explain(
                f"the selector returned {got}.",
                "a floating-point tensor of predicted costs.",
                "return self.head(features)",
            )
        )
    wanted = (count(y0), n_candidates)
    if out.shape != wanted:
        raise StateShapeError(
            explain(
                f"the selector returned shape {tuple(out.shape)}.",
                f"{wanted}: for every sample, the predicted cost of every candidate.",
                f"a last layer with {n_candidates} outputs",
            )
        )
    if not bool(torch.isfinite(out).all()):
        raise NonFiniteError(
            explain(
                "the selector predicted inf or nan costs.",
                "finite costs.",
                "torch.isfinite(y0).all()   # or fit the selector again with a lower lr",
            )
        )
    return out


def check_fittable(selector: object) -> nn.Module:
    """Return a selector that has something to fit.

    Raises:
        StateTypeError: it is no module, or has no parameters.
    """
    if isinstance(selector, nn.Module) and any(True for _ in selector.parameters()):
        return selector
    raise StateTypeError(
        explain(
            f"the selector is a {type(selector).__name__}, which has nothing to fit.",
            "an nn.Module with parameters.",
            "tdh.Dise(candidates)   # fit makes a ready selector",
        )
    )


def train(
    selector: nn.Module,
    y0: State,
    costs: Tensor,
    split: Split,
    config: SelectorConfig,
    *,
    progress: bool,
) -> tuple[Scale, list[tuple[int, float, float]]]:
    """Train a selector in place; return its unit and the losses.

    It ends in its best state on held-out data, in evaluation mode and frozen; on an error
    it is as it was before.

    Args:
        selector: v.
        y0: the starts.
        costs: (batch, candidates).
        split: which samples to train on.
        config: how.
        progress: whether to show a bar.

    Returns:
        The unit, and (iteration, training loss, held-out loss), in units squared.

    Raises:
        FitDivergedError: a loss is not finite.
    """
    unit = Scale.of(costs[split.train])
    targets = (costs - unit.shift) / unit.scale
    with frozen_or_restored(selector), own_random_state(config.seed):
        if isinstance(selector, ReadySelector):
            selector.calibrate(take(y0, split.train))
        if not any(parameter.requires_grad for parameter in selector.parameters()):
            selector.requires_grad_(True)  # noqa: FBT003 - an earlier fit froze it
        losses = _descend(selector, y0, targets, split, config, progress=progress)
    return unit, losses


def _descend(
    selector: nn.Module,
    y0: State,
    targets: Tensor,
    split: Split,
    config: SelectorConfig,
    *,
    progress: bool,
) -> list[tuple[int, float, float]]:
    n_candidates = targets.shape[1]
    optimizer = torch.optim.AdamW(
        selector.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, config.iterations, eta_min=config.lr / 100
    )
    every = max(1, config.iterations // VALIDATIONS)
    losses: list[tuple[int, float, float]] = []
    best, best_loss = copy.deepcopy(selector.state_dict()), float("inf")
    batches = _batches(split.train, config)
    bar = tqdm(total=config.iterations, disable=not progress, unit="it", desc="selector")
    with bar, torch.enable_grad():
        for iteration in range(1, config.iterations + 1):
            index = next(batches)
            selector.train()
            out = predict(selector, take(y0, index), n_candidates)
            loss = (out.to(targets.dtype) - targets[index]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if iteration % every and iteration != config.iterations:
                continue
            held = _held_out_loss(selector, y0, targets, split)
            losses.append((iteration, _checked(loss.item(), iteration), _checked(held, iteration)))
            if held < best_loss:
                best, best_loss = copy.deepcopy(selector.state_dict()), held
    selector.load_state_dict(best)
    return losses


@torch.no_grad()
def _held_out_loss(selector: nn.Module, y0: State, targets: Tensor, split: Split) -> float:
    selector.eval()
    out = predict(selector, take(y0, split.held_out), targets.shape[1])
    return float((out.to(targets.dtype) - targets[split.held_out]).square().mean())


def _batches(train: Tensor, config: SelectorConfig) -> Iterator[Tensor]:
    """Yield positions of training samples, epoch after epoch in new orders."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    while True:
        order = torch.randperm(len(train), generator=generator).to(train.device)
        # Nearly equal sizes: batch norm fails on a last batch of one sample.
        yield from train[order].tensor_split(-(-len(train) // config.batch_size))


def _checked(loss: float, iteration: int) -> float:
    if math.isfinite(loss):
        return loss
    raise FitDivergedError(
        explain(
            f"the selector's loss is {loss} at iteration {iteration}.",
            "a finite loss.",
            "tdh.SelectorConfig(lr=3e-4)",
        )
    )
