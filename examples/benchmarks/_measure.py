"""Measure contestants of any library as `tdh.evaluate` measures methods of torchdiffeq's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from benchmarks._contestants import Contestant
from benchmarks._problem import Benchmark
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.evaluation import EvaluationRow, EvaluationTable, describe_machine

# Its measure is taken over whole: one definition of NFE, MACs, ms and errors.
from torchdiffeq_hyper.evaluation._measure import Counted, Problem, errors
from torchdiffeq_hyper.recording import median_seconds

REFERENCE_TOLERANCE = 1e-6


@torch.no_grad()
def measure(
    benchmark: Benchmark, contestants: Sequence[Contestant], repeats: int
) -> EvaluationTable:
    """Return a row a contestant; times are medians of ``repeats`` rounds through all."""
    problem = Problem.of(benchmark.func, benchmark.test_y0, benchmark.span)
    total = 1 + len(contestants) * (1 + repeats)
    with tqdm(total=total, unit="solve", desc=f"{benchmark.name}: reference") as bar:
        reference = problem.reference(REFERENCE_TOLERANCE, REFERENCE_TOLERANCE, [1.0])[1.0]
        bar.update()
        rows = []
        for contestant in contestants:
            bar.set_description(f"{benchmark.name}: {contestant.method}")
            rows.append(_row(contestant, problem, reference))
            bar.update()
        bar.set_description(f"{benchmark.name}: timing")
        runs = [partial(contestant.solve, problem) for contestant in contestants]
        times = median_seconds(runs, problem.t.device, repeats, bar.update)
    rows = [replace(row, ms=1000 * seconds) for row, seconds in zip(rows, times, strict=True)]
    start, end = benchmark.span
    measured = (
        f"{benchmark.title}; batch {problem.batch}, t = {start:g} to {end:g}. Errors: against "
        f"dopri5 at rtol = atol = {REFERENCE_TOLERANCE:g}. Times: median of {repeats} "
        f"interleaved runs, {describe_machine(problem.t.device)}."
    )
    return EvaluationTable(tuple(rows), "metric", measured)


def _row(contestant: Contestant, problem: Problem, reference: State) -> EvaluationRow:
    """Return a row without its time: calls, MACs and errors of one solve."""
    counted = Counted(problem.func, counts_flops=True)
    with FlopCounterMode(display=False) as counter:
        y = contestant.solve(replace(problem, func=counted))
    off = errors(y, reference)
    outside = counter.get_total_flops() - counted.flops if contestant.is_learned else 0
    return EvaluationRow(
        method=contestant.method,
        steps=contestant.steps,
        tolerance=contestant.tolerance,
        nfe=counted.calls,
        macs_func=counted.flops / 2 / problem.batch,
        macs_g=outside / 2 / problem.batch,
        ms=math.nan,
        **off._asdict(),
        metric=None,
        is_learned=contestant.is_learned,
    )
