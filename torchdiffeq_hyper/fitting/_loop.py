"""The training loop: schedule, validation, budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_

from torchdiffeq_hyper.errors import FitDivergedError, NonFiniteError, explain
from torchdiffeq_hyper.fitting._budget import Budget, Pace
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import OutOfTimeError
from torchdiffeq_hyper.fitting._guard import random_state, set_random_state
from torchdiffeq_hyper.fitting._phases import Phase, Progress, annealed
from torchdiffeq_hyper.fitting._state_rules import restore
from torchdiffeq_hyper.solvers._report import LossPoint

VALIDATIONS = 40
"""Validations in a phase."""
LANDING = 0.25
"""What a phase that has stopped gaining adds to end annealed, as a share of its iterations."""
STEEPEST = 1.0
"""Norm at which gradients are clipped, for losses relative to the base's."""


class Loop:
    """Runs the phases of a fit on from any state.

    Args:
        phases: what to minimise, in order.
        iterations: iterations wanted in each phase.
        judge: the phase whose error selects the best state.
        net: the hypernet.
        data: the batches.
        group: the processes that share them.
        config: rates and numbers.
        state: where to start; updated in place.
        budget: the time there is.
        progress: where to show it.
        save: called with the state after each validation.
    """

    def __init__(
        self,
        *,
        phases: Sequence[Phase],
        iterations: Sequence[int],
        judge: Phase,
        net: nn.Module,
        data: Data,
        group: ProcessGroup,
        config: FitConfig,
        state: FitState,
        budget: Budget,
        progress: Progress,
        save: Callable[[FitState], None],
    ) -> None:
        self._phases = phases
        self._iterations = iterations
        self._judge = judge
        self._net = net
        self._data = data
        self._group = group
        self._config = config
        self._state = state
        self._budget = budget
        self._progress = progress
        self._save = save
        self._parameters = [p for p in net.parameters() if p.requires_grad]
        self._losses: list[float] = []

    def run(self) -> None:
        """Run the phases that are left; the net ends in the best state."""
        state = self._state
        self._net.load_state_dict(state.net)
        if state.random:
            set_random_state(state.random)
        while state.phase < len(self._phases):
            self._run_phase(self._phases[state.phase])
            state.phase += 1
            self._net.load_state_dict(state.best)

    def _run_phase(self, phase: Phase) -> None:
        state = self._state
        wanted = self._iterations[state.phase]
        is_last = state.phase == len(self._phases) - 1
        optimizer = self._begin_phase(wanted, is_last=is_last)
        pace = self._budget.start_phase(wanted, is_last=is_last)
        scales = self._group.from_first(
            lambda: [
                usable_scale(phase.base_loss(self._data.held_out, grid))
                for grid in range(self._data.n_grids)
            ]
        )
        while state.iteration - state.phase_start < state.planned[-1]:
            if pace.is_over():
                break
            self._anneal(optimizer)
            try:
                self._losses.append(self._iterate(phase, scales, optimizer))
            except OutOfTimeError:
                break
            state.iteration += 1
            done = state.iteration - state.phase_start
            state.planned[-1] = max(done, self._plan(pace, done))
            self._show(phase)
            if done % self._every() == 0 or done >= state.planned[-1]:
                self._validate(phase, optimizer)
        if self._losses:  # stopped by the clock between two validations
            self._validate(phase, optimizer)
        state.stopped = self._reason(wanted)

    def _begin_phase(self, wanted: int, *, is_last: bool) -> optim.Optimizer:
        """Return the phase's optimizer: new, or as it was when the fit was interrupted."""
        state = self._state
        optimizer = optim.AdamW(
            self._parameters, lr=self._config.lr, weight_decay=self._config.weight_decay
        )
        if len(state.planned) > state.phase:
            if state.optimizer is not None:
                restore(optimizer, state.optimizer)
            if is_last:  # a fit that its clock had cut short goes on if it has more time now
                state.planned[-1] = min(wanted, state.landing or wanted)
            return optimizer
        state.planned.append(wanted)
        state.phase_start, state.since_best, state.optimizer = state.iteration, 0, None
        state.phase_best, state.landing = math.inf, None
        return optimizer

    def _anneal(self, optimizer: optim.Optimizer) -> None:
        """Set the learning rate: half a cosine over the phase."""
        state = self._state
        share = (state.iteration - state.phase_start) / state.planned[-1]
        for group in optimizer.param_groups:
            group["lr"] = self._config.lr * annealed(share)

    def _iterate(self, phase: Phase, scales: Sequence[float], optimizer: optim.Optimizer) -> float:
        """Do one iteration and return its loss."""
        state, config = self._state, self._config
        late = state.iteration - config.pretrain_iterations
        batch = self._data[0 if late < 0 else 1 + late // config.swap_every]
        grid = state.iteration % self._data.n_grids
        self._net.train()
        optimizer.zero_grad()
        try:
            loss = phase.loss(batch, grid)
        except NonFiniteError as error:
            raise self._diverged(phase, "the roll-out", batch, grid) from error
        # Relative to the base's error, so that rates, clipping and the balance between
        # grids do not depend on the problem's units.
        (loss / scales[grid]).backward(inputs=self._parameters)
        loss = self._group.average(loss, self._parameters, batch.weight)
        norm = clip_grad_norm_(self._parameters, STEEPEST)
        for name, value in (("the loss", loss), ("the gradient", norm)):
            if not math.isfinite(float(value.detach())):
                raise self._diverged(phase, name, batch, grid)
        optimizer.step()
        return float(loss.detach())

    def _diverged(self, phase: Phase, what: str, batch: Batch, grid: int) -> FitDivergedError:
        where = f"at iteration {self._state.iteration} ({phase.name} phase)"
        if math.isfinite(phase.base_error(batch, grid)):
            return FitDivergedError(
                explain(
                    f"{what} turned non-finite {where}.",
                    "finite losses and gradients.",
                    f"FitConfig(lr={self._config.lr / 10:g})",
                )
            )
        return FitDivergedError(
            explain(
                f"{what} turned non-finite {where}; so does the base alone on these samples: it is "
                "unstable at these step sizes.",
                "a base that stays finite on all samples.",
                'more steps, or no roll-outs: objective="residual"',
            )
        )

    def _plan(self, pace: Pace, done: int) -> int:
        """Return the iterations to plan for, given the time and where the phase lands."""
        planned = pace.plan(done, self._state.planned[-1])
        return planned if self._state.landing is None else min(planned, self._state.landing)

    def _land(self) -> None:
        """Let a phase whose error has stopped falling anneal and end soon.

        Not at once: while the rate is high the error only jumps about its level, and falls
        once more when the rate does.
        """
        state = self._state
        if state.landing is None and state.since_best >= self._config.patience:
            done = state.iteration - state.phase_start
            state.landing = done + math.ceil(LANDING * done)
            state.planned[-1] = min(state.planned[-1], state.landing)

    def _every(self) -> int:
        return max(1, self._state.planned[-1] // VALIDATIONS)

    def _validate(self, phase: Phase, optimizer: optim.Optimizer) -> None:
        """Measure the held-out error, keep the best state, save."""
        state = self._state
        self._net.eval()
        self._group.align(self._net)
        error = self._group.from_first(lambda: self._judge.error(self._data.held_out))
        mean_loss = sum(self._losses) / len(self._losses)
        state.history.append(LossPoint(state.iteration, phase.name, mean_loss, error))
        self._losses = []
        state.since_best += 1
        state.net = self._net.state_dict()
        if error < state.phase_best:  # a phase may begin far above where the last one ended
            state.phase_best, state.since_best = error, 0
        if error < state.best_error:
            state.best, state.best_error = snapshot(self._net), error
        self._land()
        state.optimizer = optimizer.state_dict()
        state.random = random_state()
        state.seconds = self._budget.seconds
        self._save(state)

    def _show(self, phase: Phase) -> None:
        state = self._state
        left = sum(self._iterations[state.phase + 1 :])
        total = state.phase_start + state.planned[-1] + left
        self._progress.show(phase.name, state.iteration, total, state)

    def _reason(self, wanted: int) -> str:
        state = self._state
        done = state.iteration - state.phase_start
        if done >= wanted:
            return "iterations"
        has_landed = state.landing is not None and done >= state.landing
        return "patience" if has_landed else "max_seconds"


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a net's state_dict."""
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def usable_scale(scale: float) -> float:
    """Return a scale to divide by: 1 where the base is exact or blew up."""
    return scale if math.isfinite(scale) and scale > 0 else 1.0
