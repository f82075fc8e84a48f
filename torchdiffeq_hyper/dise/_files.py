"""What a file of kind "dise" holds: candidates, selector, report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import (
    HEADER,
    checked,
    damage_reported,
    described_in,
    refused,
    tensors_under,
)
from torchdiffeq_hyper._files import read as read_file
from torchdiffeq_hyper._files import write as write_file
from torchdiffeq_hyper._rules import (
    ANYTHING,
    FLOATS,
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
    mismatch,
    shown,
)
from torchdiffeq_hyper.dise._candidates import Candidate, check_candidates
from torchdiffeq_hyper.dise._report import DiseReport
from torchdiffeq_hyper.dise._training import Scale
from torchdiffeq_hyper.dise.selectors import ARCHITECTURES, ReadySelector, from_architecture
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    FileFormatError,
    HyperError,
    MissingHypernetError,
    StateTypeError,
)
from torchdiffeq_hyper.hypernets._files import check_weights, load_weights
from torchdiffeq_hyper.solvers._grid import STEPS
from torchdiffeq_hyper.solvers._solver import Weights, solver_class

KIND = "dise"
_SETTINGS = ("steps", "rtol", "atol", "options")


def _is_option(value: Any, levels: int = 50) -> bool:
    """Return whether a value read from JSON is not nan anywhere, nor nested without end."""
    if isinstance(value, list | dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_is_option(item, levels - 1) for item in items)
    return Text().holds(value) if isinstance(value, str) else value == value  # noqa: PLR0124 - nan


_OPTION = Value(_is_option, "a number, string, bool, None, or lists and dictionaries of these")
_TOLERANCE = Maybe(Real(low=0.0))
_CANDIDATE = Record(
    {
        "method": Text(100),
        "steps": Maybe(STEPS),
        "rtol": _TOLERANCE,
        "atol": _TOLERANCE,
        "options": Table(_OPTION),
    },
    optional={"solver": Maybe(Table(ANYTHING))},  # checked as it is rebuilt
)
_SECONDS = Real(low=0.0)
_REPORT = Record(
    {
        "names": Items(Text(), most=1000),
        "alpha": Real(above=0.0),
        "penalty": Real(above=0.0),
        "losses": Items(Row(Whole(), Real(is_finite=False), Real(is_finite=False))),
        "label_seconds": _SECONDS,
        "seconds": _SECONDS,
    }
)
_DISE = Record(
    {
        "candidates": Items(_CANDIDATE, least=1, most=1000),
        "selector": Tagged({**ARCHITECTURES, "custom": Record({"class": Text(1000)})}),
        "unit": Row(Real(), Real(above=0.0)),
        "report": Maybe(_REPORT),
    },
    optional=HEADER,
)


def write(
    path: str | os.PathLike[str],
    candidates: Sequence[Candidate],
    selector: object,
    unit: Scale,
    report: DiseReport | None,
) -> None:
    """Write a Dise's contents; see `Dise.save`."""
    if selector is None:
        raise MissingHypernetError(
            problem="this Dise has no selector to save.",
            expected="a fitted one.",
            fix="dise.fit(func, y0, t, cost=cost)",
        )
    if not isinstance(selector, nn.Module):
        raise StateTypeError(
            problem=f"the selector is a {type(selector).__name__}, which has no weights to write.",
            expected="an nn.Module.",
            fix="class MySelector(torch.nn.Module):\n    def forward(self, y0): ...",
        )
    tensors = _under("selector", selector.state_dict())
    described = []
    for position, candidate in enumerate(candidates):
        weights, settings = _describe(candidate, position)
        tensors |= _under(f"candidates.{position}", weights)
        described.append(settings)
    if report is not None:
        tensors |= _under("report", report.to_tensors())
    kind = type(selector)
    custom = {"kind": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}
    metadata = {
        "candidates": described,
        "selector": selector.architecture if isinstance(selector, ReadySelector) else custom,
        "unit": [unit.shift, unit.scale],
        "report": None if report is None else report.to_dict(),
    }
    write_file(path, tensors, KIND, metadata)


def _under(owner: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{owner}.{name}": tensor for name, tensor in tensors.items()}


def _describe(candidate: Candidate, position: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a candidate's tensors and its JSON-ready description."""
    settings = {name: getattr(candidate, name) for name in ("method", *_SETTINGS)}
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise StateTypeError(
            problem=f"candidate {position} has options that a file cannot hold: {candidate!r}.",
            expected="options that are numbers, strings, or lists of them.",
            fix=f'tdh.Candidate("{candidate.method}", rtol=1e-3, atol=1e-3)',
        ) from error
    if candidate.solver is None:
        return {}, settings
    tensors, solver = candidate.solver.describe()
    return tensors, {**settings, "solver": solver}


def read(
    path: str | os.PathLike[str],
    selector: nn.Module | None,
    hypernets: Mapping[int, nn.Module],
) -> tuple[tuple[Candidate, ...], nn.Module, Scale, DiseReport | None]:
    """Return what `write` wrote; see `Dise.load`. Weights are loaded once all of it is right."""
    tensors, metadata = read_file(path, KIND)
    found = checked(_DISE, metadata, described_in(path))
    with refused(described_in(path)):
        _check_owners(tensors, found)
        n_candidates = len(found["candidates"])
        n_predicted = found["selector"].get("n_candidates", n_candidates)
        if n_predicted != n_candidates:
            place, expected = "selector.n_candidates", f"{n_candidates}, one a candidate"
            raise mismatch(place, n_predicted, expected)
        report = None
        if found["report"] is not None:
            report = _report(found["report"], tensors_under("report.", tensors), n_candidates)
    candidates, weights = [], []
    for position, settings in enumerate(found["candidates"]):
        own = tensors_under(f"candidates.{position}.", tensors)
        candidate, missing = _rebuild(settings, position, own, hypernets.get(position), path)
        candidates.append(candidate)
        weights += [] if missing is None else [missing]
    with damage_reported(path):
        check_candidates(candidates)
    own = tensors_under("selector.", tensors)
    net = _rebuild_selector(found["selector"], own, selector, path)
    load_weights([*weights, (net, own, selector is not None)], path)
    return tuple(candidates), net, Scale(*map(float, found["unit"])), report


def _check_owners(tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Refuse tensors that belong to nothing in the description."""
    candidates = enumerate(found["candidates"])
    owners = [f"candidates.{i}." for i, settings in candidates if settings.get("solver")]
    owners += ["selector."] if found["report"] is None else ["report.", "selector."]
    for name in tensors:
        if not name.startswith(tuple(owners)):
            problem = f"the tensor {name!r} belongs to nothing described."
            raise Mismatch(problem, f"tensors of {', '.join(owners[-8:])}")


def _report(described: dict[str, Any], own: Mapping[str, Tensor], n_candidates: int) -> DiseReport:
    """Return the report, after checking that it is of these candidates."""
    names = Items(Text(), least=n_candidates, most=n_candidates)
    names.check(described["names"], "report.names")
    batch = own["nfe"].shape[0] if "nfe" in own and own["nfe"].dim() == 2 else None
    matrix = batch, n_candidates
    numbers = (torch.int64, torch.int32, *FLOATS)
    rules = Record(
        {
            "nfe": TensorOf(numbers, matrix, is_finite=True),
            "is_right": TensorOf((torch.bool,), matrix),
            "weight": TensorOf(numbers, matrix),
            "selection": _positions(n_candidates, batch),
            "held_out": _positions(batch or 0, None),
        }
    )
    report = DiseReport.from_parts(described, rules.check(own, "report"))
    _ = report.costs  # refuses an M smaller than what a right answer costs
    return report


def _positions(n: int, count: int | None) -> Such:
    """Return the rule for a tensor of positions among ``n``."""
    return Such(
        TensorOf((torch.int64,), (count,)),
        lambda index: bool(((index >= 0) & (index < n)).all()),
        f"each from 0 to {n - 1}",
    )


def _rebuild(
    settings: Mapping[str, Any],
    position: int,
    weights: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
) -> tuple[Candidate, Weights | None]:
    """Return a candidate, and the weights that its hypernet still lacks."""
    given = {name: settings[name] for name in _SETTINGS}
    described = settings.get("solver")
    if described is None:
        with damage_reported(path):
            return Candidate(settings["method"], **given), None
    net_described = described.get("hypernet")
    kind = net_described.get("kind") if isinstance(net_described, dict) else None
    if kind == "custom" and hypernet is None:
        raise FileFormatError(
            problem=f"candidate {position} in {os.fspath(path)!r} has a hypernet of your own, a "
            f"{shown(net_described.get('class'))}; the file holds weights and no code.",
            expected="an instance of that net to load them into.",
            fix=f"tdh.Dise.load({os.fspath(path)!r}, hypernets={{{position}: net}})",
        )
    at = f"candidates[{position}].solver"
    owner = solver_class(described.get("base"))
    solver, loading = owner.rebuild(described, weights, hypernet, path, at)
    with refused(described_in(path)):
        if settings["method"] != solver.method:
            place = f"candidates[{position}].method"
            raise mismatch(place, settings["method"], f'"{solver.method}", its solver\'s')
        candidate = Candidate(solver, **given)
    return candidate, loading


def _rebuild_selector(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    given: nn.Module | None,
    path: str | os.PathLike[str],
) -> nn.Module:
    """Return the selector, its weights not yet loaded."""
    name = repr(os.fspath(path))
    error: type[HyperError]
    if given is not None:
        selector, error, owner = given, BaseMismatchError, "the instance given"
    elif description["kind"] == "custom":
        raise FileFormatError(
            problem=f"{name} holds the weights of a selector of your own, a "
            f"{description['class']}, and no code.",
            expected="an instance of that module to load them into.",
            fix=f"tdh.Dise.load({name}, selector=MySelector())",
        )
    else:
        check_weights(tensors, name, "selector.")
        what = described_in(path)
        with torch.device("meta"):
            selector = from_architecture(description, tensors, what=what, at="selector")
        error, owner = FileFormatError, "its own description"
    own = selector.state_dict()
    if {key: own[key].shape for key in own} != {key: tensors[key].shape for key in tensors}:
        raise error(
            problem=f"the selector's weights in {name} are not those of {owner}.",
            expected="a module built with the arguments of the one saved.",
            fix="print({name: w.shape for name, w in selector.state_dict().items()})",
        )
    return selector
