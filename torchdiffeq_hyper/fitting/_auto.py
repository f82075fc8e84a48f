"""Ready nets: their scales, and the choice of one by a short fit of the residuals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from torchdiffeq_hyper._fields import own_random_state
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting._adamw import annealed
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._objectives import ResidualObjective, step_inputs
from torchdiffeq_hyper.fitting._problem import HypersolverProblem
from torchdiffeq_hyper.hypernets import ReadyHypernet, families, join_channels
from torchdiffeq_hyper.recording import FlopCounter


@contextmanager
def measuring_time_in(net: object, width: float, order: int) -> Iterator[None]:
    """Let a ready net that is still zero measure time in spans; as before on any error.

    One that was fitted before keeps its unit, for a base of this order from now on. Every
    other net is left as it is.
    """
    if not isinstance(net, ReadyHypernet):
        yield
        return
    before = net.time_unit, net.order
    net.measure_time_in(width if net.is_zero else net.time_unit, order)
    try:
        yield
    except BaseException:
        net.measure_time_in(*before)
        raise


@torch.no_grad()
def calibrate(net: nn.Module, batch: Batch) -> None:
    """Calibrate a ready net that is still zero; leave every other net as it is.

    Scales must not be changed under a net that was fitted before and is fitted on.
    """
    if not isinstance(net, ReadyHypernet) or not net.is_zero:
        return
    inputs, residuals = [], []
    for grid, samples in enumerate(batch.grids):
        for n, step in enumerate(step_inputs(batch, grid)):
            inputs.append(net.concat(step))
            residuals.append(join_channels(batch.layout.split(samples.residual[n])))
    net.calibrate(torch.cat(inputs), torch.cat(residuals), batch.units.state)


AUTO = "auto"
"""The name under which `fit` takes the choice."""
ROUNDS = (40, 120)
"""Iterations of a comparison's rounds; between two the worse half of the nets leaves."""
RATE = 3.0
"""Learning rate of a comparison, over the fit's: so few iterations want larger steps."""
FEWEST = 10
"""Iterations without which errors say nothing."""
TIE = 1.02
"""Nets within this factor of the smallest error count as equal: the cheapest wins."""
SHARE_OF_TIME = 0.15
"""Share of a fit's time that a comparison may take."""


def check_auto(hypernet: str) -> None:
    """Refuse a name that stands for no choice: any but "auto"."""
    if hypernet != AUTO:
        raise OptionError(
            problem=f"hypernet is {hypernet!r}.",
            expected=f'"{AUTO}", None for a ready net, or a torch.nn.Module called as g(step).',
            fix=f'hypernet="{AUTO}"   # or a net of tdh.hypernets',
        )


@dataclass
class Candidate:
    """A net to be compared."""

    net: ReadyHypernet
    cost: float  # multiply-adds of one call, as a share of func's in one step of the base
    error: float = 1.0  # mean held-out |R - g|_2 as a share of |R|_2's
    iterations: int = 0

    def __str__(self) -> str:
        """Return the net's kind and widths, its cost and its error."""
        shown = ("hidden", "kernel_size")
        own = self.net.architecture
        arguments = ", ".join(f"{name}={own[name]}" for name in shown if name in own)
        name = f"{type(self.net).__name__}({arguments})"
        cost = "" if math.isinf(self.cost) else f", {100 * self.cost:.2g} % of func's cost"
        error = f", {100 * self.error:.2g} % of |R| left" if self.iterations else ""
        return name + cost + error


def choose(problem: HypersolverProblem, first: Batch, held_out: Batch) -> dict[str, Any]:
    """Return the ready net that leaves the smallest held-out residual within the budget.

    The widest net of each kind (see `hypernets.families`) whose multiply-adds are at most
    ``config.hypernet_budget`` of func's in one step competes; each is fitted to the first
    batch's residuals for 40 iterations, the better half for 120 more. Of nets within 2 % of
    the best the cheapest is taken. The result depends on the seed alone, unless the
    comparison is cut short at 15 % of ``config.max_seconds``.

    The result has the net's "architecture" (see `ReadyHypernet.architecture`) and a "note",
    which says for people what was chosen and what it was compared to.
    """
    deadline = time.perf_counter() + SHARE_OF_TIME * problem.config.max_seconds
    with own_random_state(problem.config.seed):
        candidates = within_budget(problem, first)
        if len(candidates) > 1:
            _compare(candidates, problem, (first, held_out), deadline)
    least = min(candidate.error for candidate in candidates)
    tied = [candidate for candidate in candidates if candidate.error <= TIE * least]
    compared = all(candidate.iterations >= FEWEST for candidate in candidates)
    # Kinds that have done well come last.
    best = min(tied, key=lambda candidate: candidate.cost) if compared else candidates[-1]
    others = "; ".join(str(candidate) for candidate in candidates if candidate is not best)
    note = f'hypernet="{AUTO}" chose {best}'
    if others:
        note += f" (compared {'with' if compared else 'too briefly with'} {others})"
    if best.cost > problem.config.hypernet_budget:
        note += "; no net is within the budget, this is the cheapest"
    return {"architecture": best.net.architecture, "note": note}


def within_budget(problem: HypersolverProblem, batch: Batch) -> list[Candidate]:
    """Return the widest net of each kind within the budget, or else the cheapest of all.

    Multiply-adds are half of what torch's own counter says. Where func has none that can
    be counted, costs are infinite.
    """
    step = next(step_inputs(batch, 0))
    y = batch.start(0)
    t = step.t.to(batch.dtype)
    in_func = problem.tableau.calls * count_flops(lambda: batch.field(problem.func)(t, y))
    kinds = []
    for family in families(y, problem.tableau, time_unit=problem.width):
        flops = [count_flops(partial(net, step)) for net in family]
        costs = [n / in_func if in_func else math.inf for n in flops]
        kinds.append([Candidate(*pair) for pair in zip(family, costs, strict=True)])
    budget = problem.config.hypernet_budget
    affordable = [[candidate for candidate in kind if candidate.cost <= budget] for kind in kinds]
    widest = [kind[-1] for kind in affordable if kind]
    return widest or [kinds[0][0]]


def count_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of a call, as torch counts them."""
    with torch.no_grad(), FlopCounter() as counter:
        call()
    return int(counter.get_total_flops())


def _compare(
    candidates: list[Candidate],
    problem: HypersolverProblem,
    batches: tuple[Batch, Batch],
    end: float,
) -> None:
    """Fill in the candidates' errors by successive halving, until the clock says ``end``."""
    first, held_out = batches
    left: Sequence[Candidate] = candidates
    for candidate in candidates:
        calibrate(candidate.net, first)
    for iterations in ROUNDS:
        objectives = [ResidualObjective(c.net, problem.tableau.order) for c in left]
        runs = [
            _training(candidate, objective, batches, RATE * problem.config.lr, iterations)
            for candidate, objective in zip(left, objectives, strict=True)
        ]
        for _ in range(iterations):
            if time.perf_counter() > end:
                break
            for run in runs:
                next(run)
        for candidate, objective in zip(left, objectives, strict=True):
            error = objective.error(held_out)
            candidate.error = error if math.isfinite(error) else math.inf
        left = sorted(left, key=lambda candidate: candidate.error)[: -(-len(left) // 2)]


def _training(
    candidate: Candidate,
    objective: ResidualObjective,
    batches: tuple[Batch, Batch],
    lr: float,
    iterations: int,
) -> Iterator[None]:
    """Fit a candidate's residuals, one iteration for each item, at a rate that falls to nought."""
    first, held_out = batches
    scale = objective.base_loss(held_out, 0) or 1.0
    optimizer = optim.AdamW(candidate.net.parameters(), lr=lr)
    for done in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * annealed(done / iterations, lowest=0.0)
        optimizer.zero_grad()
        loss = objective.loss(first, done % len(first.grids)) / scale
        loss.backward()
        nn.utils.clip_grad_norm_(candidate.net.parameters(), 1.0)
        optimizer.step()
        candidate.iterations += 1
        yield
