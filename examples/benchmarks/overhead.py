"""What do hypersolvers cost beyond the calls of func and g?

Ten Euler steps of a small problem, where overhead weighs most:

1. ``odeint(..., method="hypereuler")`` against torchdiffeq's own euler plus ten calls of g;
2. ``solver.solve`` against ten calls of func and of g, both eager;
3. the same, both under ``torch.compile(fullgraph=True)``, and compiled against eager;
4. into how many graphs ``torch.compile`` breaks a solve.

    python examples/benchmarks/overhead.py [--quick]
"""

from __future__ import annotations

import argparse
import logging
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
# What is timed, and what it is compared with: the sum of these.
COMPARISONS = (
    ("odeint hypereuler", ("odeint euler", "bare g")),
    ("solver.solve", ("bare func and g",)),
    ("compiled solve", ("compiled func and g",)),
    ("solver.solve", ("compiled solve",)),
)


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


def contestants(backend: str) -> dict[str, Callable[[], object]]:
    """Return what is timed; every one makes the calls of ten Euler steps."""
    torch.manual_seed(0)
    func, y0, t = Field(), torch.randn(256, 2), torch.tensor([0.0, 1.0])
    g = tdh.ConcatHypernet(mlp(5), inputs=("y", "f0", "dt"))
    # A fitted solver knows its domain, and looks whether it is used inside.
    domain = tdh.FitDomain((0.0, 1.0), 0.1, 0.1, (1,), ((2,),), is_tuple=False, dtype="float32")
    solver = tdh.HyperSolver("euler", g, steps=STEPS, domain=domain)
    dt, f0 = torch.tensor(1 / STEPS), func(t[0], y0)
    step = tdh.StepInput(dt, t[0], y0, f0, (f0,), y0)

    def bare_func_and_g() -> None:
        for _ in range(STEPS):
            func(step.t, y0)
            g(step)

    def chain(y: Tensor, start: Tensor) -> Tensor:
        # Each call on the last one's answer: a compiler makes equal calls only once.
        for _ in range(STEPS):
            k = func(start, y)
            out = g(tdh.StepInput(dt, start, y, k, (k,), y0))
            assert isinstance(out, Tensor)
            y = out
        return y

    def bare_g() -> None:
        for _ in range(STEPS):
            g(step)

    learned, plain = {"solver": solver}, {"step_size": 1 / STEPS}
    compiled_solve = torch.compile(solver.solve, fullgraph=True, backend=backend)
    compiled_chain = torch.compile(chain, fullgraph=True, backend=backend)
    return {
        "odeint hypereuler": lambda: odeint(func, y0, t, method="hypereuler", options=learned),
        "odeint euler": lambda: odeint(func, y0, t, method="euler", options=plain),
        "bare g": bare_g,
        "solver.solve": lambda: solver.solve(func, y0, t),
        "bare func and g": bare_func_and_g,
        "compiled solve": lambda: compiled_solve(func, y0, t),
        "compiled func and g": lambda: compiled_chain(y0, step.t),
    }


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Return each round's times in microseconds; a round runs everything in turn."""
    times: list[dict[str, float]] = []
    for _ in range(rounds + 3):
        times.append({})
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(INNER):
                run()
            times[-1][name] = 1e6 * (time.perf_counter() - start) / INNER
    return times[3:]  # the first rounds compile and warm up


def graphs(run: Callable[[], object]) -> int:
    """Return into how many graphs `torch.compile` breaks a call."""
    torch.compiler.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # no report of each break
    return int(torch._dynamo.explain(run)().graph_count)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, and nothing is really compiled"
    )
    is_quick = parser.parse_args().quick
    torch.set_num_threads(1)
    runs = contestants("aot_eager" if is_quick else "inductor")
    print("| what | us | against | us | ratio |")
    print("| :--- | -: | :------ | -: | ----: |")
    with torch.no_grad():
        for name, against in COMPARISONS:
            # Alone: what runs in between would leave its code and data in the caches.
            times = measure(
                {part: runs[part] for part in (name, *against)}, 10 if is_quick else 400
            )
            # Both sides of a round ran within milliseconds: their ratio is steadier than times.
            pairs = [(round_[name], sum(round_[part] for part in against)) for round_ in times]
            us, other = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            print(f"| {name} | {us:.0f} | {' + '.join(against)} | {other:.0f} | {ratio:.3f} |")
        print("\n| under torch.compile | graphs |\n| :--- | -: |")
        for name in ("odeint euler", "odeint hypereuler", "solver.solve"):
            print(f"| {name} | {graphs(runs[name])} |")
    print(f"\nTen steps, MLP 2-64-64-2, batch 256. {describe_machine(torch.device('cpu'))}.")


if __name__ == "__main__":
    main()
