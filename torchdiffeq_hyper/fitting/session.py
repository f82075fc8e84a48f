"""One fit from data to solver: check, measure, train, report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._report import BreakEven, FitReport
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.fitting.auto import choose
from torchdiffeq_hyper.fitting.batches import Batches, n_samples, select
from torchdiffeq_hyper.fitting.break_even import measure as measure_break_even
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.calibration import calibrate
from torchdiffeq_hyper.fitting.checkpoint import (
    FitState,
    Store,
    check_same_call,
    signs_of_field,
    signs_of_net,
)
from torchdiffeq_hyper.fitting.data import Data
from torchdiffeq_hyper.fitting.distributed import budget_of
from torchdiffeq_hyper.fitting.field import Field, check_field
from torchdiffeq_hyper.fitting.guard import frozen_or_restored
from torchdiffeq_hyper.fitting.loop import Loop, snapshot
from torchdiffeq_hyper.fitting.noise import measure_noise
from torchdiffeq_hyper.fitting.objectives import delta_quantiles, no_correction
from torchdiffeq_hyper.fitting.phases import Phase, phases_of
from torchdiffeq_hyper.fitting.problem import Problem
from torchdiffeq_hyper.fitting.progress import Progress
from torchdiffeq_hyper.fitting.reference import Tolerances
from torchdiffeq_hyper.fitting.report import described, reported
from torchdiffeq_hyper.hypernets import from_architecture, ready, suited
from torchdiffeq_hyper.hypersolver import HyperSolver

PROBES = 8
"""Samples the noise is measured on."""
FEWEST_TO_PAY = 200
"""Iterations below which a fit is a trial that nobody has to earn back."""
MOST_BYTES = 2**30
"""Memory that the reference solutions kept may take."""


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
    budget = budget_of(problem.team, problem.config.max_seconds)
    batches = Batches(y0, problem.config)
    given = ready(batches[0], problem.tableau) if hypernet is None else hypernet
    with ExitStack() as stack:
        net, report = _fit_net(problem, given, batches, budget, progress, stack=stack)
        problem.team.finish()
    domain = problem.domain(batches.held_out)
    return problem.solver(net, problem.steps, domain=domain, report=report).eval()


def _fit_net(
    problem: Problem,
    given: nn.Module | str,
    batches: Batches,
    budget: Budget,
    progress: Progress,
    *,
    stack: ExitStack,
) -> tuple[nn.Module, FitReport]:
    """Return the net in its best state, and what was measured."""
    progress.say("reference solutions")
    y0 = StateLayout.of(batches.held_out).join(batches.held_out)
    field = Field(problem.func, batches.held_out, budget)
    answers = check_field(field, problem.span, y0)
    team = problem.team
    signature = _signature(problem, given, (y0, *answers))
    check_same_call(team.gather(signature))
    store = Store(problem.config.checkpoint if team.is_first else None, signature)
    state = team.from_first(store.read)
    if state is not None:
        budget.resume(state.seconds)
        if state.report is not None:
            net = stack.enter_context(frozen_or_restored(_net(given, state.choice, y0)))
            net.load_state_dict(state.best)
            return net, FitReport.from_dict(state.report)
    tolerances = Tolerances.of(problem.config, y0.dtype)
    noise = _noise(problem, batches, tolerances, budget) if state is None else state.noise
    data = _measure(problem, batches, tolerances, budget)
    choice = None if state is None else state.choice
    if isinstance(given, str) and choice is None:
        progress.say("choosing a hypernet")
        assert data.first.routes  # all processes measure it, for the first one to choose on
        first = data.first  # measured by all processes together
        choice = team.from_first(lambda: choose(problem, first, data.held_out))
        progress.tell(choice["note"])
    net = stack.enter_context(frozen_or_restored(_net(given, choice, y0)))
    phases, judge = phases_of(problem.objective, problem.solver(net), problem.func)
    if state is None:
        start = _start(net, data, judge, noise, budget)
        start.choice = choice
        state = team.from_first(lambda: start)
        store.write(state)
    data.limit(state.most_batches)
    Loop(
        phases=phases,
        iterations=problem.iterations,
        judge=judge,
        net=net,
        data=data,
        team=team,
        config=problem.config,
        state=state,
        budget=budget,
        progress=progress,
        save=store.write,
    ).run()
    report = team.from_first(lambda: _report(problem, net, data, state, budget))
    state.report = report.to_dict()
    if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
        store.write(state)
    return net, report


def _net(given: nn.Module | str, choice: dict[str, Any] | None, y: Tensor) -> nn.Module:
    """Return the net that was given, or a new one as it was chosen."""
    if isinstance(given, nn.Module):
        return given
    assert choice is not None
    return suited(from_architecture(choice["architecture"]), y)


def _measure(problem: Problem, batches: Batches, tolerances: Tolerances, budget: Budget) -> Data:
    """Return the data with the held-out batch measured."""
    return Data(
        problem.func,
        batches,
        tableau=problem.tableau,
        plan=problem.plan,
        tolerances=tolerances,
        budget=budget,
        team=problem.team,
    )


def _noise(problem: Problem, batches: Batches, tolerances: Tolerances, budget: Budget) -> float:
    """Measure the noise floor on a few of the held-out samples."""
    count = min(PROBES, n_samples(batches.held_out))
    probes = select(batches.held_out, torch.arange(count))
    field = Field(problem.func, probes, budget)
    return measure_noise(field, probes, problem.tableau, problem.plan, tolerances)


def _start(net: nn.Module, data: Data, judge: Phase, noise: float, budget: Budget) -> FitState:
    """Return the state before the first iteration: the unfitted net is the first candidate."""
    held_out_seconds = data.seconds
    calibrate(net, data.first)
    net.eval()
    return FitState(
        net=net.state_dict(),
        best=snapshot(net),
        best_error=judge.error(data.held_out),
        base_error=judge.base_error(data.held_out),
        noise=noise,
        most_batches=min(
            budget.affordable_batches((data.seconds - held_out_seconds) / data.n_measured),
            max(1, MOST_BYTES // data.first.nbytes),
        ),
    )


def _signature(
    problem: Problem, given: nn.Module | str, probes: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Return what tells this fit from others."""
    return {
        "base": problem.tableau.name,
        "alpha": problem.tableau.alpha,
        "t_span": list(problem.span),
        "steps": str(problem.steps),
        "direction": problem.direction,
        "objective": problem.objective,
        "dtype": str(probes[0].dtype),
        **described(problem.config),
        **signs_of_field(probes),
        "hypernet": given if isinstance(given, str) else signs_of_net(given),
    }


def _report(
    problem: Problem, net: nn.Module, data: Data, state: FitState, budget: Budget
) -> FitReport:
    order = problem.tableau.order
    net.eval()
    return reported(
        problem.config,
        data,
        state,
        budget,
        delta=delta_quantiles(net, order, data.held_out),
        base_delta=delta_quantiles(no_correction, order, data.held_out),
        notes=tuple(_notes(state)),
        break_even=_break_even(problem, net, data, state, budget),
    )


def _notes(state: FitState) -> Iterator[str]:
    if state.iteration == 0:
        yield "no iteration ended in time: this is the base; pass a larger max_seconds"
    elif not state.best_error < state.base_error:
        yield "no better than the base on held-out samples: do not use it as it is"
    if state.choice is not None:
        yield state.choice["note"]


def _break_even(
    problem: Problem, net: nn.Module, data: Data, state: FitState, budget: Budget
) -> BreakEven | None:
    if state.iteration < FEWEST_TO_PAY:
        return None
    solver = problem.solver(net, problem.steps)
    assert solver.n_steps is not None
    return measure_break_even(
        solver.solve,
        problem.func,
        data.held_out,
        calls=solver.n_steps * problem.tableau.calls,
        fit_seconds=budget.seconds,
        seconds_left=budget.max_seconds - budget.seconds,
    )
