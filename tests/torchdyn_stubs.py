"""Fields as torchdyn's NeuralODE wants them, shared by its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stubs import MLPField, spiral
from torchdiffeq_hyper import StepInput


class Spiral(nn.Module):
    """`stubs.spiral` with the `args` that torchdyn hands to every module."""

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return spiral(t, x)


class Field(nn.Module):
    """`stubs.MLPField` with the `args` that torchdyn hands to every module."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.net = MLPField(dim=dim, width=8)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        # torchdyn's adaptive methods give t of shape (1,).
        out: Tensor = self.net(t.reshape(()), x)
        return out


class SmallNet(nn.Module):
    """A smooth correction with parameters that looks at everything a step has."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * dim, dim, dtype=torch.float64)

    def forward(self, step: StepInput) -> Tensor:
        y, f0, y0 = step.y, step.f0, step.y0
        assert isinstance(y, Tensor)
        assert isinstance(f0, Tensor)
        assert isinstance(y0, Tensor)
        out: Tensor = self.linear(torch.cat([y * step.t, f0 + step.dt, y0], -1))
        return torch.tanh(out)


def times(*points: float) -> Tensor:
    """Return times in double precision."""
    return torch.tensor(points, dtype=torch.float64)
