"""The state of a running fit, and the file it is kept in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._report import LossPoint
from torchdiffeq_hyper.errors import FileFormatError, FileWriteError, OptionError, explain

FORMAT = "torchdiffeq_hyper fit 1"


@dataclass
class FitState:
    """All that a fit has to know to go on as if it had never been interrupted.

    Attributes:
        net: the hypernet's state_dict.
        best: the state_dict with the smallest held-out error so far.
        best_error: that error.
        base_error: the held-out error of the base alone.
        optimizer: the optimizer's state_dict; None before a phase's first iteration.
        random: states of the random generators.
        phase: number of the current phase.
        phase_start: iterations done before it.
        iteration: iterations done.
        phase_best: smallest held-out error of the current phase.
        since_best: validations since that one.
        landing: iterations after which the current phase ends, once it has stopped gaining.
        planned: iterations planned for each phase begun so far.
        history: the validations.
        noise: noise floor.
        most_batches: distinct training batches that the budget allows.
        seconds: wall time used.
        stopped: why the last phase ended, "" before.
        report: the finished fit's report, None while it runs.
        choice: the net that was chosen ("architecture") and why ("note"), None if it was given.
        references: what is solved and how exactly, as `prepare.to_keep` returns it.
    """

    net: dict[str, Tensor]
    best: dict[str, Tensor]
    best_error: float
    base_error: float
    noise: float
    most_batches: int
    optimizer: dict[str, Any] | None = None
    random: list[Tensor] = field(default_factory=list)
    phase: int = 0
    phase_start: int = 0
    iteration: int = 0
    phase_best: float = math.inf
    since_best: int = 0
    landing: int | None = None
    planned: list[int] = field(default_factory=list)
    history: list[LossPoint] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""
    report: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    references: dict[str, Any] | None = None


class Store:
    """Where a fit's state is kept: a file, or nowhere.

    Args:
        path: the file, None to keep nothing.
        signature: what tells this fit from others: plain values and lists of them.

    Raises:
        FileWriteError: the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str] | None, signature: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._signature = dict(signature)
        if self._path is not None and not self._path.parent.is_dir():
            raise _not_writable(self._path, "there is no such folder")

    def write(self, state: FitState) -> None:
        """Write a state; the file is the old one or the new one, never half of one.

        Raises:
            FileWriteError: it cannot be written.
        """
        if self._path is None:
            return
        values = {name: getattr(state, name) for name in state.__dataclass_fields__}
        values["history"] = [asdict(point) for point in state.history]
        content = {"format": FORMAT, "signature": self._signature, "state": values}
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            torch.save(content, temporary)
            temporary.replace(self._path)
        except (OSError, RuntimeError) as error:  # torch reports some failures as the latter
            raise _not_writable(self._path, str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def read(self) -> FitState | None:
        """Return the state in the file, None if there is no file; runs no code from it.

        Raises:
            FileFormatError: it is damaged, or no checkpoint of a fit.
            OptionError: it belongs to another fit.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True)
            found, values = content["signature"], content["state"]
            history = [LossPoint(**point) for point in values.pop("history")]
            state = FitState(history=history, **values)
        except Exception as error:  # whatever a reader of damaged archives may raise
            reason = next(iter(str(error).splitlines()), "")
            raise FileFormatError(
                explain(
                    f"{str(self._path)!r} is not a checkpoint of a fit, or is damaged: "
                    f"{type(error).__name__}: {reason}",
                    f"a file that a fit of this version wrote ({FORMAT}).",
                    _remedy(self._path),
                )
            ) from error
        self._check(self._path, found)
        return state

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        name = _difference(found, self._signature)
        if name is not None:
            raise OptionError(
                explain(
                    f"the checkpoint {str(path)!r} belongs to another fit: {name} is "
                    f"{found.get(name)!r} there and {self._signature[name]!r} here.",
                    "the same call as the one that was interrupted.",
                    _remedy(path),
                )
            )


def check_same_call(signatures: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that fit different things.

    Args:
        signatures: what tells a fit from others, in the order of ranks.

    Raises:
        OptionError: two differ.
    """
    first = signatures[0]
    for rank, other in enumerate(signatures):
        name = _difference(other, first)
        if name is not None:
            raise OptionError(
                explain(
                    f"process {rank} of this fit makes another call than process 0: {name} is "
                    f"{other.get(name)!r} there and {first[name]!r} in process 0.",
                    "the same arguments in every process, y0 among them: fit shares it out itself.",
                    "torch.manual_seed(0)   # before y0 is drawn; and no DistributedSampler",
                )
            )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return the name of the first entry of ``wanted`` that is another one in ``found``."""
    return next((key for key, value in wanted.items() if not _agree(found.get(key), value)), None)


def _remedy(path: Path) -> str:
    return f'remove it, or choose another: FitConfig(checkpoint="{path.stem}-2.pt")'


def _not_writable(path: Path, reason: str) -> FileWriteError:
    return FileWriteError(
        explain(
            f"the checkpoint {str(path)!r} cannot be written: {reason}",
            "a file name in an existing folder that you may write to.",
            f"os.makedirs({str(path.parent)!r}, exist_ok=True)",
        )
    )


def _agree(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        # Sums depend on the number of threads in their last digits.
        return abs(first - second) <= 1e-4 * max(abs(first), abs(second))
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_agree, first, second))
    return bool(first == second)
