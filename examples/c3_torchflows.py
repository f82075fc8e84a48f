"""torchflows: samples and densities of a trained FFJORD in six calls of its field.

Trains the field of torchflows' FFJORD on scikit-learn's two moons, fits a solver to it for both
directions of time, publishes it, and gives its name to the flow. Prints error against calls and
time, and what becomes of the log-likelihoods.

    python examples/c3_torchflows.py

Writes ffjord.md and ffjord.png to the folder out/.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import Tensor
from torchflows.bijections.continuous.ffjord import FFJORD
from torchflows.flows import ContinuousFlow

import torchdiffeq_hyper as tdh

STEPS = 3

# torchflows 1.2.1 indexes its base distribution with a list.
warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)


def moons(n: int, seed: int) -> Tensor:
    """Return points on two moons, standardised."""
    points = torch.tensor(make_moons(n, noise=0.05, random_state=seed)[0], dtype=torch.float32)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def train(iterations: int) -> ContinuousFlow:
    """Train a flow by flow matching.

    Not with its own `fit`: in torchflows 1.2.1 FFJORD's log-determinant passes no gradient to
    the field, and maximum likelihood without it draws everything to a point.
    """
    torch.manual_seed(0)
    # The same noise in every call of a solve: else there is no field to solve.
    noise = {"reuse_noise": True}
    bijection = FFJORD(
        (2,), atol=1e-5, rtol=1e-5, nn_kwargs={"hidden_size": 128}, time_derivative_kwargs=noise
    )
    field, data = bijection.f.forward_model, moons(20_000, seed=0)
    optimizer = torch.optim.Adam(field.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        x1 = data[torch.randint(len(data), (256,))]
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        loss = (field(t, torch.lerp(x0, x1, t)) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return ContinuousFlow(bijection).eval().requires_grad_(requires_grad=False)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    flow = train(300 if arguments.quick else 5000)
    field = flow.bijection.f.forward_model  # dx/dt alone, without the log-determinant
    n = 256 if arguments.quick else 2048

    # By iterations: a slow machine takes longer, and finds the same.
    config = tdh.FitConfig(iterations=40 if arguments.quick else 2000, max_seconds=3600.0)
    solver = tdh.fit(
        field,
        torch.randn(n, 2),
        (0.0, 1.0),
        base="heun",
        steps=STEPS,
        direction="both",
        config=config,
    )
    tdh.register_method("ffjord-fast", solver)

    print(f"\n{'solver':12} {'calls':>5} {'log-likelihood of held-out data':>32}")
    held_out = moons(n, seed=1)
    for name in ("dopri5", "rk4", "ffjord-fast"):
        flow.bijection.solver = name
        (log_prob,) = flow.log_prob(held_out)
        print(
            f"{name:12} {int(flow.bijection.f._n_evals):5} {float(log_prob.detach().mean()):32.4f}"
        )
    samples = flow.sample(n, no_grad=True)
    print(f"{len(samples)} samples, {int(flow.bijection.f._n_evals)} calls\n")

    table = tdh.evaluate(
        field,
        torch.randn(n, 2),
        (0.0, 1.0),
        ["dopri5", "midpoint", "heun2", "rk4", "ffjord-fast"],
        steps=(STEPS,) if arguments.quick else (1, 2, STEPS, 6),
        tolerances=(1e-2, 1e-3),
        repeats=1 if arguments.quick else 5,
    )
    print(f"sampling:\n{table.to_markdown()}")
    (arguments.out / "ffjord.md").write_text(table.to_markdown() + "\n")
    table.plot(arguments.out / "ffjord.png")


if __name__ == "__main__":
    main()
