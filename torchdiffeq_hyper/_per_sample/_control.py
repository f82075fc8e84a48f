"""How large the steps are: first, next, and when to give up."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchdiffeq_hyper._per_sample._dopri5 import ORDER, Field
from torchdiffeq_hyper.errors import OptionError, explain


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
                explain(
                    f"{name} is {getattr(self, name)!r}.",
                    f"a number {expected}.",
                    f'options={{"{name}": {example}}}',
                )
            )

    def first(self, choose: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Return the sizes of the first steps; ``choose`` is called if none is given."""
        return choose() if self.first_step is None else torch.full_like(like, self.first_step)

    @torch.no_grad()
    def next(self, dt: Tensor, ratio: Tensor) -> Tensor:
        """Return the sizes of the next steps, from the error ratios of these.

        0, which leads nowhere, after a step of the smallest size that is not finite: no
        smaller one may be tried.
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
    """Return a first step size for each sample; one call of the field.

    Args:
        field: the vector field.
        norm: of each sample.
        start: time, state and derivative.
        scale: what errors are measured in, like the state.
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
