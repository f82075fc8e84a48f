"""Vector fields and corrections of the random calls: any state, any dtype, time or times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh

State = Tensor | tuple[Tensor, ...]

FIELDS: dict[str, Callable[[Field, Tensor, Tensor], Tensor]] = {
    "decay": lambda f, t, y: -0.7 * y,
    "wave": lambda f, t, y: -y + torch.sin(t) * torch.cos(y),
    "driven": lambda f, t, y: f.a * torch.sin(2 * t + f.b) - f.c * y,
    "net": lambda f, t, y: torch.tanh(f.a * y + f.b * torch.cos(t)) - f.c * y,
    # Linear, each number feeds the one beside it: the exact solution is an exponential.
    "rotation": lambda f, t, y: torch.roll(y, 1, -1) - 0.5 * y,
    # Each sample feels all others.
    "mean": lambda f, t, y: y.mean(0) - y + 0.1 * torch.sin(t),
    # As a written-out inner loop does: the answer of the last call is overwritten.
    "buffer": lambda f, t, y: f.in_buffer(y, torch.cos(3 * t)),
    "burst": lambda f, t, y: y * y,
    "strong": lambda f, t, y: 4e4 + 0 * y,
}
COUPLED = ("rotation", "mean")
"""Fields that couple along a dimension of the state: the last one, the first one."""


class Field(nn.Module):
    """A vector field of `FIELDS` on every part of a state, with three parameters.

    Attributes:
        dtype: the dtype that the state must have at every call.
        calls: calls so far.
        complaints: what a call got that it must not get.
    """

    def __init__(self, kind: str, dtype: torch.dtype, values: tuple[float, float, float]) -> None:
        super().__init__()
        self.kind = kind
        self.dtype = dtype
        real = dtype.to_real() if dtype.is_complex else dtype
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v, dtype=real)) for v in values)
        self.calls = 0
        self.complaints: set[str] = set()
        self._buffer: Tensor | None = None

    def forward(self, t: Tensor, y: State, args: Any = None) -> State:
        """Return dy/dt; ``t`` is 0-d, or has one time a sample."""
        self.calls += 1
        if isinstance(y, Tensor):
            return self._part(t, y)
        # Every part feels the clock of its own, and the first part, sample by sample.
        drive = y[0].reshape(len(y[0]), -1).mean(1) if self._has_samples(y) else None
        out = []
        for index, part in enumerate(y):
            k = self._part(t, part)
            if index and drive is not None:
                k = k + 0.2 * drive.reshape(-1, *[1] * (part.dim() - 1))
            out.append(k)
        return tuple(out)

    def _has_samples(self, y: tuple[Tensor, ...]) -> bool:
        return all(p.dim() > 0 and p.numel() > 0 and len(p) == len(y[0]) for p in y)

    def _part(self, t: Tensor, y: Tensor) -> Tensor:
        if y.dtype != self.dtype:
            self.complaints.add(f"func got a state of {y.dtype}")
        if t.dtype != self.a.dtype:
            self.complaints.add(f"func got a time of {t.dtype}")
        if t.dim():
            t = t.reshape(-1, *[1] * (y.dim() - 1))
        return FIELDS[self.kind](self, t, y)

    def in_buffer(self, y: Tensor, factor: Tensor) -> Tensor:
        """Return ``-factor * y`` in the memory of the last answer."""
        if self._buffer is None or self._buffer.shape != y.shape:
            self._buffer = torch.empty_like(y)
        return torch.mul(y, -factor, out=self._buffer)

    def in_double(self) -> Field:
        """Return the same field for the independent evaluation in double precision."""
        wide = copy.deepcopy(self).double()
        wide.dtype = torch.complex128 if self.dtype.is_complex else torch.float64
        wide.calls, wide.complaints = 0, set()
        wide._buffer = None
        return wide


class ContextField(nn.Module):
    """y' = -rate (1 + t) y with a rate for each sample, given as context."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.calls = 0
        self.complaints: set[str] = set()

    def forward(self, t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        """Return dy/dt."""
        self.calls += 1
        if y.dtype != self.dtype:
            self.complaints.add(f"func got a state of {y.dtype}")
        if t.dim():
            t = t.reshape(-1, *[1] * (y.dim() - 1))
        return -y * rate * (1 + torch.sin(t))


def _on_parts(part: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], State]:
    """Return a correction of states from one of a part: ``(step, y, f0, last stage)``."""

    def net(step: tdh.StepInput) -> State:
        if isinstance(step.y, Tensor):
            return part(step, step.y, step.f0, step.stages[-1])  # type: ignore[arg-type]
        parts = zip(step.y, step.f0, step.stages[-1], strict=True)
        return tuple(part(step, *of_part) for of_part in parts)

    return net


def _lower(dtype: torch.dtype) -> torch.dtype:
    wide = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    return wide.get(dtype, dtype)


NETS: dict[str, Callable[[Any], State]] = {
    "zero": _on_parts(lambda step, y, f0, k: torch.zeros_like(y)),
    "linear": _on_parts(lambda step, y, f0, k: 0.2 * y - 0.3 * f0),
    "stages": _on_parts(lambda step, y, f0, k: 0.5 * (k - f0)),
    "timed": _on_parts(
        lambda step, y, f0, k: 0.3 * y * torch.sin(step.t) + 0.2 * step.dt * f0  # signed
    ),
    "lower": _on_parts(lambda step, y, f0, k: torch.full_like(y, 0.25, dtype=_lower(y.dtype))),
}


def start_net(step: tdh.StepInput) -> State:
    """Correct by the distance from the start of the solve."""
    if isinstance(step.y, Tensor):
        return 0.2 * (step.y0 - step.y)
    return tuple(0.2 * (a - b) for a, b in zip(step.y0, step.y, strict=True))


NETS["start"] = start_net
