r"""One step: base increment plus dt^(p+1) * g, on a flat state, for every host.

Hosts may solve a reverse-time problem in negated time with a negated func; the
base increment is then bitwise the same, and `Correction` undoes the negation for
the hypernet, so that g sees the true problem.
"""

from __future__ import annotations

import cmath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._types import Hypernet, State, StepInput
from torchdiffeq_hyper.errors import NonFiniteError, StateShapeError, StateTypeError, explain
from torchdiffeq_hyper.tableaus import StageCall, Tableau


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
            _check_output(out, y)
            return out
        state = self._view(y)
        views = tuple(self._view(k) for k in stages)
        out = self._hypernet(StepInput(dt, t, state, views[0], views, self._y0))
        _check_output(out, state)
        return out

    def add(self, dy: Tensor, power: Tensor, out: State) -> Tensor:
        """Return ``dy + power * out``, with g's output as `evaluate` returns it."""
        g = self._layout.join(out)
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

    def increment(
        self, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor, power: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (y1 - y0, f0) for the step from t0 to t1.

        ``power`` is dt^(p+1) where the caller has it already.
        """
        dy, stages = self.tableau.increment(self.call, t0, dt, t1, y)
        if self.correction is not None:
            if power is None:
                # Event mode of the host steps with a plain number.
                dt = torch.as_tensor(dt, dtype=t0.dtype, device=t0.device)
                power = self.correction.power(dt)
            out = self.correction.evaluate(t0, dt, y, stages)
            dy = self.correction.add(dy, power, out)
        return dy, stages[0]


def check_hypernet_device(hypernet: Hypernet, y: Tensor) -> None:
    """Refuse a net that lies on another device than the state.

    Raises:
        StateTypeError: it does.
    """
    if not isinstance(hypernet, nn.Module):
        return
    parameter = next(hypernet.parameters(), None)
    if parameter is not None and parameter.device != y.device:
        raise StateTypeError(
            explain(
                f"the hypernet is on {parameter.device}, y0 is on {y.device}.",
                "both on one device.",
                f'hypernet.to("{y.device}")   # or solver.to("{y.device}")',
            )
        )


def check_derivative(k: Tensor, y: Tensor) -> None:
    """Refuse a derivative that is none, or would broadcast against the state.

    Raises:
        StateTypeError: it is not a tensor.
        StateShapeError: the shapes differ.
    """
    if not isinstance(k, Tensor):
        raise StateTypeError(
            explain(
                f"func returned a {type(k).__name__}.",
                "a tensor of the state's shape (for a tuple state, a tuple of them).",
                "return torch.as_tensor(derivative)",
            )
        )
    if k.shape != y.shape:
        raise StateShapeError(
            explain(
                f"func returned shape {tuple(k.shape)} for a state of shape {tuple(y.shape)}.",
                "a derivative of the state's own shape.",
                "check func(t[0], y0).shape == y0.shape",
            )
        )


def _check_output(out: State, y: State) -> None:
    if isinstance(y, Tensor):
        if not isinstance(out, Tensor):
            _refuse_kind(out, y)
        if out.shape != y.shape or out.dtype != y.dtype or out.device != y.device:
            _check_part(out, y, "")
        return
    if not isinstance(out, tuple) or len(out) != len(y):
        _refuse_kind(out, y)
    for index, (part, expected) in enumerate(zip(out, y, strict=True)):
        if not isinstance(part, Tensor):
            _refuse_kind(out, y)
        _check_part(part, expected, f" for part {index}")


def _refuse_kind(out: object, y: State) -> NoReturn:
    expected = "a tensor" if isinstance(y, Tensor) else f"a tuple of {len(y)} tensors"
    got = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
    raise StateTypeError(
        explain(
            f"the hypernet returned {got}.",
            f"{expected}, like the state.",
            "return a correction shaped like step.y",
        )
    )


def _check_part(out: Tensor, y: Tensor, where: str) -> None:
    if out.shape != y.shape:
        raise StateShapeError(
            explain(
                f"the hypernet returned shape {tuple(out.shape)}{where}.",
                f"{tuple(y.shape)}, the shape of step.y.",
                "return a correction shaped like step.y; check the net's output channels",
            )
        )
    if out.dtype != y.dtype and torch.promote_types(out.dtype, y.dtype) != y.dtype:
        raise StateTypeError(
            explain(
                f"the hypernet returned {out.dtype}{where}.",
                f"a dtype that promotes to the state's {y.dtype}.",
                f"hypernet.to({y.dtype})   # or return out.to(step.y.dtype)",
            )
        )
    if out.device != y.device:
        raise StateTypeError(
            explain(
                f"the hypernet returned a tensor on {out.device}{where}.",
                f"one on the state's device, {y.device}.",
                f'hypernet.to("{y.device}")',
            )
        )


def is_finite(y: Tensor) -> bool:
    """Return False only if ``y`` is known to hold inf or nan (one device sync)."""
    if torch.compiler.is_compiling():
        return True
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    try:
        # A finite sum proves every term finite, at half the cost of looking at each.
        return cmath.isfinite(y.detach().sum().item()) or bool(torch.isfinite(y.detach()).all())
    except RuntimeError:  # no values to look at: vmap, fake and meta tensors
        return True


@torch.no_grad()
def raise_non_finite(
    step: Step, grid: Iterable[tuple[Tensor, Tensor]], y0: Tensor, sign: int = 1
) -> None:
    """Replay a solve that ended in inf or nan, and say where that began.

    Args:
        step: the step of the failed solve.
        grid: its (t0, t1) pairs, in the host's time.
        y0: flat state at the start.
        sign: -1 where the host's time is negated.

    Raises:
        NonFiniteError: always; the text names the step, the time and the culprit.
    """
    if not is_finite(y0):
        raise NonFiniteError(
            explain("y0 holds inf or nan.", "a finite start.", "torch.isfinite(y0).all()")
        )
    base = Step(step.tableau, step.call, None)
    y = y0
    for index, (start, end) in enumerate(grid):
        t0, t1 = start.detach(), end.detach()
        where = f"at step {index}, t = {sign * t0.item():.6g}, dt = {sign * (t1 - t0).item():.6g}"
        plain, _ = base.increment(t0, t1 - t0, t1, y)
        if not is_finite(y + plain):
            raise NonFiniteError(
                explain(
                    f"the base method left the finite range {where}: func's answers are the cause.",
                    "finite derivatives along the solution.",
                    "more steps, or a reference: odeint(func, y0, t, method='dopri5')",
                )
            )
        dy, _ = step.increment(t0, t1 - t0, t1, y)
        if not is_finite(dy):
            raise NonFiniteError(
                explain(
                    f"the hypernet returned inf or nan {where}.",
                    "a finite correction.",
                    "fit again with a lower lr, or solve nearer to the data it was fitted on",
                )
            )
        y = y + dy
    raise NonFiniteError(
        explain(
            "the solve ended in inf or nan, a replay of it did not: func or the hypernet "
            "answers differently each time.",
            "a deterministic func and hypernet.",
            "func.eval(); hypernet.eval()",
        )
    )
