"""The Van der Pol oscillator: no net, a vector field that costs next to nothing."""

from __future__ import annotations

import torch
from benchmarks._problem import Benchmark
from torch import Tensor

import torchdiffeq_hyper as tdh

MU = 1.0


def field(t: Tensor, y: Tensor) -> Tensor:
    """Return the derivative of position and velocity, (batch, 2)."""
    x, v = y.unbind(1)
    return torch.stack([v, MU * (1 - x * x) * v - x], 1)


def van_der_pol(quick: bool = False) -> Benchmark:
    """Return the benchmark: starts drawn evenly from a square."""
    generator = torch.Generator().manual_seed(0)
    n_fit, n_test = (256, 64) if quick else (2048, 1024)
    starts = 4 * torch.rand(n_fit + n_test, 2, generator=generator) - 2
    return Benchmark(
        name="van-der-pol",
        title=f"Van der Pol oscillator, mu = {MU:g}",
        func=field,
        fit_y0=starts[:n_fit],
        test_y0=starts[n_fit:],
        span=(0.0, 2.0),
        fit_seconds=15.0,
        fit_batch=256,
        hypernet=lambda: tdh.hypernets.MLP(channels=2, inputs=("y", "t")),
    )
