"""Relative errors of solvers on measured samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, VectorField, parts_of, sample_norms, take
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.solvers._fit_report import ErrorSummary

QUANTILES = ("0.5", "0.9", "0.99", "max")
NOTHING = dict.fromkeys(QUANTILES, math.nan)  # quantiles of what was not measured
BROKEN = (ArithmeticError, AssertionError)  # what solvers and func raise where a solve blows up

Run = Callable[[VectorField, State, Tensor], State]  # (func, y0, t) -> solution at all of t


class Comparison(NamedTuple):
    """A fitted solver beside the classical method that it started as."""

    run: Run
    base: Run
    name: str  # of the classical method, for people
    calls: int  # calls of func in a solve between two points
    fewest: int  # iterations below which a fit is a trial that nobody has to earn back


@torch.no_grad()
def solved(
    run: Run, func: VectorField, batch: Batch, y0: State, times: Tensor
) -> tuple[Tensor, ...]:
    """Return a solution's parts (m, batch, ...); inf only where a sample itself blows up."""
    try:
        return parts_of(run(batch.field(func), y0, times))
    except BROKEN:
        if n_samples(y0) == 1:
            return tuple(p.new_full((len(times), *p.shape), math.inf) for p in parts_of(y0))
        halves = torch.arange(n_samples(y0)).tensor_split(2)
        found = [solved(run, func, batch.some(h), take(y0, h), times) for h in halves]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))


def end_errors(run: Run, func: VectorField, batch: Batch, grid: int = 0) -> Tensor:
    """Return |y(T) - y_n|_2 / |y(T)|_2 of each sample at the end of a grid, (batch,)."""
    off = _off(run, func, batch, grid, [0, -1])[-1]
    return (off / batch.end_sizes(grid)).nan_to_num(math.inf, math.inf)


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
    last = len(errors) - 1
    ranks = [*(min(int(float(q) * len(errors)), last) for q in QUANTILES[:-1]), last]
    return {q: unit * float(errors[rank]) for q, rank in zip(QUANTILES, ranks, strict=True)}


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
