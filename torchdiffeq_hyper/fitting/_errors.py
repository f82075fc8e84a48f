"""Relative errors of solvers on measured samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, VectorField, parts_of, sample_norms, take
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.solvers._fit_report import ErrorSummary

QUANTILES = ("0.5", "0.9", "0.99", "max")

Run = Callable[[VectorField, State, Tensor], State]
"""``(func, y0, t) -> solution``, like ``y0`` with ``len(t)`` in front."""


class Comparison(NamedTuple):
    """A fitted solver beside the classical method that it started as."""

    run: Run
    base: Run
    name: str  # of the classical method, for people
    calls: int  # calls of func in a solve between two points
    fewest: int  # iterations below which a fit is a trial that nobody has to earn back


BROKEN = (ArithmeticError, AssertionError)  # what solvers and func raise where a solve blows up


@torch.no_grad()
def solved(
    run: Run, func: VectorField, batch: Batch, y0: State, times: Tensor
) -> tuple[Tensor, ...]:
    """Return the parts of a solution from ``y0`` on, (m, batch, ...); inf where a sample blows up.

    The others have their own solution: what raises is solved again in halves.
    """
    try:
        return parts_of(run(batch.field(func), y0, times))
    except BROKEN:
        count = n_samples(y0)
        if count == 1:
            return tuple(p.new_full((len(times), *p.shape), math.inf) for p in parts_of(y0))
        halves = torch.arange(count).tensor_split(2)
        found = [solved(run, func, batch.some(h), take(y0, h), times) for h in halves]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))


def end_errors(run: Run, func: VectorField, batch: Batch, grid: int = 0) -> Tensor:
    """Return |y(T) - y_n|_2 / |y(T)|_2 of each sample at the end of a grid, (batch,)."""
    off = _off(run, func, batch, grid, [0, -1])[-1]
    return (off / batch.end_sizes(grid)).nan_to_num(math.inf, math.inf)


@torch.no_grad()
def timed_errors(run: Run, func: VectorField, batch: Batch) -> tuple[Tensor, float]:
    """Return the errors at the end, (batch,), and the wall time of the solve."""
    began = time.perf_counter()
    errors = end_errors(run, func, batch).cpu()  # waits for the device
    return errors, time.perf_counter() - began


def errors_along(run: Run, func: VectorField, batch: Batch, grid: int = 0) -> Tensor:
    """Return the relative errors at all times of a grid but the first, (n, batch)."""
    off = _off(run, func, batch, grid, slice(None))
    return (off / batch.sizes(grid)[1:]).nan_to_num(math.inf, math.inf)


def _off(run: Run, func: VectorField, batch: Batch, grid: int, points: slice | list[int]) -> Tensor:
    """Return |y(t_n) - y_n|_2 at some points of a grid but the first."""
    samples = batch.grids[grid]
    found = solved(run, func, batch, batch.start(grid), samples.times[points])
    exact = parts_of(batch.layout.split(samples.y[points]))
    difference = tuple(a[1:].to(b.dtype) - b[1:] for a, b in zip(found, exact, strict=True))
    return sample_norms(difference, batch.units.state)


def quantiles(values: Tensor, unit: float) -> dict[str, float]:
    """Return the quantiles that a report has of some values (n,), each times a unit."""
    errors = values.sort().values
    # By rank, not interpolated: torch.quantile refuses more than 2^24 values.
    ranks = [min(int(float(q) * len(errors)), len(errors) - 1) for q in QUANTILES[:-1]]
    chosen = [errors[rank] for rank in ranks] + [errors[-1]]
    return {name: unit * float(value) for name, value in zip(QUANTILES, chosen, strict=True)}


def at_end(run: Run, func: VectorField, batch: Batch) -> ErrorSummary:
    """Return the errors at the end, or at both where both directions were fitted."""
    grids = {float(samples.times[0]): r for r, samples in enumerate(batch.grids)}.values()
    return ErrorSummary.of(torch.cat([end_errors(run, func, batch, r) for r in grids]))


def is_worse(compared: Comparison, func: VectorField, data: Data) -> bool:
    """Return whether the base ends better in mean or 95th percentile, held-out or fitted on."""
    for batch in (data.held_out, data.first):
        own, base = (at_end(run, func, batch) for run in (compared.run, compared.base))
        if not (own.mean <= base.mean and own.p95 <= base.p95):
            return True
    return False
