"""The n calls of func of a bespoke solver, and the sums between them.

The sums of n derivatives are memory traffic. `_Chain` adds them one by one: it is the
reference, differentiable in everything, and compiles. `_Chunks`, for large states, does with
the least traffic; `_Matrix`, for small ones, with the fewest operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import own, owning, share_memory
from torchdiffeq_hyper._state import is_finite
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.solvers._stepping import advice_for_half, check_start
from torchdiffeq_hyper.solvers.bespoke._weights import is_differentiated, stage_times
from torchdiffeq_hyper.tableaus import StageCall

Schedule = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The 0-d time of call i and its i + 1 weights, times the span, for each call."""

_Sum = Callable[[Tensor, list[Tensor]], Tensor]
"""Return the next state for a row of weights and the derivatives; may move the last of these."""

CHUNK = 2**18
"""Numbers summed at a time: as many bytes as lie in a core's cache."""


def schedule(weights: Tensor, start: Any, end: Any, dtype: torch.dtype) -> Schedule:
    """Return what the calls of a solve need, in the state's ``dtype``; weights on its device."""
    t_dtype = dtype.to_real() if dtype.is_complex else dtype
    times = (start + (end - start) * stage_times(weights)).to(t_dtype)
    rows = (weights * (end - start)).to(dtype).unbind()
    return times.unbind(), [row[: i + 1] for i, row in enumerate(rows)]


class ScheduleCache:
    """The last solve's schedule: a dozen small operations that a small state would notice."""

    def __init__(self) -> None:
        # Key, weights, a copy of these, schedule: in one tuple, so that threads mix up none.
        self._cached: tuple[tuple[Any, ...], Tensor, Tensor, Schedule] | None = None

    def of(self, weights: Tensor, span: tuple[float, float], y: Tensor) -> Schedule:
        """Return the schedule for the span, made anew if anything it is made of has changed."""
        key = (y.dtype, y.device, span, weights.dtype, weights.device, weights._version)  # noqa: SLF001
        cached = self._cached
        # What is written through ``.data`` leaves the version as it was. To look at the values
        # of another device would wait for it.
        if (
            cached is not None
            and cached[0] == key
            and cached[1] is weights
            and (weights.device.type != "cpu" or torch.equal(cached[2], weights))
        ):
            return cached[3]
        calls = schedule(weights.to(y.device), *span, y.dtype)
        self._cached = (key, weights, weights.detach().clone(), calls)
        return calls

    def __reduce__(self) -> tuple[type[ScheduleCache], tuple[()]]:
        """Copy and pickle as an empty one."""
        return ScheduleCache, ()


def is_plain() -> bool:
    """Return whether only numbers are wanted: no gradient, no graph."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def roll_out(call: StageCall, calls: Schedule, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the state at the end and the n derivatives, from a flat state at the start."""
    add = _sum_for(calls, y)
    x, stages = _roll_out(call, calls, y, add)
    # Two calls may have told; a func may also start with its buffer only later.
    return _roll_out(owning(call), calls, y, add) if share_memory(stages) else (x, stages)


def _sum_for(calls: Schedule, y: Tensor) -> _Sum:
    if torch.compiler.is_compiling() or is_differentiated(calls[1][-1]):
        return _Chain(y)
    if y.device.type == "cpu" and y.numel() > CHUNK:
        return _Chunks(y)
    return _Matrix(y, len(calls[1])) if is_plain() else _Chain(y)


def _roll_out(
    call: StageCall, calls: Schedule, y: Tensor, add: _Sum
) -> tuple[Tensor, list[Tensor]]:
    x, stages = y, []
    for i, (t, row) in enumerate(zip(*calls, strict=True)):
        stages.append(call(t, x))
        if i == 1 and share_memory(stages):
            return x, stages  # a func that reuses its buffer: all is to be done again
        try:
            x = add(row, stages)
        except RuntimeError:  # under vmap no batch of derivatives fits into given memory
            if i or isinstance(add, _Chain):
                raise
            add = _Chain(y)
            x = add(row, stages)
    return x, stages


class _Chain:
    """Adds up the derivatives one by one: the reference."""

    def __init__(self, y: Tensor) -> None:
        self._y = y

    def __call__(self, row: Tensor, stages: list[Tensor]) -> Tensor:
        x = self._y
        for weight, k in zip(row.unbind(), stages, strict=True):
            x = torch.addcmul(x, weight, k)
        return x


class _Matrix:
    """Keeps all derivatives in one matrix: a sum is one product with a vector."""

    def __init__(self, y: Tensor, n: int) -> None:
        self._memory = _Memory(y)
        self._start = self._memory.flat(y)
        self._matrix = y.new_empty(n, self._start.numel())

    def __call__(self, row: Tensor, stages: list[Tensor]) -> Tensor:
        n = len(stages)
        last = self._memory.view(self._matrix[n - 1])
        last.copy_(stages[-1])
        stages[-1] = last
        return self._memory.view(torch.addmv(self._start, self._matrix[:n].t(), row))


class _Chunks:
    """Adds up a part of the state that fits into the cache at a time, copying no derivative."""

    def __init__(self, y: Tensor) -> None:
        self._y = y
        self._memory = _Memory(y)
        self._add = _add_up if is_plain() else _LinearSum.apply

    def __call__(self, row: Tensor, stages: list[Tensor]) -> Tensor:
        x: Tensor = self._add(self._memory, row.tolist(), self._y, *stages)
        return x


def _add_up(memory: _Memory, weights: list[float], y: Tensor, *stages: Tensor) -> Tensor:
    """Return y plus the weighted derivatives."""
    start, *chunks = (memory.flat(tensor).split(CHUNK) for tensor in (y, *stages))
    flat = y.new_empty(y.numel())
    for part, out in enumerate(flat.split(CHUNK)):
        torch.add(start[part], chunks[0][part], alpha=weights[0], out=out)
        for weight, chunk in zip(weights[1:], chunks[1:], strict=True):
            out.add_(chunk[part], alpha=weight)
    return memory.view(flat)


class _LinearSum(torch.autograd.Function):
    """`_add_up` for autograd: linear, so that nothing needs to be kept."""

    @staticmethod
    def forward(memory: _Memory, weights: list[float], y: Tensor, *stages: Tensor) -> Tensor:
        return _add_up(memory, weights, y, *stages)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weights = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, gradient, *(gradient * weight for weight in ctx.weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        terms = zip((1.0, *ctx.weights), tangents[2:], strict=True)
        known = [weight * tangent for weight, tangent in terms if tangent is not None]
        return torch.stack(known).sum(0)


class _Memory:
    """The order in which a state's numbers lie in memory, e.g. channels last."""

    def __init__(self, y: Tensor) -> None:
        order = sorted(range(y.dim()), key=y.stride, reverse=True)
        if not y.permute(order).is_contiguous():
            order = list(range(y.dim()))
        self._order = order
        self._inverse = [order.index(axis) for axis in range(y.dim())]
        self._shape = [y.shape[axis] for axis in order]

    def flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor like the state as a vector; a view where it lies alike."""
        return tensor.permute(self._order).reshape(-1)

    def view(self, flat: Tensor) -> Tensor:
        """Return a vector as a tensor like the state."""
        return flat.view(self._shape).permute(self._inverse)


@torch.no_grad()
def raise_non_finite(call: StageCall, calls: Schedule, y0: Tensor, dtype: torch.dtype) -> None:
    """Replay a solve that ended in inf or nan, and name the call where that began, and why."""
    check_start(y0)
    x, stages, add = y0, [], _Chain(y0)
    for i, (t, row) in enumerate(zip(*calls, strict=True)):
        stages.append(own(call(t, x)))
        x = add(row, stages)
        if not is_finite(stages[-1]) or not is_finite(x):
            raise NonFiniteError(
                problem=f"the solve left the finite range at call {i} of func, t = {float(t):.6g}.",
                expected="finite derivatives along the solution.",
                fix="starts like those the solver was fitted on\n"
                "or a reference, outside of tdh.override: odeint(func, y0, t, method='dopri5')"
                + advice_for_half(dtype),
            )
    raise NonFiniteError(
        problem="the n calls of func stay finite: the hypernet returned inf or nan, or one of the "
        "two answers differently each time.",
        expected="a finite correction, and a deterministic func and hypernet.",
        fix="fit again with a lower lr; func.eval(); hypernet.eval()",
    )
