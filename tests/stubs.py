"""Problems and wrappers shared by the tests; every vector field depends on time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TupleState = tuple[Tensor, Tensor, Tensor]


def damped_wave(t: Tensor, y: Tensor) -> Tensor:
    """Nonlinear, any shape: y' = -y + sin(t) cos(y)."""
    return -y + torch.sin(t) * torch.cos(y)


def spiral(t: Tensor, y: Tensor) -> Tensor:
    """Linear, shape (..., 2): y' = -t/2 y + (1 + cos t) J y, with J a quarter turn."""
    quarter_turn = torch.stack([-y[..., 1], y[..., 0]], dim=-1)
    return -0.5 * t * y + (1 + torch.cos(t)) * quarter_turn


def spiral_solution(t: Tensor, y0: Tensor, t0: float = 0.0) -> Tensor:
    """Exact solution of `spiral` at each of the times t (n,), shape (n, *y0.shape)."""
    shape = (len(t), *[1] * (y0.dim() - 1))
    angle = (t + torch.sin(t) - t0 - math.sin(t0)).reshape(shape)
    radius = torch.exp(-0.25 * (t**2 - t0**2)).reshape(shape)
    first = torch.cos(angle) * y0[..., 0] - torch.sin(angle) * y0[..., 1]
    second = torch.sin(angle) * y0[..., 0] + torch.cos(angle) * y0[..., 1]
    return torch.stack([radius * first, radius * second], dim=-1)


def coupled(t: Tensor, state: TupleState) -> TupleState:
    """Nonlinear, on a tuple of shapes (batch, 3), (batch,), (); every part feeds every other."""
    x, z, w = state
    dx = -x + torch.sin(t) * torch.cos(x) + z.unsqueeze(-1) * w
    dz = torch.cos(t) * x.mean(dim=-1) - 0.5 * z
    dw = -t * w + z.mean()
    return dx, dz, dw


def coupled_start(batch: int = 4, dtype: torch.dtype = torch.float64) -> TupleState:
    """Return a start for `coupled`."""
    x = torch.linspace(-1.0, 1.0, batch * 3, dtype=dtype).reshape(batch, 3)
    return x, torch.linspace(0.5, 1.5, batch, dtype=dtype), torch.tensor(0.7, dtype=dtype)


class MLPField(nn.Module):
    """Learnable field on (batch, dim): a tanh net of y, sin t and cos t, the same every time."""

    def __init__(
        self, dim: int = 2, width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 2, width), nn.Tanh(), nn.Linear(width, dim))
        self.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt."""
        clock = torch.stack([torch.sin(t), torch.cos(t)]).to(y.dtype).expand(*y.shape[:-1], 2)
        out: Tensor = self.net(torch.cat([y, clock], dim=-1))
        return out


class Counted:
    """A vector field that counts its calls and keeps their times."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.times: list[float] = []

    @property
    def calls(self) -> int:
        """Number of calls so far."""
        return len(self.times)

    def __call__(self, t: Tensor, y: Any) -> Any:
        """Call the field."""
        self.times.append(float(t))
        return self.func(t, y)


def convergence_order(step_sizes: Sequence[float], errors: Sequence[float]) -> float:
    """Return the least-squares slope of log(error) over log(step size)."""
    x = torch.tensor(step_sizes, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x @ y) / (x @ x))
