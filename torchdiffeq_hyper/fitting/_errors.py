"""Relative errors of solvers on measured samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, VectorField, parts_of, sample_norms
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.solvers._report import ErrorSummary

QUANTILES = ("0.5", "0.9", "0.99", "max")

Run = Callable[[VectorField, State, Tensor], State]
"""``(func, y0, t) -> solution``, like ``y0`` with ``len(t)`` in front."""


class Comparison(NamedTuple):
    """A fitted solver beside the one it started as.

    Attributes:
        run: the fitted solver's ``(func, y0, t) -> solution``.
        base: the same of the classical method that it started as.
        name: that method's name, for people.
        calls: calls of func in a solve between two points.
        fewest: iterations below which a fit is a trial that nobody has to earn back.
    """

    run: Run
    base: Run
    name: str
    calls: int
    fewest: int


BROKEN = (ArithmeticError, AssertionError)
"""What our solvers and the host raise where a solve blows up."""


@torch.no_grad()
def end_errors(run: Run, func: VectorField, batch: Batch, route: int = 0) -> Tensor:
    """Return |y(T) - y_n|_2 / |y(T)|_2 of each sample at the end of a route, (batch,).

    A sample that blows up has an infinite error; the others have their own.
    """
    off = _off(run, func, batch, route, is_whole=False)[-1]
    return _finite_or_inf(off / batch.end_sizes(route))


@torch.no_grad()
def errors_along(run: Run, func: VectorField, batch: Batch, route: int = 0) -> Tensor:
    """Return the relative errors at all times of a route but the first, (n, batch)."""
    off = _off(run, func, batch, route, is_whole=True)
    return _finite_or_inf(off / batch.sizes(route)[1:])


def _off(run: Run, func: VectorField, batch: Batch, route: int, *, is_whole: bool) -> Tensor:
    """Return |y(t_n) - y_n|_2 at all times but the first, or at the end alone."""
    samples, count = batch.routes[route], n_samples(batch.y0)
    times = samples.times if is_whole else samples.times[[0, -1]]
    try:
        found = run(batch.field(func), batch.start(route), times)
    except BROKEN:
        if count == 1:
            return torch.full((len(times) - 1, 1), math.inf, device=samples.y.device)
        halves = torch.arange(count).tensor_split(2)
        parts = [_off(run, func, batch.some(half), route, is_whole=is_whole) for half in halves]
        return torch.cat(parts, dim=1)
    exact = batch.layout.split(samples.y if is_whole else samples.y[[0, -1]])
    pairs = zip(parts_of(found), parts_of(exact), strict=True)
    difference = tuple(a[1:].to(b.dtype) - b[1:] for a, b in pairs)
    return sample_norms(difference, batch.units.state)


def _finite_or_inf(errors: Tensor) -> Tensor:
    return torch.where(torch.isfinite(errors), errors, torch.inf)


def quantiles(values: Tensor, unit: float) -> dict[str, float]:
    """Return the quantiles that a report has of some values (n,), each times a unit."""
    errors = values.sort().values
    # By rank, not interpolated: torch.quantile refuses more than 2^24 values.
    ranks = [min(int(float(q) * len(errors)), len(errors) - 1) for q in QUANTILES[:-1]]
    chosen = [errors[rank] for rank in ranks] + [errors[-1]]
    return {name: unit * float(value) for name, value in zip(QUANTILES, chosen, strict=True)}


def at_end(run: Run, func: VectorField, batch: Batch) -> ErrorSummary:
    """Return the errors at the end, or at both where both directions were fitted."""
    routes = {float(samples.times[0]): r for r, samples in enumerate(batch.routes)}.values()
    return ErrorSummary.of(torch.cat([end_errors(run, func, batch, r) for r in routes]))


def is_worse(compared: Comparison, func: VectorField, data: Data) -> bool:
    """Return whether the base has smaller errors at the end, in mean or 95th percentile.

    That is on held-out samples, or even on those fitted to.
    """
    for batch in (data.held_out, data.first):
        own, base = (at_end(run, func, batch) for run in (compared.run, compared.base))
        if not (own.mean <= base.mean and own.p95 <= base.p95):
            return True
    return False
