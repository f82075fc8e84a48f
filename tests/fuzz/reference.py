"""What each method is defined to compute, evaluated in double precision.

Written from the formulas, with nothing of the package but the type `StepInput`:

    Runge-Kutta base of order p:  y + dt sum_i b_i k_i + dt^(p+1) g(dt, t, y, k_1..k_s)
    bns:                          x_{i+1} = y_0 + T sum_{j<=i} w_ij k_j,  end + T^2 g

States are tuples of parts throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import torchdiffeq_hyper as tdh

Parts = tuple[Tensor, ...]
Table = tuple[tuple[tuple[float, ...], ...], tuple[float, ...], int]
"""Rows of the stages after the first, the weights, the order."""

TABLES: dict[str, Table] = {
    "euler": ((), (1.0,), 1),
    "midpoint": (((1 / 2,),), (0.0, 1.0), 2),
    "heun": (((1.0,),), (1 / 2, 1 / 2), 2),
    "rk4": (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4),
    "kutta3": (((1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6), 3),
    "ssprk3": (((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 4 / 6), 3),
}


def table_of(base: str, alpha: float | None = None) -> Table:
    """Return a base's table; the family "alpha" has c = (0, a), b = (1 - 1/(2a), 1/(2a))."""
    if base != "alpha":
        return TABLES[base]
    alpha = 0.5 if alpha is None else alpha
    return ((alpha,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)), 2


class Evaluate:
    """func on tuples of parts, counted.

    Args:
        func: the field.
        is_tuple: whether it takes a tuple.
        rounded: a dtype to call func in, as the solve under test does: the distance that
            this makes is the tolerance. None for double precision.

    Attributes:
        calls: calls so far.
        largest: the largest number of all derivatives.
    """

    def __init__(
        self, func: Callable[..., Any], *, is_tuple: bool, rounded: torch.dtype | None = None
    ) -> None:
        self._func = func
        self.is_tuple = is_tuple
        self._rounded = rounded
        self.calls = 0
        self.largest = 0.0

    def __call__(self, t: Tensor, y: Parts) -> Parts:
        self.calls += 1
        wide, low = y[0].dtype, self._rounded
        if low is not None:
            t, y = t.to(low.to_real() if low.is_complex else low), tuple(p.to(low) for p in y)
        k = self._func(t, y if self.is_tuple else y[0])
        out = tuple(part.to(wide, copy=True) for part in (k if self.is_tuple else (k,)))
        sizes = [float(part.detach().abs().max()) for part in out if part.numel()]
        self.largest = max([self.largest, *sizes])
        return out

    def keep(self, y: Parts) -> Parts:
        """Return a state as it is kept between steps: half precision is stepped in float32."""
        if self._rounded is None:
            return y
        is_half = self._rounded in (torch.float16, torch.bfloat16)
        kept = torch.float32 if is_half else self._rounded
        return tuple(part.to(kept).to(part.dtype) for part in y)


def add(y: Parts, *terms: tuple[Any, Parts]) -> Parts:
    """Return y plus the sum of weights times derivatives."""
    for weight, k in terms:
        y = tuple(part + weight * slope for part, slope in zip(y, k, strict=True))
    return y


@dataclass
class Stepper:
    """A base and its correction.

    Attributes:
        evaluate: the field.
        table: the base.
        net: g; None for none.
        part: the only part of a tuple state that g sees and corrects; None for all.
    """

    evaluate: Evaluate
    table: Table
    net: Callable[[Any], Any] | None = None
    part: int | None = None

    def step(self, t0: Tensor, t1: Tensor, y: Parts, y0: Parts) -> tuple[Parts, Parts]:
        """Return the state at t1 and the derivative at t0."""
        rows, weights, order = self.table
        dt = t1 - t0
        stages = [self.evaluate(t0, y)]
        for row in rows:
            x = add(y, *((dt * a, k) for a, k in zip(row, stages, strict=True)))
            stages.append(self.evaluate(t0 + sum(row) * dt, x))
        y1 = add(y, *((dt * b, k) for b, k in zip(weights, stages, strict=True)))
        if self.net is not None:
            y1 = add(y1, (dt ** (order + 1), self.correction(t0, dt, y, stages, y0)))
        return self.evaluate.keep(y1), stages[0]

    def correction(
        self, t: Tensor, dt: Tensor, y: Parts, stages: Sequence[Parts], y0: Parts
    ) -> Parts:
        """Return g as a tuple of parts."""
        assert self.net is not None

        def view(state: Parts) -> Any:
            if not self.evaluate.is_tuple:
                return state[0]
            return state if self.part is None else state[self.part]

        seen = tuple(view(k) for k in stages)
        out = self.net(tdh.StepInput(dt, t, view(y), seen[0], seen, view(y0)))
        parts = (out,) if isinstance(out, Tensor) else out
        if self.part is not None:
            parts = tuple(out if i == self.part else torch.zeros_like(p) for i, p in enumerate(y))
        return tuple(g.to(part.dtype) for g, part in zip(parts, y, strict=True))

    def solve(self, y0: Parts, t: Tensor, grid: Tensor, interp: str = "linear") -> list[Parts]:
        """Return the states at ``t``, read off a grid that goes from t[0] to t[-1]."""
        sign = 1.0 if len(t) < 2 or bool(t[-1] > t[0]) else -1.0
        states, y, due = [y0], y0, 1
        for t0, t1 in zip(grid[:-1], grid[1:], strict=True):
            after, f0 = self.step(t0, t1, y, y0)
            while due < len(t) and bool(sign * t1 >= sign * t[due]):
                states.append(self.read(interp, (t0, y, f0), (t1, after), t[due]))
                due += 1
            y = after
        return states

    def read(
        self, interp: str, start: tuple[Tensor, Parts, Parts], end: tuple[Tensor, Parts], at: Tensor
    ) -> Parts:
        """Return the state inside a step, by a line or a cubic Hermite polynomial."""
        (t0, y0, f0), (t1, y1) = start, end
        x, dt = (at - t0) / (t1 - t0), t1 - t0
        if interp == "linear":
            return tuple(a + x * (b - a) for a, b in zip(y0, y1, strict=True))
        f1 = self.evaluate(t1, y1)
        return tuple(
            (1 + 2 * x) * (1 - x) ** 2 * a
            + x * (1 - x) ** 2 * dt * fa
            + x**2 * (3 - 2 * x) * b
            + x**2 * (x - 1) * dt * fb
            for a, fa, b, fb in zip(y0, f0, y1, f1, strict=True)
        )

    def until(
        self,
        start: tuple[Tensor, Parts],
        size: float,
        event: Callable[[Tensor, Parts], Tensor],
        interp: str,
    ) -> tuple[Tensor, Parts]:
        """Return time and state where the event changes its sign, in steps of ``size``."""
        t0, y0 = start
        sign, before, y = torch.sign(event(t0, y0)), t0, y0
        for index in range(1000):
            end = t0 + (index + 1) * size
            after, f0 = self.step(before, end, y, y0)
            if torch.sign(event(end, after)) != sign:
                break
            before, y = end, after
        low, high = before, end
        for _ in range(60):
            middle = (low + high) / 2
            state = self.read(interp, (before, y, f0), (end, after), middle)
            is_before = torch.sign(event(middle, state)) == sign
            low, high = (middle, high) if is_before else (low, middle)
        return low, self.read(interp, (before, y, f0), (end, after), low)


def bespoke(
    stepper: Stepper, weights: Tensor, y0: Parts, span: tuple[Tensor, Tensor]
) -> tuple[Parts, list[Parts], Parts | None]:
    """Return the end of a bespoke solve, its derivatives and what g adds at the end."""
    evaluate, (start, end) = stepper.evaluate, span
    length, x = end - start, y0
    stages: list[Parts] = []
    shares = torch.cat([weights.new_zeros(1), weights.sum(1)])
    for row, share in zip(weights, shares, strict=False):
        stages.append(evaluate(start + share * length, x))
        terms = zip(row, stages, strict=False)
        x = evaluate.keep(add(y0, *((length * w, k) for w, k in terms)))
    if stepper.net is None:
        return x, stages, None
    g = stepper.correction(start, length, x, stages, y0)
    added = tuple(length**2 * part for part in g)
    return add(x, (1.0, added)), stages, added


def between(
    knots: tuple[Tensor, Tensor],
    weights: Tensor,
    solved: tuple[Parts, list[Parts], Parts | None],
    y0: Parts,
    *,
    share: Tensor,
    length: Tensor,
) -> Parts:
    """Return a bespoke solve's state between the ends: cubic Hermite through its knots.

    Args:
        knots: values (n - 1, n) at the inner knots and slopes (n + 1, n) at all.
        weights: (n, n) the solver's.
        solved: what `bespoke` returns.
        y0: the start.
        share: of the span passed, where the state is wanted.
        length: of the span, signed.
    """
    values, slopes = knots
    _, stages, added = solved
    n = len(weights)
    all_values = torch.cat([torch.zeros_like(weights[:1]), values, weights[-1:]])
    left = min(int(share.detach() * n), n - 1)
    x, h = share * n - left, 1 / n
    row = (
        (1 + 2 * x) * (1 - x) ** 2 * all_values[left]
        + x * (1 - x) ** 2 * h * slopes[left]
        + x**2 * (3 - 2 * x) * all_values[left + 1]
        + x**2 * (x - 1) * h * slopes[left + 1]
    )
    y = add(y0, *((length * w, k) for w, k in zip(row, stages, strict=True)))
    return y if added is None else add(y, (share**2, added))


BUTCHER: Table = (
    (
        (1 / 3,),
        (0.0, 2 / 3),
        (1 / 12, 1 / 3, -1 / 12),
        (-1 / 16, 9 / 8, -3 / 16, -3 / 8),
        (0.0, 9 / 8, -3 / 8, -3 / 4, 1 / 2),
        (9 / 44, -9 / 11, 63 / 44, 18 / 11, 0.0, -16 / 11),
    ),
    (11 / 120, 0.0, 27 / 40, 27 / 40, -4 / 15, -4 / 15, 11 / 120),
    6,
)
"""Butcher's method of order 6 (Coefficients for the study of Runge-Kutta processes, 1964)."""


def exact(evaluate: Evaluate, y0: Parts, t: Tensor) -> list[Parts]:
    """Return the solution by many small steps of order 6."""
    stepper, states, y = Stepper(evaluate, BUTCHER), [y0], y0
    # Large states move far: fields that turn with them need shorter steps.
    size = max([0.0, *(float(part.detach().abs().max()) for part in y0 if part.numel())])
    per_unit = 32 * (1 + min(size, 200.0) / 4)
    for start, end in zip(t[:-1], t[1:], strict=True):
        n = max(1, math.ceil(abs(float((end - start).detach())) * per_unit))
        for i in range(n):
            t0, t1 = torch.lerp(start, end, i / n), torch.lerp(start, end, (i + 1) / n)
            y, _ = stepper.step(t0, t1, y, y)
        states.append(y)
    return states
