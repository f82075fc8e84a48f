"""One fit from data to solver: check, measure, train, report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._report import FitReport
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.fitting.batches import Batches, n_samples, select
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.calibration import calibrate
from torchdiffeq_hyper.fitting.checkpoint import FitState, Store
from torchdiffeq_hyper.fitting.data import Data
from torchdiffeq_hyper.fitting.field import Field, check_field
from torchdiffeq_hyper.fitting.guard import frozen_or_restored
from torchdiffeq_hyper.fitting.loop import Loop, snapshot
from torchdiffeq_hyper.fitting.noise import measure_noise
from torchdiffeq_hyper.fitting.objectives import delta_quantiles, no_correction
from torchdiffeq_hyper.fitting.phases import Phase, phases_of
from torchdiffeq_hyper.fitting.problem import Problem
from torchdiffeq_hyper.fitting.progress import Progress
from torchdiffeq_hyper.fitting.reference import Tolerances
from torchdiffeq_hyper.hypernets import ready
from torchdiffeq_hyper.hypersolver import HyperSolver

PROBES = 8
"""Samples the noise is measured on."""
MOST_BYTES = 2**30
"""Memory that the reference solutions kept may take."""


def run(
    problem: Problem,
    y0: State | Iterable[object],
    hypernet: nn.Module | None,
    progress: Progress,
) -> HyperSolver:
    """Fit, or go on with an interrupted fit, or return a finished one."""
    budget = Budget(problem.config.max_seconds)
    batches = Batches(y0, problem.config)
    net = ready(batches[0], problem.tableau) if hypernet is None else hypernet
    with frozen_or_restored(net):
        report = _fit_net(problem, net, batches, budget, progress)
    domain = problem.domain(batches.held_out)
    return problem.solver(net, problem.steps, domain=domain, report=report).eval()


def _fit_net(
    problem: Problem, net: nn.Module, batches: Batches, budget: Budget, progress: Progress
) -> FitReport:
    """Leave the net in its best state, and return what was measured."""
    progress.say("reference solutions")
    y0 = StateLayout.of(batches.held_out).join(batches.held_out)
    field = Field(problem.func, batches.held_out, budget)
    answers = check_field(field, problem.span, y0)
    store = Store(problem.config.checkpoint, _signature(problem, net, (y0, *answers)))
    state = store.read()
    if state is not None:
        budget.resume(state.seconds)
        if state.report is not None:
            net.load_state_dict(state.best)
            return FitReport.from_dict(state.report)
    tolerances = Tolerances.of(problem.config, y0.dtype)
    noise = _noise(problem, batches, tolerances, budget) if state is None else state.noise
    data = _measure(problem, batches, tolerances, budget)
    phases, judge = phases_of(problem.objective, problem.solver(net), problem.func)
    if state is None:
        state = _start(net, data, judge, noise, budget)
        store.write(state)
    data.limit(state.most_batches)
    Loop(
        phases=phases,
        iterations=problem.iterations,
        judge=judge,
        net=net,
        data=data,
        config=problem.config,
        state=state,
        budget=budget,
        progress=progress,
        save=store.write,
    ).run()
    report = _report(problem, net, data, state, budget)
    state.report = report.to_dict()
    if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
        store.write(state)
    return report


def _measure(problem: Problem, batches: Batches, tolerances: Tolerances, budget: Budget) -> Data:
    """Return the data with the held-out batch measured."""
    return Data(
        problem.func,
        batches,
        tableau=problem.tableau,
        plan=problem.plan,
        tolerances=tolerances,
        budget=budget,
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
    calibrate(net, data[0])
    net.eval()
    return FitState(
        net=net.state_dict(),
        best=snapshot(net),
        best_error=judge.error(data.held_out),
        base_error=judge.base_error(data.held_out),
        noise=noise,
        most_batches=min(
            budget.affordable_batches(data.seconds - held_out_seconds),
            max(1, MOST_BYTES // data[0].nbytes),
        ),
    )


def _signature(problem: Problem, net: nn.Module, probes: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return what tells this fit from others."""
    config = asdict(problem.config)
    for name in ("max_seconds", "checkpoint"):
        del config[name]
    return {
        "base": problem.tableau.name,
        "alpha": problem.tableau.alpha,
        "t_span": list(problem.span),
        "steps": str(problem.steps),
        "direction": problem.direction,
        "objective": problem.objective,
        "dtype": str(probes[0].dtype),
        **config,
        "size of y0 and func(t, y0)": [float(probe.norm()) for probe in probes],
        "hypernet": {name: list(value.shape) for name, value in net.state_dict().items()},
    }


def _report(
    problem: Problem, net: nn.Module, data: Data, state: FitState, budget: Budget
) -> FitReport:
    order = problem.tableau.order
    net.eval()
    return FitReport(
        losses=tuple(state.history),
        delta=delta_quantiles(net, order, data.held_out),
        base_delta=delta_quantiles(no_correction, order, data.held_out),
        validation=state.best_error,
        base_validation=state.base_error,
        noise_floor=state.noise,
        iterations=state.iteration,
        seconds=budget.seconds,
        reference_seconds=data.seconds,
        reference_nfe=data.calls,
        stopped=state.stopped,
        seed=problem.config.seed,
        notes=_notes(state),
    )


def _notes(state: FitState) -> tuple[str, ...]:
    if state.iteration == 0:
        return ("no iteration ended in time: this is the base; pass a larger max_seconds",)
    if not state.best_error < state.base_error:
        return ("no better than the base on held-out samples: do not use it as it is",)
    return ()
