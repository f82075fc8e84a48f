"""One fit from data to solver, whatever is fitted: check, solve references, train, report.

A learned solver with a fit of its own takes a subclass of `solvers._solver.Solver`, whose ``kind``
is its base's name and whose ``solve`` takes ``rtol`` and ``atol`` as well; a `WholeSolve` of it in
the package's ``__init__``; and a `Target` in a file beside this one, under that name in
`_fit.TARGETS`. See `_bespoke` and ``solvers/bespoke``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from torchdiffeq_hyper._fields._restore import frozen_or_restored, left_as_found, own_random_state
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import NoiseFloorError
from torchdiffeq_hyper.fitting._batches import Batches, head, n_samples
from torchdiffeq_hyper.fitting._budget import PROBES, Budget, ReferencePlan, plan_references
from torchdiffeq_hyper.fitting._checkpoint import FitState, PhaseState, Store, snapshot
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import MOST_BYTES, Data, References
from torchdiffeq_hyper.fitting._errors import Comparison, end_errors
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError
from torchdiffeq_hyper.fitting._objectives import measuring_time_in
from torchdiffeq_hyper.fitting._phases import Loop, Phase
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._report import reported, without_references
from torchdiffeq_hyper.fitting._signature import check_same_call
from torchdiffeq_hyper.solvers._fit_report import FitReport
from torchdiffeq_hyper.solvers._solver import Solver

SOLVES_OF_REPORT = 20  # solves of the held-out samples that a report takes, about
LATEST = (0.5, 0.6)  # shares of the time left that two attempts at the data may take
NOISE_LATEST = 0.25  # share of all time after which the measurement of the noise is given up


class Start(NamedTuple):
    """Held-out errors of a fit's start and of what it is compared with, and the noise floor."""

    error: float
    base_error: float
    noise: float


class Target(ABC):
    """What is fitted: a solver's learned part, its start and its end.

    The methods are called in the order in which they stand here, up to `solver`.
    """

    problem: Problem
    method: str  # the solver's method string
    order: int  # of the base, p: g is multiplied by dt^(p+1)
    net: nn.Module | None  # what is trained in place, None without
    module: nn.Module  # what is trained, with all its parameters
    phase_states: Sequence[type[PhaseState]]  # the kind of state of each phase

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
        """Return what tells this fit from others; under "weights" or "hypernet" what is trained."""

    @abstractmethod
    def measure_noise(self, field: Field, y0: State, tolerances: Tolerances) -> float:
        """Return the noise in what is fitted to, on a few samples, if that stands above it."""

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


class _NotUsed(Exception):  # noqa: N818 - not an error
    """Raised to leave a net as on an error: as it was before, since it is not in the result."""


def run(target: Target, func: VectorField, y0: State | Iterable[object], *, shown: bool) -> Solver:
    """Fit ``func`` as the user gave it; go on with an interrupted fit; return a finished one."""
    problem, config = target.problem, target.problem.config
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        own_random_state(config.seed),
        left_as_found(func),
        problem.group.together(),
    ):
        budget = Budget(config.max_seconds, problem.group.clock)
        batches = Batches(y0, target.config_for(y0), problem.context)
        first = batches.held_out.y0
        target.open(first)
        net, is_shown = target.net, shown and problem.group.is_first
        title = f"fit {target.method}"
        progress = tqdm(total=config.iterations, desc=title, disable=not is_shown)
        with (
            closing(progress),
            suppress(_NotUsed),
            measuring_time_in(net, problem.span, target.order),
            nullcontext() if net is None else frozen_or_restored(net),
        ):
            report = _Fit(target, batches, budget, progress).run()
            solver = target.solver(first)
            problem.group.finish()
            if net is not None and solver.hypernet is not net:
                raise _NotUsed
        solver.report = report
        solver.zero_grad()
        return solver.eval().requires_grad_(requires_grad=False)


@dataclass
class _Fit:
    """One fit of a target on some batches."""

    target: Target
    batches: Batches
    budget: Budget
    progress: tqdm[Any]

    def __post_init__(self) -> None:
        self._problem, self._group = self.target.problem, self.target.problem.group

    def run(self) -> FitReport:
        """Leave the target in its best state, and return what was measured."""
        target, problem, held_out = self.target, self._problem, self.batches.held_out
        self.progress.set_postfix_str("reference solutions")
        references, signs = problem.check_field(held_out, self.batches.count)
        signature = {**problem.signature(held_out, signs), **target.signature()}
        check_same_call(self._group.gather(signature))
        path = problem.config.checkpoint if self._group.is_first else None
        store = Store(path, signature, target.phase_states)
        state = self._group.from_first(store.read)
        if state is not None:
            self.budget.resume(state.seconds)
            if state.report is not None:
                target.restore(state)
                return FitReport.from_dict(state.report)
        try:
            data, plan, noise = self._solve_references(references, state)
        except OutOfTimeError:
            if state is None:
                name = target.leave_unfitted()
            else:
                target.restore(state)
                name = "the best of the run before"
            return without_references(problem, name, self.budget, state)
        self.progress.set_postfix_str("choosing a start")
        choice = target.prepare(data, None if state is None else state.choice)
        if state is None:
            new = self._start(data, plan, noise, choice)
            state = self._group.from_first(lambda: new)
            store.write(state)
        self.batches.most = state.most_batches
        self.budget.reserved = SOLVES_OF_REPORT * self._group.from_first(lambda: self._time(data))
        phases = target.phases()
        Loop(phases, target.module, self._group, state, self.budget, self.progress, store).run()
        target.module.eval()
        notes = [*target.finish(state), *([plan.note] if plan.note else [])]
        compared = target.comparison()
        report = self._group.from_first(
            lambda: reported(
                problem, compared, data, state, self.budget, deltas=target.deltas, notes=notes
            )
        )
        state.report = report.to_dict()
        if state.stopped != "max_seconds":  # else the next call goes on, should it have more time
            store.write(state)
        return report

    @torch.no_grad()
    def _time(self, data: Data) -> float:
        """Return the seconds of a solve of the held-out samples."""
        began = time.perf_counter()
        end_errors(self.target.comparison().run, self._problem.func, data.held_out)
        return time.perf_counter() - began

    def _solve_references(
        self, references: References, state: FitState | None
    ) -> tuple[Data, ReferencePlan, float | None]:
        """Return data with its first solutions, how they were solved, and the noise in them."""
        batches, budget, noise = self.batches, self.budget, None
        if state is None:
            in_batch = n_samples(batches[0])
            plan = self._group.from_first(
                lambda: plan_references(references, batches.held_out, in_batch, budget)
            )
            noise = self._noise(plan, references)
            attempts = [*zip((plan, plan.hurried()), LATEST, strict=True)]
        else:  # it has to meet its data again
            attempts = [(ReferencePlan.from_dict(state.references), 1.0)]
        for attempt, share in attempts:
            batches.keep(attempt.held_out, attempt.batch)
            now = budget.elapsed
            deadline = budget.until(now + share * (budget.max_seconds - now))
            solver = replace(references, tolerances=attempt.tolerances)
            with suppress(OutOfTimeError):
                data = Data(solver, batches, deadline, self._group)
                data.budget = budget
                return data, attempt, noise
        raise OutOfTimeError

    def _noise(self, plan: ReferencePlan, references: References) -> float | None:
        """Measure the noise on a few of the held-out samples; None if a process has no time."""
        noise = None
        if plan.has_noise:
            probes = head(self.batches.held_out, PROBES)
            until = self.budget.until(NOISE_LATEST * self.budget.max_seconds)
            field = Field(self._problem.func, probes, until, references.units)
            try:
                noise = self.target.measure_noise(field, probes.y0, plan.tolerances)
            except OutOfTimeError:
                pass
            except NoiseFloorError as error:
                if not plan.is_looser:
                    raise
                raise OutOfTimeError from error  # there is no time for tighter references
        return None if None in self._group.gather(noise) else noise

    def _start(
        self, data: Data, plan: ReferencePlan, noise: float | None, choice: dict[str, Any] | None
    ) -> FitState:
        """Return the state before the first iteration."""
        target, start = self.target, self.target.start(noise, plan)
        if choice is not None and not self.progress.disable:
            self.progress.write(choice["note"], file=self.progress.fp)
        in_time = self.budget.affordable_batches(data.seconds_per_batch, data.held_out_seconds)
        return FitState(
            net=target.module.state_dict(),
            best=snapshot(target.module),
            best_error=start.error,
            base_error=start.base_error,
            noise=start.noise,
            most_batches=min(in_time, max(1, MOST_BYTES // data.first.nbytes)),
            references=asdict(plan),
            choice=choice,
        )
