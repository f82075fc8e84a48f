"""func in evaluation mode for the time of a fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

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

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self._stack.enter_context(self._as_found())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Give func back."""
        self._stack.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give func back."""
        self._stack.close()
