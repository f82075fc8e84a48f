"""The state of a running fit, and the file it is kept in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import (
    Anything,
    Choice,
    Record,
    Table,
    checked,
    record_of,
    refused,
    shown,
)
from torchdiffeq_hyper.errors import (
    FileFormatError,
    FileWriteError,
    OptionError,
    explain,
    first_line,
)
from torchdiffeq_hyper.fitting._field import SHARES
from torchdiffeq_hyper.fitting._state_rules import RULES, check_state
from torchdiffeq_hyper.fitting._units import differing, fingerprint
from torchdiffeq_hyper.solvers._report import LossPoint

FUNC = "func(t, y)"
POINTS_OF: dict[str, Sequence[str]] = {
    "y0": ("",),
    FUNC: [f", {share:.0%} of t_span passed" for share in SHARES],
}
"""Entries of a signature that are fingerprints, and how each of their points is called."""
FORMAT = "torchdiffeq_hyper fit 2"


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
        fallback: what is returned in place of what was fitted: "" for nothing, "weights" for a
            bespoke solver without its correction, "start" for the base or classical start.
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
    fallback: str = ""


CHECKPOINT = Record(
    {
        "format": Choice((FORMAT,)),
        "signature": Table(Anything()),
        "state": record_of(FitState, is_complete=True, **RULES),
    }
)
"""What the file holds."""


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
        except Exception as error:  # whatever a reader of damaged archives may raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise self._unusable(reason) from error
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            reason = f"its format is {shown(content['format'])}"
            raise self._unusable(reason)
        what = f"{str(self._path)!r} is not a checkpoint of a fit, or is damaged: it"
        content = checked(CHECKPOINT, content, what)
        self._check(self._path, content["signature"])
        with refused(what):
            check_state(content["state"], self._signature)
        values = content["state"]
        return FitState(**{**values, "history": [LossPoint(**p) for p in values["history"]]})

    def _unusable(self, reason: str) -> FileFormatError:
        assert self._path is not None
        return FileFormatError(
            explain(
                f"{str(self._path)!r} is not a checkpoint of a fit, or is damaged: {reason}",
                f"a file that a fit of this version wrote ({FORMAT}).",
                _remedy(self._path),
            )
        )

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        name = _difference(found, self._signature)
        if name is not None:
            raise OptionError(
                explain(
                    f"the checkpoint {str(path)!r} belongs to another fit: "
                    f"{_told(name, found, self._signature, 'there', 'here')}.",
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
    for rank, other in enumerate(signatures[1:], 1):
        name = _difference(other, first)
        if name is not None:
            raise OptionError(
                explain(
                    f"process {rank} of this fit makes another call than process 0: "
                    f"{_told(name, other, first, 'there', 'in process 0')}.",
                    "the same arguments in every process, y0 among them: fit shares it out itself.",
                    "torch.manual_seed(0)   # before y0 is drawn; and no DistributedSampler",
                )
            )


def check_same_field(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Refuse what was fitted to another field, if it was looked at from the same starts.

    Args:
        found: what `signs_of_field` returned then, None if it was not kept.
        wanted: what it returns now.

    Raises:
        OptionError: func has other values.
    """
    if found is None or not _are_same("y0", found.get("y0"), wanted["y0"]):
        return
    if not _are_same(FUNC, found.get(FUNC), wanted[FUNC]):
        raise OptionError(
            explain(
                "the checkpoint belongs to another field: "
                f"{_told(FUNC, found, wanted, 'there', 'here')}.",
                "the func that it was fitted to.",
                "a new fit that begins with its net: HyperSolverModule(func, ..., hypernet=net)",
            )
        )


def signs_of_field(probes: Sequence[Tensor]) -> dict[str, Any]:
    """Return what tells starts and a field from others.

    Args:
        probes: the starts, flat, and what `field.check_field` returned.
    """
    dtype = probes[0].dtype
    return {
        "y0": fingerprint(probes[:1], dtype),
        FUNC: fingerprint(probes[1:], dtype),
    }


def signs_of_net(net: nn.Module) -> dict[str, list[Any]]:
    """Return what a checkpoint's weights are held against: shapes and dtypes."""
    return {
        name: [*value.shape, str(value.dtype)]
        for name, value in net.state_dict().items()
        if isinstance(value, Tensor)
    }


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return the name of the first entry of ``wanted`` that is another one in ``found``."""
    return next((key for key in wanted if not _are_same(key, found.get(key), wanted[key])), None)


def _are_same(name: str, first: object, second: object) -> bool:
    return differing(first, second) is None if name in POINTS_OF else _agree(first, second)


def _told(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], there: str, here: str
) -> str:
    """Return in which way an entry differs."""
    if name not in POINTS_OF:
        return f"{name} is {shown(found.get(name))} {there} and {shown(wanted[name])} {here}"
    position = differing(found.get(name), wanted[name]) or 0
    return f"{name} has other values {there} than {here}{POINTS_OF[name][position]}"


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
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_agree, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_agree(first[k], second[k]) for k in second)
    kinds = {type(first), type(second)}
    if kinds <= {int, float}:
        return bool(first == second) or (first != first and second != second)  # noqa: PLR0124
    return len(kinds) == 1 and not isinstance(first, Tensor) and bool(first == second)
