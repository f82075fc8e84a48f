"""The phases of a fit: when one stops, the one by AdamW, and the loop through them.

The rules of when it ends are in `Phase.stop_reason` and in what it calls; the clock is `_budget`'s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from torchdiffeq_hyper._fields._restore import random_state, set_random_state
from torchdiffeq_hyper._files import refused
from torchdiffeq_hyper._rules import FLOATS, Maybe, Record, Row, Rule, Such, TensorOf, Whole
from torchdiffeq_hyper.errors import FitDivergedError, NonFiniteError
from torchdiffeq_hyper.fitting._budget import FIRST_PHASE, LAST_PHASE, Budget, Pace
from torchdiffeq_hyper.fitting._checkpoint import FitState, PhaseState, Store, snapshot
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import OutOfTimeError
from torchdiffeq_hyper.fitting._objectives import Objective, usable_scale
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.solvers._fit_report import LossPoint

VALIDATIONS = 40  # validations in a phase
COOLDOWN = 0.25  # share of its iterations that a phase without gains adds to end annealed
STEEPEST = 1.0  # norm at which gradients are clipped, for losses relative to the base's
LOWEST_RATE = 0.01  # what the learning rate is annealed to, as a share of its start


class Phase(ABC):
    """One minimisation of a fit: an optimizer and what it minimises."""

    name: str  # the objective's, in the history
    gain: float = 0.0  # fall of the held-out error that counts as progress, relative
    wanted: int  # iterations
    training: PhaseState  # how far the phase is; what a checkpoint holds of it
    pace: Pace

    @abstractmethod
    def begin(self, saved: PhaseState | None, budget: Budget) -> bool:
        """Begin, or go on from a checkpoint; return whether the net, and so its error, changed."""

    @abstractmethod
    def iterate(self, number: int, done: int) -> float:
        """Do an iteration after ``number`` of the fit, ``done`` of the phase; return its loss."""

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
        """Return why the phase ends after ``done`` iterations, "" if it goes on."""
        if done >= self.wanted:
            return "iterations"
        if self.has_converged(done):
            return "patience"
        if done >= self.training.planned or self.pace.is_over():
            return "max_seconds"
        return ""


def annealed(share: float, lowest: float = LOWEST_RATE) -> float:
    """Return the share of the learning rate after a share of a phase: half a cosine."""
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * share)) / 2


_STEP = Such(TensorOf(FLOATS, ()), lambda step: float(step) >= 1, "of at least 1")


@dataclass
class AdamWState(PhaseState):
    """How far a phase of AdamW is."""

    kind: ClassVar[str] = "adamw"
    rules: ClassVar[Mapping[str, Rule]] = {"cooldown_end": Maybe(Whole(1))}

    # The optimizer's state for each parameter, None for those without a gradient.
    moments: list[dict[str, Tensor] | None] = field(default_factory=list)
    cooldown_end: int | None = None  # iterations after which a phase without gains ends


@dataclass(eq=False)
class AdamWPhase(Phase):
    """Minimises an objective over the training batches; a second one selects the best state."""

    objectives: tuple[Objective, Objective]
    net: nn.Module
    data: Data
    problem: Problem
    wanted: int
    is_last: bool
    training: AdamWState = field(init=False)

    def __post_init__(self) -> None:
        self._objective, self._validation = self.objectives
        self.name = self._objective.name
        self._group, self._config = self.problem.group, self.problem.config
        self._parameters = [p for p in self.net.parameters() if p.requires_grad]

    def begin(self, saved: PhaseState | None, budget: Budget) -> bool:
        """Make the optimizer: new, or as it was when the fit was interrupted."""
        config, is_changed = self._config, False
        decay = config.weight_decay
        self._optimizer = optim.AdamW(self._parameters, config.lr, weight_decay=decay)
        if saved is None:
            self.training = AdamWState(self.wanted)
            is_changed = self._objective.calibrate(self.data.first)
        else:
            assert isinstance(saved, AdamWState)
            self.training = saved
            _restore(self._optimizer, self._parameters, saved.moments)
            if self.is_last:  # a fit that its clock had cut short may have more time now
                saved.planned = min(self.wanted, saved.cooldown_end or self.wanted)
        self.pace = budget.start_phase(self.wanted, LAST_PHASE if self.is_last else FIRST_PHASE)
        self._scales = self._group.from_first(self._measure_scales)
        return is_changed

    def _measure_scales(self) -> list[float]:
        """Return the base's loss on each grid."""
        held_out, loss = self.data.held_out, self._objective.base_loss
        return [usable_scale(loss(held_out, grid)) for grid in range(len(held_out.grids))]

    def iterate(self, number: int, done: int) -> float:
        """Do one step of AdamW along the gradient on a batch and a grid."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * annealed(done / self.training.planned)
        late = number - config.pretrain_iterations
        batch = self.data[0 if late < 0 else 1 + late // config.swap_every]
        grid = number % len(self._scales)
        self.net.train()
        self._optimizer.zero_grad()
        try:
            loss = self._objective.loss(batch, grid)
        except NonFiniteError as error:
            raise self._diverged(number, batch, grid, "roll-out") from error
        # Relative to the base's error, so that rates, clipping and the balance between
        # grids do not depend on the problem's units.
        (loss / self._scales[grid]).backward(inputs=self._parameters)
        loss = self._group.average(loss, self._parameters, batch.weight)
        norm = clip_grad_norm_(self._parameters, STEEPEST)
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(float(value.detach())):
                raise self._diverged(number, batch, grid, name)
        self._optimizer.step()
        return float(loss.detach())

    def _diverged(self, number: int, batch: Batch, grid: int, what: str) -> FitDivergedError:
        problem = f"the {what} turned non-finite at iteration {number} ({self.name} phase)"
        expected, fix = "finite losses and gradients.", f"FitConfig(lr={self._config.lr / 10:g})"
        if not math.isfinite(self._objective.base_loss(batch, grid)):
            problem += "; so does the base alone on these samples: it is unstable at these steps"
            expected = "a base that stays finite on all samples."
            fix = 'more steps, or no roll-outs: objective="residual"'
        return FitDivergedError(problem=f"{problem}.", expected=expected, fix=fix)

    def error(self) -> float:
        """Return the held-out error of the objective that selects."""
        return self._validation.error(self.data.held_out)

    @property
    def every(self) -> int:
        """Iterations between two validations."""
        return max(1, self.training.planned // VALIDATIONS)

    def plan(self, done: int) -> int:
        """Return the iterations that end in time, and before the end of the cooldown."""
        planned = self.pace.plan(done, self.training.planned)
        end = self.training.cooldown_end
        return planned if end is None else min(planned, end)

    def validated(self, done: int) -> None:
        """Let a phase whose error has stopped falling anneal and end soon."""
        # Not at once: the error falls once more when the rate does.
        training = self.training
        if training.cooldown_end is None and training.since_best >= self._config.patience:
            training.cooldown_end = done + math.ceil(COOLDOWN * done)
            training.planned = min(training.planned, training.cooldown_end)

    def has_converged(self, done: int) -> bool:
        """Return whether the cooldown is over."""
        end = self.training.cooldown_end
        return end is not None and done >= end

    def save(self) -> PhaseState:
        """Return the state with the optimizer's moments."""
        self.training.moments = [
            dict(self._optimizer.state[p]) if p in self._optimizer.state else None
            for p in self._parameters
        ]
        return self.training


def _restore(
    optimizer: optim.Optimizer, parameters: Sequence[Tensor], moments: Sequence[Any]
) -> None:
    """Give an optimizer the moments that were saved; its settings stay those of this fit."""
    with refused("the checkpoint"):
        alike = [TensorOf(FLOATS, tuple(p.shape), is_finite=True) for p in parameters]
        rules = (Record({"step": _STEP, "exp_avg": rule, "exp_avg_sq": rule}) for rule in alike)
        Row(*map(Maybe, rules)).check(moments, "state.training.moments")
    state = {number: own for number, own in enumerate(moments) if own is not None}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@dataclass
class Loop:
    """Runs the phases of a fit on from a state, which it updates, to the module's best."""

    phases: Sequence[Phase]
    module: nn.Module
    group: ProcessGroup
    state: FitState
    budget: Budget
    progress: tqdm[Any]
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
        if self.group.size > 1:  # buffers, as of batch norms, saw the samples of one process
            module.load_state_dict(self.group.from_first(module.state_dict))
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
        state, bar = self.state, self.progress
        later = sum(one.wanted for one in self.phases[state.phase + 1 :])
        bar.total = state.phase_start + phase.training.planned + later
        errors = f"held-out error {state.best_error:.3g} (base {state.base_error:.3g})"
        bar.set_postfix_str(f"{phase.name}, {errors}", refresh=False)
        bar.update(state.iteration - bar.n)
