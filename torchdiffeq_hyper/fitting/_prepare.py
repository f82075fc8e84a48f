"""Before the first iteration of any fit: the field is checked, its data measured in time."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import StateLayout
from torchdiffeq_hyper.fitting._batches import Batches
from torchdiffeq_hyper.fitting._budget import (
    FEWEST,
    LOOSEST,
    Budget,
    Deadline,
    ReferencePlan,
    plan_references,
)
from torchdiffeq_hyper.fitting._context import Starts, context_signature
from torchdiffeq_hyper.fitting._data import Data, References
from torchdiffeq_hyper.fitting._errors import Run, end_errors
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError, check_field, check_samples
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._signature import signs_of_field
from torchdiffeq_hyper.fitting._units import Units

SOLVES_OF_REPORT = 20
"""Solves of the held-out samples that a report takes, about."""
LATEST = (0.5, 0.6)
"""Shares of the time left after which a first and a second attempt at the data are given up."""
NOISE_LATEST = 0.25
"""Share of all time after which the measurement of the noise is given up."""
MOST_BYTES = 2**30
"""Memory that the reference solutions kept may take."""
ENDLESS = Budget(math.inf)


@dataclass(frozen=True)
class FieldCheck:
    """What the check of a field that can be fitted has told.

    Attributes:
        dtype: the flat state's.
        signs: what tells the starts and the field from others.
        units: those of the solutions.
        tolerances: those wanted of reference solutions.
    """

    dtype: torch.dtype
    signs: dict[str, Any]
    units: Units
    tolerances: Tolerances

    @classmethod
    def of(cls, problem: Problem, starts: Starts, count: int) -> FieldCheck:
        """Look at the field on some of ``count`` samples; refuse one that cannot be fitted."""
        flat = StateLayout.of(starts.y0).join(starts.y0)
        field = Field(problem.func, starts, ENDLESS)
        check_samples(field, count, problem.span)
        answers = check_field(field, problem.span, flat)
        units = Units.of(problem.span, flat, answers[0])
        tolerances = Tolerances.of(problem.config, flat.dtype, units)
        return cls(flat.dtype, signs_of_field((flat, *answers)), units, tolerances)

    def references(self, problem: Problem) -> References:
        """Return what solves references at the wanted tolerances."""
        return References(problem.func, problem.plan, self.tolerances, self.units, problem.tableau)

    def signature(self, problem: Problem, context: tuple[Tensor, ...]) -> dict[str, Any]:
        """Return what tells fits of one kind apart, but for what is fitted."""
        settings = asdict(problem.config)
        for name in ("max_seconds", "checkpoint"):  # these may differ when a fit goes on
            del settings[name]
        return {
            "t_span": list(problem.span),
            "direction": problem.direction,
            "dtype": str(self.dtype),
            **settings,
            "context": context_signature(context),
            **self.signs,
        }


def planned(
    problem: Problem,
    batches: Batches,
    field_check: FieldCheck,
    *,
    budget: Budget,
    kept: dict[str, Any] | None,
) -> ReferencePlan:
    """Return what can be solved in the time there is; as it was where a fit goes on.

    Then ``kept`` is what `to_keep` returned in the interrupted run.
    """
    if kept is not None:
        return ReferencePlan(**{**kept, "tolerances": Tolerances(**kept["tolerances"])})
    return problem.group.from_first(
        lambda: plan_references(
            problem.func,
            (batches.held_out, batches.size),
            problem.plan.times,
            wanted=field_check.tolerances,
            units=field_check.units,
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

    budget.reserved = SOLVES_OF_REPORT * problem.group.from_first(one_solve)


def most_batches(data: Data, budget: Budget) -> int:
    """Return how many training batches time and memory allow."""
    in_time = budget.affordable_batches(data.seconds_per_batch, data.held_out_seconds)
    return min(in_time, max(1, MOST_BYTES // data.first.nbytes))


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
                group=problem.group,
            )
            assert data.first.grids  # measured by all processes together
        except OutOfTimeError:
            continue
        data.budget = budget
        return data, attempt
    raise OutOfTimeError
