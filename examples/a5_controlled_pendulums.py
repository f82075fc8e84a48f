"""Context of each sample: a batch of pendulums, each with a length, a damping and a control.

Every pendulum is driven by a torque of its own, known at seven times, with a cubic spline between.
Length, damping and torque are the context: no part of the state. Fits a bespoke solver and measures
it on pendulums that it has not seen. Prints the error against a tight solve, calls and time, and
draws error against cost. Then fits two hypersolvers, of which one sees the context.

    python examples/a5_controlled_pendulums.py

Writes pendulums.md, pendulums.png and bns-12.safetensors to the folder out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh

SPAN = (0.0, 3.0)
KNOTS = 7
GRAVITY = 9.81


def torque(t: Tensor, knots: Tensor) -> Tensor:
    """Return the torques (n,) at a time 0-d: a Catmull-Rom spline through knots (n, 7)."""
    place = (t - SPAN[0]) / (SPAN[1] - SPAN[0]) * (KNOTS - 1)
    left = place.floor().clamp(0, KNOTS - 2)
    s = place - left
    # The two knots on either side; at the ends the last one counts twice.
    around = (left.long() + torch.arange(-1, 3)).clamp(0, KNOTS - 1)
    before, first, second, after = knots.index_select(1, around).unbind(1)
    curve = 2 * before - 5 * first + 4 * second - after
    bend = 3 * (first - second) + after - before
    return first + s / 2 * (second - before + s * (curve + s * bend))


def pendulums(t: Tensor, y: Tensor, body: Tensor, knots: Tensor) -> Tensor:
    """Return the derivative of angles and velocities (n, 2).

    Args:
        t: time, 0-d.
        y: (n, 2) angles and angular velocities.
        body: (n, 2) lengths in m and dampings in 1/s.
        knots: (n, 7) torques at equidistant times, as accelerations in 1/s^2.
    """
    angle, velocity = y.unbind(1)
    length, damping = body.unbind(1)
    fall = -GRAVITY / length * torch.sin(angle)
    return torch.stack([velocity, fall - damping * velocity + torque(t, knots)], dim=1)


def draw(n: int, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return starts (n, 2) and the context (n, 2), (n, 7) of n pendulums."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    y0 = torch.stack([uniform(-1.0, 1.0, n), uniform(-0.5, 0.5, n)], dim=1)
    body = torch.stack([uniform(2.0, 4.0, n), uniform(0.1, 0.5, n)], dim=1)
    return y0, (body, torch.randn(n, KNOTS, generator=generator))


def compare_hypernets(y0: Tensor, context: tuple[Tensor, Tensor], iterations: int) -> None:
    """Fit Heun's method, a step from knot to knot, with a net that sees the context or not."""
    inputs = ("y", "stages", "t")
    config = tdh.FitConfig(iterations=iterations, max_seconds=600.0)
    for names, n_context in ((inputs, 0), ((*inputs, "context"), 2 + KNOTS)):
        net = tdh.hypernets.MLP(2, inputs=names, n_stages=2, n_context=n_context)
        solver = tdh.fit(
            pendulums,
            y0,
            SPAN,
            base="heun",
            steps=KNOTS - 1,
            hypernet=net,
            context=context,
            config=config,
        )
        print(f"heun with a net of {', '.join(names)}:\n{solver.report}\n")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    is_quick = arguments.quick
    y0, context = draw(256 if is_quick else 2048, seed=0)
    fresh, unseen = draw(256 if is_quick else 2048, seed=1)

    # By iterations, not seconds: a slow machine takes longer and finds the same.
    config = tdh.FitConfig(iterations=5 if is_quick else 40, max_seconds=600.0)
    solver = tdh.fit(pendulums, y0, SPAN, base="bns", steps=12, context=context, config=config)
    print(f"\n{solver.report}\n")
    solver.save(arguments.out / "bns-12.safetensors")

    table = tdh.evaluate(
        pendulums,
        fresh,
        SPAN,
        ["dopri5", "midpoint", "rk4", solver],
        context=unseen,
        steps=(2, 6) if is_quick else (2, 3, 4, 6, 12),
        tolerances=(1e-2, 1e-3),
        repeats=1 if is_quick else 5,
    )
    print(f"\n{table.to_markdown()}\n")
    (arguments.out / "pendulums.md").write_text(table.to_markdown() + "\n")
    table.plot(arguments.out / "pendulums.png")

    # In use, the same context of other pendulums behind the same odeint call.
    few_y0, few_context = draw(5, seed=2)
    field, t = tdh.Conditioned(pendulums, *few_context), torch.tensor(SPAN)
    y = odeint(field, few_y0, t, method="bns", options={"solver": solver})[-1]
    exact = odeint(field, few_y0, t, rtol=1e-6, atol=1e-6)[-1]
    print(f"five others: off by {float((y - exact).norm(dim=1).max()):.2g} at most\n")
    compare_hypernets(y0, context, iterations=20 if is_quick else 400)


if __name__ == "__main__":
    main()
