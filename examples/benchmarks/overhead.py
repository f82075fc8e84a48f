"""What do hypersolvers cost beyond the calls of func and g?

Ten Euler steps of a small problem, where overhead weighs most:

1. ``odeint(..., method="hypereuler")`` against torchdiffeq's own euler plus ten calls of g;
2. ``solver.solve`` against ten calls of func and of g.

    python examples/benchmarks/overhead.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.evaluation import describe_machine

STEPS = 10
INNER = 3
COMPARISONS = {
    "odeint hypereuler": ("odeint euler", "bare g"),
    "solver.solve": ("bare func and g",),
}


class Field(nn.Module):
    """The vector field: an MLP 2-64-64-2."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = self.net(y)
        return k


def mlp(channels: int) -> nn.Sequential:
    """Return an MLP with two hidden layers of 64, from ``channels`` to 2."""
    return nn.Sequential(
        nn.Linear(channels, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )


def contestants() -> dict[str, Callable[[], object]]:
    """Return what is timed; every one makes the calls of ten Euler steps."""
    torch.manual_seed(0)
    func, y0, t = Field(), torch.randn(256, 2), torch.tensor([0.0, 1.0])
    g = tdh.ConcatHypernet(mlp(5), inputs=("y", "f0", "dt"))
    # A fitted solver knows its domain, and looks whether it is used inside.
    domain = tdh.FitDomain((0.0, 1.0), 0.1, 0.1, (1,), ((2,),), is_tuple=False, dtype="float32")
    solver = tdh.HyperSolver("euler", g, steps=STEPS, domain=domain)
    f0 = func(t[0], y0)
    step = tdh.StepInput(torch.tensor(1 / STEPS), t[0], y0, f0, (f0,), y0)

    def learned() -> None:
        odeint(func, y0, t, method="hypereuler", options={"solver": solver})

    def euler() -> None:
        odeint(func, y0, t, method="euler", options={"step_size": 1 / STEPS})

    def bare_func_and_g() -> None:
        for _ in range(STEPS):
            func(step.t, y0)
            g(step)

    def bare_g() -> None:
        for _ in range(STEPS):
            g(step)

    return {
        "odeint hypereuler": learned,
        "odeint euler": euler,
        "bare g": bare_g,
        "solver.solve": lambda: solver.solve(func, y0, t),
        "bare func and g": bare_func_and_g,
    }


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Return each round's times in microseconds; a round runs everything in turn."""
    times: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        times.append({})
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(INNER):
                run()
            times[-1][name] = 1e6 * (time.perf_counter() - start) / INNER
    return times[1:]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, noisier figures")
    rounds = 30 if parser.parse_args().quick else 300
    with torch.no_grad():
        times = measure(contestants(), rounds)
    print("| what | us | against | us | ratio |")
    print("| :--- | -: | :------ | -: | ----: |")
    for name, against in COMPARISONS.items():
        # Both sides of a round ran within milliseconds: their ratio is steadier than times.
        pairs = [(round_[name], sum(round_[part] for part in against)) for round_ in times]
        us, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        print(f"| {name} | {us:.0f} | {' + '.join(against)} | {bare:.0f} | {ratio:.3f} |")
    print(f"\nTen steps, MLP 2-64-64-2, batch 256. {describe_machine(torch.device('cpu'))}.")


if __name__ == "__main__":
    main()
