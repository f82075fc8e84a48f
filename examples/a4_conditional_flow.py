"""Context of each sample: class-conditional flow matching on the digits, with guidance.

Trains a velocity u(t, x, label) on scikit-learn's digits by conditional flow matching, a tenth of
the labels left out, and fits bespoke solvers to it with and without classifier-free guidance. The
labels are the context: each sample's own, integers, no part of the state. Prints the error against
a tight solve, calls, time and how often a classifier sees the digit that was asked for, and draws
error against cost and samples.

    python examples/a4_conditional_flow.py

Writes plain.md, guided.md, plain.png, guided.png and samples.png to the folder out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from _digits import Digits, load_digits
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh

NO_LABEL = 10
"""What stands for a label that was left out."""


class Velocity(nn.Module):
    """dx/dt of images (batch, 64), given their labels (batch,)."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(NO_LABEL + 1, 32)
        self.net = nn.Sequential(
            nn.Linear(64 + 32 + 3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 64),
        )

    def forward(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity; t is 0-d or (batch, 1)."""
        clock = torch.cat([t.expand(len(x), 1) ** power for power in (1, 2, 3)], dim=1)
        u: Tensor = self.net(torch.cat([x, self.embed(labels), clock], dim=1))
        return u


class Guided(nn.Module):
    """Classifier-free guidance: from the velocity without a label on through that with it."""

    def __init__(self, velocity: Velocity, scale: float) -> None:
        super().__init__()
        self.velocity = velocity
        self.scale = scale

    def forward(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity, at the cost of two."""
        none = torch.full_like(labels, NO_LABEL)
        both = self.velocity(t, torch.cat([x, x]), torch.cat([labels, none]))
        with_label, without = both.chunk(2)
        guided: Tensor = torch.lerp(without, with_label, self.scale)
        return guided


def train(digits: Digits, iterations: int) -> Velocity:
    """Train the velocity on straight paths from noise at t = 0 to digits at t = 1."""
    torch.manual_seed(0)
    model = Velocity()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    images, labels = digits.train_images.flatten(1), digits.train_labels
    for _ in range(iterations):
        chosen = torch.randint(len(images), (128,))
        x0, x1, t = torch.randn(128, 64), images[chosen], torch.rand(128, 1)
        known = torch.where(torch.rand(128) < 0.1, NO_LABEL, labels[chosen])
        loss = (model(t, torch.lerp(x0, x1, t), known) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(requires_grad=False)


def train_judge(digits: Digits, iterations: int) -> nn.Module:
    """Train a classifier of images (batch, 64), which judges what is sampled."""
    torch.manual_seed(1)
    judge = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    images, labels = digits.train_images.flatten(1), digits.train_labels
    for _ in range(iterations):
        chosen = torch.randint(len(images), (128,))
        noisy = images[chosen] + 0.1 * torch.randn(128, 64)
        loss = nn.functional.cross_entropy(judge(noisy), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval().requires_grad_(requires_grad=False)


def starts(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise (n, 64) and the labels (n,) wanted of it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 64, generator=generator), torch.arange(n) % 10


def draw(path: Path, rows: dict[str, Tensor]) -> None:
    """Draw ten digits of each solver, one of each class."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.1 * len(rows)))
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(images[:10].reshape(10, 8, 8).transpose(0, 1).reshape(8, 80), cmap="gray_r")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--scale", type=float, default=2.5, help="scale of the guidance")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    is_quick = arguments.quick
    digits = load_digits()
    model = train(digits, iterations=200 if is_quick else 6000)
    judge = train_judge(digits, iterations=100 if is_quick else 1000)
    right = judge(digits.test_images.flatten(1)).argmax(1) == digits.test_labels
    print(f"the judge is right on {100 * float(right.float().mean()):.1f} % of the test digits")

    noise, labels = starts(128 if is_quick else 512, seed=0)
    fresh, wanted = starts(200 if is_quick else 1000, seed=1)
    # By iterations, not seconds: a slow machine takes longer and finds the same.
    config = tdh.FitConfig(iterations=5 if is_quick else 40, max_seconds=600.0)

    def asked_for(x: Tensor) -> float:
        return float((judge(x).argmax(1) == wanted).float().mean())

    rows = {}
    for name, func in (("plain", model), ("guided", Guided(model, arguments.scale))):
        solvers = [
            tdh.fit(func, noise, (0.0, 1.0), base="bns", steps=n, context=labels, config=config)
            for n in ((4,) if is_quick else (4, 8))
        ]
        print("\n".join(f"\n{name}:\n{solver.report}" for solver in solvers))
        table = tdh.evaluate(
            func,
            fresh,
            (0.0, 1.0),
            ["dopri5", "euler", "midpoint", "rk4", *solvers],
            context=wanted,
            steps=(2, 4) if is_quick else (2, 4, 8, 16),
            tolerances=(1e-2, 1e-3),
            metric=asked_for,
            metric_name="asked for",
            repeats=1 if is_quick else 5,
        )
        print(f"\n{name}:\n{table.to_markdown()}\n")
        (arguments.out / f"{name}.md").write_text(table.to_markdown() + "\n")
        table.plot(arguments.out / f"{name}.png")
        # In use, the same func and context behind the same odeint call.
        field, t = tdh.Conditioned(func, wanted[:10]), torch.tensor([0.0, 1.0])
        options = {"solver": solvers[-1]}
        x = odeint(field, fresh[:10], t, method="bns", options=options)[-1]
        rows[f"{name}, {solvers[-1].n_steps} calls"] = x
        rows[f"{name}, dopri5"] = odeint(field, fresh[:10], t, rtol=1e-5, atol=1e-5)[-1]
    draw(arguments.out / "samples.png", rows)
    print(f"written to {arguments.out}: the tables and pictures")


if __name__ == "__main__":
    main()
