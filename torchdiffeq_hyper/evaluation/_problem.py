"""The initial value problem that `evaluate` solves over and over, and its reference solution."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._fields import own
from torchdiffeq_hyper._state import (
    State,
    StateLayout,
    VectorField,
    cast,
    how_to_batch,
    is_half,
    n_samples,
    parts_of,
)
from torchdiffeq_hyper.errors import NonFiniteError, OptionError, StateShapeError
from torchdiffeq_hyper.fitting._field import Units, check_repeatable
from torchdiffeq_hyper.fitting._reference import BROKEN_DOWN

# In float32, tighter than 1e-7 gains nothing over rounding; in half precision every answer
# of func is rounded to about 1e-3 (float16) or 1e-2 (bfloat16).
_TOLERANCES = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}

Solution = TypeVar("Solution")


@dataclass(frozen=True)
class Problem:
    """An initial value problem on a batch.

    Attributes:
        func: the vector field.
        y0: the start; dimension 0 of each part is the batch.
        t: start and end time, at least float32.
    """

    func: VectorField
    y0: State
    t: Tensor

    @classmethod
    def of(cls, func: VectorField, y0: State, t_span: tuple[float, float]) -> Problem:
        """Return the problem, checked.

        Raises:
            StateTypeError: ``y0`` is not a state.
            StateShapeError: its batch is empty, or differs between parts.
            OptionError: ``t_span`` is not two different finite times.
        """
        StateLayout.of(y0)
        parts = parts_of(y0)
        if not n_samples(y0) or not all(part.numel() for part in parts):
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise StateShapeError(
                problem=f"y0 has shape {shapes}.",
                expected="at least one sample along dimension 0, as many in every part.",
                fix=how_to_batch(y0),
            )
        times = [float(value) for value in t_span]
        if len(times) != 2 or not all(map(math.isfinite, times)) or times[0] == times[1]:
            raise OptionError(
                problem=f"t_span is {t_span!r}.",
                expected="two different finite times: start and end.",
                fix="t_span=(0.0, 1.0)",
            )
        dtype = torch.promote_types(_dtype_of(y0).to_real(), torch.float32)
        return cls(func, y0, torch.tensor(times, dtype=dtype, device=parts[0].device))

    @property
    def batch(self) -> int:
        """Number of samples."""
        return n_samples(self.y0)

    @property
    def dtype(self) -> torch.dtype:
        """The state's dtype; for tuples, the one that the parts promote to."""
        return _dtype_of(self.y0)

    def solve(self, shares: Sequence[float], **how: Any) -> list[State]:
        """Return the host's states at some shares of the span, rising, above 0 and up to 1."""
        passed = torch.tensor([0.0, *shares]).to(self.t)
        t = torch.lerp(self.t[0], self.t[1], passed)
        solution = odeint(self.func, self.y0, t, **how)
        states = zip(*solution, strict=True) if isinstance(solution, tuple) else solution
        return list(states)[1:]

    def tolerances(self, rtol: float | None, atol: float | None) -> tuple[float, float]:
        """Return the reference's tolerances, filled in: those that suit dtype and size."""
        if rtol is None:
            rtol = _TOLERANCES.get(self.dtype, 1e-7)
        if atol is None:
            layout = StateLayout.of(self.y0)
            y0, k = layout.join(self.y0), layout.join(self.func(self.t[0], self.y0))
            start, end = self.t.tolist()
            atol = rtol * Units.of((start, end), y0, k).state
        return rtol, atol

    def reference(self, rtol: float, atol: float, shares: Sequence[float]) -> dict[float, State]:
        """Return dopri5's states by share of the span; half precision is integrated in float32.

        Raises:
            NoisyFieldError: func answers differently twice at one point.
            NonFiniteError: a state is not finite, or dopri5 breaks off on the way.
        """
        layout = StateLayout.of(self.y0)
        problem = replace(self, func=self._answering_in_own_memory)
        # An adaptive solve of a noisy field may never end.
        first, second = (layout.join(problem.func(self.t[0], self.y0)) for _ in range(2))
        check_repeatable(first, second, self.dtype, float(self.t[0]))
        if is_half(self.dtype):
            y0 = cast(self.y0, torch.float32)
            problem = replace(self, func=self._answering_in_float32, y0=y0)

        def solve() -> list[State]:
            return problem.solve(shares, method="dopri5", rtol=rtol, atol=atol)

        # An empty context: no scope of ours may replace or record the reference.
        states = unless_broken(lambda: contextvars.Context().run(solve)) or []
        parts = [part for state in states for part in parts_of(state)]
        if not parts or not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NonFiniteError(
                problem=f"dopri5 finds no reference solution at rtol {rtol:g}, atol {atol:g}.",
                expected="a func that is finite along the solution, and tolerances that "
                f"{self.dtype} can meet.",
                fix="evaluate(..., rtol=1e-4, atol=1e-4)",
            )
        return dict(zip(shares, states, strict=True))

    def _answering_in_own_memory(self, t: Tensor, y: State) -> State:
        # dopri5 chooses its first step by two calls, and keeps the first one's answer.
        k: State = self.func(t, y)
        return own(k) if isinstance(k, Tensor) else k

    def _answering_in_float32(self, t: Tensor, y: State) -> State:
        return cast(self.func(t.to(self.dtype), cast(y, self.dtype)), torch.float32)


def _dtype_of(y: State) -> torch.dtype:
    return reduce(torch.promote_types, (part.dtype for part in parts_of(y)))


def unless_broken(solve: Callable[[], Solution]) -> Solution | None:
    """Return what ``solve`` does, or None where the method cannot go on.

    torchdiffeq's adaptive methods say so by assertions; other assertions are func's own.
    """
    try:
        return solve()
    except NonFiniteError:
        return None
    except AssertionError as error:
        if not str(error).startswith(BROKEN_DOWN):
            raise
        return None
