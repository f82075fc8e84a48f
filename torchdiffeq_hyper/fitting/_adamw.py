"""A phase in which AdamW fits a net, batch by batch, with cosine annealing and a cooldown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_

from torchdiffeq_hyper._files import refused
from torchdiffeq_hyper._rules import (
    FLOATS,
    Items,
    Maybe,
    Mismatch,
    Record,
    Rule,
    Such,
    TensorOf,
    Whole,
)
from torchdiffeq_hyper.errors import FitDivergedError, NonFiniteError
from torchdiffeq_hyper.fitting._budget import FIRST_PHASE, LAST_PHASE, Budget
from torchdiffeq_hyper.fitting._checkpoint import PhaseState
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._loop import Phase
from torchdiffeq_hyper.fitting._objectives import Objective, usable_scale
from torchdiffeq_hyper.fitting._problem import Problem

VALIDATIONS = 40
"""Validations in a phase."""
COOLDOWN = 0.25
"""What a phase that has stopped gaining adds to end annealed, as a share of its iterations."""
STEEPEST = 1.0
"""Norm at which gradients are clipped, for losses relative to the base's."""
LOWEST_RATE = 0.01
"""What the learning rate is annealed to, as a share of its start."""


def annealed(share: float, lowest: float = LOWEST_RATE) -> float:
    """Return the share of the learning rate after a share of a phase: half a cosine."""
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * share)) / 2


_MOMENT = TensorOf(FLOATS, is_finite=True)
_STEP = Such(TensorOf(FLOATS, ()), lambda step: float(step) >= 1, "of at least 1")
_MOMENTS = Record({"step": _STEP, "exp_avg": _MOMENT, "exp_avg_sq": _MOMENT})


@dataclass
class AdamWState(PhaseState):
    """How far a phase of AdamW is."""

    kind: ClassVar[str] = "adamw"
    rules: ClassVar[Mapping[str, Rule]] = {
        "moments": Items(Maybe(_MOMENTS)),
        "cooldown_end": Maybe(Whole(1)),
    }

    # The optimizer's state for each parameter, None for those without a gradient.
    moments: list[dict[str, Tensor] | None] = field(default_factory=list)
    # Iterations after which the phase ends, once it has stopped gaining.
    cooldown_end: int | None = None


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
        """Read off what is used often."""
        self._objective, self._validation = self.objectives
        self.name = self._objective.name
        self._group, self._config = self.problem.group, self.problem.config
        self._parameters = [p for p in self.net.parameters() if p.requires_grad]

    def begin(self, saved: PhaseState | None, budget: Budget) -> bool:
        """Make the optimizer: new, or as it was when the fit was interrupted."""
        config, is_changed = self._config, False
        self._optimizer = optim.AdamW(
            self._parameters, lr=config.lr, weight_decay=config.weight_decay
        )
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
        held_out, grids = self.data.held_out, range(len(self.data.held_out.grids))
        return [usable_scale(self._objective.base_loss(held_out, grid)) for grid in grids]

    def iterate(self, number: int, done: int) -> float:
        """Do one step of AdamW along the gradient on a batch and a grid."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * annealed(done / self.training.planned)
        late = number - config.pretrain_iterations
        batch = self.data[0 if late < 0 else 1 + late // config.swap_every]
        grid = number % len(self.data.held_out.grids)
        self.net.train()
        self._optimizer.zero_grad()
        try:
            loss = self._objective.loss(batch, grid)
        except NonFiniteError as error:
            what = "the roll-out"
            raise self._diverged(what, number, batch, grid) from error
        # Relative to the base's error, so that rates, clipping and the balance between
        # grids do not depend on the problem's units.
        (loss / self._scales[grid]).backward(inputs=self._parameters)
        loss = self._group.average(loss, self._parameters, batch.weight)
        norm = clip_grad_norm_(self._parameters, STEEPEST)
        for name, value in (("the loss", loss), ("the gradient", norm)):
            if not math.isfinite(float(value.detach())):
                raise self._diverged(name, number, batch, grid)
        self._optimizer.step()
        return float(loss.detach())

    def _diverged(self, what: str, number: int, batch: Batch, grid: int) -> FitDivergedError:
        problem = f"{what} turned non-finite at iteration {number} ({self.name} phase)"
        if math.isfinite(self._objective.base_error(batch, grid)):
            return FitDivergedError(
                problem=f"{problem}.",
                expected="finite losses and gradients.",
                fix=f"FitConfig(lr={self._config.lr / 10:g})",
            )
        return FitDivergedError(
            problem=f"{problem}; so does the base alone on these samples: it is unstable at these "
            "step sizes.",
            expected="a base that stays finite on all samples.",
            fix='more steps, or no roll-outs: objective="residual"',
        )

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
        """Let a phase whose error has stopped falling anneal and end soon.

        Not at once: while the rate is high the error only jumps about its level, and falls
        once more when the rate does.
        """
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
    optimizer: optim.Optimizer,
    parameters: Sequence[Tensor],
    moments: Sequence[dict[str, Tensor] | None],
) -> None:
    """Give an optimizer the moments that were saved; its settings stay those of this fit."""
    with refused("the checkpoint"):
        at = "state.training.moments"
        if len(moments) != len(parameters):
            problem = f"{at} belong to {len(moments)} parameters."
            raise Mismatch(problem, f"those of {len(parameters)} parameters")
        for number, (p, own) in enumerate(zip(parameters, moments, strict=True)):
            if own is not None:
                for name in ("exp_avg", "exp_avg_sq"):
                    TensorOf(FLOATS, tuple(p.shape)).check(own[name], f"{at}[{number}].{name}")
    state = {number: own for number, own in enumerate(moments) if own is not None}
    own_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": own_groups})
