"""Whether a solve stayed finite, and where it did not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchdiffeq_hyper._stepping import Step
from torchdiffeq_hyper.errors import NonFiniteError, explain


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
                    "more steps, or a reference, outside of tdh.override: "
                    "odeint(func, y0, t, method='dopri5')",
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
