"""The problem that `evaluate` solves over and over, and its reference solution."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._fields import own
from torchdiffeq_hyper._state import (
    State,
    StateLayout,
    VectorField,
    how_to_batch,
    is_half,
    parts_of,
)
from torchdiffeq_hyper.errors import NonFiniteError, OptionError, StateShapeError, explain
from torchdiffeq_hyper.fitting._field import check_repeatable
from torchdiffeq_hyper.fitting._reference import BROKEN_DOWN
from torchdiffeq_hyper.fitting._units import Units

# In float32, tighter than 1e-7 gains nothing over rounding; in half precision every answer
# of func is rounded to about 1e-3 (float16) or 1e-2 (bfloat16).
_TOLERANCES = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


@dataclass(frozen=True)
class Problem:
    """An initial value problem on a batch.

    Attributes:
        func: the vector field.
        y0: the start; dimension 0 of each part is the batch.
        t: start and end time, at least float32.
        batch: number of samples.
        dtype: the state's dtype (for tuples, the one that the parts promote to).
    """

    func: VectorField
    y0: State
    t: Tensor
    batch: int
    dtype: torch.dtype

    @classmethod
    def of(cls, func: VectorField, y0: State, t_span: tuple[float, float]) -> Problem:
        """Return the problem, checked.

        Raises:
            StateTypeError: ``y0`` is not a state.
            StateShapeError: its batch is empty, or differs between parts.
            OptionError: ``t_span`` is not two different finite times.
        """
        StateLayout.of(y0)
        tensors = parts_of(y0)
        sizes = {part.shape[:1] for part in tensors}
        if len(sizes) != 1 or not sizes.pop() or 0 in (part.numel() for part in tensors):
            shapes = " and ".join(str(tuple(part.shape)) for part in tensors)
            raise StateShapeError(
                explain(
                    f"y0 has shape {shapes}.",
                    "at least one sample along dimension 0, as many in every part.",
                    how_to_batch(y0),
                )
            )
        dtype = tensors[0].dtype
        for part in tensors:
            dtype = torch.promote_types(dtype, part.dtype)
        return cls(func, y0, _times(t_span, dtype, tensors[0].device), len(tensors[0]), dtype)

    @property
    def default_tolerance(self) -> float:
        """The reference's rtol where none is asked for."""
        return _TOLERANCES.get(self.dtype, 1e-7)

    def times_at(self, shares: Sequence[Fraction]) -> Tensor:
        """Return the times at which shares of the span have passed, (m,)."""
        passed = torch.tensor([float(share) for share in shares]).to(self.t)
        return torch.lerp(self.t[0], self.t[1], passed)

    def size(self) -> float:
        """Return the size of the states, by which absolute tolerances are multiplied."""
        y0 = torch.cat([part.flatten() for part in parts_of(self.y0)])
        k = torch.cat([part.flatten() for part in parts_of(self.func(self.t[0], self.y0))])
        start, end = self.t.tolist()
        return Units.of((start, end), y0, k).state

    def reference(
        self, rtol: float, atol: float, shares: Sequence[Fraction] = (Fraction(1),)
    ) -> State:
        """Return dopri5's states at shares of the span; half precision is integrated in float32.

        Raises:
            NoisyFieldError: func answers differently twice at one point.
            NonFiniteError: it is not finite, or dopri5 breaks off on the way to it.
        """
        func, y0 = self._answering_in_own_memory, self.y0
        # An adaptive solve of a noisy field may never end.
        first, second = (
            torch.cat([p.flatten() for p in parts_of(func(self.t[0], y0))]) for _ in "ab"
        )
        check_repeatable(first, second, self.dtype, float(self.t[0]))
        if is_half(self.dtype):
            func, y0 = self._answering_in_float32, _cast(y0, torch.float32)

        def solve() -> State:
            t = self.times_at((Fraction(0), *shares))
            return without_start(odeint(func, y0, t, method="dopri5", rtol=rtol, atol=atol))

        # An empty context: no scope of ours may replace or record the reference.
        y = unless_broken(lambda: contextvars.Context().run(solve))
        if y is None or not all(bool(torch.isfinite(part).all()) for part in parts_of(y)):
            raise NonFiniteError(
                explain(
                    f"dopri5 finds no reference solution at rtol {rtol:g}, atol {atol:g}.",
                    "a func that is finite along the solution, and tolerances that "
                    f"{self.dtype} can meet.",
                    "evaluate(..., rtol=1e-4, atol=1e-4)",
                )
            )
        return y

    def _answering_in_own_memory(self, t: Tensor, y: State) -> State:
        # dopri5 chooses its first step by two calls, and keeps the first one's answer.
        k: State = self.func(t, y)
        return own(k) if isinstance(k, Tensor) else k

    def _answering_in_float32(self, t: Tensor, y: State) -> State:
        return _cast(self.func(t.to(self.dtype), _cast(y, self.dtype)), torch.float32)


def _times(t_span: tuple[float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    values = [float(value) for value in t_span]
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] == values[1]:
        raise OptionError(
            explain(
                f"t_span is {t_span!r}.",
                "two different finite times: start and end.",
                "t_span=(0.0, 1.0)",
            )
        )
    real = dtype.to_real() if dtype.is_complex else dtype
    return torch.tensor(values, dtype=torch.promote_types(real, torch.float32), device=device)


def unless_broken(solve: Callable[[], State]) -> State | None:
    """Return the solution, or None where the method cannot go on.

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


def without_start(solution: State) -> State:
    """Return a solution at all its points but the first."""
    if isinstance(solution, Tensor):
        return solution[1:]
    return tuple(part[1:] for part in solution)


def state_at(solution: State, index: int) -> State:
    """Return the state at one point of a solution."""
    if isinstance(solution, Tensor):
        return solution[index]
    return tuple(part[index] for part in solution)


def _cast(y: State, dtype: torch.dtype) -> State:
    return y.to(dtype) if isinstance(y, Tensor) else tuple(part.to(dtype) for part in y)
