"""Before the first iteration of any fit: the field is checked, its data measured in time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import SHAPE_CLASHES
from torchdiffeq_hyper._state import StateLayout
from torchdiffeq_hyper.errors import CoupledSamplesError, StateShapeError, explain, first_line
from torchdiffeq_hyper.fitting._batches import Batches, n_samples, select
from torchdiffeq_hyper.fitting._budget import Budget, Deadline
from torchdiffeq_hyper.fitting._checkpoint import FitState, Store, check_same_call, signs_of_field
from torchdiffeq_hyper.fitting._context import Starts, context_signature
from torchdiffeq_hyper.fitting._data import Data
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError, check_field, wide_dtype
from torchdiffeq_hyper.fitting._neural_ode import NeuralODEField, check_call
from torchdiffeq_hyper.fitting._objectives import Run, end_errors
from torchdiffeq_hyper.fitting._planning import FEWEST, LOOSEST, ReferencePlan, plan_references
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._units import Units

SOME = 8
"""Samples that func is called on."""
CHANGE = 1e-2
"""Relative change of the derivatives that is not rounding."""
NOISE = 1e-2
"""Change at a second call, as a share of the change in another order, that is noise."""


@torch.no_grad()
def check_samples(field: Field, count: int, span: tuple[float, float]) -> None:
    """Refuse a field that holds something of each of ``count`` samples without saying so.

    Costs two calls on eight samples: a sample's derivative must not depend on its place in
    the batch. Where func fails on eight, one more call tells whether it takes ``count``
    samples, and these only.

    Args:
        field: the field of some samples, with their context.
        count: samples there are in all.
        span: start and end.

    Raises:
        StateTypeError: func cannot be called with the context.
        StateShapeError: func takes ``count`` samples only.
        CoupledSamplesError: a sample's derivative depends on its place in the batch.
    """
    check_call(field.func, len(field.starts.context))
    # Any number but theirs: a func that holds something of each fails on no other.
    some = torch.arange(SOME if count != SOME else SOME - 1)
    turn = (3 * some + 1) % len(some)  # no symmetry of a line or a ring of points
    t = span[0] + (span[1] - span[0]) / 10  # what is held may not count at the very start
    try:
        k = _derivative(field, some, t)
        # A trace estimator's noise is drawn by places.
        if not isinstance(field.func, NeuralODEField):
            _check_order(field, k, (some, turn), t)
    except CoupledSamplesError:
        raise
    except SHAPE_CLASHES as error:
        if _takes(field, count, t):
            _refuse_size(field, count, len(some), error)
        raise


def _check_order(field: Field, k: Tensor, orders: tuple[Tensor, Tensor], t: float) -> None:
    """Refuse derivatives that depend on the order of the samples."""
    some, turn = orders
    layout = StateLayout.of(_rows(field, some).y0)
    expected = layout.join(select(layout.split(k), turn))
    change = (_derivative(field, turn, t) - expected).norm()
    if not bool(change > CHANGE * expected.norm()):
        return
    # One that answers otherwise at each call is refused by a check of its own.
    if bool((_derivative(field, some, t) - k).norm() > NOISE * change):
        return
    raise CoupledSamplesError(
        explain(
            f"func gives the same samples other derivatives at t = {t:.6g} where their order is "
            "another: it holds something of every sample (labels, controls, noise), or dim 0 of y0 "
            "is not that of samples.",
            "a derivative of each sample that does not depend on its place in the batch.",
            _fix(field),
        )
    )


def _refuse_size(field: Field, count: int, some: int, error: Exception) -> NoReturn:
    reason = first_line(error)
    raise StateShapeError(
        explain(
            f"func takes all {count} samples and fails on {some} ({reason}): it holds something "
            "of every sample (labels, controls, noise) and does not say which row is whose.",
            "a func of any of the samples, called with the rows that are theirs.",
            _fix(field),
        )
    ) from error


def _fix(field: Field) -> str:
    known = "".join(f"known{i}, " for i in range(len(field.starts.context)))
    return (
        f"tdh.fit(tdh.Conditioned(func, {known}labels), y0, t_span, ...)"
        f"   # calls func(t, y, {known}labels)\n"
        'or, for batches (state, labels): tdh.fit(func, loader, t_span, ..., context="batch")\n'
        "or, if dim 0 is one system's (a grid, a graph): y0 = y0.unsqueeze(0), with a func for it"
    )


def _takes(field: Field, count: int, t: float) -> bool:
    """Return whether func takes ``count`` samples."""
    try:
        _derivative(field, torch.arange(count), t)
    except SHAPE_CLASHES:
        return False
    return True


def _derivative(field: Field, order: Tensor, t: float) -> Tensor:
    """Return the flat derivative of some of the field's samples, in an order."""
    rows = _rows(field, order)
    y = StateLayout.of(rows.y0).join(rows.y0)
    wide = wide_dtype(y.device)
    time = torch.tensor(t, dtype=wide, device=y.device)
    return Field(field.func, rows, field.budget)(time, y.to(wide))


def _rows(field: Field, order: Tensor) -> Starts:
    return select(field.starts, order % n_samples(field.starts))


SOLVES_OF_REPORT = 20
"""Solves of the held-out samples that a report takes, about."""
LATEST = (0.5, 0.6)
"""Shares of the time left after which a first and a second attempt at the data are given up."""
NOISE_LATEST = 0.25
"""Share of all time after which the measurement of the noise is given up."""
MOST_BYTES = 2**30
"""Memory that the reference solutions kept may take."""
ENDLESS = Budget(math.inf)


class NotUsed(Exception):  # noqa: N818 - not an error
    """Raised to leave a fit's contexts as on an error: a given net is as it was before."""


@dataclass(frozen=True)
class FieldCheck:
    """A field that can be fitted, and what looking at it told.

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
        """Look at the field on some starts.

        Args:
            problem: what is fitted.
            starts: the samples.
            count: samples there are in all.

        Raises:
            HyperError: func cannot be fitted on these starts.
        """
        flat = StateLayout.of(starts.y0).join(starts.y0)
        field = Field(problem.func, starts, ENDLESS)
        check_samples(field, count, problem.span)
        answers = check_field(field, problem.span, flat)
        units = Units.of(problem.span, flat, answers[0])
        tolerances = Tolerances.of(problem.config, flat.dtype, units)
        return cls(flat.dtype, signs_of_field((flat, *answers)), units, tolerances)

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


def opened(
    problem: Problem, signature: Mapping[str, Any], budget: Budget
) -> tuple[Store, FitState | None]:
    """Return where the fit's state is kept, and what an interrupted run left there.

    Raises:
        OptionError: processes of this fit make different calls; or as `Store.read`.
    """
    team = problem.team
    check_same_call(team.gather(signature))
    store = Store(problem.config.checkpoint if team.is_first else None, signature)
    state = team.from_first(store.read)
    if state is not None:
        budget.resume(state.seconds)
    return store, state


def planned(
    problem: Problem,
    batches: Batches,
    field_check: FieldCheck,
    *,
    budget: Budget,
    kept: dict[str, Any] | None,
) -> ReferencePlan:
    """Return what can be solved in the time there is; as it was where a fit goes on.

    Args:
        problem: what is fitted.
        batches: the starts.
        field_check: of the field.
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

    budget.reserved = SOLVES_OF_REPORT * problem.team.from_first(one_solve)


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
                team=problem.team,
            )
            assert data.first.routes  # measured by all processes together
        except OutOfTimeError:
            continue
        data.budget = budget
        return data, attempt
    raise OutOfTimeError
