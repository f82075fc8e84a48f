"""flow-matching: sample and compute likelihoods in six calls of the model.

Trains a velocity on scikit-learn's two moons with the package flow-matching, fits one solver to
its samples and one to its likelihoods, and publishes both: `ODESolver` needs nothing but their
names. Prints error against calls and time, and draws both.

    python examples/c1_flow_matching.py

Writes sampling.md, likelihood.md, sampling.png and likelihood.png to the folder out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from sklearn.datasets import make_moons
from torch import Tensor, nn

import torchdiffeq_hyper as tdh

STEPS = 3


class Velocity(ModelWrapper):  # type: ignore[misc]
    """The model that flow-matching trains: u(x, t)."""

    def __init__(self, width: int = 128) -> None:
        layers = (nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        super().__init__(nn.Sequential(*layers, nn.Linear(width, 2)))

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        """Return dx/dt."""
        u: Tensor = self.model(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], dim=1))
        return u


def moons(n: int, seed: int) -> Tensor:
    """Return points on two moons, standardised."""
    points = torch.tensor(make_moons(n, noise=0.05, random_state=seed)[0], dtype=torch.float32)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


def train(iterations: int) -> Velocity:
    """Train a velocity by conditional flow matching, as the package's examples do."""
    torch.manual_seed(0)
    model = Velocity()
    path = AffineProbPath(scheduler=CondOTScheduler())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    data = moons(20_000, seed=0)
    for _ in range(iterations):
        x1 = data[torch.randint(len(data), (256,))]
        sample = path.sample(t=torch.rand(len(x1)), x_0=torch.randn_like(x1), x_1=x1)
        loss = (model(sample.x_t, sample.t) - sample.dx_t).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(requires_grad=False)
    return model


def with_log_density(
    model: Velocity, t: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the derivative of (x, log-density), as `compute_likelihood` integrates it."""
    with torch.enable_grad():
        x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
        u = model(x, t)
        rows = [torch.autograd.grad(u[:, i].sum(), x, create_graph=True)[0] for i in (0, 1)]
    return u, rows[0][:, 0] + rows[1][:, 1]


def log_p0(x: Tensor) -> Tensor:
    """Return the log-density of the noise."""
    log_p: Tensor = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(dim=1)
    return log_p


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = train(300 if arguments.quick else 5000)
    # By iterations: a slow machine takes longer, and finds the same.
    config = tdh.FitConfig(iterations=40 if arguments.quick else 2000, max_seconds=3600.0)
    n = 256 if arguments.quick else 2048

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        u: Tensor = model(x, t)
        return u

    def dynamics(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return with_log_density(model, t, state)

    # Samples: from noise at t = 0 to data at t = 1.
    sampling = tdh.fit(
        velocity, torch.randn(n, 2), (0.0, 1.0), base="heun", steps=STEPS, config=config
    )
    # Likelihoods: from data at t = 1 back to noise, with the log-density beside x.
    x1 = moons(n, seed=1)
    start = (x1, torch.zeros(n))
    likelihood = tdh.fit(dynamics, start, (1.0, 0.0), base="heun", steps=STEPS, config=config)
    tdh.register_method("moons-sampling", sampling)
    tdh.register_method("moons-likelihood", likelihood)

    solver, noise, held_out = ODESolver(model), torch.randn(n, 2), moons(n, seed=2)
    x = solver.sample(noise, step_size=None, method="moons-sampling")
    _, log_p = solver.compute_likelihood(
        held_out, log_p0, step_size=None, method="moons-likelihood", exact_divergence=True
    )
    _, exact = solver.compute_likelihood(
        held_out, log_p0, step_size=None, method="dopri5", exact_divergence=True
    )
    print(f"\n{len(x)} samples, {2 * STEPS} calls of the model")
    print(f"log-likelihood of held-out data: {log_p.mean():.4f}, by dopri5 {exact.mean():.4f}")

    for name, func, y0, span in (
        ("sampling", velocity, noise, (0.0, 1.0)),
        ("likelihood", dynamics, (held_out, torch.zeros(n)), (1.0, 0.0)),
    ):
        methods = ["dopri5", "midpoint", "heun2", "rk4", f"moons-{name}"]
        table = tdh.evaluate(
            func,
            y0,
            span,
            methods,
            steps=(STEPS,) if arguments.quick else (2, STEPS, 6),
            tolerances=(1e-2, 1e-3),
            repeats=1 if arguments.quick else 5,
        )
        print(f"\n{name}:\n{table.to_markdown()}")
        (arguments.out / f"{name}.md").write_text(table.to_markdown() + "\n")
        table.plot(arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
