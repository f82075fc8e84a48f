"""One fit from data to solver, whatever is fitted: check, solve references, train, report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict

import torch

from torchdiffeq_hyper._fields import model_as_found
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import NoiseFloorError
from torchdiffeq_hyper.fitting._auto import measuring_time_in
from torchdiffeq_hyper.fitting._batches import Batches, head
from torchdiffeq_hyper.fitting._budget import PROBES, Budget, Deadline, ReferencePlan
from torchdiffeq_hyper.fitting._checkpoint import FitState, Store, snapshot
from torchdiffeq_hyper.fitting._data import Data
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError
from torchdiffeq_hyper.fitting._guard import frozen_or_restored, left_as_found, own_random_state
from torchdiffeq_hyper.fitting._loop import Loop, Progress
from torchdiffeq_hyper.fitting._prepare import (
    NOISE_LATEST,
    FieldCheck,
    measured,
    most_batches,
    planned,
    reserve,
)
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._report import reported, without_references
from torchdiffeq_hyper.fitting._signature import check_same_call
from torchdiffeq_hyper.fitting._target import Target
from torchdiffeq_hyper.solvers._report import FitReport
from torchdiffeq_hyper.solvers._solver import Solver


def run(target: Target, func: VectorField, y0: State | Iterable[object], *, shown: bool) -> Solver:
    """Fit, or go on with an interrupted fit, or return a finished one.

    Args:
        target: what to fit.
        func: the vector field as the user gave it, to be left as found.
        y0: the starts.
        shown: whether to show a progress bar.
    """
    problem = target.problem
    with _undisturbed(func, problem):
        budget = Budget(problem.config.max_seconds, problem.group.clock)
        batches = Batches(y0, target.config_for(y0), problem.context)
        first = batches.held_out.y0
        target.open(first)
        title = f"fit {target.method}"
        is_shown = shown and problem.group.is_first
        with (
            closing(Progress(title, problem.config.iterations, shown=is_shown)) as progress,
            suppress(_NotUsed),
            _trained_in_place(target),
        ):
            report = _Fit(target, batches, budget, progress).run()
            solver = target.solver(first)
            problem.group.finish()
            if solver.hypernet is not target.net:
                raise _NotUsed
        solver.report = report
        for parameter in solver.parameters():
            parameter.grad = None
        return solver.eval().requires_grad_(requires_grad=False)


@contextmanager
def _undisturbed(func: VectorField, problem: Problem) -> Iterator[None]:
    """Fit with gradients, an own random state, func as it was found, and all processes."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(own_random_state(problem.config.seed))
        stack.enter_context(left_as_found(func))
        stack.enter_context(model_as_found(problem.func))
        stack.enter_context(problem.group.together())
        yield


class _NotUsed(Exception):  # noqa: N818 - not an error
    """Raised to leave a net as on an error: as it was before, since it is not in the result."""


@contextmanager
def _trained_in_place(target: Target) -> Iterator[None]:
    """Train the target's net in place: frozen at the end, as before on any error."""
    if target.net is None:
        yield
        return
    with (
        measuring_time_in(target.net, target.problem.width, target.order),
        frozen_or_restored(target.net),
    ):
        yield


class _Fit:
    """One fit of a target on some batches."""

    def __init__(
        self, target: Target, batches: Batches, budget: Budget, progress: Progress
    ) -> None:
        self._target = target
        self._problem = target.problem
        self._batches = batches
        self._budget = budget
        self._progress = progress

    def run(self) -> FitReport:
        """Leave the target in its best state, and return what was measured."""
        target, held_out = self._target, self._batches.held_out
        self._progress.say("reference solutions")
        check = FieldCheck.of(self._problem, held_out, self._batches.count)
        common = check.signature(self._problem, held_out.context)
        store, state = self._open({**common, **target.signature()})
        if state is not None and state.report is not None:
            target.restore(state)
            return FitReport.from_dict(state.report)
        try:
            data, plan, noise = self._solve_references(check, state)
        except OutOfTimeError:
            return self._without_references(state)
        state = self._started(data, plan, noise, state, store)
        self._batches.limit(state.most_batches)
        reserve(self._problem, target.comparison().run, data, self._budget)
        loop = Loop(target, state, self._budget, self._progress, store)
        loop.run()
        target.module.eval()
        target.finish(state)
        notes = [*target.notes(state), *([plan.note] if plan.note else [])]
        report = self._problem.group.from_first(
            lambda: reported(target, data, state, self._budget, notes)
        )
        state.report = report.to_dict()
        if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
            store.write(state)
        return report

    def _open(self, signature: dict[str, object]) -> tuple[Store, FitState | None]:
        """Return where the fit's state is kept, and what an interrupted run left there.

        Raises:
            OptionError: processes of this fit make different calls; or as `Store.read`.
        """
        group = self._problem.group
        check_same_call(group.gather(signature))
        path = self._problem.config.checkpoint if group.is_first else None
        store = Store(path, signature, self._target.phase_states)
        state = group.from_first(store.read)
        if state is not None:
            self._budget.resume(state.seconds)
        return store, state

    def _solve_references(
        self, check: FieldCheck, state: FitState | None
    ) -> tuple[Data, ReferencePlan, float | None]:
        """Return data with its first solutions, how they were solved, and the noise in them.

        Raises:
            OutOfTimeError: there was no time for reference solutions.
            NoiseFloorError: what is fitted to does not stand above the noise.
        """
        kept = None if state is None else state.references
        references = check.references(self._problem)
        plan = planned(self._problem, self._batches, references, budget=self._budget, kept=kept)
        noise = self._noise(plan, check) if state is None else None
        data, plan = measured(
            self._problem,
            self._batches,
            references,
            plan,
            self._budget,
            goes_on=state is not None,
        )
        return data, plan, noise

    def _noise(self, plan: ReferencePlan, check: FieldCheck) -> float | None:
        """Measure the noise on a few of the held-out samples; None if a process has no time."""
        noise = None
        if plan.has_noise:
            held_out = self._batches.held_out
            probes = head(held_out, PROBES)
            until = Deadline(self._budget, NOISE_LATEST * self._budget.max_seconds)
            field = Field(self._problem.func, probes, until, check.units)
            try:
                noise = self._target.measure_noise(field, probes.y0, plan.tolerances)
            except OutOfTimeError:
                pass
            except NoiseFloorError as error:
                if not plan.is_looser:
                    raise
                raise OutOfTimeError from error  # there is no time for tighter references
        return None if None in self._problem.group.gather(noise) else noise

    def _started(
        self,
        data: Data,
        plan: ReferencePlan,
        noise: float | None,
        state: FitState | None,
        store: Store,
    ) -> FitState:
        """Return the state before the first iteration, or the one to go on from."""
        target, group = self._target, self._problem.group
        self._progress.say("choosing a start")
        choice = target.prepare(data, None if state is None else state.choice)
        if state is not None:
            return state
        start = target.start(noise, plan)
        module = target.module
        new = FitState(
            net=module.state_dict(),
            best=snapshot(module),
            best_error=start.error,
            base_error=start.base_error,
            noise=start.noise,
            most_batches=most_batches(data, self._budget),
            references=asdict(plan),
            choice=choice,
        )
        new = group.from_first(lambda: new)
        if choice is not None:
            self._progress.tell(choice["note"])
        store.write(new)
        return new

    def _without_references(self, state: FitState | None) -> FitReport:
        """Take what there is without reference solutions: a start, or an earlier run's best."""
        if state is None:
            name = self._target.leave_unfitted()
        else:
            self._target.restore(state)
            name = "the best of the run before"
        return without_references(self._problem, name, self._budget, state)
