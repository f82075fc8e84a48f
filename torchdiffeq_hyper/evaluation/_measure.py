"""The problem that `evaluate` solves over and over, and what a solve of it costs and misses by."""

from __future__ import annotations

import contextvars
import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._fields._answers import check_answer, own
from torchdiffeq_hyper._fields._independence import is_probing
from torchdiffeq_hyper._fields._wrappers import can_restrict, look_through, restrict
from torchdiffeq_hyper._state import (
    RowLayout,
    State,
    StateLayout,
    VectorField,
    cast,
    is_half,
    n_samples,
    parts_of,
    sample_norms,
    shapes_of,
)
from torchdiffeq_hyper.errors import (
    NonFiniteError,
    StateShapeError,
    UnfinishedSolveError,
    is_breakdown,
)
from torchdiffeq_hyper.fitting._field import Units, check_repeatable
from torchdiffeq_hyper.fitting._reference import check_span
from torchdiffeq_hyper.recording import FlopCounter

# In float32, tighter than 1e-7 gains nothing over rounding; in half precision every answer
# of func is rounded to about 1e-3 (float16) or 1e-2 (bfloat16).
_TOLERANCES = {torch.float64: 1e-10, torch.float16: 1e-3, torch.bfloat16: 1e-2}

Solution = TypeVar("Solution")


@dataclass(frozen=True)
class Problem:
    """An initial value problem on a batch."""

    func: VectorField
    y0: State
    t: Tensor  # start and end time, at least float32

    @classmethod
    def of(cls, func: VectorField, y0: State, t_span: tuple[float, float]) -> Problem:
        """Return the problem, after checking state and span."""
        RowLayout.of(y0)
        if not all(part.numel() for part in parts_of(y0)):
            raise StateShapeError(
                problem=f"y0 has no numbers: {', '.join(map(str, shapes_of(y0)[1]))}.",
                expected="at least one sample along dim 0.",
                fix="y0 = torch.randn(256, 2)",
            )
        joined = StateLayout.of(y0).join(y0)
        dtype = torch.promote_types(joined.dtype.to_real(), torch.float32)
        return cls(func, y0, torch.tensor(check_span(t_span), dtype=dtype, device=joined.device))

    @property
    def batch(self) -> int:
        """Number of samples."""
        return n_samples(self.y0)

    @property
    def dtype(self) -> torch.dtype:
        """The state's dtype; for tuples, the one that the parts promote to."""
        return StateLayout.of(self.y0).join(self.y0).dtype

    def solve(self, shares: Sequence[float], **how: Any) -> list[State]:
        """Return the host's states at some shares of the span, rising, above 0 and up to 1."""
        passed = torch.tensor([0.0, *shares], dtype=self.t.dtype, device=self.t.device)
        t = torch.lerp(self.t[0], self.t[1], passed)
        solution = odeint(self.func, self.y0, t, **how)
        states = zip(*solution, strict=True) if isinstance(solution, tuple) else solution
        return list(states)[1:]

    def tolerances(self, rtol: float | None, atol: float | None) -> tuple[float, float]:
        """Return the reference's tolerances, filled in: those that suit dtype and size."""
        if rtol is None:
            rtol = _TOLERANCES.get(self.dtype.to_real(), 1e-7)
        if atol is None:
            join, span = StateLayout.of(self.y0).join, tuple(self.t.tolist())
            k = Counted(self.func)(self.t[0], self.y0)
            atol = rtol * Units.of(span, join(self.y0), join(k)).state
        return rtol, atol

    def reference(self, rtol: float, atol: float, shares: Sequence[float]) -> dict[float, State]:
        """Return dopri5's states by share of the span; half precision is integrated in float32."""
        dtype, t = self.dtype, self.t
        y0 = cast(self.y0, torch.float32) if is_half(dtype) else self.y0
        field, join = Counted(self.func, dtype=dtype), StateLayout.of(y0).join
        # An adaptive solve of a noisy field may never end.
        first, second = (join(field(t[0], y0)) for _ in range(2))
        check_repeatable(first, second, dtype, float(t[0]))
        # An empty context: no scope of ours may replace or record the reference.
        run, solve = contextvars.Context().run, Problem(field, y0, t).solve
        how = {"method": "dopri5", "rtol": rtol, "atol": atol}
        states = unless_broken(lambda: run(solve, shares, **how)) or [torch.tensor(math.nan)]
        if not all(bool(part.isfinite().all()) for state in states for part in parts_of(state)):
            raise NonFiniteError(
                problem=f"dopri5 finds no reference solution at rtol {rtol:g}, atol {atol:g}.",
                expected=f"a func that stays finite, and tolerances that {dtype} can meet.",
                fix="evaluate(..., rtol=1e-4, atol=1e-4)",
            )
        return dict(zip(shares, states, strict=True))


def unless_broken(solve: Callable[[], Solution]) -> Solution | None:
    """Return what ``solve`` does, or None where the method cannot go on."""
    try:
        return solve()
    except (NonFiniteError, UnfinishedSolveError):
        return None
    except AssertionError as error:
        if not is_breakdown(error):
            raise
        return None


class Counted:
    """A vector field of the samples at ``index`` that counts calls and, if asked to, FLOPs.

    It counts for ``total`` if that is given. A solver that steps half precision in float32 gives
    the state's ``dtype``: func is called in it, and answers come back in the solver's.
    """

    def __init__(
        self,
        func: VectorField,
        index: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        counts_flops: bool = False,
        total: Counted | None = None,
    ) -> None:
        self.base_func = func if index is None else restrict(func, index)
        self.whole = func
        self.calls = self.flops = 0
        self._dtype, self._counts_flops, self._total = dtype, counts_flops, total or self
        if can_restrict(self.base_func):
            given: dict[str, Any] = {"dtype": dtype, "counts_flops": counts_flops}
            self.restrict = partial(Counted, self.base_func, total=self._total, **given)

    def __call__(self, t: Tensor, y: State) -> State:
        """Return ``func(t, y)``, checked to be like ``y``."""
        state, dtype = y, self._dtype
        if dtype is not None and is_half(dtype):
            t, state = t.to(dtype), cast(y, dtype)
        is_counted = not is_probing()
        self._total.calls += is_counted
        with FlopCounter() if self._counts_flops and is_counted else nullcontext() as counter:
            k = self.base_func(t, state)
        self._total.flops += 0 if counter is None else counter.get_total_flops()
        check_answer(k, y)
        answer: State = tuple(k) if isinstance(k, list) else k
        if dtype is None:
            return answer
        if any(is_half(part.dtype) for part in parts_of(answer)):
            return cast(answer, parts_of(y)[0].dtype)
        # The host keeps answers over later calls of func, which may write into the same buffer;
        # those of tuples it copies itself.
        return own(answer) if isinstance(answer, Tensor) else answer


# What is restricted is a copy; what is attached to the whole serves its samples.
look_through(Counted, "base_func", "whole")


def count_macs(
    solve: Callable[[Problem], object], problem: Problem, *, has_hypernet: bool
) -> tuple[float, float]:
    """Return the multiply-accumulates (half the FLOPs) a sample of a solve, in func and outside."""
    counted = Counted(problem.func, counts_flops=True)
    # The counter is slow, and adaptive solvers have many operations of their own.
    with FlopCounter() if has_hypernet else nullcontext() as counter:
        solve(replace(problem, func=counted))
    outside = 0 if counter is None else counter.get_total_flops() - counted.flops
    return counted.flops / 2 / problem.batch, outside / 2 / problem.batch


class Errors(NamedTuple):
    """How far a state is from the reference: as the attributes of `EvaluationRow`."""

    mape: float
    relative_l2: float
    worst_relative_l2: float


FAILED = Errors(math.inf, math.inf, math.inf)  # where a solve broke off, or is not finite
_FLOOR = 1e-3


def errors(y: State, reference: State) -> Errors:
    """Return the errors of ``y``, in float64; the norms run over all parts of a sample together.

    Denominators near zero would make up the means: none is smaller than 1e-3 of their root mean
    square, for percentages over the part, else over the samples.
    """
    ys, refs = _float64(y), _float64(reference)
    off = tuple((a - b).abs() for a, b in zip(ys, refs, strict=True))
    if not all(bool(d.isfinite().all()) for d in off):
        return FAILED
    percent = [100 * _ratio(d, ref.abs()).flatten() for d, ref in zip(off, refs, strict=True)]
    relative = _ratio(sample_norms(off)[0], sample_norms(refs)[0])
    return Errors(float(torch.cat(percent).mean()), float(relative.mean()), float(relative.max()))


def _float64(y: State) -> tuple[Tensor, ...]:
    """Return the parts, (1, batch, ...), on the CPU: some accelerators have no float64."""
    wide = [part.detach().cpu().unsqueeze(0) for part in parts_of(y)]
    return tuple(p.to(torch.complex128 if p.is_complex() else torch.float64) for p in wide)


def _ratio(off: Tensor, size: Tensor) -> Tensor:
    floor = _FLOOR * size.square().mean().sqrt()
    # Where all is zero, what is exactly right has no error.
    return torch.where(off == 0, 0.0, off / size.clamp_min(floor))


def describe_machine(device: torch.device) -> str:
    """Return the machine that times belong to, in a few words."""
    info = Path("/proc/cpuinfo")  # the only place where Linux names the processor
    models = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    name = models[0] if models else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    words = [name, f"{os.cpu_count()} cores", f"{threads} torch thread{'s' * (threads != 1)}"]
    if device.type == "cuda":
        words.insert(0, torch.cuda.get_device_name(device))
    return ", ".join([*words, f"torch {torch.__version__}"])
