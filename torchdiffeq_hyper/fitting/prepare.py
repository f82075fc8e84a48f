"""The data of a fit, measured in the time there is."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch

from torchdiffeq_hyper.fitting.batches import Batches
from torchdiffeq_hyper.fitting.budget import Budget, Deadline
from torchdiffeq_hyper.fitting.data import Data
from torchdiffeq_hyper.fitting.field import OutOfTimeError
from torchdiffeq_hyper.fitting.judge import Run, end_errors
from torchdiffeq_hyper.fitting.planning import FEWEST, LOOSEST, ReferencePlan, plan_references
from torchdiffeq_hyper.fitting.problem import Problem
from torchdiffeq_hyper.fitting.reference import Tolerances
from torchdiffeq_hyper.fitting.units import Units

SOLVES_OF_REPORT = 20
"""Solves of the held-out samples that a report takes, about."""
LATEST = (0.5, 0.6)
"""Shares of the time left after which a first and a second attempt at the data are given up."""


def planned(
    problem: Problem,
    batches: Batches,
    tolerances: Tolerances,
    units: Units,
    *,
    budget: Budget,
    kept: dict[str, Any] | None,
) -> ReferencePlan:
    """Return what can be solved in the time there is; as it was where a fit goes on.

    Args:
        problem: what is fitted.
        batches: the starts.
        tolerances: those wanted.
        units: those of the solutions.
        budget: the time there is.
        kept: what `to_keep` returned in the run that goes on, None in the first.
    """
    if kept is not None:
        wanted = Tolerances(**kept["tolerances"])
        return ReferencePlan(**{**kept, "tolerances": wanted})
    sizes = batches.held_out, batches.size
    return problem.team.from_first(
        lambda: plan_references(
            problem.func,
            sizes,
            problem.plan.times,
            wanted=tolerances,
            units=units,
            budget=budget,
        )
    )


@torch.no_grad()
def reserve(problem: Problem, run: Run, data: Data, budget: Budget) -> None:
    """Keep time for the report: as many solves of the held-out samples as it takes."""

    def one_solve() -> float:
        began = time.perf_counter()
        end_errors(run, problem.func, data.held_out)
        return time.perf_counter() - began

    budget.reserved = SOLVES_OF_REPORT * problem.team.from_first(one_solve)


def to_keep(plan: ReferencePlan) -> dict[str, Any]:
    """Return a plan as plain values."""
    return asdict(plan)


def measured(
    problem: Problem,
    batches: Batches,
    plan: ReferencePlan,
    units: Units,
    budget: Budget,
    *,
    goes_on: bool,
) -> tuple[Data, ReferencePlan]:
    """Return the data, its held-out and its first training batch measured, and what was cut.

    Where a plan made just now takes longer than foreseen, loose solutions of a few samples
    are tried; a fit that goes on has to meet its data again.

    Raises:
        OutOfTimeError: there was no time for these either.
    """
    seconds = "less than planned: the first solutions took too long"
    hurried = replace(
        plan,
        tolerances=plan.tolerances.loosened(max(LOOSEST, plan.tolerances.rtol)),
        held_out=min(plan.held_out, FEWEST // 2),
        batch=min(plan.batch, FEWEST // 2),
        has_noise=False,
        note=f"reference solutions: a tolerance of {LOOSEST:.0e} and few samples, {seconds}",
    )
    attempts = ((plan, 1.0),) if goes_on else zip((plan, hurried), LATEST, strict=True)
    for attempt, share in attempts:
        batches.keep(attempt.held_out, attempt.batch)
        now = budget.elapsed
        try:
            data = Data(
                problem.func,
                batches,
                tableau=problem.tableau,
                plan=problem.plan,
                tolerances=attempt.tolerances,
                units=units,
                budget=Deadline(budget, now + share * (budget.max_seconds - now)),
                team=problem.team,
            )
            assert data.first.routes  # measured by all processes together
        except OutOfTimeError:
            continue
        data.budget = budget
        return data, attempt
    raise OutOfTimeError
