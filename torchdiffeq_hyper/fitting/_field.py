"""func as a fit calls it: on flat wide states, cast, counted and checked."""

from __future__ import annotations

import contextvars

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import check_answer
from torchdiffeq_hyper._state import State, StateLayout, VectorField, is_half
from torchdiffeq_hyper.errors import NoisyFieldError, NonFiniteError, explain
from torchdiffeq_hyper.fitting._budget import Budget, Deadline
from torchdiffeq_hyper.fitting._context import Starts, bind
from torchdiffeq_hyper.fitting._units import SEED, Units, size_of
from torchdiffeq_hyper.solvers._finite import is_finite
from torchdiffeq_hyper.tableaus import Edge


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which differences of nearly equal states are formed."""
    return torch.float32 if device.type == "mps" else torch.float64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a solver steps states of ``dtype``."""
    return torch.float32 if is_half(dtype) else dtype


class OutOfTimeError(Exception):
    """The time for a reference solution ended within it; a fit catches it and does less."""


class Field:
    """A vector field on flat states of any precision, called in the data's own dtype.

    Args:
        func: the user's ``func(t, y, *context)``.
        starts: samples, or a state; its layout and dtype are what func is called with.
        budget: the time there is.
        units: those of the times and states that the field is called with.

    Attributes:
        units: as given.
        func: func itself.
        starts: the samples.
        budget: the time there is.
        dtype: what func is called in.
        calls: calls of func so far.
    """

    def __init__(
        self,
        func: VectorField,
        starts: Starts | State,
        budget: Budget | Deadline,
        units: Units | None = None,
    ) -> None:
        self.starts = starts if isinstance(starts, Starts) else Starts(starts)
        self.func = func
        self.budget = budget
        self.units = Units() if units is None else units
        self._bound = bind(func, self.starts)
        self._layout = StateLayout.of(self.starts.y0)
        self.dtype = self._layout.join(self.starts.y0).dtype
        self._context = contextvars.copy_context()
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        """Return ``func(t, y)`` in the dtype of ``y``, in units of state over time.

        Raises:
            StateShapeError: func returned another shape.
            OutOfTimeError: the fit's time is up.
        """
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


def check_start(y0: Tensor) -> None:
    """Refuse starts that are not finite.

    Raises:
        NonFiniteError: one is not.
    """
    if not is_finite(y0):
        raise NonFiniteError(
            explain(
                "y0 holds inf or nan.",
                "finite starts.",
                "y0 = y0[torch.isfinite(y0.flatten(1)).all(1)]   # of a tuple, every part",
            )
        )


SHARES = (0.0, 0.1, 0.5, 1.0, 0.0, 0.77)
"""Shares of the span passed at the points that `check_field` looks at."""


@torch.no_grad()
def check_field(field: Field, span: tuple[float, float], y0: Tensor) -> tuple[Tensor, ...]:
    """Refuse a field that has no solution to fit, before one is looked for.

    Args:
        field: the field.
        span: start and end.
        y0: flat state at the start.

    Returns:
        The field at the start and a little later, which have to be finite; and, to tell it
        from others, at the middle and end of the span and at perturbed states; each like
        ``y0``.

    Raises:
        StateShapeError: func returned another shape.
        NonFiniteError: y0 or func's answer holds inf or nan.
        NoisyFieldError: func answers differently the second time.
    """
    check_start(y0)
    start = torch.tensor(span[0], dtype=wide_dtype(y0.device), device=y0.device)
    times = [start + share * (span[1] - span[0]) for share in SHARES]
    k = _answer(field, start, y0)
    # Noise may vanish at the start, e.g. at y = 0: look a step further, too.
    later = y0 + SHARES[1] * (span[1] - span[0]) * k
    second = _answer(field, times[1], later)
    states = (later, later, *_perturbed(y0, later))
    others = (field(t, y) for t, y in zip(times[2:], states, strict=True))
    return k, second, *others


def _perturbed(y0: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """Return two states near ``later``: each number off by a tenth of it and of its way there.

    In their own units, and small enough that what has to be positive mostly stays so.
    """
    generator = torch.Generator().manual_seed(SEED)
    way, states = later - y0, []
    for _ in range(2):
        draws = (2 * torch.rand(2, *y0.shape, generator=generator) - 1).to(y0)
        states.append(later + 0.1 * (draws[0] * later + draws[1] * way))
    return states[0], states[1]


def _answer(field: Field, t: Tensor, y: Tensor) -> Tensor:
    """Return ``field(t, y)`` after checking that it is finite and the same twice."""
    first, second = field(t, y), field(t, y)
    if not is_finite(first):
        raise NonFiniteError(
            explain(
                f"func returned inf or nan at t = {float(t):.6g}.",
                "finite derivatives along the solution.",
                "torch.isfinite(func(t, y)).all()",
            )
        )
    check_repeatable(first, second, field.dtype, float(t))
    return first


def check_repeatable(first: Tensor, second: Tensor, dtype: torch.dtype, t: float) -> None:
    """Refuse a field that answers differently twice at one point.

    Args:
        first: its answer, flat.
        second: its answer to the same question.
        dtype: what the field computes in.
        t: the time, for the message.

    Raises:
        NoisyFieldError: the answers differ by more than rounding.
    """
    # Parallel sums may differ in the last digits from call to call; noise is far above.
    slack = min(1e3 * torch.finfo(dtype).eps, 0.05)
    # Sizes that neither overflow nor vanish in any unit.
    wide = second.cpu() if second.is_complex() else second.cpu().double()
    size, difference = size_of(first), size_of(first.cpu().to(wide.dtype) - wide)
    change = difference / size if size > 0 else float(difference > 0)
    if change > slack:
        raise NoisyFieldError(
            explain(
                f"func answers differently twice at t = {t:.6g} and one y, by {change:.2g} "
                "of its size: it draws fresh noise, or changes, at each call.",
                "one answer, so that there is a solution to fit.",
                "func.eval()   # if it is dropout; else draw the noise once, before the solve:\n"
                "func.noise = torch.randn_like(y0)",
            )
        )
