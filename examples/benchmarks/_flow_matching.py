"""A small flow-matching model of real digits: noise to 8x8 images, plain torch."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks._problem import Benchmark
from torch import Tensor, nn
from tqdm import tqdm

import torchdiffeq_hyper as tdh

PIXELS = 64
ITERATIONS = 6000


class Velocity(nn.Module):
    """An MLP for the velocity of (batch, 64) images, with time as one more input."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(PIXELS + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, PIXELS),
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity."""
        out: Tensor = self.net(torch.cat([y, t.to(y.dtype).expand(len(y), 1)], 1))
        return out


def train(images: Tensor, checkpoint: Path) -> Velocity:
    """Regress the velocity of straight paths from noise to images; finished once saved."""
    torch.manual_seed(0)
    model = Velocity()
    if checkpoint.is_file():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=ITERATIONS)
    bar = tqdm(range(ITERATIONS), desc="training flow matching", unit="it")
    for i in bar:
        image = images[torch.randint(len(images), (256,))]
        noise, t = torch.randn_like(image), torch.rand(len(image), 1)
        velocity = model(t, torch.lerp(noise, image, t))
        loss = (velocity - (image - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    torch.save(model.state_dict(), checkpoint)
    return model.eval()


def flow_matching(folder: Path) -> Benchmark:
    """Return the benchmark: solvers are fitted on some noise and measured on other."""
    from _digits import load_digits

    digits = load_digits()
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    model = train(images, folder / "model.pt")
    generator = torch.Generator().manual_seed(1)
    n_fit, n_test = 2048, 512
    noise = torch.randn(n_fit + n_test, PIXELS, generator=generator)
    return Benchmark(
        name="flow-matching",
        title="flow matching on 8x8 digits, MLP 65-256-256-256-64",
        func=model,
        fit_y0=noise[:n_fit],
        test_y0=noise[n_fit:],
        span=(0.0, 1.0),
        fit_seconds=20.0,
        fit_batch=128,
        hypernet=lambda: tdh.hypernets.MLP(channels=PIXELS, inputs=("y", "t")),
    )
