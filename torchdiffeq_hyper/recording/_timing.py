"""How long calls take, and how many floating-point operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def median_seconds(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    repeats: int,
    tick: Callable[[], object] = lambda: None,
    turn_seconds: float = 0.02,
) -> list[float]:
    """Return each run's median wall time in seconds over ``repeats`` rounds.

    A round has every run's turn, so that a machine that slows down slows them all. A run shorter
    than a turn is repeated in it; ``tick`` is called after each, outside the measured time.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, seconds in zip(runs, times, strict=True):
            seconds.append(_time_turn(run, device, turn_seconds))
            tick()
    return [statistics.median(seconds) for seconds in times]


def _time_turn(run: Callable[[], object], device: torch.device, turn_seconds: float) -> float:
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    n_runs, elapsed, start = 0, 0.0, time.perf_counter()
    while n_runs == 0 or elapsed < turn_seconds:
        run()
        synchronize()
        n_runs, elapsed = n_runs + 1, time.perf_counter() - start
    return elapsed / n_runs


class FlopCounter(FlopCounterMode):
    """torch's FLOP counter, its total only.

    torch's own counts per module too, by hooks on the modules' inputs; those end the
    `torch.autograd.grad` of such an input, as in every likelihood's divergence, with
    "A leaf node was passed to _will_engine_execute_node" (torch 2.13).
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        tracker: Any = nullcontext()
        tracker.parents = {"Global"}
        self.mod_tracker = tracker
