"""The choice of a ready net by a short fit of the residuals: ``fit(hypernet="auto")``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from torchdiffeq_hyper._fields._restore import own_random_state
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._objectives import (
    ResidualObjective,
    calibrate,
    step_inputs,
    usable_scale,
)
from torchdiffeq_hyper.fitting._phases import STEEPEST, annealed
from torchdiffeq_hyper.fitting._problem import HypersolverProblem
from torchdiffeq_hyper.hypernets import ReadyHypernet, families
from torchdiffeq_hyper.recording import FlopCounter

AUTO = "auto"  # the name under which `fit` takes the choice
ROUNDS = (40, 120)  # iterations of a comparison's rounds; between two the worse half leaves
RATE = 3.0  # learning rate of a comparison, over the fit's: so few iterations want larger steps
FEWEST = 10  # iterations without which errors say nothing
TIE = 1.02  # nets within this factor of the smallest error count as equal: the cheapest wins
SHARE_OF_TIME = 0.15  # share of a fit's time that a comparison may take


def check_auto(hypernet: str) -> None:
    """Refuse a name that stands for no choice: any but "auto"."""
    if hypernet != AUTO:
        raise OptionError(
            problem=f"hypernet is {hypernet!r}.",
            expected=f'"{AUTO}", None for a ready net, or a torch.nn.Module called as g(step).',
            fix=f'hypernet="{AUTO}"   # or a net of tdh.hypernets',
        )


@dataclass
class ComparedNet:
    """A ready net in the comparison."""

    net: ReadyHypernet
    cost: float  # multiply-adds of one call, as a share of func's in one step of the base
    error: float = 1.0  # mean held-out |R - g|_2 as a share of |R|_2's
    iterations: int = 0

    def __str__(self) -> str:
        """Return the net's kind and widths, its cost and its error."""
        own = self.net.architecture
        arguments = ", ".join(f"{k}={own[k]}" for k in ("hidden", "kernel_size") if k in own)
        cost = "" if math.isinf(self.cost) else f", {100 * self.cost:.2g} % of func's cost"
        error = f", {100 * self.error:.2g} % of |R| left" if self.iterations else ""
        return f"{type(self.net).__name__}({arguments}){cost}{error}"


def choose(problem: HypersolverProblem, first: Batch, held_out: Batch) -> dict[str, Any]:
    """Return the "architecture" of the ready net to fit, and a "note" that says for people why.

    It depends on the seed alone, unless the comparison is cut short.
    """
    deadline = time.perf_counter() + SHARE_OF_TIME * problem.config.max_seconds
    with own_random_state(problem.config.seed):
        nets = within_budget(problem, first)
        if len(nets) > 1:
            _compare(nets, problem, (first, held_out), deadline)
    least = min(net.error for net in nets)
    is_compared = all(net.iterations >= FEWEST for net in nets)
    tied = [net for net in nets if net.error <= TIE * least]
    # Kinds that have done well come last.
    best = min(tied, key=lambda net: net.cost) if is_compared else nets[-1]
    note = f'hypernet="{AUTO}" chose {best}'
    if others := "; ".join(str(net) for net in nets if net is not best):
        note += f" (compared {'with' if is_compared else 'too briefly with'} {others})"
    if best.cost > problem.config.hypernet_budget:
        note += "; no net is within the budget, this is the cheapest"
    return {"architecture": best.net.architecture, "note": note}


def within_budget(problem: HypersolverProblem, batch: Batch) -> list[ComparedNet]:
    """Return the widest net of each kind within the budget, or else the cheapest of all."""
    step, y = next(step_inputs(batch, 0)), batch.start(0)
    t = step.t.to(batch.dtype)
    in_func = problem.tableau.calls * count_flops(lambda: batch.field(problem.func)(t, y))
    kinds = []
    for family in families(y, problem.tableau, time_unit=problem.width):
        flops = [count_flops(partial(net, step)) for net in family]
        costs = [n / in_func if in_func else math.inf for n in flops]
        kinds.append([ComparedNet(*pair) for pair in zip(family, costs, strict=True)])
    budget = problem.config.hypernet_budget
    affordable = [[net for net in kind if net.cost <= budget] for kind in kinds]
    return [kind[-1] for kind in affordable if kind] or [kinds[0][0]]


def count_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of a call, as torch counts them."""
    with torch.no_grad(), FlopCounter() as counter:
        call()
    return int(counter.get_total_flops())


def _compare(
    nets: list[ComparedNet], problem: HypersolverProblem, batches: tuple[Batch, Batch], end: float
) -> None:
    """Fill in the nets' errors by successive halving, until the clock says ``end``."""
    left, order, lr = nets, problem.tableau.order, RATE * problem.config.lr
    for net in nets:
        calibrate(net.net, batches[0])
    for iterations in ROUNDS:
        runs = [_training(net, order, batches, lr, iterations) for net in left]
        for _ in range(iterations):
            if time.perf_counter() > end:
                break
            for run in runs:
                next(run)
        for net in left:
            error = ResidualObjective(net.net, order).error(batches[1])
            net.error = error if math.isfinite(error) else math.inf
        left = sorted(left, key=lambda net: net.error)[: -(-len(left) // 2)]


def _training(
    compared: ComparedNet, order: int, batches: tuple[Batch, Batch], lr: float, iterations: int
) -> Iterator[None]:
    """Fit a net's residuals, one iteration for each item, at a rate that falls to nought."""
    first, held_out = batches
    objective, n_grids = ResidualObjective(compared.net, order), len(first.grids)
    scales = [usable_scale(objective.base_loss(held_out, grid)) for grid in range(n_grids)]
    parameters = list(compared.net.parameters())
    optimizer = optim.AdamW(parameters, lr=lr)
    for done in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = lr * annealed(done / iterations, lowest=0.0)
        optimizer.zero_grad()
        grid = done % n_grids
        (objective.loss(first, grid) / scales[grid]).backward()
        nn.utils.clip_grad_norm_(parameters, STEEPEST)
        optimizer.step()
        compared.iterations += 1
        yield
