"""Whether a solve stayed finite, and where it did not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchdiffeq_hyper._state import is_half
from torchdiffeq_hyper.errors import NonFiniteError, explain
from torchdiffeq_hyper.solvers._stepping import Step


def is_finite(y: Tensor) -> bool:
    """Return False only if ``y`` is known to hold inf or nan (one device sync)."""
    if torch.compiler.is_compiling():
        return True
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    try:
        # A finite sum proves every term finite, at half the cost of looking at each.
        total = y.sum().item()
        # Only a finite number, real or complex, less itself is zero.
        return total - total == 0 or bool(torch.isfinite(y).all())
    except RuntimeError:  # no values to look at: vmap, fake and meta tensors
        return True


def cast_back(solution: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a solution in the dtype of the user's state.

    Raises:
        NonFiniteError: it is finite, but not in that dtype.
    """
    if solution.dtype == dtype:
        return solution
    narrow = solution.to(dtype)
    if not is_finite(narrow) and is_finite(solution):
        raise NonFiniteError(_overflow(dtype, solution))
    return narrow


def _overflow(dtype: torch.dtype, solution: Tensor) -> str:
    largest = float(solution.abs().amax())
    return explain(
        f"the solution grows to {largest:.6g} and overflows the state's dtype, {dtype}, which ends "
        f"at {torch.finfo(dtype).max:.6g}.",
        "a dtype that holds the solution.",
        "y0 = y0.float()   # for a tuple, each part; func must take it\n"
        "or a state in smaller units",
    )


def check_start(y0: Tensor) -> None:
    """Refuse a start that is known to hold inf or nan."""
    if not is_finite(y0):
        raise NonFiniteError(
            problem="y0 holds inf or nan.",
            expected="a finite start.",
            fix="torch.isfinite(y0).all()",
        )


@torch.no_grad()
def raise_non_finite(
    step: Step,
    grid: Iterable[tuple[Tensor, Tensor]],
    y0: Tensor,
    sign: int = 1,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Replay a solve that ended in inf or nan, and name the step where that began, and why.

    Args:
        step: the step of the failed solve.
        grid: its (t0, t1) pairs, in the host's time.
        y0: flat state at the start.
        sign: -1 where the host's time is negated.
        dtype: of the user's state, where the solve steps in another one.

    Raises:
        NonFiniteError: always.
    """
    check_start(y0)
    base = Step(step.tableau, step.call, None)
    y = y0
    for index, (start, end) in enumerate(grid):
        t0, t1 = start.detach(), end.detach()
        where = f"at step {index}, t = {sign * t0.item():.6g}, dt = {sign * (t1 - t0).item():.6g}"
        plain, _ = base.increment(t0, t1 - t0, t1, y)
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
        if dtype is not None and not is_finite(y.to(dtype)):
            raise NonFiniteError(_overflow(dtype, y))
    raise NonFiniteError(
        problem="the solve ended in inf or nan, a replay of it did not: func or the hypernet "
        "answers differently each time.",
        expected="a deterministic func and hypernet.",
        fix="func.eval(); hypernet.eval()",
    )


def advice_for_half(dtype: torch.dtype | None) -> str:
    """Return one more fix for states of half precision, in which func is called."""
    if dtype is None or not is_half(dtype):
        return ""
    return f"\nor y0.float(): func is called in {dtype}, which ends at {torch.finfo(dtype).max:.6g}"
