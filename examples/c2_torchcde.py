"""torchcde: classify sequences with half the calls, through `cdeint` and its default adjoint.

Reads scikit-learn's digits row by row, as sequences of 8 points in 8 channels. Trains a neural
controlled differential equation on them with torchcde, fits a solver to it, and classifies the
test images. Prints accuracy and error against calls and time.

    python examples/c2_torchcde.py

Writes cde.md to the folder out/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torchcde
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchdiffeq_hyper as tdh

LENGTH = 8


class Field(nn.Module):
    """The f of dz = f(z) dX, shape (batch, hidden, channels); counts its calls."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.shape = hidden, channels
        self.net = nn.Sequential(
            nn.Linear(hidden, 64), nn.SiLU(), nn.Linear(64, hidden * channels), nn.Tanh()
        )
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the matrices that act on dX/dt."""
        self.calls += 1
        matrices: Tensor = self.net(z).reshape(*z.shape[:-1], *self.shape) / 3
        return matrices


class Classifier(nn.Module):
    """A neural CDE from the rows of an image to its digit."""

    def __init__(self, hidden: int = 16, channels: int = 9) -> None:
        super().__init__()
        self.field = Field(hidden, channels)
        self.encode = nn.Linear(channels, hidden)
        self.decode = nn.Linear(hidden, 10)

    def forward(self, coefficients: Tensor, **solver: Any) -> tuple[Tensor, Tensor]:
        """Return the logits, and the hidden state they come from."""
        path = torchcde.CubicSpline(coefficients)
        z0 = self.encode(path.evaluate(path.interval[0]))
        z = torchcde.cdeint(X=path, func=self.field, z0=z0, t=path.interval, **solver)[:, -1]
        return self.decode(z), z


def sequences() -> tuple[Tensor, Tensor]:
    """Return the spline coefficients of all digits, time being the first channel, and labels."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    clock = torch.linspace(0.0, 1.0, LENGTH).expand(len(rows), LENGTH).unsqueeze(-1)
    # Piece by piece, these are known from the slopes at both ends: what Heun's stages see.
    splines = torchcde.hermite_cubic_coefficients_with_backward_differences
    return splines(torch.cat([clock, rows], dim=-1)), torch.tensor(digits.target)[order]


def train(coefficients: Tensor, labels: Tensor, epochs: int) -> Classifier:
    """Train through rk4, two steps a row."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            logits, _ = model(
                coefficients[batch], method="rk4", options={"step_size": 0.5}, adjoint=False
            )
            loss = nn.functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(requires_grad=False)


def fit_solver(model: Classifier, coefficients: Tensor, iterations: int) -> tdh.Solver:
    """Return Heun's method with a correction, a step a row."""

    def field(t: Tensor, z: Tensor, coefficients: Tensor) -> Tensor:
        slope = torchcde.CubicSpline(coefficients).derivative(t)
        dz: Tensor = (model.field(t, z) @ slope.unsqueeze(-1)).squeeze(-1)
        return dz

    z0 = model.encode(torchcde.CubicSpline(coefficients).evaluate(torch.tensor(0.0)))
    solver = tdh.fit(
        field,
        z0,
        (0.0, LENGTH - 1.0),
        base="heun",
        steps=LENGTH - 1,
        hypernet=tdh.hypernets.MLP(z0.shape[1], inputs=("y", "stages"), n_stages=2),
        context=coefficients,  # every sample has a path of its own
        config=tdh.FitConfig(iterations=iterations, max_seconds=600.0),
    )
    print(f"\n{solver.report}\n")
    return solver


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    coefficients, labels = sequences()
    model = train(coefficients[:898], labels[:898], epochs=2 if arguments.quick else 60)
    solver = fit_solver(model, coefficients[:898], iterations=20 if arguments.quick else 2000)
    tdh.register_method("cde-fast", solver)

    step = {"options": {"step_size": 1.0}}
    solvers: dict[str, dict[str, Any]] = {
        "dopri5, cdeint's own": {},
        "rk4, a step a row": {"method": "rk4", **step},
        "heun2, a step a row": {"method": "heun2", **step},
        "hyperheun, a step a row": {"method": "cde-fast"},
    }
    test, truth = coefficients[898:], labels[898:]
    _, exact = model(test, rtol=1e-6, atol=1e-6)
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(1 if arguments.quick else 7):  # in turn, so that a slow moment slows all
        for name, keywords in solvers.items():
            start = time.perf_counter()
            model(test, **keywords)
            seconds[name].append(time.perf_counter() - start)
    lines = ["| solver | NFE | ms | rel. L2 | accuracy |", "|:---|---:|---:|---:|---:|"]
    for name, keywords in solvers.items():
        model.field.calls = 0
        logits, z = model(test, **keywords)
        off = float(((z - exact).norm(dim=1) / exact.norm(dim=1)).mean())
        right = float((logits.argmax(1) == truth).float().mean())
        ms = 1e3 * statistics.median(seconds[name])
        # torchcde looks at the field once itself.
        lines.append(f"| {name} | {model.field.calls - 1} | {ms:.3g} | {off:.3g} | {right:.4f} |")
    machine = tdh.evaluation.describe_machine(torch.device("cpu"))
    lines += ["", f"{len(test)} test images, float32; {machine}."]
    print("\n".join(lines))
    (arguments.out / "cde.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
