"""What a solver was fitted for: span, step sizes, direction and kind of state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._files import from_plain
from torchdiffeq_hyper._rules import Choice, Items, Real, Row, Such, Whole, record_of
from torchdiffeq_hyper._state import State, values_of
from torchdiffeq_hyper.errors import StateShapeError, StateTypeError


class Match(IntEnum):
    """How well a fit suits the times of a solve; the better, the larger."""

    NONE = 0  # the solver cannot serve them
    OUTSIDE = 1  # it serves them, and was fitted for the other direction
    DIRECTION = 2  # the direction was fitted
    SPAN = 3  # direction and span were fitted


@dataclass(frozen=True)
class FitDomain:
    """What a solver was fitted for; `fit` makes one, and files hold it.

    Outside of it a solver warns once, and goes on; a "bns" solver with a domain refuses.

    Attributes:
        span: (start, end) as passed to `fit`.
        dt_min: smallest fitted step size |dt|, ``dt_max`` the largest.
        directions: signs of dt that were fitted: 1 (time grows), -1 (time falls).
        shapes: shape of each part of the state without its batch dimension; ``is_tuple`` says
            whether it was a tuple, ``dtype`` names its dtype, e.g. "float32".

    Example:
        >>> from torchdiffeq_hyper import FitDomain
        >>> domain = FitDomain((0.0, 1.0), 0.1, 0.1, (1,), ((2,),), False, "float32")
        >>> domain.covers(0.1), domain.covers(-0.1), domain.covers(0.5)
        (True, False, False)
    """

    span: tuple[float, float]
    dt_min: float
    dt_max: float
    directions: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_tuple: bool
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values for JSON, where tuples become lists."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FitDomain:
        """Rebuild from `to_dict`'s values."""
        domain: FitDomain = from_plain(cls, data)
        return domain

    def covers(self, dt: float) -> bool:
        """Return whether a signed step size lies in the fitted range and direction."""
        slack = 1e-3  # grids in float32 have steps that differ in their last digits
        low, high = self.dt_min * (1 - slack), self.dt_max * (1 + slack)
        return (1 if dt >= 0 else -1) in self.directions and low <= abs(dt) <= high

    def match(self, direction: int, start: float | None = None, end: float | None = None) -> Match:
        """Return how well the fit suits a solve: `Match` is larger the better.

        ``direction`` is 1 where time grows, -1 where it falls; None stands for unknown times.
        """
        if direction not in self.directions:
            return Match.OUTSIDE
        if start is None:
            return Match.DIRECTION
        low, high = sorted(self.span)
        first, last = (low, high) if direction > 0 else (high, low)
        # Times in float32 miss the span by their rounding errors.
        slack = 1e-5 * (high - low) + 1e-6 * max(abs(low), abs(high))
        is_span = abs(start - first) <= slack and (end is None or abs(end - last) <= slack)
        return Match.SPAN if is_span else Match.DIRECTION

    def outside(self, dt: Tensor, sign: int = 1, readable: str | None = None) -> dict[str, str]:
        """Return what to warn of for step sizes ``sign * dt``, (n,), by kind.

        Kinds are "direction", "dt", and "points" for steps that follow the points asked for:
        ``readable`` is then a call that reads these off larger steps, ``{options}`` left open.
        """
        sizes = [sign * size for size in values_of(dt) or ()]
        texts: dict[str, str] = {}
        for size in (min(sizes), max(sizes)) if sizes else ():  # one point in t: no step
            if self.covers(size):
                continue
            fitted = " and ".join("forward" if sign > 0 else "reverse" for sign in self.directions)
            kind = "dt" if (1 if size >= 0 else -1) in self.directions else "direction"
            text = (
                f"dt = {size:.4g} is outside what this solver was fitted for: {fitted}, |dt| from "
                f"{self.dt_min:.4g} to {self.dt_max:.4g}. The solve goes on; "
            )
            advice = "tdh.evaluate measures it; or fit with direction='both' or steps=(low, high)."
            if kind == "dt" and readable is not None:
                n = round(abs(sum(sizes)) / self.dt_min)  # fitted steps over the whole way
                if n > 0 and self.covers(abs(sum(sizes)) / n * self.directions[0]):
                    kind, advice = "points", self._how_to_read_off(n, sizes, readable)
            texts.setdefault(kind, text + advice)
        return texts

    def _how_to_read_off(self, n: int, sizes: list[float], readable: str) -> str:
        # A little too large: the host would put a tiny step at the end of one too small.
        step_size = abs(sum(sizes)) / n * (1 + 2e-4 / n)
        options = f'"step_size": {step_size:.7g}, "interp": "cubic"'
        return (
            f"t has {len(sizes) + 1} points, and each step goes from one to the next. To take "
            f"{n} step{'s' * (n > 1)} as fitted and read the points off: "
            + readable.replace("{options}", options)
        )

    def corrected_part(self, y0: State) -> int | None:
        """Return which part of a tuple a tensor-fitted solver corrects, by shape; None: all."""
        is_tensor = isinstance(y0, Tensor)
        if self.is_tuple and (is_tensor or len(y0) != len(self.shapes)):
            got = "one tensor" if is_tensor else f"a tuple of {len(y0)} tensors"
            raise (StateTypeError if is_tensor else StateShapeError)(
                problem=f"the solver was fitted on a tuple state, y0 is {got}.",
                expected=f"{len(self.shapes)} tensors with trailing shapes {self.shapes}.",
                fix="odeint(func, (y0, ...), t, ...)   # or a fit on states of this structure",
            )
        if self.is_tuple or is_tensor:
            return None
        shapes = [tuple(part.shape) for part in y0]
        matching = [i for i, shape in enumerate(shapes) if shape[1:] == self.shapes[0]]
        if len(matching) != 1:
            raise StateShapeError(
                problem=f"y0 is a tuple with shapes {shapes}; {len(matching)} of its parts have "
                f"the trailing shape {self.shapes[0]} that the solver was fitted on.",
                expected="exactly one such part: it is corrected, the others take the plain base.",
                fix="tdh.fit(func, y0, ...) with the whole tuple as y0",
            )
        return matching[0]


_SPAN = Such(Row(Real(), Real()), lambda span: 0 < abs(span[1] - span[0]) < math.inf, "that differ")
_DIRECTIONS = Such(
    Items(Choice(1, -1), least=1, most=2), lambda signs: len({*signs}) == len(signs), "once each"
)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128")
DOMAIN = Such(
    record_of(
        FitDomain,
        span=_SPAN,
        dt_min=Real(above=0.0),
        dt_max=Real(above=0.0),
        directions=_DIRECTIONS,
        shapes=Items(Items(Whole(), most=64), least=1, most=1000),
        dtype=Choice(*_DTYPES),
    ),
    lambda domain: (
        domain["dt_min"] <= domain["dt_max"] and (domain["is_tuple"] or len(domain["shapes"]) == 1)
    ),
    "dt_min no larger than dt_max, and one shape where the state is no tuple",
)
"""What files may say of a domain."""
