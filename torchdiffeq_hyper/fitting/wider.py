"""How a fitted solver takes starts that lie further out than those it was fitted on."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.fitting.batches import n_samples, parts_of
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
    times, field = batch.routes[0].times[[0, -1]], batch.field(func)
    own, base = (_end(run, field, y0, times) for run in (fitted.run, fitted.base))
    if base is None:
        return ""
    if own is None:
        return _note("some blow up, and others", fitted.name)
    unit = batch.units.state
    off = sample_norms(tuple(a - b for a, b in zip(own, base, strict=True)), unit)[0]
    ratio = off / sample_sizes(base, unit)[0]
    astray = int((~(ratio < ASTRAY)).sum())
    return _note(f"{astray} of {n_samples(y0)}", fitted.name) if astray else ""


def _note(what: str, name: str) -> str:
    return (
        f"starts unlike those fitted on may go wrong: of starts {FURTHER:g} times as far from "
        f"their mean, {what} end far from where {name} ends; fit on starts that cover all that "
        "you will meet"
    )


def _wider(part: Tensor) -> Tensor:
    mean = part.float().mean(0).to(part.dtype)
    return mean + FURTHER * (part - mean)


def _end(run: Run, func: VectorField, y0: State, times: Tensor) -> tuple[Tensor, ...] | None:
    """Return the parts of the ends, (1, batch, ...) each; None where the solve blows up."""
    try:
        solution = run(func, y0, times)
    except BROKEN:
        return None
    ends = tuple(part[-1:] for part in parts_of(solution))
    return ends if all(bool(torch.isfinite(end).all()) for end in ends) else None
