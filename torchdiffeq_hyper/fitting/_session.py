"""One fit from data to solver: check, measure, train, report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from torchdiffeq_hyper._state import Hypernet, State
from torchdiffeq_hyper.errors import HyperError, NoiseFloorError
from torchdiffeq_hyper.fitting._auto import calibrate, choose, measuring_time_in
from torchdiffeq_hyper.fitting._batches import Batches, n_samples, select
from torchdiffeq_hyper.fitting._budget import PROBES, Budget, Deadline, ReferencePlan
from torchdiffeq_hyper.fitting._checkpoint import FitState, signs_of_net
from torchdiffeq_hyper.fitting._data import Data
from torchdiffeq_hyper.fitting._distributed import budget_of
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError
from torchdiffeq_hyper.fitting._guard import frozen_or_restored, own_random_state
from torchdiffeq_hyper.fitting._loop import Loop, snapshot
from torchdiffeq_hyper.fitting._noise import measure_noise
from torchdiffeq_hyper.fitting._objectives import Fitted, delta_quantiles, no_correction
from torchdiffeq_hyper.fitting._phases import Phase, Progress, phases_of
from torchdiffeq_hyper.fitting._prepare import (
    NOISE_LATEST,
    FieldCheck,
    NotUsed,
    measured,
    most_batches,
    opened,
    planned,
    reserve,
    to_keep,
)
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._report import is_worse, reported, without_references
from torchdiffeq_hyper.fitting._units import Units
from torchdiffeq_hyper.hypernets import (
    ReadyHypernet,
    from_architecture,
    join_channels,
    ready,
    suited,
)
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._report import FitReport

FEWEST_TO_PAY = 200
"""Iterations below which a fit is a trial that nobody has to earn back."""


def run(
    problem: Problem,
    y0: State | Iterable[object],
    hypernet: nn.Module | str | None,
    progress: Progress,
) -> HyperSolver:
    """Fit, or go on with an interrupted fit, or return a finished one.

    Args:
        problem: what to fit.
        y0: the starts.
        hypernet: the net, None for a ready one, or "auto" for one to be chosen.
        progress: where to show it.
    """
    budget = budget_of(problem.group, problem.config.max_seconds)
    batches = Batches(y0, problem.config, problem.context)
    given = hypernet
    if hypernet is None:
        given = ready(batches[0].y0, problem.tableau, time_unit=problem.width)
    assert given is not None
    with suppress(NotUsed), ExitStack() as stack:
        stack.enter_context(measuring_time_in(given, problem.width, problem.tableau.order))
        net, report = _fit_net(problem, given, batches, budget, progress, stack=stack)
        problem.group.finish()
        if isinstance(given, nn.Module) and net is not given:
            raise NotUsed
    domain = problem.domain(batches.held_out.y0)
    return problem.solver(net, problem.steps, domain=domain, report=report).eval()


def _fit_net(
    problem: Problem,
    given: nn.Module | str,
    batches: Batches,
    budget: Budget,
    progress: Progress,
    *,
    stack: ExitStack,
) -> tuple[Hypernet, FitReport]:
    """Return the net in its best state, and what was measured."""
    progress.say("reference solutions")
    held_out = batches.held_out
    group = problem.group
    field_check = FieldCheck.of(problem, held_out, batches.count)
    signature = _signature(problem, given, field_check.signature(problem, held_out.context))
    store, state = opened(problem, signature, budget)
    if state is not None and state.report is not None:
        is_own = isinstance(given, nn.Module) and not isinstance(given, ReadyHypernet)
        if state.fallback and is_own:
            return _zero(problem, held_out.y0), FitReport.from_dict(state.report)
        net = stack.enter_context(frozen_or_restored(_net(given, state.choice, held_out.y0)))
        net.load_state_dict(state.best)
        return net, FitReport.from_dict(state.report)
    units = field_check.units
    kept = None if state is None else state.references
    try:
        plan = planned(problem, batches, field_check, budget=budget, kept=kept)
        if state is None:
            noise, plan = _noise(problem, batches, plan, units, budget)
        goes_on = state is not None
        data, plan = measured(problem, batches, plan, units, budget, goes_on=goes_on)
    except OutOfTimeError:
        return _unfitted(problem, given, state, held_out.y0, budget, stack=stack)
    choice = None if state is None else state.choice
    if isinstance(given, str) and choice is None:
        progress.say("choosing a hypernet")
        first = data.first  # measured by all processes together
        choice = group.from_first(lambda: choose(problem, first, data.held_out))
        progress.tell(choice["note"])
    net = stack.enter_context(frozen_or_restored(_net(given, choice, held_out.y0)))
    phases, judge = phases_of(problem.objective, problem.solver(net), problem.func)
    if state is None:
        start = _start(net, data, judge, noise, budget)
        start.choice, start.references = choice, to_keep(plan)
        state = group.from_first(lambda: start)
        store.write(state)
    data.limit(state.most_batches)
    reserve(problem, problem.solver(net, problem.steps).solve, data, budget)
    Loop(
        phases=phases,
        iterations=problem.iterations,
        judge=judge,
        net=net,
        data=data,
        group=group,
        config=problem.config,
        state=state,
        budget=budget,
        progress=progress,
        save=store.write,
    ).run()
    used, report = _finish(problem, net, data, state, budget, cut=plan.note)
    if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
        store.write(state)
    return used, report


def _finish(
    problem: Problem, net: nn.Module, data: Data, state: FitState, budget: Budget, *, cut: str
) -> tuple[Hypernet, FitReport]:
    """Give up what is worse than the base; return what is used, and the report."""
    group, used = problem.group, cast(Hypernet, net)
    net.eval()
    fitted = _fitted(problem, used)
    state.fallback = "start" if group.from_first(lambda: is_worse(fitted, problem, data)) else ""
    if state.fallback and isinstance(net, ReadyHypernet):
        net.reset()
        state.best = snapshot(net)
    elif state.fallback:
        used = _zero(problem, data.held_out.y0)
    if state.fallback:
        state.best_error = state.base_error
    notes = tuple(_notes(state, cut))
    report = group.from_first(lambda: _report(problem, used, data, state, budget, notes=notes))
    state.report = report.to_dict()
    return used, report


def _zero(problem: Problem, y0: State) -> Hypernet:
    """Return a ready net that is zero, so that the solver is its base and can be saved."""
    try:
        with own_random_state(problem.config.seed):
            net = ready(y0, problem.tableau, time_unit=problem.width)
    except HyperError:  # no ready net for such a state
        return no_correction
    return net.requires_grad_(requires_grad=False)


def _unfitted(
    problem: Problem,
    given: nn.Module | str,
    state: FitState | None,
    y0: State,
    budget: Budget,
    *,
    stack: ExitStack,
) -> tuple[Hypernet, FitReport]:
    """Return what there is without reference solutions: the base, or an earlier run's best."""
    if state is not None:
        net = stack.enter_context(frozen_or_restored(_net(given, state.choice, y0)))
        net.load_state_dict(state.best)
        return net, without_references(problem, "the best of the run before", budget, state)
    report = without_references(problem, f"{problem.tableau.name} without a correction", budget)
    return _zero(problem, y0), report


def _net(given: nn.Module | str, choice: dict[str, Any] | None, y0: State) -> nn.Module:
    """Return the net that was given, or a new one as it was chosen."""
    if isinstance(given, nn.Module):
        return given
    assert choice is not None
    return suited(from_architecture(choice["architecture"]), join_channels(y0))


def _noise(
    problem: Problem, batches: Batches, plan: ReferencePlan, units: Units, budget: Budget
) -> tuple[float, ReferencePlan]:
    """Measure the noise floor on a few of the held-out samples, if there is time.

    Raises:
        NoiseFloorError: the residuals do not stand above it.
        OutOfTimeError: nor do they in references as loose as the time allows.
    """
    noise, is_late = 0.0, not plan.has_noise
    if plan.has_noise:
        probes = select(batches.held_out, torch.arange(min(PROBES, n_samples(batches.held_out))))
        until = Deadline(budget, NOISE_LATEST * budget.max_seconds)
        field = Field(problem.func, probes, until, units)
        try:
            noise = measure_noise(field, probes.y0, problem.tableau, problem.plan, plan.tolerances)
        except OutOfTimeError:
            is_late = True
        except NoiseFloorError as error:
            if not plan.is_looser:
                raise
            raise OutOfTimeError from error
    if any(problem.group.gather(is_late)):
        return 0.0, replace(plan, has_noise=False)
    return noise, plan


def _start(net: nn.Module, data: Data, judge: Phase, noise: float, budget: Budget) -> FitState:
    """Return the state before the first iteration: the unfitted net is the first candidate."""
    calibrate(net, data.first)
    net.eval()
    return FitState(
        net=net.state_dict(),
        best=snapshot(net),
        best_error=judge.error(data.held_out),
        base_error=judge.base_error(data.held_out),
        noise=noise,
        most_batches=most_batches(data, budget),
    )


def _signature(
    problem: Problem, given: nn.Module | str, common: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what tells this fit from others."""
    return {
        "base": problem.tableau.name,
        "alpha": problem.tableau.alpha,
        "steps": str(problem.steps),
        "objective": problem.objective,
        **common,
        "hypernet": given if isinstance(given, str) else signs_of_net(given),
    }


def _fitted(problem: Problem, net: Hypernet) -> Fitted:
    """Return the solver, and its base alone, as the report compares them."""
    solver, base = (problem.solver(g, problem.steps) for g in (net, no_correction))
    assert solver.n_steps is not None
    return Fitted(
        run=solver.solve,
        base=base.solve,
        name=problem.tableau.name,
        calls=solver.n_steps * problem.tableau.calls,
        fewest=FEWEST_TO_PAY,
    )


def _report(
    problem: Problem,
    net: Hypernet,
    data: Data,
    state: FitState,
    budget: Budget,
    *,
    notes: tuple[str, ...],
) -> FitReport:
    order = problem.tableau.order
    return reported(
        problem,
        _fitted(problem, net),
        data,
        state,
        budget,
        deltas=lambda: (
            delta_quantiles(net, order, data.held_out),
            delta_quantiles(no_correction, order, data.held_out),
        ),
        notes=notes,
    )


def _notes(state: FitState, cut: str) -> Iterator[str]:
    if state.iteration == 0:
        yield "no iteration ended in time: this is the base; pass a larger max_seconds"
    elif state.fallback:
        yield "the fitted net was worse than none in mean or tail: this is the base alone"
    elif not state.best_error < state.base_error:
        yield "no better than the base on held-out samples: do not use it as it is"
    if state.choice is not None:
        yield state.choice["note"]
    if cut:
        yield cut
