"""A bespoke solve: its times, the n calls of func, the sums between, and what is read off.

The sums of n derivatives are memory traffic. `_add_one_by_one` is the reference, differentiable
in everything, and compiles. `_add_in_chunks`, for large states, does with the least traffic;
`_Matrix`, for small ones, with the fewest operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._answers import own, owning, share_memory
from torchdiffeq_hyper._state import is_differentiated, is_finite, is_half, time_dtype, values_of
from torchdiffeq_hyper.errors import NonFiniteError, OptionError
from torchdiffeq_hyper.solvers._stepping import advice_for_half, check_start
from torchdiffeq_hyper.solvers.bespoke._weights import hermite, stage_times
from torchdiffeq_hyper.tableaus import StageCall

Span: TypeAlias = tuple[float, float]
Schedule: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The 0-d time of call i and its i + 1 weights, times the span, for each call."""
_Sum = Callable[[Tensor, list[Tensor]], Tensor]
"""Return the next state for a row of weights and the derivatives; may move the last of these."""
CHUNK = 2**18
"""Numbers summed at a time: as many bytes as lie in a core's cache."""


def is_whole_span(t: Tensor, span: Span | None, calls: int) -> bool:
    """Return whether ``t`` is known to be the two ends of the span, and not differentiated.

    None stands for any span. Refuses times that start elsewhere, leave the span, or turn back.
    """
    if span is None:
        return len(t) == 2
    points = values_of(t)
    if points is None:
        return False
    start, end = span
    slack = slack_of(span, t.dtype) * abs(end - start)
    is_inside = all(min(span) - slack <= point <= max(span) + slack for point in points)
    if abs(points[0] - start) > slack or not is_inside:
        first, last = (repr(float(f"{time:.6g}")) for time in span)
        with_start = f"torch.cat([t.new_tensor([{first}]), t])"
        fix = f"t = {with_start if is_inside else f'torch.tensor([{first}, {last}])'}\n"
        raise OptionError(
            problem=f"t goes from {points[0]:.6g} to {points[-1]:.6g}; the solver was fitted from "
            f"{start:.6g} to {end:.6g}.",
            expected=f"times that start at {start:.6g} and stay in that span.",
            fix=fix + _another_fit(points, span, slack, calls),
        )
    forward = 1 if end > start else -1
    if any(forward * (after - before) < 0 for before, after in pairwise(points)):
        expected = f"times that only {'grow' if forward > 0 else 'fall'}."
        fix = f"t = t.sort(descending={forward < 0}).values"
        raise OptionError(problem="t turns back on its way.", expected=expected, fix=fix)
    return len(t) == 2 and abs(points[1] - end) <= slack and not is_differentiated(t)


def _another_fit(points: list[float], span: Span, slack: float, calls: int) -> str:
    """Return the call that fits a solver for these points."""
    first, last = points[0], points[-1]
    if first == last:  # t turns back, or is one point: no span
        return f"or a fit from {first:.6g} on"
    more, states = "", "at the first of the two"
    if abs(first - span[1]) <= slack and abs(last - span[0]) <= slack:
        (first, last), more, states = span, ', direction="reverse"', f"at {span[0]:.6g}"
    call = f'tdh.fit(func, y0, ({first:.6g}, {last:.6g}), base="bns", steps={calls}{more})'
    return f"or a fit of its own: {call}   # y0: states {states}"


def slack_of(span: Span | None, dtype: torch.dtype) -> float:
    """Return the share of a span by which the user's times of a dtype may miss it; None: any."""
    if span is None:
        return math.inf
    start, end = span
    # Times of float32 miss the ends; half precision rounds these more.
    rounding = torch.finfo(dtype).eps if is_half(dtype) else 1e-6
    return 1e-5 + rounding * max(abs(start), abs(end)) / abs(end - start)


def _rounding_of(span: Span | None, dtype: torch.dtype) -> float:
    """Return the share of a span by which times of a dtype miss it by rounding alone."""
    if span is None:
        return math.inf
    start, end = span
    return 8 * torch.finfo(dtype).eps * (1 + max(abs(start), abs(end)) / abs(end - start))


def schedule(weights: Tensor, start: Any, end: Any, dtype: torch.dtype) -> Schedule:
    """Return what the calls of a solve need, in the state's ``dtype``; weights on its device."""
    times = (start + (end - start) * stage_times(weights)).to(time_dtype(dtype))
    rows = (weights * (end - start)).to(dtype).unbind()
    return times.unbind(), [row[: i + 1] for i, row in enumerate(rows)]


class ScheduleCache:
    """The last solve's schedule: a dozen small operations that a small state would notice."""

    # Key, weights, their copy, schedule: one tuple, so that threads see all or none.
    _cached: tuple[tuple[Any, ...], Tensor, Tensor, Schedule] | None = None

    def of(self, weights: Tensor, span: tuple[float, float], y: Tensor) -> Schedule:
        """Return the schedule for the span, made anew if anything it is made of has changed."""
        key = (y.dtype, y.device, span, weights.dtype, weights.device, weights._version)  # noqa: SLF001
        cached = self._cached
        is_same = cached is not None and cached[0] == key and cached[1] is weights
        # Writing through ``.data`` leaves the version. Looking at another device would wait for it.
        if cached and is_same and (weights.device.type != "cpu" or torch.equal(cached[2], weights)):
            return cached[3]
        calls = schedule(weights.to(y.device), *span, y.dtype)
        self._cached = (key, weights, weights.detach().clone(), calls)
        return calls

    def __reduce__(self) -> tuple[type[ScheduleCache], tuple[()]]:
        """Copy and pickle as an empty one."""
        return ScheduleCache, ()


def is_plain() -> bool:
    """Return whether no gradient is wanted, and no graph."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def roll_out(call: StageCall, calls: Schedule, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the state at the end and the n derivatives, from a flat state at the start."""
    add = _sum_for(calls, y)
    x, stages = _roll_out(call, calls, y, add)
    # Two calls may have told; a func may also start with its buffer only later.
    return _roll_out(owning(call), calls, y, add) if share_memory(stages) else (x, stages)


def _sum_for(calls: Schedule, y: Tensor) -> _Sum:
    if not (torch.compiler.is_compiling() or is_differentiated(calls[1][-1])):
        if y.device.type == "cpu" and y.numel() > CHUNK:
            return partial(_add_in_chunks, y)
        if is_plain():
            return _Matrix(y, len(calls[1]))
    return partial(_add_one_by_one, y)


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
            if i:
                raise
            add = partial(_add_one_by_one, y)
            x = add(row, stages)
    return x, stages


def _add_one_by_one(y: Tensor, row: Tensor, stages: list[Tensor]) -> Tensor:
    for weight, k in zip(row.unbind(), stages, strict=True):
        y = torch.addcmul(y, weight, k)
    return y


class _Matrix:
    """Keeps all derivatives in one matrix: a sum is one product with a vector."""

    def __init__(self, y: Tensor, n: int) -> None:
        self._memory = _Memory(y)
        self._start = self._memory.flat(y)
        matrix = y.new_empty(n, self._start.numel())
        self._columns, self._rows = matrix.t(), matrix.unbind()

    def __call__(self, row: Tensor, stages: list[Tensor]) -> Tensor:
        n = len(stages)
        last = self._memory.view(self._rows[n - 1])
        last.copy_(stages[-1])
        stages[-1] = last
        return self._memory.view(torch.addmv(self._start, self._columns[:, :n], row))


def _add_in_chunks(y: Tensor, row: Tensor, stages: list[Tensor]) -> Tensor:
    """Add up a part of the state that fits into the cache at a time, copying no derivative."""
    add = _LinearSum.forward if is_plain() else _LinearSum.apply
    x: Tensor = add(row.tolist(), y, *stages)
    return x


class _LinearSum(torch.autograd.Function):
    """y plus the weighted derivatives; linear, so that nothing needs to be kept."""

    @staticmethod
    def forward(weights: list[float], y: Tensor, *stages: Tensor) -> Tensor:
        memory = _Memory(y)
        start, *chunks = (memory.flat(tensor).split(CHUNK) for tensor in (y, *stages))
        flat = y.new_empty(y.numel())
        for part, out in enumerate(flat.split(CHUNK)):
            torch.add(start[part], chunks[0][part], alpha=weights[0], out=out)
            for weight, chunk in zip(weights[1:], chunks[1:], strict=True):
                out.add_(chunk[part], alpha=weight)
        return memory.view(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weights = inputs[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient, *(gradient * weight for weight in ctx.weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        terms = zip((1.0, *ctx.weights), tangents[1:], strict=True)
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


def _hermite_weights(position: Tensor, weights: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the weights of the derivatives in the states at some shares of the span, (m, n).

    At share 1 they are the last row of ``weights`` to the last bit.
    """
    n = len(weights)
    knots = torch.cat([torch.zeros_like(weights[:1]), values, weights[-1:]])
    scaled = position.to(weights.dtype) * n
    left = scaled.detach().floor().clamp(0, n - 1).long()
    x = (scaled - left)[:, None]
    ends = (knots[left], knots[left + 1]), (slopes[left], slopes[left + 1])
    of_values, of_slopes = hermite(x, *ends)
    return of_values + of_slopes / n


def dense_output(
    t: Tensor,
    span: Span | None,
    given_dtype: torch.dtype,
    matrices: Sequence[Tensor],
    derivatives: tuple[Tensor, Sequence[Tensor]],
    *,
    added: Tensor | None,
) -> Tensor:
    """Return the states at all m + 1 times but the first, (m, ...).

    nan where ``t`` starts elsewhere or leaves the span: a compiled or exported solve cannot raise.
    ``given_dtype`` is that of the user's times; ``matrices`` are the weights and the knots' values
    and slopes, ``derivatives`` the flat start and the n derivatives; ``added``, the correction at
    the end, grows with the square of the share of the span.
    """
    (start, end), (y, stages) = span or (t[0], t[-1]), derivatives
    rounding, slack = _rounding_of(span, t.dtype), slack_of(span, given_dtype)
    passed = (t - start) / (end - start)
    share = passed[1:].to(matrices[0].dtype)
    missed = share - share.clamp(0, 1)
    share = share - torch.where(missed.abs() <= rounding, missed, 0).detach()
    weights = _hermite_weights(share, *matrices) * (end - start)
    missed = torch.cat([passed[:1], passed[1:] - passed[1:].clamp(0, 1)]).detach()
    weights = torch.where(missed.abs().amax() > slack, torch.nan, weights).to(y.dtype)
    matrix = torch.stack(list(stages)).reshape(len(stages), -1)
    states: Tensor = torch.addmm(y.reshape(-1), weights, matrix).reshape(len(share), *y.shape)
    if added is None:
        return states
    square: Tensor = (share**2).to(y.dtype).reshape(-1, *[1] * added.dim())
    return states + square * added


@torch.no_grad()
def raise_non_finite(call: StageCall, calls: Schedule, y0: Tensor, dtype: torch.dtype) -> None:
    """Replay a solve that ended in inf or nan, and name the call where that began, and why."""
    check_start(y0)
    x, stages = y0, []
    for i, (t, row) in enumerate(zip(*calls, strict=True)):
        stages.append(own(call(t, x)))
        x = _add_one_by_one(y0, row, stages)
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
