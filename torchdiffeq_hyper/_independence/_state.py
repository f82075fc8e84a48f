"""States as samples: taken out, copied, compared."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import is_half, parts_of
from torchdiffeq_hyper._types import State


def like(y: State, parts: tuple[Tensor, ...]) -> State:
    """Return parts as a tuple state, or as one tensor, as ``y`` is."""
    return parts if isinstance(y, tuple) else parts[0]


def n_samples(y: State) -> int:
    """Return the number of samples; 0 where the parts have none in common, or no numbers."""
    parts = parts_of(y)
    sizes = {len(part) if part.dim() else 0 for part in parts}
    return sizes.pop() if len(sizes) == 1 and any(part.numel() for part in parts) else 0


def shapes(y: object) -> tuple[bool, list[tuple[int, ...]]]:
    """Return whether ``y`` is a tuple, and the shapes in it: equal for alike states."""
    parts = y if isinstance(y, tuple) else (y,)
    return isinstance(y, tuple), [tuple(getattr(part, "shape", (-1,))) for part in parts]


def take(y: State, index: Tensor) -> State:
    """Return the samples at some positions."""
    return like(y, tuple(part[index] for part in parts_of(y)))


def scaled(y: State, index: Tensor, factor: float) -> State:
    """Return the state with the samples at some positions multiplied by a factor."""
    factors = torch.ones(n_samples(y), device=index.device).index_fill(0, index, factor)
    parts = (
        part * factors.to(part.dtype).reshape(-1, *[1] * (part.dim() - 1)) for part in parts_of(y)
    )
    return like(y, tuple(parts))


def own(k: State) -> State:
    """Return a copy of an answer: func may write its next one to the same memory."""
    return like(k, tuple(part.detach().clone() for part in parts_of(k)))


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
    pairs = zip(parts_of(y0), parts_of(k), strict=True)
    return like(y0, tuple(part + (h * slope).to(part.dtype) for part, slope in pairs))


def nudged(y: State, digits: int) -> State:
    """Return the state changed in its last digits, up and down at random."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in parts_of(y):
        signs = torch.randint(0, 2, part.shape, generator=generator).to(part.device) * 2 - 1
        eps = torch.finfo(part.dtype).eps
        parts.append(part * (1 + digits * eps * signs.to(part.dtype)))
    return like(y, tuple(parts))


def relative_slack(y: State, wide: float) -> Tensor:
    """Return for each part with numbers what rounding explains: ``wide``, more for half."""
    parts = [part for part in parts_of(y) if part.numel()]
    slack = [4 * torch.finfo(p.dtype).eps if is_half(p.dtype) else wide for p in parts]
    return torch.tensor(slack, device=parts[0].device)
