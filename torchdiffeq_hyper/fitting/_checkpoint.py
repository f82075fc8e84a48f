"""The state of a running fit, and the file that holds it."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from errno import ENOENT
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import refused, write_bytes
from torchdiffeq_hyper._rules import (
    ANYTHING,
    Choice,
    Items,
    Maybe,
    Mismatch,
    Real,
    Record,
    Rule,
    Table,
    Tagged,
    TensorOf,
    Text,
    Whole,
    mismatch,
    missing,
    record_of,
)
from torchdiffeq_hyper.errors import first_line, unwritable
from torchdiffeq_hyper.fitting._budget import ReferencePlan
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.fitting._signature import check_same_fit
from torchdiffeq_hyper.hypernets._files import ARCHITECTURES, check_sizes
from torchdiffeq_hyper.solvers._fit_report import REPORT, LossPoint

FORMAT = "torchdiffeq_hyper fit 4"
_EXPECTED = f"a file that a fit of this version wrote ({FORMAT})"


@dataclass
class PhaseState:
    """How far a phase of a fit is; each optimizer adds to it what it remembers."""

    kind: ClassVar[str]
    rules: ClassVar[Mapping[str, Rule]] = {}

    planned: int  # iterations
    best_error: float = math.inf  # smallest held-out error of the phase
    since_best: int = 0  # validations since that one


@dataclass
class FitState:
    """All that a fit has to know to go on as if it had never been interrupted."""

    net: dict[str, Tensor]  # the state_dict of what is trained
    best: dict[str, Tensor]  # the one with the smallest held-out error so far
    best_error: float
    base_error: float  # held-out error of what the fit started as
    noise: float
    most_batches: int  # distinct training batches that the budget allows
    references: dict[str, Any]  # a `ReferencePlan` in plain values
    choice: dict[str, Any] | None = None  # the "architecture" that was chosen, and a "note" why
    random: list[Tensor] = field(default_factory=list)
    phase: int = 0
    phase_start: int = 0  # iterations done before that phase
    training: PhaseState | None = None  # how far that phase is, None between two
    iteration: int = 0
    history: list[LossPoint] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""  # why the last phase ended
    fallback: str = ""  # what replaces what was fitted: the "start", or the "weights" alone
    report: dict[str, Any] | None = None  # of a finished fit


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# Rules of fields of a `FitState`; the others' come from their annotations.
_RULES: dict[str, Rule] = {
    "most_batches": Whole(1),
    "references": record_of(
        ReferencePlan,
        is_complete=True,
        tolerances=record_of(Tolerances, rtol=Real(above=0.0), atol=Real(above=0.0)),
        held_out=Whole(1),
        batch=Whole(1),
    ),
    "choice": Maybe(Record({"architecture": Tagged(ARCHITECTURES), "note": Text()})),
    "random": Items(TensorOf((torch.uint8,), (None,)), most=1025),
    "seconds": Real(low=0.0),
    "fallback": Choice("", "weights", "start"),
    "report": Maybe(REPORT),
}
_FILE = Record({"format": Choice(FORMAT), "signature": Table(ANYTHING), "state": ANYTHING})


@dataclass
class Store:
    """Where a fit's state is kept: a file, or nowhere."""

    path: str | os.PathLike[str] | None
    signature: Mapping[str, Any]  # plain values that tell this fit from others
    phases: Sequence[type[PhaseState]]  # the kinds of state of its phases

    def __post_init__(self) -> None:
        self._path = None if self.path is None else Path(self.path)
        if self._path is not None and not self._path.parent.is_dir():
            raise unwritable(self._path, FileNotFoundError(ENOENT, "there is no such folder"))

    def write(self, state: FitState) -> None:
        """Write a state; the file is the old one or the new one, never half of one."""
        if self._path is None:
            return
        values = vars(state) | {"history": [asdict(point) for point in state.history]}
        if state.training is not None:
            values["training"] = {"kind": state.training.kind, **vars(state.training)}
        content = {"format": FORMAT, "signature": dict(self.signature), "state": values}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_bytes(self._path, buffer.getvalue())

    def read(self) -> FitState | None:
        """Return the state in the file, None if there is no file; runs no code from it."""
        if self._path is None or not self._path.exists():
            return None
        remedy = f'remove it, or choose another: FitConfig(checkpoint="{self._path.stem}-2.pt")'
        what = f"{str(self._path)!r} is not a checkpoint of a fit, or is damaged: it"
        with refused(what):
            try:
                content = torch.load(self._path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a reader of damaged archives may raise
                problem = f"{type(error).__name__}: {first_line(error)}"
                raise Mismatch(problem, _EXPECTED, remedy) from error
            if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
                got = content["format"]
                raise mismatch(name="its format", value=got, expected=_EXPECTED, fix=remedy)
            content = _FILE.check(content, "")
        check_same_fit(content["signature"], self.signature, str(self._path), remedy)
        kinds = {kind.kind: kind for kind in self.phases}
        of = {name: record_of(kind, is_complete=True, **kind.rules) for name, kind in kinds.items()}
        rules = {**_RULES, "phase": Whole(0, len(self.phases)), "training": Maybe(Tagged(of))}
        with refused(what):
            values = record_of(FitState, is_complete=True, **rules).check(content["state"], "state")
            _check_state(values, self.signature, self.phases)
        values["history"] = [LossPoint(**point) for point in values["history"]]
        if (own := values["training"]) is not None:
            values["training"] = kinds[own.pop("kind")](**own)
        return FitState(**values)


def _check_state(
    values: Mapping[str, Any], signature: Mapping[str, Any], phases: Sequence[type[PhaseState]]
) -> None:
    """Refuse fields, each right by itself, that are not this fit's, or no fit's."""
    shapes = signature.get("weights", signature.get("hypernet"))
    if isinstance(shapes, dict):
        rules = {
            name: TensorOf((getattr(torch, dtype.removeprefix("torch.")),), tuple(shape))
            for name, (*shape, dtype) in shapes.items()
        }
        for place in ("net", "best"):
            Record(rules).check(values[place], f"state.{place}")
    elif values["choice"] is None:  # there is but the name of a way to choose a net
        raise missing(name="state.choice", expected="the net that was chosen")
    else:
        architecture, at = values["choice"]["architecture"], "state.choice.architecture"
        check_sizes(architecture, values["best"], at, but=("n_stages", "order"))
    if values["training"] is not None:
        running = Choice(*(phase.kind for phase in phases[values["phase"] :][:1]))
        running.check(values["training"]["kind"], "state.training.kind")
    Whole(0, values["iteration"]).check(values["phase_start"], "state.phase_start")
    for generator in values["random"][:1]:
        try:
            torch.Generator().set_state(generator)
        except (RuntimeError, TypeError) as error:
            name, wanted = "state.random[0]", "a generator's state"
            raise mismatch(name, generator, wanted) from error
