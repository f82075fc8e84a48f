"""What a fit that somebody else runs has to know before its first iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchdiffeq_hyper.fitting.batches import n_samples, select
from torchdiffeq_hyper.fitting.calibration import calibrate, measuring_time_in
from torchdiffeq_hyper.fitting.context import Starts
from torchdiffeq_hyper.fitting.data import Batch, measure_batch
from torchdiffeq_hyper.fitting.field import Field
from torchdiffeq_hyper.fitting.loop import usable_scale
from torchdiffeq_hyper.fitting.noise import measure_noise
from torchdiffeq_hyper.fitting.phases import Phase
from torchdiffeq_hyper.fitting.planning import PROBES
from torchdiffeq_hyper.fitting.prepare import ENDLESS, FieldCheck
from torchdiffeq_hyper.fitting.problem import Problem
from torchdiffeq_hyper.fitting.reference import Tolerances
from torchdiffeq_hyper.fitting.units import Units
from torchdiffeq_hyper.hypernets import ready


@dataclass(frozen=True)
class Start:
    """A net ready to be fitted and what was measured for it.

    Attributes:
        net: the hypernet, calibrated.
        batch: the starts with their reference solution.
        noise: noise floor.
        tolerances: of the reference solutions.
        units: those of the reference solutions.
        signs: what tells the starts and the field from others.
    """

    net: nn.Module
    batch: Batch
    noise: float
    tolerances: Tolerances
    units: Units
    signs: dict[str, Any]

    @classmethod
    def of(cls, problem: Problem, starts: Starts, net: nn.Module | None) -> Start:
        """Check the field, measure, and calibrate a net.

        Args:
            problem: what is fitted.
            starts: the samples.
            net: the net, None for a ready one.

        Raises:
            HyperError: func, ``y0`` or the base cannot be fitted.
        """
        y0 = starts.y0
        field_check = FieldCheck.of(problem, starts, n_samples(starts))
        units, tolerances = field_check.units, field_check.tolerances
        field = Field(problem.func, starts, ENDLESS, units)
        probes = select(starts, torch.arange(min(PROBES, n_samples(starts))))
        noise = measure_noise(
            Field(problem.func, probes, ENDLESS, units),
            probes.y0,
            problem.tableau,
            problem.plan,
            tolerances,
        )
        batch = measure_batch(field, starts, problem.tableau, problem.plan, tolerances)
        if net is None:
            net = ready(y0, problem.tableau, time_unit=problem.width)
        with measuring_time_in(net, problem.width, problem.tableau.order):
            calibrate(net, batch)
        return cls(net, batch, noise, tolerances, units, field_check.signs)

    def scale(self, phase: Phase, route: int) -> float:
        """Return the base's loss in a phase on a route, to which losses are relative."""
        return usable_scale(phase.base_loss(self.batch, route))
