"""Add a method of your own: Ralston's third-order method, learned, as a plugin.

A plugin is any object with one hook, `register_solvers`. Given a tableau, the package
makes a learned method of it, with all that the built-in ones have: fitting, saving,
the options, events and adjoints of torchdiffeq. This script registers a plugin by hand,
measures the order of its method, fits a correction for a driven pendulum and solves with
it through plain `odeint`.

To have a plugin loaded whenever torchdiffeq_hyper is imported, put the hook into a
module of an installed package and name that module in the package's pyproject.toml:

    [project.entry-points.torchdiffeq_hyper]
    my-plugin = "my_package.methods"

    python examples/a3_write_a_plugin.py [--quick] [--out DIR]

Writes pendulum.safetensors, the fitted solver.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.methods import Register
from torchdiffeq_hyper.tableaus import Edge, StageCall, Tableau

SPAN = (0.0, 4.0)
STEPS = 8


def ralston3(
    call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the step's increment and its stages: c = (0, 1/2, 3/4), b = (2, 3, 4)/9.

    `call` evaluates the vector field; a stage at the very start or end of the step says
    so (`Edge.START`, `Edge.END`), for torchdiffeq's option "perturb".
    """
    k1 = call(t0, y, Edge.START)
    k2 = call(t0 + dt / 2, y + dt / 2 * k1)
    k3 = call(t0 + dt * 3 / 4, y + dt * 3 / 4 * k2)
    return dt * (2 * k1 + 3 * k2 + 4 * k3) / 9, (k1, k2, k3)


class Plugin:
    """The plugin: an object (or a module) with the hook."""

    @tdh.hookimpl
    def register_solvers(self, register: Register) -> None:
        """Register method "hyperralston3", whose base is called "ralston3"."""
        register("hyperralston3", Tableau("ralston3", order=3, calls=3, increment=ralston3))


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """Return the derivative of angle and velocity (batch, 2) of a driven pendulum."""
    angle, velocity = y.unbind(-1)
    return torch.stack([velocity, 0.5 * torch.cos(2 * t) - torch.sin(angle)], dim=-1)


def error(y0: Tensor, steps: int, hypernet: object) -> float:
    """Return the mean error at the end of the span, against a tight adaptive solve."""
    t = torch.linspace(*SPAN, steps + 1, dtype=y0.dtype)
    exact = odeint(pendulum, y0, t[[0, -1]], rtol=1e-10, atol=1e-12)[-1]
    y = odeint(pendulum, y0, t, method="hyperralston3", options={"hypernet": hypernet})[-1]
    return float((y - exact).norm(dim=-1).mean())


def main() -> None:
    """Register, measure, fit, solve."""
    parser = argparse.ArgumentParser(description="Add a method of your own.")
    parser.add_argument("--quick", action="store_true", help="a short fit")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the result")
    arguments = parser.parse_args()

    tdh.register_plugin(Plugin(), name="my-plugin")

    generator = torch.Generator().manual_seed(0)
    y0 = 2 * torch.rand(256, 2, generator=generator, dtype=torch.float64) - 1
    print("without a correction it is Ralston's method, of order 3:\n")
    print("steps  error     order")
    errors: list[float] = []
    for steps in (8, 16, 32, 64):
        errors.append(error(y0, steps, lambda step: torch.zeros_like(step.y)))
        order = f"{math.log2(errors[-2] / errors[-1]):.2f}" if len(errors) > 1 else ""
        print(f"{steps:5d}  {errors[-1]:.2e}  {order}")

    config = tdh.FitConfig(iterations=200 if arguments.quick else 3000)
    solver = tdh.fit(pendulum, y0, SPAN, base="ralston3", steps=STEPS, config=config)
    new = 2 * torch.rand(256, 2, generator=generator, dtype=torch.float64) - 1
    print(f"\nfitted at {STEPS} steps, on new initial states:")
    print(f"error {error(new, STEPS, solver.hypernet):.2e}, {errors[0]:.2e} without")

    arguments.out.mkdir(parents=True, exist_ok=True)
    solver.save(arguments.out / "pendulum.safetensors")
    print(f"\nwrote {arguments.out / 'pendulum.safetensors'}")


if __name__ == "__main__":
    main()
