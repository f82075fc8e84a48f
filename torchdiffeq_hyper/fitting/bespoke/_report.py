"""What a bespoke solver's fit says of itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._chunks import samples_needed
from torchdiffeq_hyper.fitting._correction import EndPhase
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._objectives import Fitted, quantiles
from torchdiffeq_hyper.fitting._report import reported
from torchdiffeq_hyper.fitting._sensitivities import n_weights
from torchdiffeq_hyper.fitting.bespoke._problem import BespokeProblem
from torchdiffeq_hyper.solvers._report import FitReport
from torchdiffeq_hyper.solvers.bespoke import ORDER, BespokeSolver

FEWEST_TO_PAY = 20
"""Iterations below which a fit is a trial that nobody has to earn back."""


def fitted_of(
    problem: BespokeProblem, solvers: tuple[BespokeSolver, BespokeSolver], name: str, y0: State
) -> Fitted:
    """Return the solver fitted, and the one it started as, as the report compares them."""
    domain = problem.domain(y0)  # with its span, as it will be used
    own, start = (
        BespokeSolver(
            solver.weights,
            hypernet=solver.hypernet,
            knots=(solver.get_buffer("knot_values"), solver.get_buffer("knot_slopes")),
            domain=domain,
        )
        for solver in solvers
    )
    return Fitted(own.solve, start.solve, name, problem.calls, FEWEST_TO_PAY)


def report_of(
    problem: BespokeProblem,
    solvers: tuple[BespokeSolver, BespokeSolver],
    data: Data,
    *,
    state: FitState,
    budget: Budget,
    name: str,
    cut: str,
) -> FitReport:
    """Return the report of a fit that ends; of the solver fitted and the one it started as."""
    return reported(
        problem,
        fitted_of(problem, solvers, name, data.held_out.y0),
        data,
        state,
        budget,
        deltas=lambda: _deltas(problem, solvers, data.held_out),
        notes=tuple(_notes(state, data, name, problem.calls, cut=cut)),
    )


@torch.no_grad()
def _deltas(
    problem: BespokeProblem, solvers: tuple[BespokeSolver, BespokeSolver], batch: Batch
) -> tuple[dict[str, float], dict[str, float]]:
    """Return quantiles of the residuals: the span is one step, its error over its square."""
    unit = batch.units.residual(ORDER)
    own, start = (
        {name: unit * value for name, value in quantiles(errors).items()}
        for errors in (EndPhase(solver, problem.func).norms(batch) for solver in solvers)
    )
    return own, start


def _notes(state: FitState, data: Data, name: str, calls: int, *, cut: str) -> Iterator[str]:
    if state.iteration == 0:
        yield f"no iteration ended in time: this is {name}; pass a larger max_seconds"
    elif state.fallback == "weights":
        yield "the correction was worse than none in mean or tail: these are the weights alone"
    elif state.fallback:
        yield f"the fitted weights were worse than {name} in mean or tail: this is {name}"
    elif not state.best_error < state.base_error:
        yield f"no better than {name} on held-out samples: do not use it as it is"
    else:
        yield f"the base is {name} with as many calls of func, the best classical start"
    needed = samples_needed(data.held_out.y0, calls)
    if data.n_starts < needed:
        yield (
            f"{data.n_starts} samples for {n_weights(calls)} weights: starts unlike them may go "
            f"wrong, and the held-out error ({n_samples(data.held_out.y0)} samples) need not show "
            f"it; pass {needed} or more"
        )
    if cut:
        yield cut
