"""func as a fit calls it: on flat wide states, cast, counted and checked."""

from __future__ import annotations

import contextvars

import torch
from torch import Tensor

from torchdiffeq_hyper._checks import check_answer
from torchdiffeq_hyper._finite import is_finite
from torchdiffeq_hyper._layout import StateLayout, is_half
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.errors import NoisyFieldError, NonFiniteError, OptionError, explain
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.neural_ode import given
from torchdiffeq_hyper.tableaus import Edge


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which differences of nearly equal states are formed."""
    return torch.float32 if device.type == "mps" else torch.float64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a solver steps states of ``dtype``."""
    return torch.float32 if is_half(dtype) else dtype


class OutOfTimeError(OptionError):
    """The time of a fit ended within a reference solution."""


class Field:
    """A vector field on flat states of any precision, called in the data's own dtype.

    Args:
        func: the user's ``func(t, y)``.
        y0: a state; its layout and dtype are what func is called with.
        budget: the time there is.

    Attributes:
        dtype: what func is called in.
        calls: calls of func so far.
    """

    def __init__(self, func: VectorField, y0: State, budget: Budget) -> None:
        self._func = given(func, y0)
        self._budget = budget
        self._layout = StateLayout.of(y0)
        self.dtype = self._layout.join(y0).dtype
        self._context = contextvars.copy_context()
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        """Return ``func(t, y)`` in the dtype of ``y``.

        Raises:
            StateShapeError: func returned another shape.
            OutOfTimeError: the fit's time is up.
        """
        if self._budget.is_over():
            raise _out_of_time(self._budget)
        self.calls += 1
        state = self._layout.split(y.to(self.dtype))
        # References are solved outside any scope that overrides a method; func is not.
        out = self._context.run(self._func, t.to(self.dtype), state)
        check_answer(out, state)
        return self._layout.join(out).to(y.dtype)


def _out_of_time(budget: Budget) -> OutOfTimeError:
    return OutOfTimeError(
        explain(
            f"max_seconds = {budget.max_seconds:g} was over before the reference solutions were "
            "known.",
            "time for at least the held-out samples and one batch.",
            "FitConfig(max_seconds=600.0)\n"
            "or looser tolerances: FitConfig(rtol=1e-4)\n"
            "or smaller batches: FitConfig(batch_size=16)",
        )
    )


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


@torch.no_grad()
def check_field(field: Field, span: tuple[float, float], y0: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse a field that has no solution to fit, before one is looked for.

    Args:
        field: the field.
        span: start and end.
        y0: flat state at the start.

    Returns:
        The field at the start and a little later, like ``y0``.

    Raises:
        StateShapeError: func returned another shape.
        NonFiniteError: y0 or func's answer holds inf or nan.
        NoisyFieldError: func answers differently the second time.
    """
    check_start(y0)
    start = torch.tensor(span[0], dtype=wide_dtype(y0.device), device=y0.device)
    k = _answer(field, start, y0)
    # Noise may vanish at the start, e.g. at y = 0: look a step further, too.
    little = (span[1] - span[0]) / 10
    return k, _answer(field, start + little, y0 + little * k)


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
    change = float((first - second).norm() / first.norm().clamp_min(1e-30))
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
