"""How far off a solver is on a batch, sample by sample and along the span."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.fitting.batches import n_samples
from torchdiffeq_hyper.fitting.data import Batch
from torchdiffeq_hyper.fitting.norms import sample_norms

Run = Callable[[VectorField, State, Tensor], State]
"""``(func, y0, t) -> solution``, like ``y0`` with ``len(t)`` in front."""


class Fitted(NamedTuple):
    """A fitted solver and the one it started as.

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
