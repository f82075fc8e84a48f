"""What a module needs of Lightning and keeps during a Trainer's fit: batches, func, history."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchdiffeq_hyper._state import parts_of
from torchdiffeq_hyper.errors import MissingExtraError
from torchdiffeq_hyper.fitting._batches import Starts
from torchdiffeq_hyper.fitting._budget import ENDLESS
from torchdiffeq_hyper.fitting._data import MOST_BYTES, Batch, References
from torchdiffeq_hyper.solvers._fit_report import FitReport, LossPoint


def find_lightning() -> Any:
    """Return Lightning under the name it is already used by, or is installed as."""
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
    """Keeps func as a fit needs it, and gives it back: a module has no hook for exceptions."""

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


class KnownBatches:
    """Batches with their references, each solved once as long as it comes again unchanged."""

    def __init__(self, references: References) -> None:
        self.references = references
        self._batches: dict[Hashable, Batch] = {}

    def measure(self, key: Hashable, starts: Starts) -> Batch:
        """Return the batch known under a key if it has these samples, else solve it."""
        known = self._batches.pop(key, None)
        if known is None or not _same(known.starts, starts):
            known = self.references.solve(starts, ENDLESS)
        if sum(batch.nbytes for batch in self._batches.values()) + known.nbytes <= MOST_BYTES:
            self._batches[key] = known
        return known


def _same(first: Starts, second: Starts) -> bool:
    tensors = ((*parts_of(starts.y0), *starts.context) for starts in (first, second))
    pairs = zip(*tensors, strict=True)
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


@dataclass
class History:
    """The fields of a `FitReport` that grow during a fit; they are kept in checkpoints."""

    losses: list[LossPoint] = field(default_factory=list)
    delta: dict[str, float] = field(default_factory=dict)
    base_delta: dict[str, float] = field(default_factory=dict)
    validation: float = 0.0
    base_validation: float = 0.0
    iterations: int = 0
    seconds: float = 0.0

    def report(self, **others: Any) -> FitReport | None:
        """Return the report with the other fields, None before the first validation."""
        if not self.delta:
            return None
        return FitReport(**{**vars(self), "losses": tuple(self.losses), **others})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """Rebuild from the values of `dataclasses.asdict`."""
        return cls(**{**data, "losses": [LossPoint(**point) for point in data["losses"]]})
