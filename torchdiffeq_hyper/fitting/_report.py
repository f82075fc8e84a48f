"""The report of a fit, whatever was fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, VectorField, parts_of, sample_norms, sample_sizes
from torchdiffeq_hyper.errors import first_line
from torchdiffeq_hyper.fitting._batches import n_samples, select
from torchdiffeq_hyper.fitting._break_even import best_classical
from torchdiffeq_hyper.fitting._break_even import measure as measure_break_even
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._objectives import (
    BROKEN,
    QUANTILES,
    Fitted,
    Run,
    end_errors,
    errors_along,
)
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._units import size_of
from torchdiffeq_hyper.hypernets import join_channels
from torchdiffeq_hyper.solvers._report import BreakEven, ErrorSummary, FitReport, Rival

FURTHER = 1.3
"""How many times as far from their mean as the starts fitted on."""
ASTRAY = 3.0
"""Distance from the base's end, relative to its size, that no error of a base explains."""


@torch.no_grad()
def wider_starts(fitted: Fitted, func: VectorField, batch: Batch) -> str:
    """Return what to say of starts further out; "" where the fitted solver takes them.

    Held-out samples are like those fitted on, and may miss what a tail of others does. No
    reference is needed to see a blow-up: the classical method that the solver started as
    stands in for it, on the samples on which that stays finite.

    Args:
        fitted: the solver.
        func: the vector field.
        batch: samples that it was fitted on.
    """
    start = batch.start(0)
    wide = tuple(_wider(part) for part in parts_of(start))
    y0: State = wide if isinstance(start, tuple) else wide[0]
    own, base = (_ends(run, func, batch, y0) for run in (fitted.run, fitted.base))
    unit = batch.units.state
    is_finite = torch.isfinite(sample_norms(base, unit)[0])
    if not bool(is_finite.any()):
        return ""
    own, base = (tuple(part[:, is_finite] for part in ends) for ends in (own, base))
    off = sample_norms(tuple(a - b for a, b in zip(own, base, strict=True)), unit)[0]
    astray = int((~(off / sample_sizes(base, unit)[0] < ASTRAY)).sum())
    if not astray:
        return ""
    return (
        f"starts unlike those fitted on may go wrong: {astray} of {len(off)} starts {FURTHER:g} "
        f"times as far from their mean end far from where {fitted.name} ends; fit on starts that "
        "cover all that you will meet"
    )


def _wider(part: Tensor) -> Tensor:
    mean = part.float().mean(0).to(part.dtype)
    return mean + FURTHER * (part - mean)


def _ends(run: Run, func: VectorField, batch: Batch, y0: State) -> tuple[Tensor, ...]:
    """Return the parts of the ends, (1, batch, ...) each; inf where a sample blows up."""
    try:
        solution = run(batch.field(func), y0, batch.grids[0].times[[0, -1]])
    except BROKEN:
        count = n_samples(y0)
        if count == 1:
            return tuple(torch.full_like(part, math.inf).unsqueeze(0) for part in parts_of(y0))
        halves = torch.arange(count).tensor_split(2)
        found = [_ends(run, func, batch.some(half), select(y0, half)) for half in halves]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return tuple(part[-1:] for part in parts_of(solution))


UNUSABLE = 0.3
"""Mean relative error from which on a result says little of the solution."""
HEAVY_TAIL = 20.0
"""Ratio of the worst to the median error from which on the worst decides."""
FEW = 20
"""Held-out samples below which their 95th percentile is their worst."""
UNLIKE = 1e3
"""Ratio of the sizes of channels from which on the smaller ones do not count in a norm."""
CLEAR = 1.25
"""Ratio of errors below which a gain on some held-out samples may be none on others."""

T = TypeVar("T")


def is_worse(fitted: Fitted, problem: Problem, data: Data) -> bool:
    """Return whether the base has smaller errors at the end, in mean or 95th percentile.

    That is on held-out samples, or even on those fitted to.
    """
    for batch in (data.held_out, data.first):
        own, base = (_at_end(run, problem, batch) for run in (fitted.run, fitted.base))
        if not (own.mean <= base.mean and own.p95 <= base.p95):
            return True
    return False


def reported(
    problem: Problem,
    fitted: Fitted,
    data: Data,
    state: FitState,
    budget: Budget,
    *,
    deltas: Callable[[], tuple[dict[str, float], dict[str, float]]],
    notes: tuple[str, ...],
) -> FitReport:
    """Return the report of a fit that ends. No measurement that fails loses the fit.

    Args:
        problem: what was fitted.
        fitted: the solver.
        data: what was measured.
        state: where the fit ended.
        budget: the time there was.
        deltas: measures the quantiles of |R - g| and of |R|.
        notes: of the fit itself.
    """
    failed: list[str] = []
    held_out, func = data.held_out, problem.func
    errors = _or_none(lambda: _at_end(fitted.run, problem, held_out), "the error", failed)
    base_errors = _or_none(lambda: _at_end(fitted.base, problem, held_out), "the base", failed)
    finest = max(range(len(held_out.grids)), key=lambda r: len(held_out.grids[r].dt))
    along = _or_none(lambda: errors_along(fitted.run, func, held_out, finest), "the span", failed)
    rival = _or_none(
        lambda: best_classical(fitted.run, func, held_out, calls=fitted.calls), "rivals", failed
    )
    pays = _break_even(problem, fitted, held_out, state.iteration, budget)
    if isinstance(pays, Exception):
        failed.append(_failure("the break-even", pays))
        pays = "its measurement failed"
    delta, base_delta = _or_none(deltas, "delta", failed) or (nothing(), nothing())
    own = tuple(_notes(errors, base_errors, rival, fitted.name))
    unlike = _or_none(lambda: unlike_channels(held_out), "the size of channels", failed)
    if unlike:
        own = (*own, unlike)
    wider = _or_none(lambda: wider_starts(fitted, func, data.first), "wider starts", failed)
    if wider:
        own = (*own, wider)
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
        notes=(*notes, *own, *failed),
        break_even=pays if isinstance(pays, BreakEven) else None,
        no_break_even="" if isinstance(pays, BreakEven) else pays,
        errors=errors,
        base_errors=base_errors,
        along=None if along is None else ErrorSummary.of(along.mean(0)),
        worst_time=None if along is None else _worst_time(along, held_out.grids[finest].times),
        rival=rival,
    )


def without_references(
    problem: Problem, name: str, budget: Budget, state: FitState | None = None
) -> FitReport:
    """Return the report of a fit that had no time for reference solutions.

    Args:
        problem: what was to be fitted.
        name: what is returned, for people.
        budget: the time there was.
        state: where an earlier run had ended, None without.
    """
    note = (
        f"max_seconds = {problem.config.max_seconds:g} was over before reference solutions were "
        f"known: this is {name}; pass a larger max_seconds"
    )
    return FitReport(
        losses=() if state is None else tuple(state.history),
        delta=nothing(),
        base_delta=nothing(),
        validation=math.nan if state is None else state.best_error,
        base_validation=math.nan if state is None else state.base_error,
        noise_floor=math.nan if state is None else state.noise,
        iterations=0 if state is None else state.iteration,
        seconds=budget.seconds,
        reference_seconds=budget.seconds,
        reference_nfe=0,
        stopped="max_seconds",
        seed=problem.config.seed,
        notes=(note,),
        no_break_even="there was no time to fit",
    )


def nothing() -> dict[str, float]:
    """Return quantiles of what was not measured."""
    return dict.fromkeys(QUANTILES, math.nan)


def unlike_channels(batch: Batch) -> str:
    """Return what to say where some channels of the solution are far smaller than others."""
    joined = join_channels(batch.layout.split(batch.grids[0].y[-1])).transpose(0, 1)
    sizes = [size_of(channel) for channel in joined]
    sizes = [size for size in sizes if size > 0]
    if not sizes or max(sizes) < UNLIKE * min(sizes):
        return ""
    return (
        f"channels of the state have sizes from {min(sizes):.2g} to {max(sizes):.2g}: errors of "
        "the small ones hardly count; write func in units in which those that matter are alike"
    )


def _at_end(run: Run, problem: Problem, batch: Batch) -> ErrorSummary:
    """Return the errors at the end, or at both where both directions were fitted."""
    grids = {float(samples.times[0]): r for r, samples in enumerate(batch.grids)}.values()
    return ErrorSummary.of(torch.cat([end_errors(run, problem.func, batch, r) for r in grids]))


def _worst_time(along: Tensor, times: Tensor) -> tuple[float, float]:
    means = along.mean(1)
    worst = int(means.argmax())
    return float(times[1 + worst]), float(means[worst])


def _break_even(
    problem: Problem, fitted: Fitted, batch: Batch, iterations: int, budget: Budget
) -> BreakEven | str | Exception:
    if iterations < fitted.fewest:
        return f"{iterations} iterations are a trial, not a fit to be earned back"
    try:
        return measure_break_even(
            fitted.run,
            problem.func,
            batch,
            calls=fitted.calls,
            fit_seconds=budget.seconds,
            seconds_left=budget.max_seconds - budget.seconds,
        )
    except Exception as error:  # noqa: BLE001  # func may raise anything
        return error


def _or_none(measure: Callable[[], T], what: str, failed: list[str]) -> T | None:
    """Return what is measured; if that fails, None, and a note."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001  # func may raise anything
        failed.append(_failure(what, error))
        return None


def _failure(what: str, error: Exception) -> str:
    return f"{what} could not be measured: {type(error).__name__}: {first_line(error)}"


def _notes(
    errors: ErrorSummary | None,
    base_errors: ErrorSummary | None,
    rival: Rival | None,
    name: str,
) -> Iterator[str]:
    """Yield what the errors mean for a user."""
    if errors is None:
        return
    if not errors.mean < UNUSABLE:
        yield (
            f"unusable as it is: the mean relative error is {errors.mean:.2g}; take more steps "
            "or calls (steps=...), or a shorter span"
        )
    if errors.worst > HEAVY_TAIL * errors.median:
        yield (
            f"the errors have a heavy tail: the worst of {errors.samples} samples is off by "
            f"{errors.worst:.2g}, the median by {errors.median:.2g}; other starts may be worse"
        )
    if errors.samples < FEW:
        yield (
            f"measured on {errors.samples} held-out sample{'s' * (errors.samples > 1)}: too few to "
            "tell a tail; pass more starts, or larger batches"
        )
    if base_errors is not None and not errors.mean * CLEAR < base_errors.mean:
        yield f"no clear gain over {name}, which it started as"
    if rival is not None:
        yield from _compared(rival)


def _compared(rival: Rival) -> Iterator[str]:
    errors = rival.own_errors
    if not errors.mean <= rival.errors.mean:
        yield f"a classical solver wins: {rival.solver} is more accurate in the same time"
    elif not errors.mean * CLEAR < rival.errors.mean:
        yield f"no clear gain over {rival.solver}, which takes the same time"
    elif not errors.p95 * CLEAR < rival.best_p95:
        yield (
            f"no clear gain in the 95th percentile ({errors.p95:.3g}): a classical solver has "
            f"{rival.best_p95:.3g} in the same time"
        )
