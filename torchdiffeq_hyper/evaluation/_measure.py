"""What a solve costs and how far off it ends: calls, MACs, milliseconds, errors."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields import can_restrict, check_answer, is_probing, look_through, restrict
from torchdiffeq_hyper._state import State, VectorField, parts_of
from torchdiffeq_hyper.evaluation._problem import Problem
from torchdiffeq_hyper.recording._cost import FlopCounter, median_seconds


class Counted:
    """A vector field that counts its calls and, if asked to, its FLOPs.

    Args:
        func: the field; solvers attached to it are found.
        counts_flops: whether to have torch count FLOPs, which slows the calls down.
        whole: the field of which this is that of some samples: it counts.
    """

    def __init__(
        self, func: VectorField, *, counts_flops: bool = False, whole: Counted | None = None
    ) -> None:
        self.base_func = func
        self.calls = 0
        self.flops = 0
        self._counts_flops = counts_flops
        self._counter = self if whole is None else whole
        if can_restrict(func):
            self.restrict = self._of_samples

    def _of_samples(self, index: Tensor) -> Counted:
        func = restrict(self.base_func, index)
        return Counted(func, counts_flops=self._counts_flops, whole=self._counter)

    def __call__(self, t: Tensor, y: State) -> State:
        """Return ``func(t, y)``, checked to be like ``y``."""
        self._counter.calls += not is_probing()
        if self._counts_flops and not is_probing():
            with FlopCounter() as counter:
                k: State = self.base_func(t, y)
            self._counter.flops += counter.get_total_flops()
        else:
            k = self.base_func(t, y)
        check_answer(k, y)
        return k


look_through(Counted, "base_func")


def count_macs(
    solve: Callable[[Problem], State], problem: Problem, *, has_hypernet: bool
) -> tuple[float, float]:
    """Return the multiply-accumulates of one solve: inside func, and outside it.

    Half of what torch's own FLOP counter says: products of matrices, convolutions and
    attention count, elementwise operations do not. Methods without a hypernet have
    nothing to count outside func.
    """
    counted = Counted(problem.func, counts_flops=True)
    # The counter makes every operation slow, and adaptive solvers have many of their own.
    with FlopCounter() if has_hypernet else nullcontext() as counter:
        solve(replace(problem, func=counted))
    outside = 0 if counter is None else counter.get_total_flops() - counted.flops
    return counted.flops / 2, outside / 2


def time_in_turn(
    solves: Sequence[Callable[[Problem], State]],
    problem: Problem,
    repeats: int,
    tick: Callable[[], object],
) -> list[float]:
    """Return each solve's median wall time in ms over ``repeats`` rounds.

    A round runs every solve, so that a machine that slows down slows them all; a short
    solve is run many times within its turn, so that what ran before it does not count.
    ``tick`` is called after each turn, outside the measured time.
    """
    runs = [partial(solve, problem) for solve in solves]
    return [1000 * each for each in median_seconds(runs, problem.t.device, repeats, tick)]


class Errors(NamedTuple):
    """How far a final state is from the reference.

    Attributes:
        mape: mean absolute percentage error, in percent.
        relative_l2: mean over samples of |y - y_ref| / |y_ref|.
        worst: the largest of these.
    """

    mape: float
    relative_l2: float
    worst: float

    @classmethod
    def infinite(cls) -> Errors:
        """Return the errors of a solve that failed."""
        return cls(math.inf, math.inf, math.inf)


_FLOOR = 1e-3


def errors(y: State, reference: State) -> Errors:
    """Return the errors of ``y``, in float64; dimension 0 of every part is the batch.

    The norms run over all parts of a sample together. Denominators that happen to lie
    near zero would make up the means, so none is smaller than 1e-3 of their root mean
    square: for percentages that of |y_ref| over the part, else that of the samples'
    norms. A ``y`` that is not finite has infinite errors.
    """
    ys, refs = _float64(y), _float64(reference)
    off = [(a - b).abs() for a, b in zip(ys, refs, strict=True)]
    if not all(bool(torch.isfinite(d).all()) for d in off):
        return Errors.infinite()
    percent = [100 * _ratio(d, ref.abs()).flatten() for d, ref in zip(off, refs, strict=True)]
    relative = _ratio(_sample_norm(off), _sample_norm(refs))
    return Errors(float(torch.cat(percent).mean()), float(relative.mean()), float(relative.max()))


def _float64(y: State) -> list[Tensor]:
    # On the CPU, because some accelerators have no float64.
    wide = [part.detach().cpu() for part in parts_of(y)]
    return [p.to(torch.complex128 if p.is_complex() else torch.float64) for p in wide]


def _sample_norm(tensors: Sequence[Tensor]) -> Tensor:
    rows = torch.cat([p.abs().reshape(len(p), -1) for p in tensors], dim=1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _ratio(off: Tensor, size: Tensor) -> Tensor:
    floor = _FLOOR * size.square().mean().sqrt()
    # Where all is zero, what is exactly right has no error.
    return torch.where(off == 0, torch.zeros_like(off), off / size.clamp_min(floor))


@contextmanager
def buffers_kept(modules: Iterable[object]) -> Iterator[None]:
    """Give the modules their buffers back at the end (batch norm counts in train mode)."""
    owners = [getattr(module, "__self__", module) for module in modules]  # bound methods
    buffers = [b for owner in owners if isinstance(owner, nn.Module) for b in owner.buffers()]
    saved = [b.detach().clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def describe_machine(device: torch.device) -> str:
    """Return the machine that times belong to, in a few words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")  # the only place where Linux names the processor
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    threads = torch.get_num_threads()
    words = [name, f"{os.cpu_count()} cores", f"{threads} torch thread{'s' * (threads != 1)}"]
    if device.type == "cuda":
        words.insert(0, torch.cuda.get_device_name(device))
    return ", ".join([*words, f"torch {torch.__version__}"])
