"""func as it was found: in evaluation mode for the time of a fit, in its own dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.lightning._find import find_lightning

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
