"""Setting a ready net's scales from measured residuals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchdiffeq_hyper.fitting.data import Batch
from torchdiffeq_hyper.fitting.objectives import step_inputs
from torchdiffeq_hyper.hypernets import ReadyHypernet, join_channels


@contextmanager
def measuring_time_in(net: object, width: float, order: int) -> Iterator[None]:
    """Let a ready net that is still zero measure time in spans; as before on any error.

    One that was fitted before keeps its unit, for a base of this order from now on. Every
    other net is left as it is.
    """
    if not isinstance(net, ReadyHypernet):
        yield
        return
    before = net.time_unit, net.order
    net.measure_time_in(width if net.is_zero else net.time_unit, order)
    try:
        yield
    except BaseException:
        net.measure_time_in(*before)
        raise


@torch.no_grad()
def calibrate(net: nn.Module, batch: Batch) -> None:
    """Calibrate a ready net that is still zero; leave every other net as it is.

    Scales must not be changed under a net that was fitted before and is fitted on.
    """
    if not isinstance(net, ReadyHypernet) or not net.is_zero:
        return
    inputs, residuals = [], []
    for route, samples in enumerate(batch.routes):
        for n, step in enumerate(step_inputs(batch, route)):
            inputs.append(net.concat(step))
            residuals.append(join_channels(batch.layout.split(samples.residual[n])))
    net.calibrate(torch.cat(inputs), torch.cat(residuals), batch.units.state)
