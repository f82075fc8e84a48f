"""func as a fit calls it: on flat wide states, cast, counted and checked."""

from __future__ import annotations

import contextvars
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._answers import check_answer, check_call
from torchdiffeq_hyper._fields._wrappers import HOW_TO_RESTRICT, SHAPE_CLASHES, ModelField
from torchdiffeq_hyper._state import RowLayout, StateLayout, VectorField, is_finite, wide_dtype
from torchdiffeq_hyper.errors import (
    CoupledSamplesError,
    NoisyFieldError,
    NonFiniteError,
    StateShapeError,
    first_line,
)
from torchdiffeq_hyper.fitting._batches import Starts, bind, n_samples, select
from torchdiffeq_hyper.solvers._stepping import check_start
from torchdiffeq_hyper.tableaus import Edge

SEED = 2020


def size_of(value: Tensor) -> float:
    """Return the root mean square, without overflow or underflow on the way."""
    wide = value.detach().cpu().abs().double().flatten()
    largest = float(wide.max()) if wide.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float((wide / largest).square().mean().sqrt())


DRIVEN = 1e-2  # starts count as zero below this share of the way that f0 would go over the span


@dataclass(frozen=True)
class Units:
    """What dimensionless time and states are multiplied by, so that no power of dt overflows."""

    start: float = 0.0  # the time at dimensionless time 0
    time: float = 1.0  # length of the span, above 0
    state: float = 1.0  # size of the states, above 0

    @classmethod
    def of(cls, span: tuple[float, float], y0: Tensor, f0: Tensor) -> Units:
        """Return the units of a problem with flat starts ``y0`` and derivatives ``f0`` there."""
        width = abs(span[1] - span[0])
        size = max(size_of(y0), DRIVEN * width * size_of(f0))
        return cls(span[0], width, size if 0 < size < math.inf else 1.0)

    def times(self, t: Tensor) -> Tensor:
        """Return true times as dimensionless ones, of the same sign."""
        return (t - self.start) / self.time

    def residual(self, order: int) -> float:
        """Return the unit of the residuals of a base of some order: state / time^(p+1)."""
        # One factor at a time: the power itself may leave the range of numbers.
        unit = self.state
        for _ in range(order + 1):
            unit /= self.time
        return unit


class OutOfTimeError(Exception):
    """The time for a reference solution ended within it; a fit catches it and does less."""


class Timer(Protocol):
    """Some time that ends."""

    def is_over(self) -> bool: ...


class Field:
    """A vector field on flat states of any precision, called in the data's own dtype.

    It takes times and states in ``units``; func gets true ones, with the layout and dtype of
    ``starts``. ``flat`` is their state, flat, in true units.
    """

    def __init__(
        self, func: VectorField, starts: Starts, budget: Timer, units: Units | None = None
    ) -> None:
        self.func = func
        self.starts = starts
        self.budget = budget
        self.units = units or Units()
        self._bound = bind(func, starts)
        self._layout = StateLayout.of(starts.y0)
        self.flat = self._layout.join(starts.y0)
        self.dtype = self.flat.dtype
        self._context = contextvars.copy_context()
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        """Return the derivative in the dtype of ``y``, in units of state over time."""
        if self.budget.is_over():
            raise OutOfTimeError
        self.calls += 1
        units = self.units
        state = self._layout.split((y * units.state).to(self.dtype))
        time = (units.start + units.time * t).to(self.dtype)
        # References are solved outside any scope that overrides a method; func is not.
        out = self._context.run(self._bound, time, state)
        check_answer(out, state)
        k = self._layout.join(out).to(y.dtype)
        # A product anew: stages are kept over later calls, and func may write into one buffer.
        return k * (units.time / units.state)


SHARES = (0.0, 0.1, 0.5, 1.0, 0.0, 0.77)
"""Shares of the span passed at the points that `check_field` looks at."""


@torch.no_grad()
def check_field(field: Field, span: tuple[float, float], y0: Tensor) -> tuple[Tensor, ...]:
    """Refuse a field that has no solution to fit; return its values at some points.

    Those at the start and a little later have to be finite; the others tell fields apart.
    """
    check_start(y0)
    start = torch.tensor(span[0], dtype=wide_dtype(y0.device), device=y0.device)
    times = [start + share * (span[1] - span[0]) for share in SHARES]
    k = _answer(field, start, y0)
    # Noise may vanish at the start, e.g. at y = 0: look a step further, too.
    later = y0 + SHARES[1] * (span[1] - span[0]) * k
    second = _answer(field, times[1], later)
    states = [later, later]
    # Each number off by a tenth of it and of its way there: in their own units, and small
    # enough that what has to be positive mostly stays so.
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(2):
        draws = (2 * torch.rand(2, *y0.shape, generator=generator) - 1).to(y0)
        states.append(later + 0.1 * (draws[0] * later + draws[1] * (later - y0)))
    others = (field(t, y) for t, y in zip(times[2:], states, strict=True))
    return k, second, *others


def _answer(field: Field, t: Tensor, y: Tensor) -> Tensor:
    """Return ``field(t, y)`` after checking that it is finite and the same twice."""
    first, second = field(t, y), field(t, y)
    if not is_finite(first):
        raise NonFiniteError(
            problem=f"func returned inf or nan at t = {float(t):.6g}.",
            expected="finite derivatives along the solution.",
            fix="torch.isfinite(func(t, y)).all()",
        )
    check_repeatable(first, second, field.dtype, float(t))
    return first


def check_repeatable(first: Tensor, second: Tensor, dtype: torch.dtype, t: float) -> None:
    """Refuse a field computing in ``dtype`` whose two flat answers differ beyond rounding."""
    # Parallel sums may differ in the last digits from call to call; noise is far above.
    slack = min(1e3 * torch.finfo(dtype).eps, 0.05)
    # Sizes that neither overflow nor vanish in any unit.
    wide = second.cpu() if second.is_complex() else second.cpu().double()
    size, difference = size_of(first), size_of(first.cpu().to(wide.dtype) - wide)
    change = difference / size if size > 0 else float(difference > 0)
    if change > slack:
        raise NoisyFieldError(
            problem=f"func answers differently twice at t = {t:.6g} and one y, by {change:.2g} "
            "of its size: it draws fresh noise, or changes, at each call.",
            expected="the same answer at each call.",
            fix=f"func.eval()   # for dropout; else draw the noise once:\n{HOW_TO_RESTRICT}",
        )


SOME = 8  # samples that func is called on to see whether their order matters
CHANGE = 1e-2  # relative change of the derivatives that is not rounding
NOISE = 1e-2  # change at a second call, as a share of the change in another order, that is noise
HOLDS = "holds something of every sample (labels, controls, noise)"


@torch.no_grad()
def check_samples(field: Field, count: int, span: tuple[float, float]) -> None:
    """Refuse a field whose derivatives depend on a sample's place, or on there being ``count``."""
    check_call(field.func, len(field.starts.context))
    known = "".join(f"known{i}, " for i in range(len(field.starts.context)))
    fix = (
        f"tdh.fit(tdh.Conditioned(func, {known}labels), ...)   # func(t, y, {known}labels)\n"
        'or, for batches (state, labels): tdh.fit(func, loader, t_span, ..., context="batch")\n'
        "or, if dim 0 is one system's (a grid, a graph): y0 = y0.unsqueeze(0), with a func for it"
    )
    # Any number but theirs: a func that holds something of each fails on no other.
    some = torch.arange(SOME if count != SOME else SOME - 1)
    turn = (3 * some + 1) % len(some)  # no symmetry of a line or a ring of points
    t = span[0] + (span[1] - span[0]) / 10  # what is held may not count at the very start
    try:
        k = _derivatives(field, some, t)
        # A trace estimator's noise is drawn by places.
        if isinstance(field.func, ModelField):
            return
        change = torch.linalg.vector_norm(_derivatives(field, turn, t) - k[turn])
        if not bool(change > CHANGE * torch.linalg.vector_norm(k)):
            return
        again = torch.linalg.vector_norm(_derivatives(field, some, t) - k)
    except SHAPE_CLASHES as error:
        try:
            _derivatives(field, torch.arange(count), t)
        except SHAPE_CLASHES:
            raise error from None
        raise StateShapeError(
            problem=f"func takes all {count} samples and fails on {len(some)} "
            f"({first_line(error)}): it {HOLDS}.",
            expected="a func of any of the samples, called with the rows that are theirs.",
            fix=fix,
        ) from error
    # One that answers otherwise at each call is refused by `check_field`.
    if not bool(again > NOISE * change):
        raise CoupledSamplesError(
            problem=f"func gives the same samples other derivatives at t = {t:.6g} in another "
            f"order: it {HOLDS}, or dim 0 of y0 is not that of samples.",
            expected="a derivative of each sample that does not depend on its place in the batch.",
            fix=fix,
        )


def _derivatives(field: Field, order: Tensor, t: float) -> Tensor:
    """Return the derivatives of some of the field's samples, in an order, one a row."""
    starts = select(field.starts, order % n_samples(field.starts))
    part = Field(field.func, starts, field.budget)
    y = part.flat.to(wide_dtype(part.flat.device))
    return RowLayout.of(starts.y0).join(StateLayout.of(starts.y0).split(part(y.new_tensor(t), y)))
