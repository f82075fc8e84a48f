"""func as it was found: in evaluation mode for the time of a fit, in its own dtype."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchdiffeq_hyper.errors import MissingExtraError, OptionError, explain
from torchdiffeq_hyper.fitting._adamw import annealed
from torchdiffeq_hyper.fitting._problem import RESIDUAL_SHARE


def find_lightning() -> Any:
    """Return Lightning under the name it is already used by, or is installed as.

    Raises:
        MissingExtraError: it is not installed.
    """
    names = ("pytorch_lightning", "lightning.pytorch")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in {name, name.partition(".")[0]}:
                raise
    raise MissingExtraError(
        explain(
            "torchdiffeq_hyper.lightning needs Lightning, which is not installed.",
            "pytorch_lightning, or lightning.",
            'pip install "torchdiffeq_hyper[lightning]"',
        )
    )


if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = find_lightning().Callback


class LeftAsFound(Callback):
    """Keeps func in evaluation mode, without gradients, for the time of a fit.

    Args:
        as_found: returns a context that does so and gives func back.
    """

    def __init__(self, as_found: Callable[[], AbstractContextManager[None]]) -> None:
        self._as_found = as_found
        self._stack = ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a precision that would leave func in another dtype.

        Raises:
            OptionError: the Trainer would cast the module, and func with it.
        """
        precision = str(trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise OptionError(
                explain(
                    f"the Trainer's precision is {precision!r}, which casts func and leaves it so.",
                    '"32-true", which casts nothing, or "bf16-mixed".',
                    "func and y0 cast by yourself, and Trainer() without precision",
                )
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self._stack.enter_context(self._as_found())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Give func back."""
        self._stack.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give func back."""
        self._stack.close()


@dataclass(frozen=True)
class Schedule:
    """When each phase ends.

    Attributes:
        ends: the optimizer steps done by the end of each phase.
    """

    ends: tuple[int, ...]

    @classmethod
    def of(cls, total: float, n_phases: int) -> Schedule:
        """Return the schedule for a number of optimizer steps.

        Raises:
            OptionError: it is infinite.
        """
        if total == float("inf"):
            raise OptionError(
                explain(
                    "the Trainer has no last step, so the learning rate cannot be annealed.",
                    "a number of epochs or steps.",
                    "Trainer(max_epochs=100)   # or max_steps=2000; EarlyStopping may end it",
                )
            )
        last = max(1, int(total))
        return cls((max(1, round(RESIDUAL_SHARE * last)), last)[-n_phases:])

    def phase_at(self, step: int) -> int:
        """Return the number of the phase in which a step is."""
        return sum(step >= end for end in self.ends[:-1])

    def rate_at(self, step: int) -> float:
        """Return the share of the learning rate for a step."""
        number = self.phase_at(step)
        start = self.ends[number - 1] if number else 0
        return annealed(min(1.0, (step - start) / max(1, self.ends[number] - start)))
