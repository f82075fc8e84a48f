r"""One step of a hypersolver: base increment plus dt^(p+1) * g, on a flat state.

`Step` is one step of a solve, `Correction` its learned term, `stage_call` the func that both
work on, `integrate` a whole solve on a time grid. Nothing is looked at on the way: the grid is
looked at once before the first step (`Correction.look_at`), the last state once after it
(`is_finite`); a solve that failed is replayed to say where (`raise_non_finite`).

Hosts may solve a reverse-time problem in negated time with a negated func. The base increment is
then bitwise the same, and `Correction` undoes the negation, so that g sees the true problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._answers import (
    check_answer,
    check_correction,
    check_hypernet_device,
    own,
    owning,
    share_memory,
)
from torchdiffeq_hyper._state import (
    Hypernet,
    State,
    StateLayout,
    StepInput,
    VectorField,
    history_of,
    is_finite,
    is_half,
    time_dtype,
    values_of,
)
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.hypernets import MultistepOnGrid, ReadyHypernet
from torchdiffeq_hyper.tableaus import Edge, StageCall, Stepped, Tableau

History: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Flat derivatives f0 at the starts of earlier steps with the sizes of these, newest first."""
Factors: TypeAlias = tuple[Tensor, ...]
"""Factors of dt^(p+1), each finite in the state's dtype: one, wherever that holds the power."""


class Step:
    """One step of a solve: the base's increment plus the correction (None: the base alone)."""

    def __init__(self, tableau: Tableau, call: StageCall, correction: Correction | None) -> None:
        self.tableau = tableau
        self.correction = correction
        self._call = call
        self._is_watched = tableau.calls > 1
        self._depth = 0 if correction is None else correction.history
        self._history: History = ()

    def restart(self) -> None:
        """Forget the steps so far: the next one is the first of a solve."""
        self._history = ()
        if self.correction is not None and self.correction.on_grid is not None:
            self.correction.on_grid.restart()

    def base(self, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> Stepped:
        """Return the base's increment and its stages.

        A func that answers in one buffer would overwrite them: once that is seen, its answers
        are copied.
        """
        dy, stages = self.tableau.increment(self._call, t0, dt, t1, y)
        if self._is_watched and share_memory(stages):
            self._call, self._is_watched = owning(self._call), False
            return self.tableau.increment(self._call, t0, dt, t1, y)
        return dy, stages

    def increment(
        self, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor, factors: Factors | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (y1 - y0, f0) for the step from t0 to t1; ``factors`` are those of its dt."""
        dy, stages = self.base(t0, dt, t1, y)
        if self.correction is None:
            return dy, stages[0]
        if self.correction.on_grid is not None:
            return self.correction.on_grid.add(dy, y, stages), stages[0]
        if factors is None:
            # Event mode of the host steps with a plain number.
            dt = torch.as_tensor(dt, dtype=t0.dtype, device=t0.device)
            factors = self.correction.factors(dt, dy.dtype)
        out = self.correction.evaluate(t0, dt, y, stages, self._history)
        if self._depth:
            self._history = ((own(stages[0]), dt), *self._history)[: self._depth]
        return self.correction.add(dy, out, factors), stages[0]


class Correction:
    """The learned term of one solve, for a base of some order, on flat states laid out alike.

    ``y0`` is the flat state at the start, ``negated`` says whether time and derivatives are given
    negated, ``part`` is the only part of a tuple state that g sees and corrects (None: all).

    Attributes:
        history: how many earlier derivatives g wants to see.
        on_grid: g for the steps of a grid that `look_at` was shown, where it has such a form.
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
        context: tuple[Tensor, ...] = (),
    ) -> None:
        check_hypernet_device(hypernet, y0)
        self.time_unit, self._hypernet, self._ready = 1.0, hypernet, None
        # Wrappers around a ready net, of torch.compile say, are called as they are.
        if isinstance(hypernet, ReadyHypernet):
            hypernet.check_base(order)
            self._ready = hypernet if layout.shapes is None else None
            self.time_unit = hypernet.time_unit
            self._hypernet = hypernet if self.time_unit == 1 else hypernet.scaled
        self.history = history_of(hypernet)
        self.on_grid: MultistepOnGrid | None = None
        self._power = order + 1
        self._layout = layout
        self._negated = negated
        self._part = part
        self._y0 = self._view(y0)
        self._context = context
        self._is_in_range = False

    def _view(self, flat: Tensor) -> State:
        if self._layout.shapes is None:  # the common case, at every stage of every step
            return flat
        state = self._layout.split(flat)
        return state if self._part is None else state[self._part]

    def look_at(self, sizes: Tensor, y: Tensor, starts: Tensor | None = None) -> None:
        """Look, once a solve, at its steps, for states like ``y``.

        Where ``starts`` are the times at which all start, g may prepare for these. Else it is noted
        whether dt^(p+1) of all sizes is one factor (one device sync; unnoted they are p + 1).
        """
        if starts is not None and self._ready is not None and y.dim() > 1:
            times = (-starts, -sizes) if self._negated else (starts, sizes)
            self.on_grid = self._ready.on_grid(*times, y, negated=self._negated)
            if self.on_grid is not None:
                return
        dtype = wider_dtype(y, sizes)
        self._is_in_range = is_power_in_range(sizes / self.time_unit, self._power, dtype)

    def factors(self, dt: Tensor, dtype: torch.dtype) -> Factors:
        """Return dt^(p+1) in units of time, with the true sign of dt, as `power_factors` does."""
        dt = -dt if self._negated else dt
        dt = dt if self.time_unit == 1 else dt / self.time_unit
        return power_factors(dt, self._power, dtype, is_in_range=self._is_in_range)

    def evaluate(
        self, t: Tensor, dt: Tensor, y: Tensor, stages: tuple[Tensor, ...], history: History = ()
    ) -> State:
        """Return g's output for one step, times time_unit^(p+1), checked."""
        if self._negated:
            t, dt, stages = -t, -dt, tuple(-k for k in stages)
            history = tuple((-f, -size) for f, size in history)
        state, views = self._view(y), tuple(map(self._view, stages))
        seen = tuple((self._view(f), size) for f, size in history)
        out = self._hypernet(
            StepInput(dt, t, state, views[0], views, self._y0, self._context, seen)
        )
        check_correction(out, state, dt.dtype)
        return out

    def add(self, dy: Tensor, out: State, factors: Factors) -> Tensor:
        """Return ``dy + dt^(p+1) * out`` for a flat ``dy``, `evaluate`'s output and `factors`."""
        g, power = self._layout.join(out), factors[0]
        if not g.dtype == power.dtype == dy.dtype:
            g, power = g.to(dy.dtype), power.to(dy.dtype)
        for factor in factors[1:]:
            g = g * factor
        if self._part is None:
            return torch.addcmul(dy, power, g)
        start, end = self._layout.bounds(self._part)
        corrected = torch.addcmul(dy[start:end], power, g.reshape(-1))
        return torch.cat([dy[:start], corrected, dy[end:]])


def wider_dtype(y: Tensor, times: Tensor) -> torch.dtype:
    """Return a state's dtype after a step: a 0-d one takes that of wider times, as in hosts."""
    return y.dtype if y.dim() else torch.promote_types(y.dtype, times.dtype)


def power_factors(dt: Tensor, exponent: int, dtype: torch.dtype, *, is_in_range: bool) -> Factors:
    """Return factors of dt^exponent, each finite in ``dtype``, without a branch on values.

    One where ``is_in_range`` says that ``dtype`` holds the power. Else as many as the exponent:
    the power and ones if ``dtype`` holds it after all, elsewhere all dt, so that products with g
    grow or shrink step by step, 0 stays 0, and only what lies out of range itself is lost.
    """
    base = dt
    if not is_in_range:
        low, high = _limits(dt.dtype, dtype, exponent)
        size, one = dt.detach().abs(), torch.ones_like(dt)
        inside = (size >= low) & (size <= high)
        # No power that overflows is formed: its gradient would be nan even where it is not taken.
        base = torch.where(inside, dt, one)
    power = base
    for _ in range(exponent - 1):  # cheaper than torch.pow, and its gradient too
        power = power * base
    if is_in_range:
        return (power.to(dtype),)
    first, other = torch.where(inside, power, dt), torch.where(inside, one, dt)
    return first.to(dtype), *[other.to(dtype)] * (exponent - 1)


def is_power_in_range(dt: Tensor, exponent: int, dtype: torch.dtype) -> bool:
    """Return whether dt^exponent is known to be a normal number in ``dtype`` (one device sync)."""
    sizes = values_of(dt.abs())
    low, high = _limits(dt.dtype, dtype, exponent)
    return sizes is not None and low <= min(sizes) and max(sizes) <= high


def _limits(first: torch.dtype, second: torch.dtype, exponent: int) -> tuple[float, float]:
    """Return the sizes of dt between which dt^exponent is a normal number in both dtypes."""
    infos = torch.finfo(first), torch.finfo(second)
    low, high = max(info.tiny for info in infos), min(info.max for info in infos)
    return low ** (1 / exponent) * 1.001, high ** (1 / exponent) * 0.999


def integrate(
    step: Step, grid: Tensor, sizes: Tensor, y0: Tensor, *, ends_only: bool
) -> list[Tensor]:
    """Return the flat states on a grid of times with these differences; or those at its ends."""
    assert step.correction is not None
    step.correction.look_at(sizes, y0, grid[:-1])
    all_factors = step.correction.factors(sizes, wider_dtype(y0, sizes))
    each_factors = zip(*(factor.unbind() for factor in all_factors), strict=True)
    times, dts = grid.unbind(), sizes.unbind()
    y, states = y0, [y0]
    for t0, dt, t1, factors in zip(times[:-1], dts, times[1:], each_factors, strict=True):
        y = y + step.increment(t0, dt, t1, y, factors)[0]
        if not ends_only:
            states.append(y)
    return [y0, y] if ends_only else states


def stage_call(func: VectorField, layout: StateLayout, dtype: torch.dtype) -> StageCall:
    """Return func on the flat state, checked; called in ``dtype``, answered in the state's."""

    def call(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        # By the state, which takes the dtype of a wider time or answer, as in the host.
        k: Tensor = func(t if t.dtype == y.dtype else t.to(time_dtype(y.dtype)), y)
        if type(k) is not Tensor or k.dtype != dtype or k.shape != y.shape:
            check_answer(k, y)
            return k.to(y.dtype) if is_half(k.dtype) else k  # under autocast too
        return k

    def call_on_parts(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        # Half-precision states are stepped in float32; func still sees its own dtype.
        state = layout.split(y.to(dtype))
        out = func(t.to(time_dtype(dtype)), state)
        check_answer(out, state)
        k = layout.join(out)
        return k.to(y.dtype) if is_half(k.dtype) else k

    return call_on_parts if layout.shapes is not None or is_half(dtype) else call


def cast_back(solution: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a solution in the dtype of the user's state; refuse one that overflows it."""
    if solution.dtype == dtype:
        return solution
    narrow = solution.to(dtype)
    if not is_finite(narrow) and is_finite(solution):
        raise _overflow(dtype, solution)
    return narrow


def _overflow(dtype: torch.dtype, solution: Tensor) -> NonFiniteError:
    return NonFiniteError(
        problem=f"the solution grows to {float(solution.abs().amax()):.6g} and overflows the "
        f"state's dtype, {dtype}, which ends at {torch.finfo(dtype).max:.6g}.",
        expected="a dtype that holds the solution.",
        fix="y0 = y0.float()   # for a tuple, each part; func must take it\n"
        "or a state in smaller units",
    )


def check_start(y0: Tensor) -> None:
    """Refuse a start that is known to hold inf or nan."""
    if not is_finite(y0):
        raise NonFiniteError(
            problem="y0 holds inf or nan.",
            expected="finite starts.",
            fix="torch.isfinite(y0).nonzero()   # where they are; of each part of a tuple",
        )


@torch.no_grad()
def raise_non_finite(
    step: Step, grid: Iterable[tuple[Tensor, Tensor]], y0: Tensor, dtype: torch.dtype, sign: int = 1
) -> None:
    """Replay a solve that ended in inf or nan, and name the step where that began, and why.

    ``grid`` are its pairs (t0, t1) in the host's time, negated where ``sign`` is -1; ``dtype``
    is that of the user's state, where the solve steps in another one.
    """
    check_start(y0)
    step.restart()
    y = y0
    for index, (start, end) in enumerate(grid):
        t0, t1 = start.detach(), end.detach()
        where = f"at step {index}, t = {sign * t0.item():.6g}, dt = {sign * (t1 - t0).item():.6g}"
        plain, _ = step.base(t0, t1 - t0, t1, y)
        if not is_finite(y + plain):
            raise NonFiniteError(
                problem=f"the base method left the finite range {where}: func's answers are the "
                "cause.",
                expected="finite derivatives along the solution.",
                fix="more steps, or a reference, outside of tdh.override: "
                "odeint(func, y0, t, method='dopri5')" + advice_for_half(dtype),
            )
        dy, _ = step.increment(t0, t1 - t0, t1, y)
        if not is_finite(dy):
            raise NonFiniteError(
                problem=f"the hypernet returned inf or nan {where}.",
                expected="a finite correction.",
                fix="fit again with a lower lr, or solve nearer to the data it was fitted on",
            )
        y = y + dy
        if not is_finite(y.to(dtype)):
            raise _overflow(dtype, y)
    raise NonFiniteError(
        problem="the solve ended in inf or nan, a replay of it did not: func or the hypernet "
        "answers differently each time.",
        expected="a deterministic func and hypernet.",
        fix="func.eval(); hypernet.eval()",
    )


def advice_for_half(dtype: torch.dtype) -> str:
    """Return one more fix for states of half precision, in which func is called."""
    if not is_half(dtype):
        return ""
    return f"\nor y0.float(): func is called in {dtype}, which ends at {torch.finfo(dtype).max:.6g}"
