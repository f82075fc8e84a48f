"""One measured row."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationRow:
    """What one method at one setting costs, and how far off it ends.

    Attributes:
        method: the method's label.
        steps: number of equal steps, None for methods that choose their own.
        tolerance: rtol = atol of such a method, else None.
        nfe: calls of func in one solve of the whole batch, the choice of a first step
            and rejected steps included.
        macs_func: multiply-accumulates per sample of one solve, inside func.
        macs_g: the same inside the hypernet; 0 for methods that have none.
        ms: median wall time of one solve of the whole batch, in ms.
        mape: mean absolute percentage error of the final state, in percent; |y_ref|
            counts as at least 1e-3 of its root mean square.
        relative_l2: mean over samples of |y - y_ref| / |y_ref|, the norms over all parts
            of a sample together; |y_ref| counts as at least 1e-3 of its root mean square.
        worst_relative_l2: the largest of these.
        metric: the task metric of the final state, None where none was asked for.
        is_learned: whether the method corrects its base with a hypernet.
        along: mean relative L2 error over samples and the points of the method's own grid (at
            most 16; eight equidistant ones where it has none); nan where not measured.
    """

    method: str
    steps: int | None
    tolerance: float | None
    nfe: int
    macs_func: float
    macs_g: float
    ms: float
    mape: float
    relative_l2: float
    worst_relative_l2: float
    metric: float | None
    is_learned: bool
    along: float = math.nan

    @property
    def failed(self) -> bool:
        """Whether the solve broke off or ended in inf or nan; its errors are inf then."""
        return not math.isfinite(self.relative_l2)

    @property
    def setting(self) -> str:
        """The number of steps, or the tolerance, as text; "own" where the fit has chosen."""
        if self.steps is None and self.tolerance is None:
            return "own"
        return str(self.steps) if self.steps is not None else f"tol {self.tolerance:g}"
