"""The training loop of any fit: phase after phase, with validation, stopping and saving."""

from __future__ import annotations

from tqdm import tqdm

from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import FitState, Store, snapshot
from torchdiffeq_hyper.fitting._field import OutOfTimeError
from torchdiffeq_hyper.fitting._guard import random_state, set_random_state
from torchdiffeq_hyper.fitting._target import Phase, Target
from torchdiffeq_hyper.solvers._report import LossPoint


def stop_reason(phase: Phase, done: int) -> str:
    """Return why a phase ends after ``done`` iterations, "" if it goes on.

    These are all the ways in which a fit stops, but for errors.
    """
    if done >= phase.wanted:
        return "iterations"
    if phase.has_converged(done):
        return "patience"
    if done >= phase.training.planned or phase.pace.is_over():
        return "max_seconds"
    return ""


class Loop:
    """Runs the phases of a fit on from any state.

    Args:
        target: what is fitted; its module ends in the best state.
        state: where to start; updated in place.
        budget: the time there is.
        progress: where to show it.
        store: where the state is kept at each validation.
    """

    def __init__(
        self, target: Target, state: FitState, budget: Budget, progress: Progress, store: Store
    ) -> None:
        self._target = target
        self._group = target.problem.group
        self._phases = target.phases()
        self._state = state
        self._budget = budget
        self._progress = progress
        self._store = store

    def run(self) -> None:
        """Run the phases that are left."""
        state, module = self._state, self._target.module
        module.load_state_dict(state.net)
        if state.random:
            set_random_state(state.random)
        while state.phase < len(self._phases):
            self._run_phase(self._phases[state.phase])
            state.phase += 1
            state.training = None
            module.load_state_dict(state.best)

    def _run_phase(self, phase: Phase) -> None:
        state, losses = self._state, list[float]()
        if state.training is None:
            state.phase_start = state.iteration
        if phase.begin(state.training, self._budget):
            state.best_error = self._group.from_first(phase.error)
            state.best = snapshot(self._target.module)
        done = state.iteration - state.phase_start
        while not (reason := stop_reason(phase, done)):
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
        state, module = self._state, self._target.module
        module.eval()
        self._group.align(module)
        error = self._group.from_first(phase.error)
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
        state.random, state.seconds = random_state(), self._budget.seconds
        self._store.write(state)

    def _show(self, phase: Phase) -> None:
        state = self._state
        later = sum(one.wanted for one in self._phases[state.phase + 1 :])
        total = state.phase_start + phase.training.planned + later
        self._progress.show(phase.name, state.iteration, total, state)


class Progress:
    """Shows how far a fit is, what it is doing and how well.

    Args:
        title: what is fitted.
        iterations: iterations of all phases.
        shown: whether to show anything.
    """

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
