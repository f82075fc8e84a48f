"""Fills in the `FitReport` of a fit (`solvers._fit_report`): errors, classical solvers, notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchdiffeq_hyper._state import VectorField, map_parts, sample_norms, sample_sizes
from torchdiffeq_hyper.errors import first_line
from torchdiffeq_hyper.fitting._break_even import best_classical
from torchdiffeq_hyper.fitting._break_even import measure as measure_break_even
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._errors import NOTHING, Comparison, Run, at_end, errors_along, solved
from torchdiffeq_hyper.fitting._field import size_of
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.hypernets import join_channels
from torchdiffeq_hyper.solvers._fit_report import ClassicalAlternative, ErrorSummary, FitReport

FURTHER = 1.3  # how many times as far from their mean as the starts fitted on
ASTRAY = 3.0  # distance from the base's end, relative to its size, that no error of a base explains
UNUSABLE = 0.3  # mean relative error from which on a result says little of the solution
HEAVY_TAIL = 20.0  # ratio of the worst to the median error from which on the worst decides
FEW = 20  # held-out samples below which their 95th percentile is their worst
UNLIKE = 1e3  # ratio of the sizes of channels from which on the smaller ones do not count in a norm
CLEAR = 1.25  # ratio of errors below which a gain on some held-out samples may be none on others

T = TypeVar("T")


@torch.no_grad()
def starts_further_out(compared: Comparison, func: VectorField, batch: Batch) -> str:
    """Return what to say of starts further out than those fitted on; "" where all is well."""
    # Held-out samples may miss what a tail of others does. The base stands in for a reference.
    far, times = map_parts(_further_out, batch.start(0)), batch.grids[0].times[[0, -1]]
    runs, unit = (compared.run, compared.base), batch.units.state
    own, base = (tuple(p[-1:] for p in solved(run, func, batch, far, times)) for run in runs)
    is_finite = torch.isfinite(sample_norms(base, unit)[0])
    own, base = (tuple(part[:, is_finite] for part in ends) for ends in (own, base))
    off = sample_norms(tuple(map(torch.sub, own, base)), unit)[0]
    astray = int((~(off / sample_sizes(base, unit)[0] < ASTRAY)).sum())
    if not astray:
        return ""
    return (
        f"starts unlike those fitted on may go wrong: {astray} of {len(off)}, {FURTHER:g} times as "
        f"far from their mean, end far from {compared.name}'s end; fit on all that you will meet"
    )


def _further_out(part: Tensor) -> Tensor:
    mean = part.float().mean(0).to(part.dtype)
    return mean + FURTHER * (part - mean)


def reported(
    problem: Problem,
    compared: Comparison,
    data: Data,
    state: FitState,
    budget: Budget,
    *,
    deltas: Callable[[], tuple[dict[str, float], dict[str, float]]],
    notes: Sequence[str],
) -> FitReport:
    """Return the report of a fit that ends; ``notes`` of its own stand first."""
    held_out, func, failures = data.held_out, problem.func, list[str]()

    def measured(what: str, measure: Callable[..., T], *given: Any, **more: Any) -> T | None:
        try:
            return measure(*given, **more)
        except Exception as error:  # noqa: BLE001 - func may raise anything; the fit is not lost
            reason = f"{type(error).__name__}: {first_line(error)}"
            failures.append(f"{what} could not be measured: {reason}")
            return None

    run, calls = compared.run, compared.calls
    given = run, func, held_out
    errors = measured("the error", at_end, *given)
    base_errors = measured("the base", at_end, compared.base, func, held_out)
    along, worst_time = measured("the span", _along, *given) or (None, None)
    classical = measured("classical solvers", best_classical, *given, calls=calls)
    if state.iteration >= compared.fewest:
        race = partial(measure_break_even, calls=calls, budget=budget)
        pays = measured("the break-even", race, *given) or "its measurement failed"
    else:
        pays = f"{state.iteration} iterations are a trial, not a fit to be earned back"
    delta, base_delta = measured("delta", deltas) or (dict(NOTHING), dict(NOTHING))
    further = (
        *_notes(errors, base_errors, classical, compared.name),
        measured("the size of channels", unlike_channels, held_out),
        measured("starts further out", starts_further_out, compared, func, data.first),
    )
    return replace(
        _unmeasured(problem, state, budget),
        delta=delta,
        base_delta=base_delta,
        reference_seconds=data.references.seconds,
        reference_nfe=data.references.calls,
        notes=(*notes, *(note for note in further if note), *failures),
        break_even=None if isinstance(pays, str) else pays,
        no_break_even=pays if isinstance(pays, str) else "",
        errors=errors,
        base_errors=base_errors,
        along=along,
        worst_time=worst_time,
        rival=classical,  # the name that files hold
    )


def without_references(
    problem: Problem, name: str, budget: Budget, state: FitState | None = None
) -> FitReport:
    """Return the report where there was no time for references, after an earlier run if any."""
    note = (
        f"max_seconds = {problem.config.max_seconds:g} was over before reference solutions were "
        f"known: this is {name}; pass a larger max_seconds"
    )
    if state is None:
        state = FitState({}, {}, math.nan, math.nan, math.nan, most_batches=0, references={})
    report = _unmeasured(problem, state, budget)
    why = "there was no time to fit"
    return replace(report, stopped="max_seconds", notes=(note,), no_break_even=why)


def _unmeasured(problem: Problem, state: FitState, budget: Budget) -> FitReport:
    """Return what a state says alone: all the time went into references."""
    return FitReport(
        losses=tuple(state.history),
        delta=dict(NOTHING),
        base_delta=dict(NOTHING),
        validation=state.best_error,
        base_validation=state.base_error,
        noise_floor=state.noise,
        iterations=state.iteration,
        seconds=budget.seconds,
        reference_seconds=budget.seconds,
        reference_nfe=0,
        stopped=state.stopped,
        seed=problem.config.seed,
    )


def unlike_channels(batch: Batch) -> str:
    """Return what to say where some channels of the solution are far smaller than others."""
    joined = join_channels(batch.layout.split(batch.grids[0].y[-1])).transpose(0, 1)
    sizes = [size for channel in joined if (size := size_of(channel)) > 0]
    if not sizes or max(sizes) < UNLIKE * min(sizes):
        return ""
    return (
        f"channels have sizes from {min(sizes):.2g} to {max(sizes):.2g}: errors of the small ones "
        "hardly count; write func in units in which those that matter are alike"
    )


def _along(run: Run, func: VectorField, batch: Batch) -> tuple[ErrorSummary, tuple[float, float]]:
    """Return the errors along the finest grid, and when their mean is largest, with that mean."""
    finest = max(range(len(batch.grids)), key=lambda r: len(batch.grids[r].dt))
    errors = errors_along(run, func, batch, finest)
    worst, step = errors.mean(1).max(0)
    worst_time = float(batch.grids[finest].times[1 + step]), float(worst)
    return ErrorSummary.of(errors.mean(0)), worst_time


def _notes(
    errors: ErrorSummary | None,
    base_errors: ErrorSummary | None,
    classical: ClassicalAlternative | None,
    name: str,
) -> Iterator[str]:
    if errors is None:
        return
    if not errors.mean < UNUSABLE:
        yield (
            f"unusable as it is: the mean relative error is {errors.mean:.2g}; take more steps "
            "or calls (steps=...), or a shorter span"
        )
    if errors.worst > HEAVY_TAIL * errors.median:
        yield (
            f"the errors have a heavy tail: the worst of {errors.samples} is {errors.worst:.2g}, "
            f"the median {errors.median:.2g}; other starts may be worse"
        )
    if errors.samples < FEW:
        yield (
            f"measured on {errors.samples} held-out sample{'s' * (errors.samples > 1)}: too few to "
            "tell a tail; pass more starts, or larger batches"
        )
    if base_errors is not None and not errors.mean * CLEAR < base_errors.mean:
        yield f"no clear gain over {name}, which it started as"
    if classical is None:
        return
    own, best = classical.own_errors, classical.errors
    if not own.mean <= best.mean:
        yield f"a classical solver wins: {classical.solver} is more accurate in the same time"
    elif not own.mean * CLEAR < best.mean:
        yield f"no clear gain over {classical.solver}, which takes the same time"
    elif not own.p95 * CLEAR < classical.best_p95:
        yield (
            f"no clear gain in the 95th percentile ({own.p95:.3g}): a classical solver has "
            f"{classical.best_p95:.3g} in the same time"
        )
