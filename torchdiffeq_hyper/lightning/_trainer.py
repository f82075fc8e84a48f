"""Lightning, under whichever of its names, and a callback that gives func back after a fit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from torchdiffeq_hyper.errors import MissingExtraError


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
        problem="torchdiffeq_hyper.lightning needs Lightning, which is not installed.",
        expected="pytorch_lightning, or lightning.",
        fix='pip install "torchdiffeq_hyper[lightning]"',
    )


if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = find_lightning().Callback


class FieldAsFound(Callback):
    """Holds a context open for the time of a fit: a module has no hook for exceptions.

    Args:
        as_found: returns a context that keeps func as a fit needs it, and gives it back.
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
