"""How the cost of a learned solve grows with batch, state, steps and DISE candidates.

One table a question, of time ratios: each round runs all contestants of a table in turn, and
the ratios are medians over rounds. `latency` compares solvers on one sample.

    python examples/benchmarks/scale.py                  # all of them
    python examples/benchmarks/scale.py batch            # or one: batch, state, steps,
    python examples/benchmarks/scale.py latency --quick  # candidates, latency
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.evaluation import describe_machine

T = torch.tensor([0.0, 1.0])
STEPS = 10
Run = Callable[[], object]


class Field(nn.Module):
    """The vector field: an MLP dim-64-64-dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, dim)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = self.net(y)
        return k


def hyper_euler(dim: int, steps: int = STEPS) -> tdh.HyperSolver:
    """Return a hypersolver with a net a quarter as wide as func; what it says costs the same."""
    return tdh.HyperSolver("euler", tdh.hypernets.MLP(dim, (16,)), steps=steps)


def solves(dim: int, batch: int, steps: int = STEPS) -> tuple[Run, Run]:
    """Return a learned solve, and torchdiffeq's own with the same calls of func."""
    func, y0, solver = Field(dim), torch.randn(batch, dim), hyper_euler(dim, steps)
    options = {"step_size": 1 / steps}
    return (
        lambda: solver.solve(func, y0, T),
        lambda: odeint(func, y0, T, method="euler", options=options),
    )


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return each contestant's seconds, round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            run()  # refills the caches after another contestant
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in times.items()}  # the first rounds warm up


def ratio(times: dict[str, list[float]], name: str, against: str) -> float:
    """Return the median over rounds of one contestant's time over another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[against], strict=True))


def growth(what: str, sizes: list[int], make: Callable[[int], tuple[Run, Run]], rounds: int) -> str:
    """Return a table of a learned solve's time against the smallest, and against euler's."""
    runs: dict[str, Run] = {}
    for size in sizes:
        runs[f"{size}"], runs[f"euler {size}"] = make(size)
    times = timed(runs, rounds)
    lines = [
        f"| {what} | ms | time, ratio to {what} {sizes[0]} | per unit | to odeint euler |",
        "|--:|--:|--:|--:|--:|",
    ]
    for size in sizes:
        grown = ratio(times, f"{size}", f"{sizes[0]}")
        ms = 1e3 * statistics.median(times[f"{size}"])
        same_calls = ratio(times, f"{size}", f"euler {size}")
        lines.append(
            f"| {size} | {ms:.2f} | {grown:.2f} | {grown * sizes[0] / size:.4f} "
            f"| {same_calls:.2f} |"
        )
    return "\n".join(lines)


def batch(*, is_quick: bool) -> str:
    """Return the growth with the batch, 1 to 4,096 samples of 2 numbers."""
    sizes = [1, 64, 4096] if is_quick else [1, 4, 16, 64, 256, 1024, 4096]
    return growth("batch", sizes, lambda size: solves(2, size), 2 if is_quick else 100)


def state(*, is_quick: bool) -> str:
    """Return the growth with the state's size, at 64 samples."""
    sizes = [2, 512] if is_quick else [2, 8, 32, 128, 512, 2048]
    return growth("state", sizes, lambda size: solves(size, 64), 2 if is_quick else 50)


def steps(*, is_quick: bool) -> str:
    """Return the growth with the number of steps, at 64 samples of 2 numbers."""
    sizes = [1, 10] if is_quick else [1, 2, 5, 10, 20, 50, 100]
    return growth("steps", sizes, lambda size: solves(2, 64, size), 2 if is_quick else 50)


def dispatch(n_candidates: int) -> Run:
    """Return a DISE solve that sends as many of 256 samples to every candidate."""
    func, y0 = Field(2), torch.randn(256, 2)
    share = torch.arange(256) % n_candidates
    costs = 1 - nn.functional.one_hot(share, n_candidates).float()
    selector = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, n_candidates))

    def select(y: Any) -> Tensor:
        # What a selector costs, and known groups.
        predicted: Tensor = costs + 0 * selector(y)
        return predicted

    candidates = [tdh.Candidate(hyper_euler(2)) for _ in range(n_candidates)]
    options = {"dise": tdh.Dise(candidates, select)}
    return lambda: odeint(func, y0, T, method="dise", options=options)


def candidates(*, is_quick: bool) -> str:
    """Return the growth with the number of DISE candidates, 256 samples in equal groups."""
    numbers = [1, 4] if is_quick else [1, 2, 4, 8, 16]
    runs = {f"{number}": dispatch(number) for number in numbers}
    runs["alone"], _ = solves(2, 256)
    times = timed(runs, 2 if is_quick else 50)
    lines = ["| candidates | ms | time, ratio to the candidate alone |", "|--:|--:|--:|"]
    for name in map(str, numbers):
        ms = 1e3 * statistics.median(times[name])
        lines.append(f"| {name} | {ms:.2f} | {ratio(times, name, 'alone'):.2f} |")
    return "\n".join(lines)


def latency(*, is_quick: bool) -> str:
    """Return the time of one sample, by solver, against dopri5's."""
    func, y0, solver = Field(2), torch.randn(1, 2), hyper_euler(2)
    calls: dict[str, dict[str, Any]] = {
        "dopri5": {"rtol": 1e-3, "atol": 1e-3},
        **{name: {"options": {"step_size": 1 / STEPS}} for name in ("euler", "midpoint", "rk4")},
        "hypereuler": {"options": {"solver": solver}},
    }
    runs: dict[str, Run] = {
        f"odeint {method}": functools.partial(odeint, func, y0, T, method=method, **arguments)
        for method, arguments in calls.items()
    }
    runs["solver.solve"] = lambda: solver.solve(func, y0, T)
    if not is_quick:  # compiling takes long
        compiled = torch.compile(solver.solve, fullgraph=True)
        runs["solver.solve, compiled"] = lambda: compiled(func, y0, T)
    times = timed(runs, 2 if is_quick else 200)
    lines = [
        f"| one sample, {STEPS} steps (dopri5: 1e-3) | ms | time, ratio to dopri5 |",
        "|:--|--:|--:|",
    ]
    for name in runs:
        ms = 1e3 * statistics.median(times[name])
        lines.append(f"| {name} | {ms:.2f} | {ratio(times, name, 'odeint dopri5'):.2f} |")
    return "\n".join(lines)


QUESTIONS = {
    "batch": batch,
    "state": state,
    "steps": steps,
    "candidates": candidates,
    "latency": latency,
}


def main() -> None:
    """Print a table for each question asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", choices=QUESTIONS, help="one table alone")
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds: noisy")
    arguments = parser.parse_args()
    # The tensors are small: more threads gain little, and lose much on a busy machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    asked = [arguments.question] if arguments.question else list(QUESTIONS)
    with torch.no_grad():
        for name in asked:
            print(f"{QUESTIONS[name](is_quick=arguments.quick)}\n", flush=True)
    print(
        f"MLP dim-64-64-dim, g with one hidden layer of 16, {STEPS} Euler steps. Medians of "
        f"interleaved runs; {describe_machine(torch.device('cpu'))}."
    )


if __name__ == "__main__":
    main()
