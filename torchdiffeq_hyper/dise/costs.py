"""What a candidate's answer for a sample costs: its calls of func, or a penalty."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import OptionError, StateTypeError, explain


class Verdict(NamedTuple):
    """What a cost says of one candidate's answers.

    Attributes:
        is_right: whether each answer is good enough (batch,).
        weight: what a call of func counts for in a right answer (batch,).
    """

    is_right: Tensor
    weight: Tensor


class Cost(Protocol):
    """A rule for costs; `ClassificationCost` and `RegressionCost` are two."""

    alpha: float
    penalty: float

    def check(self, batch: int) -> None:
        """Raise if the cost belongs to another number of samples."""
        ...

    def judge(self, solution: State, index: Tensor) -> Verdict:
        """Judge a solution at all times for the samples ``index``."""
        ...


def check_settings(alpha: float, penalty: float) -> tuple[float, float]:
    """Return alpha and M.

    Raises:
        OptionError: one is not a finite number above 0.
    """
    check_positive("alpha", alpha, "alpha=0.3")
    check_positive("penalty", penalty, "penalty=1000.0")
    return float(alpha), float(penalty)


def check_positive(name: str, value: Any, fix: str) -> None:
    """Refuse what is not a finite number above 0.

    Raises:
        OptionError: it is not.
    """
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and value > 0):
        raise OptionError(explain(f"{name} is {value!r}.", "a finite number above 0.", fix))


def check_callable(name: str, value: Any, fix: str) -> None:
    """Refuse what cannot be called.

    Raises:
        StateTypeError: it cannot.
    """
    if not callable(value):
        raise StateTypeError(explain(f"{name} is a {type(value).__name__}.", "a callable.", fix))
