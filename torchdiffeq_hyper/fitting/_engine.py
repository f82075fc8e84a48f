"""One fit from data to solver, whatever is fitted: check, solve references, train, report.

A `Target` says what is trained, from which start, and what becomes of it. To add a learned
solver with a fit of its own:

1. write the solver, a leaf of `solvers._solver.Solver`, and what its files hold
   (`solvers._files`);
2. register its method in the package's ``__init__``;
3. write its target in a file beside this one, and name it in `_fit.TARGETS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from torchdiffeq_hyper._fields import frozen_or_restored, left_as_found, own_random_state
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import NoiseFloorError
from torchdiffeq_hyper.fitting._auto import measuring_time_in
from torchdiffeq_hyper.fitting._batches import Batches, head
from torchdiffeq_hyper.fitting._budget import PROBES, Budget, ReferencePlan
from torchdiffeq_hyper.fitting._checkpoint import FitState, PhaseState, Store, snapshot
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import Data
from torchdiffeq_hyper.fitting._errors import Comparison
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError
from torchdiffeq_hyper.fitting._loop import Loop, Phase, Progress
from torchdiffeq_hyper.fitting._prepare import (
    NOISE_LATEST,
    FieldCheck,
    measured,
    most_batches,
    planned,
    reserve,
)
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._report import reported, without_references
from torchdiffeq_hyper.fitting._signature import check_same_call
from torchdiffeq_hyper.solvers._fit_report import FitReport
from torchdiffeq_hyper.solvers._solver import Solver


@dataclass(frozen=True)
class Start:
    """Held-out errors of a fit's start and of what it is compared with, and the noise floor."""

    error: float
    base_error: float
    noise: float


class Target(ABC):
    """What is fitted: a solver's learned part, its start and its end.

    The methods are called in the order in which they stand here, up to `solver`.

    Attributes:
        problem: the arguments.
        method: the method string of the solver.
        order: the order p of the base: g is multiplied by dt^(p+1).
        net: the net that is trained in place, None without.
        module: what is trained, with all its parameters.
        phase_states: the kind of state of each phase.
    """

    problem: Problem
    method: str
    order: int
    net: nn.Module | None
    module: nn.Module
    phase_states: Sequence[type[PhaseState]]

    @classmethod
    @abstractmethod
    def of(
        cls,
        func: VectorField,
        t_span: object,
        *,
        base: str,
        alpha: float | None,
        hypernet: nn.Module | str | None,
        **given: Any,
    ) -> Target:
        """Return the target of the arguments of `fit`, checked."""

    def config_for(self, y0: object) -> FitConfig:
        """Return the configuration that batches are made with."""
        return self.problem.config

    @abstractmethod
    def open(self, y0: State) -> None:
        """Set ``net``, and ``module`` if it is known already, for starts like ``y0``."""

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Return what tells this fit from those of other solvers: plain values.

        Names, shapes and dtypes of what is trained stand under "weights" or "hypernet": a
        checkpoint is held against them.
        """

    @abstractmethod
    def measure_noise(self, field: Field, y0: State, tolerances: Tolerances) -> float:
        """Return the noise in what is fitted to, on a few samples.

        Raises `NoiseFloorError` where what is fitted to does not stand above it.
        """

    @abstractmethod
    def prepare(self, data: Data, choice: dict[str, Any] | None) -> dict[str, Any] | None:
        """Take the data; return the choice of a net, as it was or as it is made now."""

    @abstractmethod
    def start(self, noise: float | None, plan: ReferencePlan) -> Start:
        """Bring ``module`` to its start and measure it; ``noise`` is None if there was no time."""

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """Return the phases in order."""

    @abstractmethod
    def comparison(self) -> Comparison:
        """Return the solver as it is, and the one it started as."""

    @abstractmethod
    def finish(self, state: FitState) -> Iterable[str]:
        """Give up what is worse than the start; complete ``state``; return notes for the user."""

    @abstractmethod
    def deltas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return quantiles of |R - g|_2 and of |R|_2 on held-out samples."""

    @abstractmethod
    def restore(self, state: FitState) -> None:
        """Take the best state of an earlier run, in place of all from `measure_noise` on."""

    @abstractmethod
    def leave_unfitted(self) -> str:
        """Be what can be had without data, and return its name for people."""

    @abstractmethod
    def solver(self, y0: State) -> Solver:
        """Return the solver with its domain, without its report."""


def run(target: Target, func: VectorField, y0: State | Iterable[object], *, shown: bool) -> Solver:
    """Fit, or go on with an interrupted fit, or return a finished one.

    ``func`` is the field as the user gave it, ``shown`` whether to show a progress bar.
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
            if target.net is not None and solver.hypernet is not target.net:
                raise _NotUsed
        solver.report = report
        for parameter in solver.parameters():
            parameter.grad = None
        return solver.eval().requires_grad_(requires_grad=False)


@contextmanager
def _undisturbed(func: VectorField, problem: Problem) -> Iterator[None]:
    """Fit with gradients, an own random state, func as it was found, and all processes."""
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        own_random_state(problem.config.seed),
        left_as_found(func),
        problem.group.together(),
    ):
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


@dataclass
class _Fit:
    """One fit of a target on some batches."""

    target: Target
    batches: Batches
    budget: Budget
    progress: Progress

    @property
    def problem(self) -> Problem:
        """The arguments."""
        return self.target.problem

    def run(self) -> FitReport:
        """Leave the target in its best state, and return what was measured."""
        target, held_out = self.target, self.batches.held_out
        self.progress.say("reference solutions")
        check = FieldCheck.of(self.problem, held_out, self.batches.count)
        common = check.signature(self.problem, held_out.context)
        store, state = self._open({**common, **target.signature()})
        if state is not None and state.report is not None:
            target.restore(state)
            return FitReport.from_dict(state.report)
        try:
            data, plan, noise = self._solve_references(check, state)
        except OutOfTimeError:
            return self._without_references(state)
        state = self._started(data, plan, noise, state, store)
        self.batches.limit(state.most_batches)
        reserve(self.problem, target.comparison().run, data, self.budget)
        phases, group = target.phases(), self.problem.group
        Loop(phases, target.module, group, state, self.budget, self.progress, store).run()
        target.module.eval()
        notes = [*target.finish(state), *([plan.note] if plan.note else [])]
        compared = target.comparison()
        report = group.from_first(
            lambda: reported(
                self.problem, compared, data, state, self.budget, deltas=target.deltas, notes=notes
            )
        )
        state.report = report.to_dict()
        if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
            store.write(state)
        return report

    def _open(self, signature: dict[str, object]) -> tuple[Store, FitState | None]:
        """Return where the fit's state is kept, and what an interrupted run left there."""
        group = self.problem.group
        check_same_call(group.gather(signature))
        path = self.problem.config.checkpoint if group.is_first else None
        store = Store(path, signature, self.target.phase_states)
        state = group.from_first(store.read)
        if state is not None:
            self.budget.resume(state.seconds)
        return store, state

    def _solve_references(
        self, check: FieldCheck, state: FitState | None
    ) -> tuple[Data, ReferencePlan, float | None]:
        """Return data with its first solutions, how they were solved, and the noise in them."""
        kept = None if state is None else state.references
        references = check.references(self.problem)
        plan = planned(self.problem, self.batches, references, budget=self.budget, kept=kept)
        noise = self._noise(plan, check) if state is None else None
        data, plan = measured(
            self.problem,
            self.batches,
            references,
            plan,
            self.budget,
            goes_on=state is not None,
        )
        return data, plan, noise

    def _noise(self, plan: ReferencePlan, check: FieldCheck) -> float | None:
        """Measure the noise on a few of the held-out samples; None if a process has no time."""
        noise = None
        if plan.has_noise:
            held_out = self.batches.held_out
            probes = head(held_out, PROBES)
            until = self.budget.until(NOISE_LATEST * self.budget.max_seconds)
            field = Field(self.problem.func, probes, until, check.units)
            try:
                noise = self.target.measure_noise(field, probes.y0, plan.tolerances)
            except OutOfTimeError:
                pass
            except NoiseFloorError as error:
                if not plan.is_looser:
                    raise
                raise OutOfTimeError from error  # there is no time for tighter references
        return None if None in self.problem.group.gather(noise) else noise

    def _started(
        self,
        data: Data,
        plan: ReferencePlan,
        noise: float | None,
        state: FitState | None,
        store: Store,
    ) -> FitState:
        """Return the state before the first iteration, or the one to go on from."""
        target, group = self.target, self.problem.group
        self.progress.say("choosing a start")
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
            most_batches=most_batches(data, self.budget),
            references=asdict(plan),
            choice=choice,
        )
        new = group.from_first(lambda: new)
        if choice is not None:
            self.progress.tell(choice["note"])
        store.write(new)
        return new

    def _without_references(self, state: FitState | None) -> FitReport:
        """Take what there is without reference solutions: a start, or an earlier run's best."""
        if state is None:
            name = self.target.leave_unfitted()
        else:
            self.target.restore(state)
            name = "the best of the run before"
        return without_references(self.problem, name, self.budget, state)
