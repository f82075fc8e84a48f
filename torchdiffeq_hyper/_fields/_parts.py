"""func called on part of a batch, for a comparison that no count of a solve's calls holds."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields._context import HOW_TO_RESTRICT, SHAPE_CLASHES, restrict
from torchdiffeq_hyper._state import (
    State,
    VectorField,
    is_half,
    map_parts,
    n_samples,
    parts_of,
    shapes_of,
)
from torchdiffeq_hyper.errors import (
    CoupledSamplesError,
    HyperError,
    StateShapeError,
    explain,
    first_line,
)


def scaled(y: State, index: Tensor, factor: float) -> State:
    """Return the state with the samples at some positions multiplied by a factor."""
    factors = torch.ones(n_samples(y), device=index.device).index_fill(0, index, factor)
    return map_parts(
        lambda part: part * factors.to(part.dtype).reshape(-1, *[1] * (part.dim() - 1)), y
    )


def own(k: State) -> State:
    """Return a copy of an answer: func may write its next one to the same memory."""
    return map_parts(lambda part: part.detach().clone(), k)


def difference(k: State, other: State) -> Tensor:
    """Return each sample's largest difference in each part that has numbers, (samples, parts)."""
    pairs = zip(_rows(k), _rows(other), strict=True)
    return torch.stack([(a - b).abs().amax(dim=1) for a, b in pairs], dim=1)


def size(k: State, other: State) -> Tensor:
    """Return each sample's largest number in each part of either state, (samples, parts)."""
    pairs = zip(_rows(k), _rows(other), strict=True)
    columns = [torch.maximum(a.abs().amax(1), b.abs().amax(1)) for a, b in pairs]
    return torch.stack(columns, dim=1)


def _rows(k: State) -> list[Tensor]:
    rows = [part.detach().reshape(len(part), -1) for part in parts_of(k) if part.numel()]
    wide = torch.float32 if rows[0].device.type == "mps" else torch.float64
    return [row.to(torch.complex128 if row.dtype.is_complex else wide) for row in rows]


def moved(y0: State, k: State, span: float) -> State:
    """Return the state a little along ``k``: a tenth of the span, or of its own size at most."""
    largest, fastest = (
        max(float(part.detach().abs().max()) for part in parts_of(s) if part.numel())
        for s in (y0, k)
    )
    h = 0.1 * span
    if largest > 0 and abs(h) * fastest > 0.1 * largest:
        h *= 0.1 * largest / (abs(h) * fastest)
    return map_parts(lambda part, slope: part + (h * slope).to(part.dtype), y0, k)


def nudged(y: State, digits: int) -> State:
    """Return the state changed in its last digits, up and down at random."""
    generator = torch.Generator().manual_seed(0)

    def nudge(part: Tensor) -> Tensor:
        signs = torch.randint(0, 2, part.shape, generator=generator).to(part.device) * 2 - 1
        return part * (1 + digits * torch.finfo(part.dtype).eps * signs.to(part.dtype))

    return map_parts(nudge, y)


def relative_slack(y: State, wide: float) -> Tensor:
    """Return for each part with numbers what rounding explains: ``wide``, more for half."""
    parts = [part for part in parts_of(y) if part.numel()]
    slack = [4 * torch.finfo(p.dtype).eps if is_half(p.dtype) else wide for p in parts]
    return torch.tensor(slack, device=parts[0].device)


Alone: TypeAlias = Callable[[Tensor, State, Tensor], State]
"""``alone(t, y, index)``: the derivatives of the samples at positions ``index``, whose state is
``y``, without the other samples."""

_probing: contextvars.ContextVar[bool] = contextvars.ContextVar("probing", default=False)


def is_probing() -> bool:
    """Return whether func is called for a comparison only, which those who count leave out."""
    return _probing.get()


@contextmanager
def probing() -> Iterator[None]:
    """Call func inside the block for a comparison: uncounted, what it solves unrecorded."""
    token = _probing.set(True)
    try:
        with recording.paused():
            yield
    finally:
        _probing.reset(token)


def halves(batch: int, device: torch.device) -> list[Tensor]:
    """Return the positions of both halves of a batch, drawn at random against symmetries."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    return [part.sort().values.to(device) for part in order.tensor_split(2)]


def by_restricting(func: VectorField, y0: State) -> Alone:
    """Return calls of func on some of the samples of ``y0``.

    Args:
        func: the vector field of the batch; one with a method ``restrict`` is restricted.
        y0: the state.
    """

    def alone(t: Tensor, y: State, index: Tensor) -> State:
        try:
            k: State = restrict(func, index)(t, y)
        except HyperError:
            raise
        except SHAPE_CLASHES as error:
            reason = first_line(error)
            error_of_part = cannot_take_part(f"fails ({reason})", y0)
            raise error_of_part from error
        if shapes_of(k) != shapes_of(y):
            what = f"returned shapes {shapes_of(k)[1]} for {shapes_of(y)[1]}"
            raise cannot_take_part(what, y0)
        return own(k)

    return alone


def cannot_take_part(what: str, y0: State) -> StateShapeError | CoupledSamplesError:
    """Return the error about a func that takes the whole batch only.

    A state that is a vector (D,) may be a single sample, whose numbers func needs together.

    Args:
        what: what func does with part of the batch.
        y0: the state of the batch.
    """
    parts = parts_of(y0)
    is_vector = all(part.dim() == 1 for part in parts)
    text = explain(
        f"func {what}, part of a batch of {len(parts[0])}.",
        "a derivative of the state's own shape for any part of the batch; a func that holds "
        "something of every sample (noise, controls, conditioning) must say which part of it "
        "belongs to which sample.",
        (ways_of_one_sample(y0) if is_vector else "")
        + f"{HOW_TO_RESTRICT}\n"
        + "or, if batch norm in training mode couples the samples: func.eval()",
    )
    return CoupledSamplesError(text) if is_vector else StateShapeError(text)


def ways_of_one_sample(y0: State) -> str:
    """Return the lines to paste where ``y0`` is a single sample, or is to be solved as one."""
    is_tuple = isinstance(y0, tuple)
    one = "tuple(part.unsqueeze(0) for part in y0)" if is_tuple else "y0.unsqueeze(0)"
    return (
        f"y0 = {one}   # if y0 is a single sample: dim 0 counts the samples\n"
        'odeint(func, y0, t, method="dopri5")   # takes the whole batch as one\n'
    )
