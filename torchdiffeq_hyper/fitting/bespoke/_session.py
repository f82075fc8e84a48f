"""A bespoke solver's fit from data to solver: choose a start, step, correct, read between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress

import torch
from torch import nn

from torchdiffeq_hyper._fields import find_coupling
from torchdiffeq_hyper._state import State, parts_of
from torchdiffeq_hyper.fitting._auto import measuring_time_in
from torchdiffeq_hyper.fitting._batches import Batches, n_samples, select
from torchdiffeq_hyper.fitting._budget import LAST_PHASE, Deadline
from torchdiffeq_hyper.fitting._checkpoint import FitState, signs_of_net
from torchdiffeq_hyper.fitting._context import bind
from torchdiffeq_hyper.fitting._distributed import budget_of
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError
from torchdiffeq_hyper.fitting._guard import frozen_or_restored
from torchdiffeq_hyper.fitting._loop import Loop, snapshot
from torchdiffeq_hyper.fitting._phases import Progress
from torchdiffeq_hyper.fitting._planning import PROBES, ReferencePlan
from torchdiffeq_hyper.fitting._prepare import (
    ENDLESS,
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
from torchdiffeq_hyper.fitting._report import is_worse, without_references
from torchdiffeq_hyper.fitting.bespoke._correction import (
    EndPhase,
    added_at_end,
    calibrate_end,
    fit_knots,
)
from torchdiffeq_hyper.fitting.bespoke._loop import mean_error
from torchdiffeq_hyper.fitting.bespoke._pieces import cut, rows_of
from torchdiffeq_hyper.fitting.bespoke._problem import BespokeProblem, with_large_batches
from torchdiffeq_hyper.fitting.bespoke._report import fitted_of, report_of
from torchdiffeq_hyper.fitting.bespoke._start import (
    Descents,
    best_starts,
    default_start,
    noise_at_end,
    refuse_exact,
)
from torchdiffeq_hyper.solvers._report import FitReport
from torchdiffeq_hyper.solvers.bespoke import ORDER, BespokeSolver, compositions

WEIGHTS_FIRST = 0.5
"""Share of the time that the weights get where a correction is fitted after them."""


def run_bespoke(
    problem: BespokeProblem,
    y0: State | Iterable[object],
    hypernet: nn.Module | None,
    progress: Progress,
) -> BespokeSolver:
    """Fit, or go on with an interrupted fit, or return a finished one."""
    with (
        suppress(NotUsed),
        nullcontext() if hypernet is None else frozen_or_restored(hypernet),
        measuring_time_in(hypernet, problem.width, ORDER),
    ):
        session = Session(problem, y0, hypernet, progress)
        report = session.run()
        problem.team.finish()
        if hypernet is not None and session.solver.hypernet is None:
            raise NotUsed
    solver = session.solver
    solver.domain, solver.report = problem.domain(session.batches.held_out.y0), report
    return solver.eval().requires_grad_(requires_grad=False)


class Session:
    """One fit.

    Args:
        problem: what to fit.
        y0: the starts.
        hypernet: the correction, if any.
        progress: where to show it.
    """

    def __init__(
        self,
        problem: BespokeProblem,
        y0: State | Iterable[object],
        hypernet: nn.Module | None,
        progress: Progress,
    ) -> None:
        self._problem = problem
        self._budget = budget_of(problem.team, problem.config.max_seconds)
        self.batches = Batches(y0, with_large_batches(problem, y0), problem.context)
        self._progress = progress
        self.solver = self._new_solver("euler")
        self.solver.hypernet = hypernet

    def run(self) -> FitReport:
        """Leave the solver in its best state, and return what was measured."""
        problem, team = self._problem, self._problem.team
        self._progress.say("reference solutions")
        held_out = self.batches.held_out
        self._field_check = FieldCheck.of(problem, held_out, self.batches.count)
        signature = {
            "base": problem.method,
            "steps": problem.calls,
            **self._field_check.signature(problem, held_out.context),
            "weights": signs_of_net(self.solver),
        }
        store, state = opened(problem, signature, self._budget)
        if state is not None and state.report is not None:
            if state.fallback:
                self.solver.hypernet = None
            self.solver.load_state_dict(state.best, strict=not state.fallback)
            return FitReport.from_dict(state.report)
        try:
            noise = self._measure(state)
        except OutOfTimeError:
            return self._unfitted(state)
        starts = team.from_first(lambda: best_starts(self._held_out, self.solver.weights))
        name = starts[0]
        if state is None:
            start = self._start(name, noise)
            state = team.from_first(lambda: start)
            store.write(state)
        self._data.limit(state.most_batches)
        if state.phase == 0:
            share = LAST_PHASE if self.solver.hypernet is None else WEIGHTS_FIRST
            reserve(problem, self._new_solver(name).solve, self._data, self._budget)
            Descents(
                problem,
                self.solver,
                self._data,
                self._held_out,
                rows=self._rows,
                deadline=self._budget.seconds + share * self._budget.to_train,
                budget=self._budget,
                progress=self._progress,
                save=store.write,
            ).run(starts, state)
        if self.solver.hypernet is not None:
            self._fit_correction(state, store.write)
        self._give_up_what_is_worse(name, state)
        self._fit_knots()
        state.best = {**state.best, **snapshot(self.solver)}
        report = team.from_first(
            lambda: report_of(
                problem,
                (self.solver, self._new_solver(name)),
                self._data,
                state=state,
                budget=self._budget,
                name=name,
                cut=self._plan.note,
            )
        )
        state.report = report.to_dict()
        if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
            store.write(state)
        return report

    def _new_solver(self, method: str) -> BespokeSolver:
        solver = BespokeSolver.classical(method, self._problem.calls)
        solver.requires_grad_(requires_grad=False)
        return solver.to(parts_of(self.batches.held_out.y0)[0].device)

    def _measure(self, state: FitState | None) -> float:
        """Measure the data, see how samples may be taken apart, return the noise floor.

        Raises:
            OutOfTimeError: there was no time for reference solutions.
        """
        problem, field_check = self._problem, self._field_check
        kept = None if state is None else state.references
        plan = planned(problem, self.batches, field_check, budget=self._budget, kept=kept)
        noise = plan.tolerances.rtol
        if state is None and plan.has_noise:
            noise = self._noise(plan)
        self._data, self._plan = measured(
            problem, self.batches, plan, field_check.units, self._budget, goes_on=state is not None
        )
        self._held_out = cut(self._data.held_out, problem.func, ENDLESS, None)
        held_out, n = self.batches.held_out, problem.calls
        first, last = problem.span
        times = torch.tensor([first, (first + last) / 2, last], dtype=torch.float64)
        field = bind(problem.func, held_out)
        with torch.no_grad():
            whole = find_coupling(field, held_out.y0, times) is not None
        self._rows = None if whole else rows_of(held_out.y0, n)
        return max(noise, self._plan.tolerances.rtol) if self._plan.is_looser else noise

    def _start(self, name: str, noise: float) -> FitState:
        """Return the state before the first iteration: a classical method."""
        self.solver.set_weights(compositions(self._problem.calls)[name])
        base_error = mean_error(self._held_out, self.solver.weights)
        if base_error <= 2 * noise and not self._plan.is_looser:
            refuse_exact(name, self._problem.calls, base_error, noise, self._field_check.dtype)
        return FitState(
            net=snapshot(self.solver),
            best=snapshot(self.solver),
            best_error=base_error,
            base_error=base_error,
            noise=noise,
            most_batches=most_batches(self._data, self._budget),
            references=to_keep(self._plan),
        )

    def _noise(self, plan: ReferencePlan) -> float:
        """Return the noise in the ends; that of the tolerance where there is no time for it."""
        held_out, budget = self.batches.held_out, self._budget
        probes = select(held_out, torch.arange(min(PROBES, n_samples(held_out))))
        until = Deadline(budget, NOISE_LATEST * budget.max_seconds)
        field = Field(self._problem.func, probes, until, self._field_check.units)
        try:
            ends = self._problem.plan.times[[0, -1]]
            return noise_at_end(field, probes.y0, ends, plan.tolerances)
        except OutOfTimeError:
            return plan.tolerances.rtol

    def _unfitted(self, state: FitState | None) -> FitReport:
        """Leave what there is without reference solutions: a start, or an earlier run's best."""
        if state is not None:
            self.solver.load_state_dict(state.best)
            name = "the best of the run before"
        else:
            name = default_start(self._problem.calls)
            self.solver = self._new_solver(name)
            name = f"{name} in {self._problem.calls} calls of func"
        return without_references(self._problem, name, self._budget, state)

    def _give_up_what_is_worse(self, name: str, state: FitState) -> None:
        """Let the solver be what is best, without its correction or as it started."""
        state.fallback = self._problem.team.from_first(lambda: self._fallback(name, state))
        if not state.fallback:
            return
        self.solver.hypernet = None
        if state.fallback == "start":
            self.solver.set_weights(self._new_solver(name).weights)
        state.best_error = mean_error(self._held_out, self.solver.weights)

    def _fallback(self, name: str, state: FitState) -> str:
        """Return what is better than what was fitted: "weights", "start", or "" for nothing."""
        if state.iteration == 0:
            return ""
        solvers = {"": self.solver}
        if self.solver.hypernet is not None:
            solvers["weights"] = BespokeSolver(self.solver.weights)
        start, y0 = self._new_solver(name), self.batches.held_out.y0
        for fallback, solver in solvers.items():
            fitted = fitted_of(self._problem, (solver, start), name, y0)
            if not is_worse(fitted, self._problem, self._data):
                return fallback
        return "start"

    def _fit_correction(self, state: FitState, save: Callable[[FitState], None]) -> None:
        """Fit the correction, the weights staying as they are."""
        phase = EndPhase(self.solver, self._problem.func)
        if len(state.planned) == 1:
            calibrate_end(self.solver, self._problem.func, self._data.first)
            state.best_error = phase.error(self._data.held_out)
            state.net = state.best = snapshot(self.solver)
        Loop(
            phases=(phase, phase),
            iterations=[state.iteration, self._problem.config.iterations],
            judge=phase,
            net=self.solver,
            data=self._data,
            team=self._problem.team,
            config=self._problem.config,
            state=state,
            budget=self._budget,
            progress=self._progress,
            save=save,
        ).run()

    @torch.no_grad()
    def _fit_knots(self) -> None:
        """Fit what is said between the ends, on the first training batches."""
        n, func = self._problem.calls, self._problem.func
        if n == 1:
            return
        batch = self._data.first
        added = added_at_end(self.solver, func, batch)
        pieces = cut(batch, func, ENDLESS, self._rows if added is None else None)
        values, slopes = fit_knots(piece.knot_data(self.solver.weights, added) for piece in pieces)
        self.solver.get_buffer("knot_values").copy_(values)
        self.solver.get_buffer("knot_slopes").copy_(slopes)
