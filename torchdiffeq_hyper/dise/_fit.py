"""How a selector is fitted: labels of every sample solved alone, and a regression on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from torchdiffeq_hyper._fields._independence import check_independence
from torchdiffeq_hyper._fields._restore import frozen_or_restored, left_as_found, own_random_state
from torchdiffeq_hyper._rules import Real, Such, Whole
from torchdiffeq_hyper._state import State, StateLayout, map_parts, parts_of, take
from torchdiffeq_hyper.dise._candidates import Batch, Candidate, count_samples, joined
from torchdiffeq_hyper.dise._costs import Cost, check_number
from torchdiffeq_hyper.dise._report import Choice, Labels, TradeOff, TradeOffPoint
from torchdiffeq_hyper.dise.selectors import ReadySelector, predict, ready
from torchdiffeq_hyper.errors import FitDivergedError, OptionError, StateTypeError
from torchdiffeq_hyper.evaluation._measure import unless_broken
from torchdiffeq_hyper.evaluation._table import distinct
from torchdiffeq_hyper.fitting._batches import bound
from torchdiffeq_hyper.fitting._field import check_repeatable
from torchdiffeq_hyper.solvers._per_sample import PerSampleDopri5

_RULES = {
    "iterations": Whole(1),
    "lr": Real(low=1e-9),
    "weight_decay": Real(low=0.0),
    "batch_size": Whole(1),
    "validation": Such(Real(above=0.0), lambda share: share < 1, "below 1"),
    "seed": Whole(),
}


@dataclass(frozen=True)
class SelectorConfig:
    """How `Dise.fit` trains a selector: AdamW on the squared error of its costs.

    Attributes:
        iterations: batches trained on.
        lr: initial learning rate, annealed to a hundredth of it along a cosine.
        weight_decay: of AdamW.
        batch_size: samples in a batch.
        validation: fraction of the samples that is held out; the best state on them is kept.
        seed: seeds the split, the batches, the net's start and its dropout.

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
        for field in fields(self):
            fix = f"tdh.SelectorConfig({field.name}={field.default})"
            check_number(field.name, getattr(self, field.name), _RULES[field.name], fix)


class Scale(NamedTuple):
    """The unit in which a selector predicts: costs are ``shift + scale * prediction``."""

    # One for all candidates, so that the smallest prediction is the smallest cost; no logarithm:
    # v estimates a mean, and wrong answers must weigh in it.
    shift: float
    scale: float


@dataclass(frozen=True)
class Training:
    """The samples that selectors are trained on, split at random, and how."""

    y0: State
    train: Tensor
    held_out: Tensor
    config: SelectorConfig
    progress: bool

    @classmethod
    def of(cls, y0: State, config: SelectorConfig | None, *, progress: bool) -> Training:
        """Split the samples, of which there must be at least two."""
        config = config or SelectorConfig()
        n = count_samples(y0, least=2)
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(n, generator=generator).to(parts_of(y0)[0].device)
        held = min(max(1, round(config.validation * n)), n - 1)
        return cls(y0, order[held:], order[:held], config, progress)

    def selector(self, given: object, n_candidates: int) -> nn.Module:
        """Return a selector that has something to fit: a new ready one for None."""
        if given is None:
            with own_random_state(self.config.seed):
                return ready(self.y0, n_candidates)
        if not isinstance(given, nn.Module) or not any(True for _ in given.parameters()):
            problem = f"the selector is a {type(given).__name__}, which has nothing to fit."
            fix = "tdh.Dise(candidates)   # fit makes a ready selector"
            raise StateTypeError(problem=problem, expected="an nn.Module with parameters.", fix=fix)
        with torch.no_grad():  # before anything is solved
            predict(given.eval(), take(self.y0, self.held_out[:1]), n_candidates)
        return given

    def run(
        self, selector: nn.Module, costs: Tensor
    ) -> tuple[Scale, list[tuple[int, float, float]]]:
        """Train a selector in place; return its unit and the losses.

        It ends in the state that was best on held-out samples, or on an error as it was.
        """
        config, seen = self.config, costs[self.train]
        unit = Scale(float(seen.mean()), float(seen.std(correction=0)) or 1.0)
        targets = (costs - unit.shift) / unit.scale

        def loss_on(index: Tensor) -> Tensor:
            out = predict(selector, take(self.y0, index), targets.shape[1])
            return (out.to(targets.dtype) - targets[index]).square().mean()

        every = max(1, config.iterations // 50)  # validations
        losses: list[tuple[int, float, float]] = []
        best_loss = math.inf
        bar = tqdm(total=config.iterations, disable=not self.progress, desc="selector")
        with frozen_or_restored(selector), own_random_state(config.seed), bar, torch.enable_grad():
            if isinstance(selector, ReadySelector):
                selector.calibrate(take(self.y0, self.train))
            if not any(parameter.requires_grad for parameter in selector.parameters()):
                selector.requires_grad_(requires_grad=True)  # an earlier fit froze it
            best = copy.deepcopy(selector.state_dict())
            optimizer = AdamW(selector.parameters(), config.lr, weight_decay=config.weight_decay)
            schedule = CosineAnnealingLR(optimizer, config.iterations, eta_min=config.lr / 100)
            numbers = range(1, config.iterations + 1)
            for iteration, index in zip(numbers, self._batches(), strict=False):
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
                    held = loss_on(self.held_out).item()
                losses.append((iteration, loss.item(), held))
                if not math.isfinite(held + loss.item()):
                    problem = f"the selector's loss is {held} at iteration {iteration}."
                    fix = "tdh.SelectorConfig(lr=3e-4)"
                    raise FitDivergedError(problem=problem, expected="a finite loss.", fix=fix)
                if held < best_loss:
                    best, best_loss = copy.deepcopy(selector.state_dict()), held
            selector.load_state_dict(best)
        return unit, losses

    def sweep(
        self, unfitted: nn.Module, labels: Labels, settings: Iterable[tuple[float, float]]
    ) -> TradeOff:
        """Train copies of a selector, one at every alpha and M; see `Dise.suggest`."""
        held, starts = labels.of(self.held_out), take(self.y0, self.held_out)
        points = []
        for setting, costs in [(setting, labels.costs(*setting)) for setting in settings]:
            selector = copy.deepcopy(unfitted)
            self.run(selector, costs)
            with torch.no_grad():
                chosen = predict(selector, starts, len(labels.names)).argmin(dim=1)
            points.append(TradeOffPoint(held, chosen, *setting))
        points.sort(key=lambda point: point.mean_nfe)
        best = Choice(held, held.oracle())
        return TradeOff(tuple(points), held.singles, (best.mean_nfe, best.accuracy), labels)

    def _batches(self) -> Iterator[Tensor]:
        """Yield positions of training samples, epoch after epoch in new orders."""
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        while True:
            order = torch.randperm(len(self.train), generator=generator).to(self.train.device)
            # Nearly equal sizes: batch norm fails on a last batch of one sample.
            yield from self.train[order].tensor_split(-(-len(order) // self.config.batch_size))


def are_finite(solution: State) -> Tensor:
    """Return for each sample of a solution whether it holds no inf and no nan."""
    finite = [torch.isfinite(part).transpose(0, 1).flatten(1) for part in parts_of(solution)]
    return torch.cat(finite, dim=1).all(dim=1)


def labels_of(
    candidates: Sequence[Candidate],
    batch: Batch,
    cost: Cost,
    *,
    known: Labels | None = None,
    progress: bool,
) -> Labels:
    """Solve every sample with every candidate, alone, unless calls and right answers are known."""
    n = count_samples(batch.y0, least=1)
    if known is not None:
        if known.nfe.shape == (n, len(candidates)):
            return known
        problem = "labels are of {} samples and {} candidates.".format(*known.nfe.shape)
        expected = f"those of these {n} samples and {len(candidates)} candidates."
        fix = "labels=dise.suggest(func, y0, t, cost=cost).labels"
        raise OptionError(problem=problem, expected=expected, fix=fix)
    cost.check(n)
    func, field = batch.func, bound(batch.func, batch.y0, None)
    batch = replace(batch, func=field)
    samples = torch.arange(n, device=batch.first.device)
    some = samples[torch.linspace(0, n - 1, min(4, n)).long().unique()]
    names: list[str] = []
    columns = []
    bar = tqdm(total=n * len(candidates), disable=not progress, desc="solving alone")
    predict_or_error = getattr(cost, "predict", None) or getattr(cost, "error", None)
    with left_as_found(func), left_as_found(predict_or_error), torch.no_grad(), bar:
        # As the host does: a func may concatenate its time with its state.
        t0, dtype = batch.t[0].to(batch.first.dtype.to_real()), batch.first.dtype
        counted, join = batch.field(), StateLayout.of(batch.y0).join
        first, second = (join(counted(t0, batch.y0)) for _ in range(2))
        check_repeatable(first, second, dtype, float(t0))
        check_independence(field, batch.y0, batch.t, groups=some.split(1))
        for candidate in candidates:
            solution, nfe = _solve_alone(candidate, batch, samples, some, bar.update)
            is_right, weight = cost.judge(solution, samples)
            columns.append((nfe, is_right & are_finite(solution), weight))
            names.append(distinct(candidate.label, names))
    return Labels(tuple(names), *(torch.stack(column, 1) for column in zip(*columns, strict=True)))


def _solve_alone(
    candidate: Candidate, batch: Batch, samples: Tensor, some: Tensor, tick: Callable[[int], Any]
) -> tuple[State, Tensor]:
    """Return a candidate's solution of every sample alone, and its calls of func (batch,).

    All are solved together where that gives the same for ``some`` samples, else one by one.
    """
    try:
        together = unless_broken(partial(_together, candidate, batch))
    except OptionError:  # one by one it shows whether func minds vmap only
        together = None
    if together is not None:
        alone, calls = _one_by_one(candidate, batch, some)
        if torch.equal(together[1][some], calls) and _are_close(take(together[0], some, 1), alone):
            tick(len(batch))
            return together
    return _one_by_one(candidate, batch, samples, tick)


def _together(candidate: Candidate, batch: Batch) -> tuple[State, Tensor] | None:
    """Return the solution of all samples in one go, or None where the method has none."""
    if candidate.follows_grid or candidate.solver is not None:
        field = batch.field()
        solution = batch.solve(candidate, field)
        return solution, torch.full((len(batch),), field.calls, device=batch.first.device)
    controls = {field.name for field in fields(PerSampleDopri5)}
    # The host's dopri5 has the same ones, but for "time".
    options = {"dopri5": controls - {"time"}, "dopri5_per_sample": controls}
    known = options.get(candidate.method)
    if known is None or not candidate.options.keys() <= known:
        return None
    rtol, atol = candidate.tolerances(batch.rtol, batch.atol)
    solver = PerSampleDopri5(**candidate.options)
    return solver.run(batch.func, batch.y0, batch.t, rtol=rtol, atol=atol)


def _one_by_one(
    candidate: Candidate, batch: Batch, samples: Tensor, tick: Callable[[int], Any] = lambda _: None
) -> tuple[State, Tensor]:
    """Return solutions and calls; what cannot be solved is nan, at the calls made until then."""
    solutions, nfe = [], []
    for index in samples.split(1):
        field = batch.field(index)
        solution = unless_broken(partial(batch.solve, candidate, field, index))
        if solution is None:
            start = take(batch.y0, index)
            solution = batch.constant(map_parts(lambda part: part * torch.nan, start))
        solutions.append(solution)
        nfe.append(field.calls)
        tick(1)
    return joined(solutions), torch.tensor(nfe, device=batch.first.device)


def _are_close(solution: State, other: State) -> bool:
    """Return whether states differ by no more than other kernels' rounding would explain."""
    for part, alone in zip(parts_of(solution), parts_of(other), strict=True):
        slack = min(0.1, 10 * torch.finfo(part.dtype).eps ** 0.5)
        sizes = torch.where(torch.isfinite(alone), alone, 0).abs()
        atol = slack * float(sizes.max()) if sizes.numel() else 0.0
        if not torch.allclose(part, alone, rtol=slack, atol=atol, equal_nan=True):
            return False
    return True
