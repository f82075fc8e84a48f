"""For torchdyn users: from `NeuralODE` and a Trainer to a solver with twelve parameters.

Trains a classifier of scikit-learn's two moons as a torchdyn user does, fits a linear correction
of Heun's method to its flow, and classifies with it: the same decisions on 1,000 test points, in
fewer than half of dopri5's calls of the vector field. Draws the flow under the solvers.

    python examples/a2_torchdyn.py

Writes torchdyn_flows.png to the folder out/.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE

import torchdiffeq_hyper as tdh

T_SPAN = torch.linspace(0.0, 1.0, 2)
STEPS = 9

warnings.filterwarnings("ignore", ".*does not have many workers.*")


class Classifier(pl.LightningModule):
    """A NeuralODE with a linear read-out, trained by Lightning."""

    def __init__(self) -> None:
        super().__init__()
        field = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        self.ode = NeuralODE(field, solver="dopri5", atol=1e-4, rtol=1e-4)
        self.read_out = nn.Linear(2, 2)

    def decide(self, ode: NeuralODE, x: Tensor) -> Tensor:
        """Return the class of each point, as ``ode`` solves the flow."""
        with torch.no_grad():
            classes: Tensor = self.read_out(ode(x, T_SPAN)[1][-1]).argmax(dim=1)
        return classes

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        x, label = batch
        _, solution = self.ode(x, T_SPAN)
        return nn.functional.cross_entropy(self.read_out(solution[-1]), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points on two moons and which of them they are on."""
    points, label = make_moons(n, noise=0.08, random_state=seed)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(label)


def train(epochs: int) -> Classifier:
    """Train with the user's own Trainer."""
    pl.seed_everything(0, verbose=False)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(*moons(512, seed=0)), batch_size=128, shuffle=True)
    trainer.fit(model, loader)
    return model.eval().requires_grad_(requires_grad=False)


def calls(ode: NeuralODE, x: Tensor) -> int:
    """Return how often one solve calls the vector field."""
    ode.vf.nfe = 0
    with torch.no_grad():
        ode(x, T_SPAN)
    return int(ode.vf.nfe)


def milliseconds(odes: dict[str, NeuralODE], x: Tensor, rounds: int) -> dict[str, float]:
    """Return each solver's median time, the solvers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in odes}
    for _ in range(rounds):
        for name, ode in odes.items():
            start = time.perf_counter()
            with torch.no_grad():
                ode(x, T_SPAN)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(seen) for name, seen in times.items()}


def grid(n: int) -> Tensor:
    """Return n x n points around the moons."""
    axes = torch.linspace(-1.5, 2.5, n), torch.linspace(-1.0, 1.5, n)
    return torch.cartesian_prod(*axes)


def draw(model: Classifier, odes: dict[str, NeuralODE], path: Path) -> None:
    """Draw decisions around the moons, and below them the flow that leads to them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(odes), 8), layout="constrained")
    panels: Any = figure.subplots(2, len(odes), sharex="row", sharey="row")
    x, label = moons(80, seed=2)
    n = 150
    corners = grid(n)
    points = corners.reshape(n, n, 2)
    for (decisions, flow), (name, ode) in zip(panels.T, odes.items(), strict=True):
        classes = model.decide(ode, corners).reshape(n, n)
        decisions.contourf(
            points[..., 0], points[..., 1], classes, levels=1, cmap="RdBu", alpha=0.4
        )
        with torch.no_grad():
            paths = ode.trajectory(x, torch.linspace(0.0, 1.0, STEPS + 1))
        for index, colour in enumerate(("tab:red", "tab:blue")):
            chosen = paths[:, label == index]
            decisions.scatter(chosen[0, :, 0], chosen[0, :, 1], color=colour, s=10)
            flow.plot(chosen[..., 0], chosen[..., 1], color=colour, lw=0.6, alpha=0.7)
            flow.scatter(chosen[-1, :, 0], chosen[-1, :, 1], color=colour, s=12)
        decisions.set_title(f"{name}, {calls(ode, x)} calls")
    panels[0, 0].set_ylabel("decisions at t = 0")
    panels[1, 0].set_ylabel("flow from t = 0 to t = 1")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    # 1. What you have: a NeuralODE and a Trainer.
    model = train(epochs=40 if arguments.quick else 120)
    x, label = moons(1000, seed=1)

    # 2. Fit a linear g of Heun's two derivatives and the time: 5 x 2 weights and 2 biases.
    g = tdh.hypernets.Linear(channels=2, inputs=("stages", "t"), n_stages=2)
    print(f"g has {sum(parameter.numel() for parameter in g.parameters())} parameters")
    solver = tdh.fit(
        model.ode,
        moons(512, seed=0)[0],
        (0.0, 1.0),
        base="heun",
        steps=STEPS,
        hypernet=g,
        config=tdh.FitConfig(iterations=300 if arguments.quick else 2000),
    )
    print(f"\n{solver.report}\n")

    # 3. Use it: the same vector field, another solver.
    plain = tdh.HyperSolver("heun", tdh.hypernets.Linear(channels=2), steps=STEPS)  # g = 0
    plain.requires_grad_(requires_grad=False)
    field = model.ode.vf.vf
    odes = {
        "dopri5": model.ode,
        "hyperheun": NeuralODE(field, solver=solver),
        "heun": NeuralODE(field, solver=plain),
    }
    exact = NeuralODE(field, solver="dopri5", atol=1e-7, rtol=1e-7)
    with torch.no_grad():
        reference = exact(x, T_SPAN)[1][-1]
    decisions, everywhere = model.decide(model.ode, x), model.decide(model.ode, grid(200))
    ms = milliseconds(odes, x, rounds=3 if arguments.quick else 30)
    print(f"{'solver':14} {'NFE':>4} {'ms':>6} {'rel. L2':>8} {'accuracy':>9} other decisions of")
    print(f"{'':46}1,000 test points, 40,000 of a grid")
    for name, ode in odes.items():
        with torch.no_grad():
            y = ode(x, T_SPAN)[1][-1]
        off = float((y - reference).norm() / reference.norm())
        classes = model.decide(ode, x)
        right = float((classes == label).float().mean())
        other = int((classes != decisions).sum())
        other_everywhere = int((model.decide(ode, grid(200)) != everywhere).sum())
        print(
            f"{name:14} {calls(ode, x):4} {ms[name]:6.1f} {off:8.3g} {right:9.4f} "
            f"{other:10} {other_everywhere:8}"
        )
    if not arguments.quick:
        assert calls(odes["dopri5"], x) >= 40
        assert calls(odes["hyperheun"], x) < 20
        assert torch.equal(model.decide(odes["hyperheun"], x), decisions)
    draw(model, odes, arguments.out / "torchdyn_flows.png")
    print(f"written to {arguments.out}: torchdyn_flows.png")


if __name__ == "__main__":
    main()
