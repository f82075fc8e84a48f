"""What a solve costs and how far off it ends: calls, MACs, errors, and on which machine."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import can_restrict, check_answer, is_probing, look_through, restrict
from torchdiffeq_hyper._state import State, VectorField, parts_of, sample_norms
from torchdiffeq_hyper.evaluation._problem import Problem
from torchdiffeq_hyper.recording import FlopCounter


class Counted:
    """A vector field that counts its calls and, if asked to (it is slow), its FLOPs."""

    def __init__(self, func: VectorField, *, counts_flops: bool = False) -> None:
        self.base_func = func
        self.calls = 0
        self.flops = 0
        self._counts_flops = counts_flops
        self._counter = self
        if can_restrict(func):
            self.restrict = self._of_samples

    def _of_samples(self, index: Tensor) -> Counted:
        part = Counted(restrict(self.base_func, index), counts_flops=self._counts_flops)
        part._counter = self._counter
        return part

    def __call__(self, t: Tensor, y: State) -> State:
        """Return ``func(t, y)``, checked to be like ``y``."""
        self._counter.calls += not is_probing()
        counts_flops = self._counts_flops and not is_probing()
        with FlopCounter() if counts_flops else nullcontext() as counter:
            k: State = self.base_func(t, y)
        self._counter.flops += 0 if counter is None else counter.get_total_flops()
        check_answer(k, y)
        return tuple(k) if isinstance(k, list) else k


look_through(Counted, "base_func")


def count_macs(
    solve: Callable[[Problem], State], problem: Problem, *, has_hypernet: bool
) -> tuple[float, float]:
    """Return the multiply-accumulates per sample of one solve: inside func, and outside it.

    Half of what torch's own FLOP counter says: products of matrices, convolutions and
    attention count, elementwise operations do not. Methods without a hypernet have
    nothing to count outside func.
    """
    counted = Counted(problem.func, counts_flops=True)
    # The counter makes every operation slow, and adaptive solvers have many of their own.
    with FlopCounter() if has_hypernet else nullcontext() as counter:
        solve(replace(problem, func=counted))
    outside = 0 if counter is None else counter.get_total_flops() - counted.flops
    return counted.flops / 2 / problem.batch, outside / 2 / problem.batch


class Errors(NamedTuple):
    """How far a state is from the reference: as the attributes of `EvaluationRow`."""

    mape: float
    relative_l2: float
    worst_relative_l2: float


FAILED = Errors(math.inf, math.inf, math.inf)
"""The errors of a solve that broke off, or whose state is not finite."""

_FLOOR = 1e-3


def errors(y: State, reference: State) -> Errors:
    """Return the errors of ``y``, in float64; dimension 0 of every part is the batch.

    The norms run over all parts of a sample together. Denominators that happen to lie
    near zero would make up the means, so none is smaller than 1e-3 of their root mean
    square: for percentages that of |y_ref| over the part, else that of the samples' norms.
    """
    ys, refs = _float64(y), _float64(reference)
    off = tuple((a - b).abs() for a, b in zip(ys, refs, strict=True))
    if not all(bool(d.isfinite().all()) for d in off):
        return FAILED
    percent = [100 * _ratio(d, ref.abs()).flatten() for d, ref in zip(off, refs, strict=True)]
    relative = _ratio(_norms(off), _norms(refs))
    return Errors(float(torch.cat(percent).mean()), float(relative.mean()), float(relative.max()))


def _float64(y: State) -> tuple[Tensor, ...]:
    # On the CPU, because some accelerators have no float64.
    wide = [part.detach().cpu() for part in parts_of(y)]
    return tuple(p.to(torch.complex128 if p.is_complex() else torch.float64) for p in wide)


def _norms(parts: tuple[Tensor, ...]) -> Tensor:
    return sample_norms(tuple(part.unsqueeze(0) for part in parts))[0]


def _ratio(off: Tensor, size: Tensor) -> Tensor:
    floor = _FLOOR * size.square().mean().sqrt()
    # Where all is zero, what is exactly right has no error.
    return torch.where(off == 0, 0.0, off / size.clamp_min(floor))


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
