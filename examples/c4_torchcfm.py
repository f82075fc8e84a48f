"""torchcfm and torchdyn: carry eight Gaussians to two moons in eight calls of the model.

Trains the flow of torchcfm's own first example, from eight Gaussians to two moons, with its
conditional flow matching, and wraps it into torchdyn's `NeuralODE` as that example does. Fits a
solver to the `NeuralODE`, publishes it, and samples by its name. Prints error against calls and
time.

    python examples/c4_torchcfm.py

Writes cfm.md and cfm.png to the folder out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
from torchcfm.models.models import MLP
from torchcfm.utils import sample_8gaussians, sample_moons, torch_wrapper
from torchdyn.core import NeuralODE

import torchdiffeq_hyper as tdh

STEPS = 2


def train(iterations: int) -> nn.Module:
    """Train a velocity with optimal-transport flow matching."""
    torch.manual_seed(0)
    model: nn.Module = MLP(dim=2, time_varying=True)
    matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(iterations):
        t, x, u = matcher.sample_location_and_conditional_flow(
            sample_8gaussians(256), sample_moons(256)
        )
        loss = (model(torch.cat([x, t[:, None]], dim=1)) - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(requires_grad=False)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    field = torch_wrapper(train(200 if arguments.quick else 5000))
    node = NeuralODE(field, solver="dopri5", sensitivity="adjoint", atol=1e-4, rtol=1e-4)

    # By iterations: a slow machine takes longer, and finds the same.
    iterations = 40 if arguments.quick else 1500
    config = tdh.FitConfig(iterations=iterations, max_seconds=3600.0, batch_size=128)
    n = 512 if arguments.quick else 4096
    solver = tdh.fit(node, sample_8gaussians(n), (0.0, 1.0), base="rk4", steps=STEPS, config=config)
    print(f"\n{solver.report}\n")
    tdh.register_method("cfm-fast", solver)
    fast = NeuralODE(field, solver="cfm-fast", sensitivity="adjoint")

    x, t_span = sample_8gaussians(2048), torch.linspace(0.0, 1.0, 2)
    with torch.no_grad():
        ends = {ode.solver: ode.trajectory(x, t_span)[-1] for ode in (node, fast)}
    for name, ode in (("dopri5", node), ("cfm-fast", fast)):
        print(f"{name}: {int(ode.vf.nfe)} calls")
    exact, found = ends.values()
    print(f"samples differ by {float((found - exact).norm() / exact.norm()):.3g} of their size\n")

    table = tdh.evaluate(
        field,
        x,
        (0.0, 1.0),
        ["dopri5", "midpoint", "rk4", "cfm-fast"],
        steps=(STEPS,) if arguments.quick else (1, STEPS, 4),
        tolerances=(1e-2, 1e-3, 1e-4),
        repeats=1 if arguments.quick else 5,
    )
    print(table.to_markdown())
    (arguments.out / "cfm.md").write_text(table.to_markdown() + "\n")
    table.plot(arguments.out / "cfm.png")


if __name__ == "__main__":
    main()
