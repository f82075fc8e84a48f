"""A two-dimensional continuous normalizing flow, trained by exact maximum likelihood."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from benchmarks._problem import Benchmark
from torch import Tensor, nn
from torchdiffeq import odeint
from tqdm import tqdm

import torchdiffeq_hyper as tdh

RADII = (0.8, 1.8)
STEPS = 8
BATCH = 256


def rings(n: int) -> Tensor:
    """Draw n points (n, 2) from two thin rings, which noise must be torn apart for."""
    radius = torch.tensor(RADII)[torch.randint(len(RADII), (n,))] + 0.08 * torch.randn(n)
    angle = 2 * math.pi * torch.rand(n)
    return radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)


class Field(nn.Module):
    """An MLP 3-64-64-64-2 with tanh: time is one more input."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 2),
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the derivative: t = 0 is noise, t = 1 is data."""
        out: Tensor = self.net(torch.cat([y, t.to(y.dtype).expand(len(y), 1)], 1))
        return out

    def with_divergence(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the derivatives of the point and of its log density's change.

        The trace of the Jacobian is exact: one pass forward with a tangent a coordinate.
        """
        hidden = torch.cat([state[0], t.expand(len(state[0]), 1)], 1)
        tangents = torch.eye(3)[:2].unsqueeze(1)  # (coordinate, 1, input)
        for layer in self.net:
            hidden = layer(hidden)
            if isinstance(layer, nn.Linear):
                tangents = tangents @ layer.weight.T
            else:
                tangents = tangents * (1 - hidden.square())
        return hidden, tangents[0, :, 0] + tangents[1, :, 1]


def train(checkpoint: Path, iterations: int) -> Field:
    """Maximise the likelihood of fresh points; finished once saved."""
    torch.manual_seed(0)
    model = Field()
    if checkpoint.is_file():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=iterations)
    t, options = torch.tensor([1.0, 0.0]), {"step_size": 1 / STEPS}
    bar = tqdm(range(iterations), desc="training the CNF", unit="it")
    for i in bar:
        start = (rings(BATCH), torch.zeros(BATCH))
        z, change = odeint(model.with_divergence, start, t, method="rk4", options=options)
        log_noise = -z[-1].square().sum(1) / 2 - math.log(2 * math.pi)
        # d log p / dt = -divergence, integrated from data to noise.
        loss = -(log_noise + change[-1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 20 == 0:
            bar.set_postfix(nll=f"{loss.item():.3f}")
    torch.save(model.state_dict(), checkpoint)
    return model.eval()


def cnf(folder: Path, quick: bool = False) -> Benchmark:
    """Return the benchmark: sampling, fitted on some noise and measured on other."""
    model = train(folder / "model.pt", iterations=20 if quick else 1500)
    generator = torch.Generator().manual_seed(1)
    n_fit, n_test = (256, 64) if quick else (4096, 5000)
    noise = torch.randn(n_fit + n_test, 2, generator=generator)
    return Benchmark(
        name="cnf",
        title="two-dimensional CNF of two rings, MLP 3-64-64-64-2, sampling",
        func=model,
        fit_y0=noise[:n_fit],
        test_y0=noise[n_fit:],
        span=(0.0, 1.0),
        fit_seconds=20.0,
        fit_batch=256,
        hypernet=lambda: tdh.hypernets.MLP(channels=2, inputs=("y", "t")),
    )
