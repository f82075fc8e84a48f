"""What a file of kind "dise" holds: candidates, selector, report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper import _files as files
from torchdiffeq_hyper._files import damage_reported, described_in, refused, tensors_under
from torchdiffeq_hyper._rules import (
    ANYTHING,
    FLOATS,
    Choice,
    Items,
    Maybe,
    Mismatch,
    Real,
    Record,
    Row,
    Such,
    Table,
    Tagged,
    TensorOf,
    Text,
    Value,
    Whole,
    shown,
)
from torchdiffeq_hyper.dise._candidates import Candidate, check_candidates
from torchdiffeq_hyper.dise._fit import Scale
from torchdiffeq_hyper.dise._report import DiseReport, Labels
from torchdiffeq_hyper.dise.selectors import ARCHITECTURES, ReadySelector, from_architecture
from torchdiffeq_hyper.errors import BaseMismatchError, FileFormatError, StateTypeError
from torchdiffeq_hyper.hypernets._files import check_weights, load_weights
from torchdiffeq_hyper.solvers._grid import STEPS
from torchdiffeq_hyper.solvers._solver import Weights, solver_class

KIND = "dise"
_SETTINGS = ("steps", "rtol", "atol", "options")
_MATRICES = ("nfe", "is_right", "weight")
_NUMBERS = ("alpha", "penalty", "label_seconds", "seconds")


def _is_option(value: Any, levels: int = 50) -> bool:
    """Return whether a value read from JSON is not nan anywhere, nor nested without end."""
    if isinstance(value, list | dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_is_option(item, levels - 1) for item in items)
    return Text().holds(value) if isinstance(value, str) else value == value  # noqa: PLR0124 - nan


_OPTION = Value(_is_option, "a number, string, bool, None, or lists and dictionaries of these")
_CANDIDATE = Record(
    {
        "method": Text(100),
        "steps": Maybe(STEPS),
        "rtol": Maybe(Real(low=0.0)),
        "atol": Maybe(Real(low=0.0)),
        "options": Table(_OPTION),
    },
    optional={"solver": Maybe(Table(ANYTHING))},  # checked as it is rebuilt
)
_REPORT = Record(
    {
        "names": Items(Text(), most=1000),
        "alpha": Real(above=0.0),
        "penalty": Real(above=0.0),
        "losses": Items(Row(Whole(), Real(is_finite=False), Real(is_finite=False))),
        "label_seconds": Real(low=0.0),
        "seconds": Real(low=0.0),
    }
)
_DISE = Record(
    {
        "candidates": Items(_CANDIDATE, least=1, most=1000),
        "selector": Tagged({**ARCHITECTURES, "custom": Record({"class": Text(1000)})}),
        "unit": Row(Real(), Real(above=0.0)),
        "report": Maybe(_REPORT),
    },
    optional=files.HEADER,
)


def write(
    path: str | os.PathLike[str],
    candidates: Sequence[Candidate],
    selector: object,
    unit: Scale,
    report: DiseReport | None,
) -> None:
    """Write a Dise's contents; see `Dise.save`."""
    kind = type(selector)
    if not isinstance(selector, nn.Module):
        problem = f"the selector is a {kind.__name__}, which has no weights to write."
        fix = "class MySelector(torch.nn.Module):\n    def forward(self, y0): ..."
        raise StateTypeError(problem=problem, expected="an nn.Module.", fix=fix)
    custom = {"kind": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}
    described: Any = selector.architecture if isinstance(selector, ReadySelector) else custom
    metadata = {"candidates": [], "selector": described, "unit": unit, "report": None}
    tensors = _under("selector", selector.state_dict())
    for position, candidate in enumerate(candidates):
        settings = {name: getattr(candidate, name) for name in ("method", *_SETTINGS)}
        try:
            json.dumps(settings)
        except (TypeError, ValueError) as error:
            problem = f"candidate {position} has options that a file cannot hold: {candidate!r}."
            expected, fix = "numbers, strings, or lists of them.", "options=None"
            raise StateTypeError(problem=problem, expected=expected, fix=fix) from error
        if candidate.solver is not None:
            weights, settings["solver"] = candidate.solver.describe()
            tensors |= _under(f"candidates.{position}", weights)
        metadata["candidates"].append(settings)
    if report is not None:
        matrices = {name: getattr(report.labels, name) for name in _MATRICES}
        choices = {"selection": report.selection, "held_out": report.held_out}
        tensors |= _under("report", {**matrices, **choices})
        numbers = {name: getattr(report, name) for name in _NUMBERS}
        metadata["report"] = {"names": report.labels.names, "losses": report.losses, **numbers}
    files.write(path, tensors, KIND, metadata)


def _under(owner: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{owner}.{name}": tensor for name, tensor in tensors.items()}


def read(
    path: str | os.PathLike[str], selector: nn.Module | None, hypernets: Mapping[int, nn.Module]
) -> tuple[tuple[Candidate, ...], nn.Module, Scale, DiseReport | None]:
    """Return what `write` wrote; see `Dise.load`. Weights are loaded once all of it is right."""
    tensors, metadata = files.read(path, KIND)
    found = files.checked(_DISE, metadata, described_in(path))
    with refused(described_in(path)):
        candidates = enumerate(found["candidates"])
        owners = [f"candidates.{i}." for i, settings in candidates if settings.get("solver")]
        owners += ["selector."] if found["report"] is None else ["report.", "selector."]
        for name in tensors:
            if not name.startswith(tuple(owners)):
                problem = f"the tensor {name!r} belongs to nothing described."
                raise Mismatch(problem, f"tensors of {', '.join(owners[-8:])}")
        n = len(found["candidates"])
        Choice(n).check(found["selector"].get("n_candidates", n), "selector.n_candidates")
        report = None
        if found["report"] is not None:
            report = _report(found["report"], tensors_under("report.", tensors), n)
    rebuilt = [
        _candidate(settings, i, tensors_under(f"candidates.{i}.", tensors), hypernets.get(i), path)
        for i, settings in enumerate(found["candidates"])
    ]
    with damage_reported(path):
        loaded = check_candidates([candidate for candidate, _ in rebuilt])
    own = tensors_under("selector.", tensors)
    net = _selector(found["selector"], own, selector, os.fspath(path))
    weights = [missing for _, missing in rebuilt if missing is not None]
    load_weights([*weights, (net, own, selector is not None)], path)
    return loaded, net, Scale(*found["unit"]), report


def _report(described: dict[str, Any], own: Mapping[str, Tensor], n_candidates: int) -> DiseReport:
    """Return the report, after checking that it is of these candidates."""
    Items(Text(), n_candidates, n_candidates).check(described["names"], "report.names")
    batch = own["nfe"].shape[0] if "nfe" in own and own["nfe"].dim() == 2 else None
    numbers = (torch.int64, torch.int32, *FLOATS)
    expected = Record(
        {
            "nfe": TensorOf(numbers, (batch, n_candidates), is_finite=True),
            "is_right": TensorOf((torch.bool,), (batch, n_candidates)),
            "weight": TensorOf(numbers, (batch, n_candidates)),
            "selection": _positions(n_candidates, batch),
            "held_out": _positions(batch or 0, None),
        }
    )
    found = expected.check(own, "report")
    report = DiseReport(
        labels=Labels(tuple(described["names"]), *(found[name] for name in _MATRICES)),
        selection=found["selection"],
        held_out=found["held_out"],
        losses=tuple((n, a, b) for n, a, b in described["losses"]),
        **{name: described[name] for name in _NUMBERS},
    )
    _ = report.costs  # refuses an M smaller than what a right answer costs
    return report


def _positions(n: int, count: int | None) -> Such:
    """Return the rule for a tensor of positions among ``n``."""
    return Such(
        TensorOf((torch.int64,), (count,)),
        lambda index: bool(((index >= 0) & (index < n)).all()),
        f"each from 0 to {n - 1}",
    )


def _candidate(
    settings: Mapping[str, Any],
    position: int,
    weights: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
) -> tuple[Candidate, Weights | None]:
    """Return a candidate, and the weights that its hypernet still lacks."""
    method, loading = settings["method"], None
    described = settings.get("solver")
    if described is not None:
        net, file = described.get("hypernet"), os.fspath(path)
        if isinstance(net, dict) and net.get("kind") == "custom" and hypernet is None:
            kind, argument = shown(net.get("class")), f"hypernets={{{position}: net}}"
            raise _no_instance(file, f"the net of candidate {position}", kind, argument)
        at, owner = f"candidates[{position}]", solver_class(described.get("base"))
        method, loading = owner.rebuild(described, weights, hypernet, path, f"{at}.solver")
        with refused(described_in(path)):
            Choice(method.method).check(settings["method"], f"{at}.method")
    with damage_reported(path):
        return Candidate(method, **{name: settings[name] for name in _SETTINGS}), loading


def _no_instance(file: str, owner: str, kind: str, argument: str) -> FileFormatError:
    return FileFormatError(
        problem=f"{owner} in {file!r} is one of your own, a {kind}.",
        expected="an instance to load its weights into: the file holds no code.",
        fix=f"tdh.Dise.load({file!r}, {argument})",
    )


def _selector(
    description: Mapping[str, Any], own: Mapping[str, Tensor], given: nn.Module | None, file: str
) -> nn.Module:
    """Return the selector, its weights not yet loaded."""
    selector = given
    if selector is None and description["kind"] == "custom":
        raise _no_instance(file, "the selector", description["class"], "selector=MySelector()")
    if selector is None:
        check_weights(own, repr(file), "selector.")
        with torch.device("meta"):
            what = described_in(file)
            selector = from_architecture(description, own, what=what, at="selector")
    weights = selector.state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in own.items()}:
        owner = "its own description" if given is None else "the instance given"
        raise (FileFormatError if given is None else BaseMismatchError)(
            problem=f"the selector's weights in {file!r} are not those of {owner}.",
            expected="a module built with the arguments of the one saved.",
            fix="print({name: w.shape for name, w in selector.state_dict().items()})",
        )
    return selector
