"""Dopri5's step on rows of samples, and the control of its size."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError

ORDER = 5

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``field(t, y)``: derivatives of the active samples, t (active,), y (active, width)."""

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
_MIDDLE = (
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)


class Attempt(NamedTuple):
    """A step that was tried, before it is known which samples accept it.

    Attributes:
        y1: states at its end.
        f1: derivatives there.
        error: estimated error of ``y1``.
        stages: the seven derivatives.
    """

    y1: Tensor
    f1: Tensor
    error: Tensor
    stages: tuple[Tensor, ...]


def attempt(field: Field, t: Tensor, dt: Tensor, y: Tensor, f: Tensor) -> Attempt:
    """Return a step of size ``dt`` (active,) from ``t``; six calls of the field."""
    real = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    # Just before the end, which may be a discontinuity of func.
    end, start, size = _before((t + dt).to(real)), t.to(real), dt.to(real)
    h = size.unsqueeze(1)
    y1, stages = y, [f]
    for node, weights in zip(_NODES, _STAGES, strict=True):
        time = end if node == 1.0 else start + node * size
        y1 = y + _combine(stages, weights, h)
        stages.append(field(time, y1))
    return Attempt(y1, stages[-1], _combine(stages, _ERROR, h), tuple(stages))


def interpolate(step: Attempt, y: Tensor, dt: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Return the states of some rows inside their steps, of order 4.

    The quartic with the step's values and derivatives at both ends and its value in the
    middle. ``x`` says for each of the rows how far into its step, from 0 to 1.
    """
    h, x = dt[rows].to(x.dtype).unsqueeze(1), x.unsqueeze(1)
    stages = [k[rows] for k in step.stages]
    y0, y1, f0, f1 = y[rows], step.y1[rows], h * stages[0], h * stages[-1]
    middle = y0 + _combine(stages, _MIDDLE, h)
    quartic = 2 * (f1 - f0) - 8 * (y1 + y0) + 16 * middle
    cubic = 5 * f0 - 3 * f1 + 18 * y0 + 14 * y1 - 32 * middle
    square = f1 - 4 * f0 - 11 * y0 - 5 * y1 + 16 * middle
    return y0 + x * (f0 + x * (square + x * (cubic + x * quartic)))


def _combine(stages: list[Tensor], weights: tuple[float, ...], h: Tensor) -> Tensor:
    total = stages[0] * (weights[0] * h)
    for k, weight in zip(stages[1:], weights[1:], strict=True):
        if weight:
            total = total + k * (weight * h)
    return total


def _before(t: Tensor) -> Tensor:
    """Return the number next below ``t``, with the gradient of ``t``."""
    with torch.no_grad():
        step = torch.nextafter(t, t - 1) - t
    return t + step


@dataclass(frozen=True)
class StepControl:
    """The step controls of torchdiffeq's dopri5, with its names and defaults.

    Attributes:
        safety: factor on the step size that the error estimate allows.
        ifactor: most by which a step may grow.
        dfactor: least by which a rejected step may shrink.
        first_step: size of the first step; None chooses one for each sample.
        min_step: steps are never smaller, and accepted at this size while they are finite.
        max_step: steps are never larger.
        max_num_steps: most steps a sample may try between two points of t.

    Raises:
        OptionError: a value is impossible; the text names it.
    """

    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1

    def __post_init__(self) -> None:
        """Check every value."""
        for field in fields(StepControl):
            value, example = getattr(self, field.name), 1e-3 if field.default is None else 1.0
            is_left_out = value is None and field.default is None
            self._require(field.name, is_left_out or _is_number(value), "(real)", example)
        self._require("safety", 0 < self.safety <= 1, "above 0, at most 1", 0.9)
        self._require("ifactor", 1 <= self.ifactor < math.inf, "at least 1, finite", 10.0)
        self._require("dfactor", 0 < self.dfactor < 1, "between 0 and 1", 0.2)
        first = self.first_step
        is_size = first is None or 0 < first < math.inf
        self._require("first_step", is_size, "above 0, finite, also in reverse", 0.1)
        self._require("min_step", 0 <= self.min_step < math.inf, "at least 0", 1e-4)
        is_most = self.max_step > 0 and self.max_step >= self.min_step
        self._require("max_step", is_most, "above 0, at least min_step", 0.1)
        self._require("max_num_steps", self.max_num_steps >= 1, "at least 1", 1000)

    def _require(self, name: str, is_valid: object, expected: str, example: float) -> None:
        if not is_valid:
            raise OptionError(
                problem=f"{name} is {getattr(self, name)!r}.",
                expected=f"a number {expected}.",
                fix=f'options={{"{name}": {example}}}',
            )

    @torch.no_grad()
    def next(self, dt: Tensor, ratio: Tensor) -> Tensor:
        """Return the sizes of the next steps, from the error ratios of these.

        0 after a step of the smallest size that is not finite: no smaller one may be tried.
        """
        ratio = ratio.to(dt.dtype)
        lowest = torch.where(ratio < 1, 1.0, self.dfactor)
        factor = (self.safety / ratio ** (1 / ORDER)).maximum(lowest).clamp(max=self.ifactor)
        after = self.clamp(dt * torch.where(ratio == 0, self.ifactor, factor))
        return torch.where((dt <= self.min_step) & ratio.isinf(), 0.0, after)

    def clamp(self, dt: Tensor) -> Tensor:
        """Return the sizes, kept between the smallest and the largest."""
        return dt.clamp(self.min_step, min(self.max_step, sys.float_info.max))


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, float | int)


@torch.no_grad()
def first_step(
    field: Field,
    norm: Callable[[Tensor], Tensor],
    start: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
) -> Tensor:
    """Return a first step size for each sample, as the host chooses it; one call of the field.

    ``start`` is time, state and derivative; ``scale`` what errors are measured in.
    """
    t, y, f = start
    d0, d1 = norm(y / scale), norm(f / scale)
    tiny = torch.as_tensor(1e-6, dtype=d0.dtype, device=d0.device)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), tiny, 0.01 * d0 / d1)
    f1 = field((t + h0).to(d0.dtype), y + h0.unsqueeze(1).to(f.dtype) * f)
    d2 = norm((f1 - f) / scale) / h0
    flat = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = torch.where(
        flat, torch.maximum(tiny, h0 * 1e-3), (0.01 / torch.maximum(d1, d2)) ** (1 / ORDER)
    )
    return torch.minimum(100 * h0, h1).to(t.dtype)
