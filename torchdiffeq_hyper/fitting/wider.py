"""How a fitted solver takes starts that lie further out than those it was fitted on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.fitting.batches import n_samples, select
from torchdiffeq_hyper.fitting.data import Batch
from torchdiffeq_hyper.fitting.judge import BROKEN, Fitted, Run
from torchdiffeq_hyper.fitting.norms import sample_norms, sample_sizes

FURTHER = 1.3
"""How many times as far from their mean as the starts fitted on."""
ASTRAY = 3.0
"""Distance from the base's end, relative to its size, that no error of a base explains."""


@torch.no_grad()
def wider_starts(fitted: Fitted, func: VectorField, batch: Batch) -> str:
    """Return what to say of starts further out; "" where the fitted solver takes them.

    Held-out samples are like those fitted on, and may miss what a tail of others does. No
    reference is needed to see a blow-up: the classical method that the solver started as
    stands in for it, on the samples on which that stays finite.

    Args:
        fitted: the solver.
        func: the vector field.
        batch: samples that it was fitted on.
    """
    start = batch.start(0)
    wide = tuple(_wider(part) for part in parts_of(start))
    y0: State = wide if isinstance(start, tuple) else wide[0]
    own, base = (_ends(run, func, batch, y0) for run in (fitted.run, fitted.base))
    unit = batch.units.state
    is_finite = torch.isfinite(sample_norms(base, unit)[0])
    if not bool(is_finite.any()):
        return ""
    own, base = (tuple(part[:, is_finite] for part in ends) for ends in (own, base))
    off = sample_norms(tuple(a - b for a, b in zip(own, base, strict=True)), unit)[0]
    astray = int((~(off / sample_sizes(base, unit)[0] < ASTRAY)).sum())
    if not astray:
        return ""
    return (
        f"starts unlike those fitted on may go wrong: {astray} of {len(off)} starts {FURTHER:g} "
        f"times as far from their mean end far from where {fitted.name} ends; fit on starts that "
        "cover all that you will meet"
    )


def _wider(part: Tensor) -> Tensor:
    mean = part.float().mean(0).to(part.dtype)
    return mean + FURTHER * (part - mean)


def _ends(run: Run, func: VectorField, batch: Batch, y0: State) -> tuple[Tensor, ...]:
    """Return the parts of the ends, (1, batch, ...) each; inf where a sample blows up."""
    try:
        solution = run(batch.field(func), y0, batch.routes[0].times[[0, -1]])
    except BROKEN:
        count = n_samples(y0)
        if count == 1:
            return tuple(torch.full_like(part, math.inf).unsqueeze(0) for part in parts_of(y0))
        halves = torch.arange(count).tensor_split(2)
        found = [_ends(run, func, batch.some(half), select(y0, half)) for half in halves]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return tuple(part[-1:] for part in parts_of(solution))
