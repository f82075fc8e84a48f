"""The best classical solver in the time that a fitted one takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from torchdiffeq_hyper._layout import is_half
from torchdiffeq_hyper._report import ErrorSummary, Rival
from torchdiffeq_hyper._types import VectorField
from torchdiffeq_hyper.fitting.batches import n_samples
from torchdiffeq_hyper.fitting.classical import FIXED, FixedStep
from torchdiffeq_hyper.fitting.data import Batch
from torchdiffeq_hyper.fitting.judge import Run, end_errors

QUICK = 0.05
"""Seconds of a solve below which a second run is timed, too, and the shorter one counts."""
MOST_SECONDS = 2.0
"""Time that the comparison should take at most: with more to do, fewer samples are solved."""
FEWEST = 8
"""Samples that are solved at least."""


@dataclass(frozen=True)
class _Measured:
    """A classical solver with some steps."""

    label: str
    errors: ErrorSummary
    seconds: float


@torch.no_grad()
def best_classical(run: Run, func: VectorField, batch: Batch, *, calls: int) -> Rival | None:
    """Return the best of the classical solvers in the time that a fitted one takes.

    Each of them has as many steps as end in that time, or as its calls of func allow, if
    that is more: times of single runs are only roughly known. The one with the smallest mean
    error is the best.

    Args:
        run: the fitted solver.
        func: the vector field.
        batch: held-out samples, of which the first route is solved.
        calls: calls of func in one of the fitted solver's solves.

    Returns:
        None for half-precision samples, which the host cannot solve as ours are.
    """
    if is_half(batch.dtype):
        return None
    own_errors, own_seconds = _timed(run, func, batch)
    count = n_samples(batch.y0)
    wanted = int(count * MOST_SECONDS / max(2 * len(FIXED) * own_seconds, 1e-9))
    if max(FEWEST, wanted) < count:
        batch = batch.some(torch.arange(max(FEWEST, wanted)))
        own_errors, own_seconds = _timed(run, func, batch)
    found = [
        _measured(name, method, func, batch, (calls, own_seconds)) for name, method in FIXED.items()
    ]
    best = min(found, key=lambda each: each.errors.mean)
    return Rival(
        solver=best.label,
        errors=best.errors,
        own_errors=own_errors,
        best_p95=min(each.errors.p95 for each in found),
        seconds=best.seconds,
        own_seconds=own_seconds,
    )


def _measured(
    name: str, method: FixedStep, func: VectorField, batch: Batch, own: tuple[int, float]
) -> _Measured:
    """Return a method with the steps that fit into the fitted solver's calls and time."""
    calls, own_seconds = own
    steps = max(1, calls // method.each)
    first = method.with_steps(name, steps)
    errors, seconds = _timed(first.run, func, batch)
    work = steps * method.each + method.start
    in_time = work * own_seconds / max(seconds, 1e-9)
    more = int((in_time - method.start) / method.each)
    if more <= steps:
        return _Measured(first.label, errors, seconds)
    second = method.with_steps(name, more)
    errors, seconds = _timed(second.run, func, batch)
    return _Measured(second.label, errors, seconds)


def _timed(run: Run, func: VectorField, batch: Batch) -> tuple[ErrorSummary, float]:
    """Return the errors at the end and the wall time of a solve."""
    began = time.perf_counter()
    errors = ErrorSummary.of(end_errors(run, func, batch))  # waits for the device
    seconds = time.perf_counter() - began
    if seconds < QUICK:  # what is set up once counts in the first
        began = time.perf_counter()
        end_errors(run, func, batch)
        seconds = min(seconds, time.perf_counter() - began)
    return errors, seconds
