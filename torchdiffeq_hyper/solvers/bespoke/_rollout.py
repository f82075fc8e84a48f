"""The calls of func and the sums between them, in three ways.

`chained` is differentiable in everything and compiles; but the sums of n derivatives are
memory traffic. `chunked`, for large states, does with the least of it; `buffered`, for small
ones, with the fewest operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdiffeq_hyper._fields import owning, share_memory
from torchdiffeq_hyper.solvers.bespoke._dense import stage_times
from torchdiffeq_hyper.tableaus import StageCall


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a tensor carries a gradient or a tangent, in reverse or forward mode.

    Under vmap, which hides that, it may.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_batchedtensor(tensor):  # noqa: SLF001 - there is no public way
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def following(call: StageCall, t: Tensor, start: float, y: Tensor) -> Tensor:
    r"""Return the state at a fitted start, as a function of the time ``t[0]`` of ``y``.

    .. math:: y - (t_0 - s) f(s, y)

    The weights belong to the span and stay where they are; instead the solution is followed
    back to its start s, to first order: :math:`t_0 - s` is 0 to rounding, but its derivative is
    1. Costs one call of func.

    Args:
        call: evaluates func.
        t: the times of the solve, differentiated.
        start: the fitted start s.
        y: flat state at ``t[0]``.
    """
    t_dtype = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    time = torch.full((), start, dtype=t.dtype, device=t.device)
    return y - (t[0] - time).to(t_dtype) * call(time.to(t_dtype), y)


Schedule = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The 0-d time of call i and its i + 1 weights, times the span, for each call."""

CHUNK = 2**18
"""Numbers summed at a time: as many bytes as lie in a core's cache."""


def schedule(weights: Tensor, start: Any, end: Any, dtype: torch.dtype) -> Schedule:
    """Return what the calls of a solve need, in the state's ``dtype``; weights on its device."""
    t_dtype = dtype.to_real() if dtype.is_complex else dtype
    times = (start + (end - start) * stage_times(weights)).to(t_dtype)
    rows = (weights * (end - start)).to(dtype).unbind()
    return times.unbind(), [row[: i + 1] for i, row in enumerate(rows)]


class KeptSchedule:
    """The last solve's schedule: a dozen small operations that a small state would notice."""

    def __init__(self) -> None:
        # Key, weights, a copy of these and the schedule: published as one tuple, so that
        # threads never mix up those of two solves.
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor, Schedule] | None = None

    def of(self, weights: Tensor, span: tuple[float, float], y: Tensor) -> Schedule:
        """Return the schedule for the span, made anew if anything it is made of has changed."""
        key = (y.dtype, y.device, span, weights.dtype, weights.device, weights._version)  # noqa: SLF001
        kept = self._kept
        # What is written through ``.data`` leaves the version as it was. To look at the values
        # of another device would wait for it.
        if (
            kept is not None
            and kept[0] == key
            and kept[1] is weights
            and (weights.device.type != "cpu" or torch.equal(kept[2], weights))
        ):
            return kept[3]
        calls = schedule(weights.to(y.device), *span, y.dtype)
        self._kept = (key, weights, weights.detach().clone(), calls)
        return calls

    def __reduce__(self) -> tuple[type[KeptSchedule], tuple[()]]:
        """Copy and pickle as an empty one."""
        return KeptSchedule, ()


def is_plain() -> bool:
    """Return whether only numbers are wanted: no gradient, no graph."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def roll_out(call: StageCall, calls: Schedule, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the state at the end and the n derivatives.

    Args:
        call: evaluates func.
        calls: times and weights.
        y: flat state at the start.
    """
    x, stages = _roll_out(call, calls, y)
    # Two calls may have told; a func may also start with its buffer only later.
    return _roll_out(owning(call), calls, y) if share_memory(stages) else (x, stages)


def _roll_out(call: StageCall, calls: Schedule, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    if torch.compiler.is_compiling() or is_differentiated(calls[1][-1]):
        return chained(call, calls, y)
    if y.device.type == "cpu" and y.numel() > CHUNK:
        return chunked(call, calls, y)
    return buffered(call, calls, y) if is_plain() else chained(call, calls, y)


def chained(
    call: StageCall, calls: Schedule, y: Tensor, first: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Add up the derivatives one by one; ``first`` is the first one where it is known."""
    x, stages = y, []
    for i, (t, row) in enumerate(zip(*calls, strict=True)):
        stages.append(call(t, x) if i or first is None else first)
        if i == 1 and share_memory(stages):
            return x, stages  # a func that reuses its buffer: all is to be done again
        x = y
        for weight, k in zip(row.unbind(), stages, strict=True):
            x = torch.addcmul(x, weight, k)
    return x, stages


def buffered(call: StageCall, calls: Schedule, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Keep all derivatives in one matrix: a sum is one product with a vector."""
    memory, times = _Memory(y), calls[0]
    start, k = memory.flat(y), call(times[0], y)
    matrix = y.new_empty(len(times), start.numel())
    views = [memory.view(row) for row in matrix]
    try:
        views[0].copy_(k)
    except RuntimeError:  # under vmap a batch of derivatives does not fit into one
        return chained(call, calls, y, k)
    x = y
    for i, row in enumerate(calls[1]):
        if i:
            views[i].copy_(call(times[i], x))
        x = memory.view(torch.addmv(start, matrix[: i + 1].t(), row))
    return x, views


def chunked(call: StageCall, calls: Schedule, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Add up a part of the state that fits into the cache at a time, copying no derivative."""
    memory, stages, x = _Memory(y), [call(calls[0][0], y)], y
    add = _add_up if is_plain() else _Sum.apply
    for i, weights in enumerate(calls[1]):
        if i:
            stages.append(call(calls[0][i], x))
            if i == 1 and share_memory(stages):
                return x, stages  # as in `chained`
        try:
            x = add(memory, weights.tolist(), y, *stages)
        except RuntimeError:
            if i:
                raise
            return chained(call, calls, y, stages[0])  # vmap knows no given outputs
    return x, stages


def _add_up(memory: _Memory, weights: list[float], y: Tensor, *stages: Tensor) -> Tensor:
    """Return y plus the weighted derivatives."""
    start, *chunks = (memory.flat(tensor).split(CHUNK) for tensor in (y, *stages))
    flat = y.new_empty(y.numel())
    for part, out in enumerate(flat.split(CHUNK)):
        torch.add(start[part], chunks[0][part], alpha=weights[0], out=out)
        for weight, chunk in zip(weights[1:], chunks[1:], strict=True):
            out.add_(chunk[part], alpha=weight)
    return memory.view(flat)


class _Sum(torch.autograd.Function):
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
