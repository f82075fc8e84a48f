"""What a bespoke solver's fit says of itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._report import FitReport
from torchdiffeq_hyper.bespoke import BespokeSolver
from torchdiffeq_hyper.fitting.bespoke.correction import EndPhase
from torchdiffeq_hyper.fitting.bespoke.problem import BespokeProblem
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.checkpoint import FitState
from torchdiffeq_hyper.fitting.data import Data
from torchdiffeq_hyper.fitting.objectives import quantiles


def signature_of(
    problem: BespokeProblem, solver: BespokeSolver, probes: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Return what tells a fit from others."""
    config = asdict(problem.config)
    for name in ("max_seconds", "checkpoint"):
        del config[name]
    return {
        "base": problem.method,
        "t_span": list(problem.span),
        "steps": problem.calls,
        "direction": problem.direction,
        "dtype": str(probes[0].dtype),
        **config,
        "size of y0 and func(t, y0)": [float(probe.norm()) for probe in probes],
        "weights": {name: list(value.shape) for name, value in solver.state_dict().items()},
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
    return FitReport(
        losses=tuple(state.history),
        delta=delta,
        base_delta=base_delta,
        validation=state.best_error,
        base_validation=state.base_error,
        noise_floor=state.noise,
        iterations=state.iteration,
        seconds=budget.seconds,
        reference_seconds=data.seconds,
        reference_nfe=data.calls,
        stopped=state.stopped,
        seed=problem.config.seed,
        notes=_notes(state, name),
    )


def _notes(state: FitState, name: str) -> tuple[str, ...]:
    if state.iteration == 0:
        return (f"no iteration ended in time: this is {name}; pass a larger max_seconds",)
    if not state.best_error < state.base_error:
        return (f"no better than {name} on held-out samples: do not use it as it is",)
    return (f"the base is {name} with as many calls of func, the best classical start",)
