r"""One step, base increment plus dt^(p+1) * g on a flat state, and whether it stays finite.

Hosts may solve a reverse-time problem in negated time with a negated func; the
base increment is then bitwise the same, and `Correction` undoes the negation for
the hypernet, so that g sees the true problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import (
    check_answer,
    check_correction,
    check_hypernet_device,
    owning,
    share_memory,
)
from torchdiffeq_hyper._state import (
    Hypernet,
    State,
    StateLayout,
    StepInput,
    VectorField,
    is_finite,
    is_half,
    values_of,
)
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.tableaus import Edge, StageCall, Stepped, Tableau


class Correction:
    """The learned term of one solve, for a base of some order, on flat states laid out alike.

    ``y0`` is the flat state at the start, ``negated`` says whether time and derivatives are given
    negated, ``part`` is the only part of a tuple state that g sees and corrects (None: all).
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
        # A ready net may answer in a time unit of its own. Looked up on the class, so that
        # wrappers around it, of torch.compile say, are called as they are.
        scaled = getattr(type(hypernet), "scaled", None)
        self.time_unit: float = 1.0 if scaled is None else hypernet.time_unit  # type: ignore[attr-defined]
        self._hypernet = hypernet if self.time_unit == 1 else hypernet.scaled  # type: ignore[attr-defined]
        self._power = order + 1
        self._layout = layout
        self._negated = negated
        self._part = part
        self._y0 = self._view(y0)
        self._context = context
        self._is_direct = layout.shapes is None and not negated
        self._is_in_range = False

    def _view(self, flat: Tensor) -> State:
        if self._layout.shapes is None:
            return flat
        state = self._layout.split(flat)
        return state if self._part is None else state[self._part]

    def look_at(self, dt: Tensor, dtype: torch.dtype) -> None:
        """Note, once a solve, whether ``dtype`` holds all its dt^(p+1): `factors` is then short."""
        self._is_in_range = is_power_in_range(dt / self.time_unit, self._power, dtype)

    def factors(self, dt: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return dt^(p+1) in units of time, with the true sign of dt, as `power_factors` does."""
        dt = -dt if self._negated else dt
        dt = dt if self.time_unit == 1 else dt / self.time_unit
        return power_factors(dt, self._power, dtype, is_in_range=self._is_in_range)

    def evaluate(self, t: Tensor, dt: Tensor, y: Tensor, stages: tuple[Tensor, ...]) -> State:
        """Return g's output for one step, times time_unit^(p+1), checked."""
        if self._negated:
            t, dt, stages = -t, -dt, tuple(-k for k in stages)
        state, views = self._view(y), tuple(map(self._view, stages))
        out = self._hypernet(StepInput(dt, t, state, views[0], views, self._y0, self._context))
        check_correction(out, state, dt.dtype)
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
        others: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Return ``dy + power * g``: `evaluate` and `add` in one, without detours for tensors."""
        if not self._is_direct:
            return self.add(dy, self.evaluate(t, dt, y, stages), power, others)
        out = self._hypernet(StepInput(dt, t, y, stages[0], stages, self._y0, self._context))
        if (
            type(out) is Tensor
            and out.shape == dy.shape
            and out.dtype == dy.dtype == power.dtype
            and out.device == dy.device
        ):
            for factor in others:
                out = out * factor
            return torch.addcmul(dy, power, out)
        check_correction(out, y, dt.dtype)
        return self.add(dy, out, power, others)

    def add(self, dy: Tensor, out: State, power: Tensor, others: tuple[Tensor, ...] = ()) -> Tensor:
        """Return ``dy + power * out`` for a flat ``dy``: `evaluate`'s output times `factors`'s."""
        g = (out if isinstance(out, Tensor) else self._layout.join(out)).to(dy.dtype)
        for factor in others:
            g = g * factor
        power = power.to(dy.dtype)
        if self._part is None:
            return torch.addcmul(dy, power, g)
        start, end = self._layout.bounds(self._part)
        corrected = torch.addcmul(dy[start:end], power, g.reshape(-1))
        return torch.cat([dy[:start], corrected, dy[end:]])


def power_factors(
    dt: Tensor, exponent: int, dtype: torch.dtype, *, is_in_range: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return factors of dt^exponent, each finite in ``dtype``: the first, and the others.

    Where ``dtype`` holds the power (as ``is_in_range`` may know), it is the first factor, and the
    others are 1 or left out. Elsewhere all are dt: products with g then grow or shrink step by
    step, so that 0 stays 0 and only what lies out of range itself is lost. Branches on no value.
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
        return power.to(dtype), ()
    first, other = torch.where(inside, power, dt), torch.where(inside, one, dt)
    return first.to(dtype), (other.to(dtype),) * (exponent - 1)


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


@dataclass
class Step:
    """Base plus correction (None: the base alone), bound to one solve's func.

    ``call`` starts to copy func's answers once they are seen to share their memory.
    """

    tableau: Tableau
    call: StageCall
    correction: Correction | None

    def __post_init__(self) -> None:
        """Watch the memory of derivatives that later calls of func might overwrite."""
        self._is_watched = self.tableau.calls > 1

    def base(self, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> Stepped:
        """Return the base's increment and its stages, none of them overwritten by a later one."""
        dy, stages = self.tableau.increment(self.call, t0, dt, t1, y)
        if self._is_watched and share_memory(stages):
            self.call, self._is_watched = owning(self.call), False
            return self.tableau.increment(self.call, t0, dt, t1, y)
        return dy, stages

    def increment(self, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y1 - y0, f0) for the step from t0 to t1."""
        dy, stages = self.base(t0, dt, t1, y)
        if self.correction is not None:
            # Event mode of the host steps with a plain number.
            dt = torch.as_tensor(dt, dtype=t0.dtype, device=t0.device)
            power, others = self.correction.factors(dt, dy.dtype)
            dy = self.correction.apply(dy, t0, dt, y, stages, power=power, others=others)
        return dy, stages[0]


def integrate(
    step: Step, grid: Tensor, sizes: Tensor, y0: Tensor, *, ends_only: bool
) -> list[Tensor]:
    """Return the flat states on a grid of times with these differences; or those at its ends."""
    assert step.correction is not None
    base, correct = step.base, step.correction.apply
    times, dts = grid.unbind(), sizes.unbind()
    # A 0-d state is stepped in the wider dtype of state and time, as by the host.
    dtype = y0.dtype if y0.dim() else torch.promote_types(y0.dtype, sizes.dtype)
    step.correction.look_at(sizes, dtype)
    firsts, rest = step.correction.factors(sizes, dtype)
    others = zip(*(factor.unbind() for factor in rest), strict=True) if rest else repeat(())
    y, states = y0, [y0]
    for t0, dt, t1, power, more in zip(times[:-1], dts, times[1:], firsts.unbind(), others):  # noqa: B905
        dy, stages = base(t0, dt, t1, y)
        y = y + correct(dy, t0, dt, y, stages, power=power, others=more)
        if not ends_only:
            states.append(y)
    return [y0, y] if ends_only else states


def stage_call(
    func: VectorField, layout: StateLayout, dtype: torch.dtype, *, is_scalar: bool = False
) -> StageCall:
    """Return func on the flat state, checked; called in ``dtype``, answered in the state's."""
    t_dtype = dtype.to_real() if dtype.is_complex else dtype

    def call(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        k: Tensor = func(t if t.dtype == t_dtype else t.to(t_dtype), y)
        if type(k) is not Tensor or k.dtype != dtype or k.shape != y.shape:
            check_answer(k, y)
            return k.to(y.dtype) if is_half(k.dtype) else k  # under autocast too
        return k

    def call_on_parts(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        # Half-precision states are stepped in float32; func still sees its own dtype.
        state = layout.split(y.to(dtype))
        out = func(t.to(t_dtype), state)
        check_answer(out, state)
        k = layout.join(out)
        return k.to(y.dtype) if is_half(k.dtype) else k

    def call_on_scalar(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        # A 0-d state takes the dtype of a wider time, as in the host.
        k: Tensor = func(t.to(y.dtype.to_real() if y.dtype.is_complex else y.dtype), y)
        check_answer(k, y)
        return k.to(y.dtype) if is_half(k.dtype) else k

    if layout.shapes is not None or is_half(dtype):
        return call_on_parts
    return call_on_scalar if is_scalar else call


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
            fix="y0 = y0[torch.isfinite(y0.flatten(1)).all(1)]   # of a tuple, every part",
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
