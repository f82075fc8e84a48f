"""Before the first iteration of any fit: the field is checked, its data measured in time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.fitting._batches import Batches, Starts, context_signature, n_samples
from torchdiffeq_hyper.fitting._budget import (
    ENDLESS,
    FEWEST,
    LOOSEST,
    Budget,
    ReferencePlan,
    plan_references,
)
from torchdiffeq_hyper.fitting._data import Data, References
from torchdiffeq_hyper.fitting._errors import Run, end_errors
from torchdiffeq_hyper.fitting._field import (
    Field,
    OutOfTimeError,
    Units,
    check_field,
    check_samples,
)
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._signature import signs_of_field

SOLVES_OF_REPORT = 20
"""Solves of the held-out samples that a report takes, about."""
LATEST = (0.5, 0.6)
"""Shares of the time left after which a first and a second attempt at the data are given up."""
NOISE_LATEST = 0.25
"""Share of all time after which the measurement of the noise is given up."""
MOST_BYTES = 2**30
"""Memory that the reference solutions kept may take."""


@dataclass(frozen=True)
class FieldCheck:
    """What the check of a field that can be fitted has told.

    ``dtype`` is the flat state's, ``signs`` tell the starts and the field from others, and
    ``tolerances`` are those wanted of reference solutions.
    """

    dtype: torch.dtype
    signs: dict[str, Any]
    units: Units
    tolerances: Tolerances

    @classmethod
    def of(cls, problem: Problem, starts: Starts, count: int) -> FieldCheck:
        """Look at the field on some of ``count`` samples; refuse one that cannot be fitted."""
        field = Field(problem.func, starts, ENDLESS)
        check_samples(field, count, problem.span)
        answers = check_field(field, problem.span, field.flat)
        units = Units.of(problem.span, field.flat, answers[0])
        tolerances = Tolerances.of(problem.config, field.dtype, units)
        return cls(field.dtype, signs_of_field((field.flat, *answers)), units, tolerances)

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
    references: References,
    *,
    budget: Budget,
    kept: dict[str, Any] | None,
) -> ReferencePlan:
    """Return what can be solved in the time there is; as ``kept`` where a fit goes on."""
    if kept is not None:
        return ReferencePlan.from_dict(kept)
    in_batch = n_samples(batches[0])
    return problem.group.from_first(
        lambda: plan_references(references, batches.held_out, in_batch, budget)
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


def measured(
    problem: Problem,
    batches: Batches,
    references: References,
    plan: ReferencePlan,
    budget: Budget,
    *,
    goes_on: bool,
) -> tuple[Data, ReferencePlan]:
    """Return the data, its held-out and its first training batch measured, and what was cut.

    Where a plan made just now takes longer than foreseen, loose solutions of a few samples
    are tried; a fit that goes on has to meet its data again. `OutOfTimeError` where there
    was no time for these either.
    """
    rtol = max(LOOSEST, plan.tolerances.rtol)
    hurried = ReferencePlan(
        plan.tolerances.loosened(rtol),
        held_out=min(plan.held_out, FEWEST // 2),
        batch=min(plan.batch, FEWEST // 2),
        has_noise=False,
        is_looser=True,
        note=f"reference solutions: a tolerance of {rtol:.0e} and few samples, less than planned: "
        "the first solutions took too long",
    )
    attempts = ((plan, 1.0),) if goes_on else zip((plan, hurried), LATEST, strict=True)
    for attempt, share in attempts:
        batches.keep(attempt.held_out, attempt.batch)
        now = budget.elapsed
        deadline = budget.until(now + share * (budget.max_seconds - now))
        solver = replace(references, tolerances=attempt.tolerances)
        try:
            data = Data(solver, batches, deadline, problem.group)
            data.measure_first()
        except OutOfTimeError:
            continue
        data.budget = budget
        return data, attempt
    raise OutOfTimeError
