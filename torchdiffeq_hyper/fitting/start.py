"""What a fit that somebody else runs has to know before its first iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.fitting.batches import n_samples, select
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.calibration import calibrate
from torchdiffeq_hyper.fitting.checkpoint import signs_of_field
from torchdiffeq_hyper.fitting.data import Batch, measure_batch
from torchdiffeq_hyper.fitting.field import Field, check_field
from torchdiffeq_hyper.fitting.loop import usable_scale
from torchdiffeq_hyper.fitting.noise import measure_noise
from torchdiffeq_hyper.fitting.phases import Phase
from torchdiffeq_hyper.fitting.problem import Problem
from torchdiffeq_hyper.fitting.reference import Tolerances
from torchdiffeq_hyper.fitting.session import PROBES
from torchdiffeq_hyper.hypernets import ready


@dataclass(frozen=True)
class Start:
    """A net ready to be fitted and what was measured for it.

    Attributes:
        net: the hypernet, calibrated.
        batch: the starts with their reference solution.
        noise: noise floor.
        tolerances: of the reference solutions.
        signs: what tells the starts and the field from others.
    """

    net: nn.Module
    batch: Batch
    noise: float
    tolerances: Tolerances
    signs: dict[str, Any]

    @classmethod
    def of(cls, problem: Problem, y0: State, net: nn.Module | None) -> Start:
        """Check the field, measure, and calibrate a net.

        Args:
            problem: what is fitted.
            y0: starts.
            net: the net, None for a ready one.

        Raises:
            HyperError: func, ``y0`` or the base cannot be fitted.
        """
        flat = StateLayout.of(y0).join(y0)
        tolerances = Tolerances.of(problem.config, flat.dtype)
        unlimited = Budget(math.inf)
        field = Field(problem.func, y0, unlimited)
        signs = signs_of_field((flat, *check_field(field, problem.span, flat)))
        probes = select(y0, torch.arange(min(PROBES, n_samples(y0))))
        noise = measure_noise(
            Field(problem.func, probes, unlimited),
            probes,
            problem.tableau,
            problem.plan,
            tolerances,
        )
        batch = measure_batch(field, y0, problem.tableau, problem.plan, tolerances)
        net = ready(y0, problem.tableau) if net is None else net
        calibrate(net, batch)
        return cls(net, batch, noise, tolerances, signs)

    def scale(self, phase: Phase, route: int) -> float:
        """Return the base's error in a phase on a route, to which losses are relative."""
        return usable_scale(phase.base_error(self.batch, route))
