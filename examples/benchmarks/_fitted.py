"""Fit the learned solvers of a benchmark, each once: a file keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks._problem import Benchmark
from torch import nn

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.hypernets import MLP

BNS_CALLS = (4, 7, 8, 9, 10, 14, 16)


@dataclass(frozen=True)
class Recipe:
    """How a solver is fitted.

    Attributes:
        name: of its file.
        base: base method.
        steps: steps over the span; for bns calls of func.
        hypernet: returns its correction, or "auto" for a choice of cheap ones.
    """

    name: str
    base: str
    steps: int
    hypernet: Callable[[], nn.Module | str] | None = None


def recipes(quick: bool = False) -> Iterator[Recipe]:
    """Yield ours: bns at several numbers of calls of func, hypersolvers at 10."""
    for calls in (4,) if quick else BNS_CALLS:
        yield Recipe(f"bns-{calls}", "bns", calls)
    yield Recipe("hypereuler", "euler", 10, lambda: "auto")
    if not quick:
        yield Recipe("hypermidpoint", "midpoint", 5, lambda: "auto")
        yield Recipe("hyperheun", "heun", 5, lambda: "auto")


def two_calls(quick: bool = False) -> Iterator[Recipe]:
    """Yield ours for sampling a plane with two calls of func."""
    stages = partial(MLP, 2, inputs=("y", "stages"), n_stages=2)
    yield Recipe("hypermidpoint-1", "midpoint", 1, stages)
    if not quick:
        yield Recipe("hypereuler-2", "euler", 2, partial(MLP, 2, inputs=("y", "f0", "t")))


def of_state_and_time(benchmark: Benchmark) -> Recipe:
    """Return the recipe of a hypereuler whose net knows y and t, as torchdyn's nets do."""
    return Recipe("hypereuler-y-t", "euler", 10, benchmark.hypernet)


def fitted(benchmark: Benchmark, recipe: Recipe, folder: Path) -> tdh.Solver:
    """Return the solver of a recipe: from its file, or fitted and then saved there."""
    path = folder / f"{recipe.name}.safetensors"
    if path.is_file():
        return tdh.HyperSolver.load(path)
    config = tdh.FitConfig(
        max_seconds=benchmark.fit_seconds,
        batch_size=benchmark.fit_batch,
        rtol=benchmark.fit_tolerance,
        checkpoint=folder / f"{recipe.name}.fit",
    )
    solver = tdh.fit(
        benchmark.func,
        benchmark.fit_y0,
        benchmark.span,
        base=recipe.base,
        steps=recipe.steps,
        hypernet=None if recipe.hypernet is None else recipe.hypernet(),
        config=config,
    )
    print(f"\n{benchmark.name}, {recipe.name}:\n{solver.report}\n", flush=True)
    solver.save(path)
    (folder / f"{recipe.name}.fit").unlink(missing_ok=True)
    return solver
