"""What a bespoke solver's fit says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._report import BreakEven, FitReport
from torchdiffeq_hyper.bespoke import BespokeSolver
from torchdiffeq_hyper.fitting.batches import n_samples
from torchdiffeq_hyper.fitting.bespoke.correction import EndPhase
from torchdiffeq_hyper.fitting.bespoke.pieces import samples_needed
from torchdiffeq_hyper.fitting.bespoke.problem import BespokeProblem
from torchdiffeq_hyper.fitting.bespoke.sensitivities import n_weights
from torchdiffeq_hyper.fitting.break_even import measure
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.checkpoint import FitState, signs_of_field, signs_of_net
from torchdiffeq_hyper.fitting.data import Data
from torchdiffeq_hyper.fitting.objectives import quantiles
from torchdiffeq_hyper.fitting.report import described, reported

FEWEST_TO_PAY = 20
"""Iterations below which a fit is a trial that nobody has to earn back."""
USELESS = 0.5
"""Mean relative error of an end that says next to nothing of the solution."""


def signature_of(
    problem: BespokeProblem, solver: BespokeSolver, probes: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Return what tells a fit from others."""
    return {
        "base": problem.method,
        "t_span": list(problem.span),
        "steps": problem.calls,
        "direction": problem.direction,
        "dtype": str(probes[0].dtype),
        **described(problem.config),
        **signs_of_field(probes),
        "weights": signs_of_net(solver),
    }


@torch.no_grad()
def report_of(
    problem: BespokeProblem,
    solvers: tuple[BespokeSolver, BespokeSolver],
    data: Data,
    *,
    state: FitState,
    budget: Budget,
    name: str,
) -> FitReport:
    """Return the report of a fit that ends; of the solver fitted and the one it started as.

    The whole span being one step, the residual is the error at the end over the span
    squared.
    """
    width = problem.span[1] - problem.span[0]
    delta, base_delta = (
        quantiles(EndPhase(solver, problem.func).norms(data.held_out) / width**2)
        for solver in solvers
    )
    return reported(
        problem.config,
        data,
        state,
        budget,
        delta=delta,
        base_delta=base_delta,
        notes=tuple(_notes(state, data, name, problem.calls)),
        break_even=_break_even(problem, solvers[0], data, state, budget),
    )


def _notes(state: FitState, data: Data, name: str, calls: int) -> Iterator[str]:
    if state.iteration == 0:
        yield f"no iteration ended in time: this is {name}; pass a larger max_seconds"
    elif not state.best_error < state.base_error:
        yield f"no better than {name} on held-out samples: do not use it as it is"
    else:
        yield f"the base is {name} with as many calls of func, the best classical start"
    if not state.best_error < USELESS:
        yield f"{calls} calls are too few for this field: pass a larger steps, or a shorter span"
    needed = samples_needed(data.held_out.y0, calls)
    if data.n_starts < needed:
        yield (
            f"{data.n_starts} samples for {n_weights(calls)} weights: starts unlike them may go "
            f"wrong, and the held-out error ({n_samples(data.held_out.y0)} samples) need not show "
            f"it; pass {needed} or more"
        )


def _break_even(
    problem: BespokeProblem, solver: BespokeSolver, data: Data, state: FitState, budget: Budget
) -> BreakEven | None:
    if state.iteration < FEWEST_TO_PAY:
        return None
    # With its span, as it will be used: what a solve needs is then made once.
    domain = problem.domain(data.held_out.y0)
    used = BespokeSolver(solver.weights, hypernet=solver.hypernet, domain=domain)
    return measure(
        used.solve,
        problem.func,
        data.held_out,
        calls=problem.calls,
        fit_seconds=budget.seconds,
        seconds_left=budget.max_seconds - budget.seconds,
    )
