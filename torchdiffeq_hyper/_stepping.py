r"""One step: base increment plus dt^(p+1) * g, on a flat state, for every host.

Hosts may solve a reverse-time problem in negated time with a negated func; the
base increment is then bitwise the same, and `Correction` undoes the negation for
the hypernet, so that g sees the true problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper._checks import (
    check_answer,
    check_correction,
    check_derivative,
    check_hypernet_device,
)
from torchdiffeq_hyper._layout import StateLayout, is_half
from torchdiffeq_hyper._types import Hypernet, State, StepInput, VectorField
from torchdiffeq_hyper.tableaus import Edge, StageCall, Tableau


class Correction:
    """The learned term of one solve.

    Args:
        hypernet: g.
        order: order p of the base.
        layout: how the state lies in the flat tensors given to `__call__`.
        y0: flat state at the start of the solve.
        negated: whether time and derivatives are given negated.
        part: the only part of a tuple state that g sees and corrects, or None.
    """

    def __init__(
        self,
        hypernet: Hypernet,
        order: int,
        layout: StateLayout,
        y0: Tensor,
        *,
        negated: bool = False,
        part: int | None = None,
    ) -> None:
        check_hypernet_device(hypernet, y0)
        self._hypernet = hypernet
        self._power = order + 1
        self._layout = layout
        self._negated = negated
        self._part = part
        self._y0 = self._view(y0)
        self._is_direct = layout.shapes is None and not negated

    def _view(self, flat: Tensor) -> State:
        if self._layout.shapes is None:
            return flat
        state = self._layout.split(flat)
        return state if self._part is None else state[self._part]

    def power(self, dt: Tensor) -> Tensor:
        """Return dt^(p+1), with the true sign of dt."""
        dt = -dt if self._negated else dt
        power = dt
        for _ in range(self._power - 1):  # cheaper than torch.pow, and its gradient too
            power = power * dt
        return power

    def evaluate(self, t: Tensor, dt: Tensor, y: Tensor, stages: tuple[Tensor, ...]) -> State:
        """Return g's output for one step, checked."""
        if self._negated:
            t, dt, stages = -t, -dt, tuple(-k for k in stages)
        if self._layout.shapes is None:
            out = self._hypernet(StepInput(dt, t, y, stages[0], stages, self._y0))
            check_correction(out, y)
            return out
        state = self._view(y)
        views = tuple(self._view(k) for k in stages)
        out = self._hypernet(StepInput(dt, t, state, views[0], views, self._y0))
        check_correction(out, state)
        return out

    def apply(
        self,
        dy: Tensor,
        t: Tensor,
        dt: Tensor,
        y: Tensor,
        stages: tuple[Tensor, ...],
        *,
        power: Tensor,
    ) -> Tensor:
        """Return ``dy + power * g``: `evaluate` and `add` in one, without detours for tensors."""
        if not self._is_direct:
            return self.add(dy, power, self.evaluate(t, dt, y, stages))
        out = self._hypernet(StepInput(dt, t, y, stages[0], stages, self._y0))
        if (
            type(out) is Tensor
            and out.shape == dy.shape
            and out.dtype == dy.dtype == power.dtype
            and out.device == dy.device
        ):
            return torch.addcmul(dy, power, out)
        check_correction(out, y)
        return self.add(dy, power, out)

    def add(self, dy: Tensor, power: Tensor, out: State) -> Tensor:
        """Return ``dy + power * out``, with g's output as `evaluate` returns it."""
        g = out if isinstance(out, Tensor) else self._layout.join(out)
        if g.dtype != dy.dtype:
            g = g.to(dy.dtype)
        if power.dtype != dy.dtype:
            power = power.to(dy.dtype)
        if self._part is None:
            return torch.addcmul(dy, power, g)
        start, end = self._layout.bounds(self._part)
        corrected = torch.addcmul(dy[start:end], power, g.reshape(-1))
        return torch.cat([dy[:start], corrected, dy[end:]])


@dataclass(frozen=True)
class Step:
    """Base plus correction, bound to one solve's func.

    Attributes:
        tableau: the base method.
        call: evaluates func for a stage, on the flat state.
        correction: the learned term; None for the base alone.
    """

    tableau: Tableau
    call: StageCall
    correction: Correction | None

    def increment(self, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y1 - y0, f0) for the step from t0 to t1."""
        dy, stages = self.tableau.increment(self.call, t0, dt, t1, y)
        if self.correction is not None:
            # Event mode of the host steps with a plain number.
            dt = torch.as_tensor(dt, dtype=t0.dtype, device=t0.device)
            dy = self.correction.apply(dy, t0, dt, y, stages, power=self.correction.power(dt))
        return dy, stages[0]


def integrate(
    step: Step, grid: Tensor, sizes: Tensor, y0: Tensor, *, ends_only: bool
) -> list[Tensor]:
    """Return the states on a grid of times, ``y0`` first; or the first and the last.

    Args:
        step: a corrected step.
        grid: the times.
        sizes: their differences.
        y0: flat state at the first time.
        ends_only: keep no state between.
    """
    assert step.correction is not None
    call, increment, correct = step.call, step.tableau.increment, step.correction.apply
    times, dts = grid.unbind(), sizes.unbind()
    powers = step.correction.power(sizes).to(y0.dtype).unbind()
    y, kept = y0, [y0]
    for t0, dt, t1, power in zip(times[:-1], dts, times[1:], powers, strict=True):
        dy, stages = increment(call, t0, dt, t1, y)
        y = y + correct(dy, t0, dt, y, stages, power=power)
        if not ends_only:
            kept.append(y)
    return [y0, y] if ends_only else kept


def stage_call(func: VectorField, layout: StateLayout, dtype: torch.dtype) -> StageCall:
    """Return func on the flat state, checked; called in ``dtype``, answered in the state's."""
    t_dtype = dtype.to_real() if dtype.is_complex else dtype

    def call(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        k: Tensor = func(t if t.dtype == t_dtype else t.to(t_dtype), y)
        if type(k) is not Tensor or k.dtype != dtype or k.shape != y.shape:
            check_derivative(k, y)
            return k.to(y.dtype) if is_half(k.dtype) else k  # under autocast too
        return k

    def call_on_parts(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        # Half-precision states are stepped in float32; func still sees its own dtype.
        state = layout.split(y.to(dtype))
        out = func(t.to(t_dtype), state)
        check_answer(out, state)
        k = layout.join(out)
        return k.to(y.dtype) if is_half(k.dtype) else k

    return call if layout.shapes is None and not is_half(dtype) else call_on_parts
