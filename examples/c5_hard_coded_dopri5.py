"""Libraries that hard-code dopri5: generate digits in a fifth of the calls, unchanged.

Diffusion and simulation libraries have samplers and likelihoods that call torchdiffeq with
`method="dopri5"` and offer no other. `sample` below is written as theirs are. The example trains
a flow that generates scikit-learn's digits, fits a solver to it, and runs `sample` inside
`tdh.override`. Prints error against calls and time, and draws the digits.

    python examples/c5_hard_coded_dopri5.py

Writes generated.md and generated.png to the folder out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh

STEPS = 5


class Velocity(nn.Module):
    """The derivative of a (batch, 64) image of the digit ``label`` at time t."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.classes = nn.Embedding(10, 32)
        self.net = nn.Sequential(
            nn.Linear(64 + 32 + 2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 64),
        )
        self.calls = 0

    def forward(self, t: Tensor, x: Tensor, label: Tensor) -> Tensor:
        """Return dx/dt; t is 0-d or has an entry a sample."""
        self.calls += 1
        t = t.reshape(-1, 1).expand(len(x), 1)
        clock = torch.cat([torch.sin(2 * t), torch.cos(2 * t)], dim=1)
        u: Tensor = self.net(torch.cat([x, self.classes(label), clock], dim=1))
        return u


def sample(model: Velocity, noise: Tensor, label: Tensor) -> Tensor:
    """Turn noise into digits, as a library would: nothing of the solver can be chosen."""

    def func(t: Tensor, x: Tensor) -> Tensor:
        u: Tensor = model(t, x, label)
        return u

    t = torch.tensor([0.0, 1.0])
    images: Tensor = odeint(func, noise, t, method="dopri5", rtol=1e-4, atol=1e-4)[-1]
    return images


def train(iterations: int) -> Velocity:
    """Train by flow matching on straight paths from noise to digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    model = Velocity()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        index = torch.randint(len(images), (128,))
        x1, x0, t = images[index], torch.randn(128, 64), torch.rand(128)
        x = torch.lerp(x0, x1, t[:, None])
        loss = (model(t, x, labels[index]) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(requires_grad=False)


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Draw ten images of each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.1 * len(rows)))
    axes = figure.subplots(len(rows), 10, squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images[:10], strict=True):
            axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axis.set_axis_off()
        line[0].text(-0.3, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = train(200 if arguments.quick else 6000)
    n = 256 if arguments.quick else 8192

    noise, label = torch.randn(1000, 64), torch.arange(1000) % 10
    solver = tdh.fit(
        model,  # called as model(t, x, label)
        torch.randn(n, 64),
        (0.0, 1.0),
        context=torch.arange(n) % 10,
        base="heun",
        steps=STEPS,
        hypernet=tdh.hypernets.MLP(64, hidden=(128, 128), inputs=("y", "stages"), n_stages=2),
        # By iterations: a slow machine takes longer, and finds the same.
        config=tdh.FitConfig(
            iterations=20 if arguments.quick else 1000, max_seconds=3600.0, batch_size=256
        ),
    )
    print(f"\n{solver.report}\n")

    rows = {}
    model.calls = 0
    rows["dopri5"] = sample(model, noise, label)
    calls = model.calls
    with tdh.override("dopri5", solver):
        model.calls = 0
        rows["overridden"] = sample(model, noise, label)
    print(f"sample: {calls} calls of the model; overridden: {model.calls}")

    table = tdh.evaluate(
        model,
        noise,
        (0.0, 1.0),
        ["dopri5", "midpoint", "heun2", "rk4", solver],
        context=label,
        steps=(STEPS,) if arguments.quick else (2, STEPS, 10),
        tolerances=(1e-2, 1e-4),
        repeats=1 if arguments.quick else 5,
    )
    print(f"\n{table.to_markdown()}")
    (arguments.out / "generated.md").write_text(table.to_markdown() + "\n")
    draw(rows, arguments.out / "generated.png")


if __name__ == "__main__":
    main()
