"""The training loop of any fit: phase after phase, with validation, stopping and saving.

How a phase stops is said by `Phase.stop_reason`; when it has converged, by the phases
themselves (`_adamw`, `_levenberg_marquardt`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from torchdiffeq_hyper._fields import random_state, set_random_state
from torchdiffeq_hyper.fitting._budget import Budget, Pace
from torchdiffeq_hyper.fitting._checkpoint import FitState, PhaseState, Store, snapshot
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import OutOfTimeError
from torchdiffeq_hyper.solvers._fit_report import LossPoint


class Phase(ABC):
    """One minimisation of a fit: an optimizer and what it minimises.

    Attributes:
        name: the objective's name in the history.
        wanted: iterations wanted.
        gain: fall of the held-out error that counts as progress, relative.
        training: how far the phase is; what a checkpoint holds of it.
        pace: how many iterations end in time.
    """

    name: str
    gain: float = 0.0
    wanted: int
    training: PhaseState
    pace: Pace

    @abstractmethod
    def begin(self, saved: PhaseState | None, budget: Budget) -> bool:
        """Begin, or go on from a checkpoint; return whether the net, and so its error, changed."""

    @abstractmethod
    def iterate(self, number: int, done: int) -> float:
        """Do an iteration and return its training loss.

        ``number`` iterations of the fit and ``done`` of the phase came before it. Raises
        `OutOfTimeError` where a reference solution did not end in time, in any process.
        """

    @abstractmethod
    def error(self) -> float:
        """Return the held-out error by which states of all phases are compared."""

    @property
    def every(self) -> int:
        """Iterations between two validations."""
        return 1

    def plan(self, done: int) -> int:
        """Return how many iterations to plan for after ``done`` of this phase."""
        return self.wanted

    @abstractmethod
    def validated(self, done: int) -> None:
        """React to a validation, which ``training`` counts already."""

    @abstractmethod
    def has_converged(self, done: int) -> bool:
        """Return whether more iterations would gain nothing."""

    def save(self) -> PhaseState:
        """Return the state of the phase as it is now."""
        return self.training

    def stop_reason(self, done: int) -> str:
        """Return why the phase ends after ``done`` iterations, "" if it goes on.

        It also ends where a reference solution runs out of time within an iteration.
        """
        if done >= self.wanted:
            return "iterations"
        if self.has_converged(done):
            return "patience"
        if done >= self.training.planned or self.pace.is_over():
            return "max_seconds"
        return ""


class Progress:
    """Shows how far a fit of so many iterations is, what it is doing and how well."""

    def __init__(self, title: str, iterations: int, *, shown: bool) -> None:
        self._bar = tqdm(total=iterations, desc=title, disable=not shown)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def say(self, activity: str) -> None:
        """Show what is going on before the first iteration."""
        self._bar.set_postfix_str(activity)

    def tell(self, line: str) -> None:
        """Show a line that stays."""
        if not self._bar.disable:
            self._bar.write(line, file=self._bar.fp)

    def show(self, phase: str, iteration: int, total: int, state: FitState) -> None:
        """Show the state after an iteration."""
        self._bar.total = total
        self._bar.set_postfix_str(
            f"{phase}, held-out error {state.best_error:.3g} (base {state.base_error:.3g})",
            refresh=False,
        )
        self._bar.update(iteration - self._bar.n)


@dataclass
class Loop:
    """Runs the phases of a fit on from any state, and leaves the module in the best one.

    ``state`` is where to start; it is updated in place, and stored at each validation.
    """

    phases: Sequence[Phase]
    module: nn.Module
    group: ProcessGroup
    state: FitState
    budget: Budget
    progress: Progress
    store: Store

    def run(self) -> None:
        """Run the phases that are left."""
        state, module = self.state, self.module
        module.load_state_dict(state.net)
        if state.random:
            set_random_state(state.random)
        while state.phase < len(self.phases):
            self._run_phase(self.phases[state.phase])
            state.phase += 1
            state.training = None
            module.load_state_dict(state.best)

    def _run_phase(self, phase: Phase) -> None:
        state, losses = self.state, list[float]()
        if state.training is None:
            state.phase_start = state.iteration
        if phase.begin(state.training, self.budget):
            state.best_error = self.group.from_first(phase.error)
            state.best = snapshot(self.module)
        done = state.iteration - state.phase_start
        while not (reason := phase.stop_reason(done)):
            try:
                losses.append(phase.iterate(state.iteration, done))
            except OutOfTimeError:
                reason = "max_seconds"
                break
            state.iteration += 1
            done += 1
            phase.training.planned = max(done, phase.plan(done))
            self._show(phase)
            if done % phase.every == 0 or done >= phase.training.planned:
                self._validate(phase, losses)
                losses = []
        if losses:  # stopped by the clock between two validations
            self._validate(phase, losses)
        state.stopped = reason

    def _validate(self, phase: Phase, losses: list[float]) -> None:
        """Measure the held-out error, keep the best state, save."""
        state, module = self.state, self.module
        module.eval()
        self.group.align(module)
        error = self.group.from_first(phase.error)
        mean_loss = sum(losses) / len(losses)
        state.history.append(LossPoint(state.iteration, phase.name, mean_loss, error))
        if error < state.best_error:
            state.best, state.best_error = snapshot(module), error
        training = phase.training
        training.since_best += 1
        if error < (1 - phase.gain) * training.best_error:
            training.best_error, training.since_best = error, 0
        phase.validated(state.iteration - state.phase_start)
        state.net, state.training = module.state_dict(), phase.save()
        state.random, state.seconds = random_state(), self.budget.seconds
        self.store.write(state)

    def _show(self, phase: Phase) -> None:
        state = self.state
        later = sum(one.wanted for one in self.phases[state.phase + 1 :])
        total = state.phase_start + phase.training.planned + later
        self.progress.show(phase.name, state.iteration, total, state)
