"""What a file of kind "dise" holds: candidates, selector, report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import (
    FLOATS,
    Anything,
    Default,
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
    Whole,
    checked,
    mismatch,
    refused,
    shown,
)
from torchdiffeq_hyper._files._container import HEADER, damage_reported, described_in, tensors_under
from torchdiffeq_hyper._files._container import read as read_file
from torchdiffeq_hyper._files._container import write as write_file
from torchdiffeq_hyper.dise._candidates import Candidate, check_candidates
from torchdiffeq_hyper.dise._report import DiseReport
from torchdiffeq_hyper.dise._training import Scale
from torchdiffeq_hyper.dise.selectors import ARCHITECTURES, ReadySelector, from_architecture
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    FileFormatError,
    MissingHypernetError,
    StateTypeError,
    explain,
)
from torchdiffeq_hyper.hypernets._files import load_weights
from torchdiffeq_hyper.solvers._files import (
    MOST_STEPS,
)
from torchdiffeq_hyper.solvers._solver import Weights, class_described

KIND = "dise"
_SETTINGS = ("steps", "rtol", "atol", "options")
_TOLERANCE = Maybe(Real(low=0.0))
_CANDIDATE = Record(
    {
        "method": Text(100),
        "steps": Maybe(Whole(1, MOST_STEPS)),
        "rtol": _TOLERANCE,
        "atol": _TOLERANCE,
        "options": Table(Anything(is_json=True)),
        "solver": Default(Maybe(Table(Anything())), None),  # checked as it is rebuilt
    }
)
_SECONDS = Real(low=0.0)
DISE = Record(
    {
        "candidates": Items(_CANDIDATE, least=1, most=1000),
        "selector": Tagged("kind", {**ARCHITECTURES, "custom": Record({"class": Text(1000)})}),
        "unit": Row((Real(), Real(above=0.0))),
        "report": Maybe(
            Record(
                {
                    "names": Items(Text(), most=1000),
                    "alpha": Real(above=0.0),
                    "penalty": Real(above=0.0),
                    "losses": Items(Row((Whole(), Real(is_finite=False), Real(is_finite=False)))),
                    "label_seconds": _SECONDS,
                    "seconds": _SECONDS,
                }
            )
        ),
    },
    ignored=tuple(HEADER),
)
"""The description in a file of kind "dise"."""


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
            explain(
                "this Dise has no selector to save.",
                "a fitted one.",
                "dise.fit(func, y0, t, cost=cost)",
            )
        )
    if not isinstance(selector, nn.Module):
        raise StateTypeError(
            explain(
                f"the selector is a {type(selector).__name__}, which has no weights to write.",
                "an nn.Module.",
                "class MySelector(torch.nn.Module):\n    def forward(self, y0): ...",
            )
        )
    tensors = {f"selector.{name}": tensor for name, tensor in selector.state_dict().items()}
    described = []
    for position, candidate in enumerate(candidates):
        settings, weights = _describe(candidate, position)
        described.append(settings)
        tensors |= {f"candidates.{position}.{name}": tensor for name, tensor in weights.items()}
    metadata = {
        "candidates": described,
        "selector": _describe_selector(selector),
        "unit": [unit.shift, unit.scale],
        "report": None if report is None else report.to_dict(),
    }
    if report is not None:
        tensors |= {f"report.{name}": tensor for name, tensor in report.to_tensors().items()}
    write_file(path, tensors, KIND, metadata)


def read(
    path: str | os.PathLike[str],
    selector: nn.Module | None,
    hypernets: Mapping[int, nn.Module],
) -> tuple[tuple[Candidate, ...], nn.Module, Scale, DiseReport | None]:
    """Return what `write` wrote; see `Dise.load`. Weights are loaded once all of it is right."""
    tensors, metadata = read_file(path, KIND)
    what = described_in(path)
    found = checked(DISE, metadata, what)
    with refused(what):
        _check_tensors(tensors, found)
        report = None if found["report"] is None else _report(found, tensors)
    candidates: list[Candidate] = []
    weights: list[Weights] = []
    for position, settings in enumerate(found["candidates"]):
        own = tensors_under(f"candidates.{position}.", tensors)
        candidate, loadable = _rebuild(settings, position, own, hypernets.get(position), path)
        candidates.append(candidate)
        weights += [] if loadable is None else [loadable]
    n_predicted = found["selector"].get("n_candidates", len(candidates))
    if n_predicted != len(candidates):
        with refused(what):
            place, expected = "selector.n_candidates", f"{len(candidates)}, one a candidate"
            raise mismatch(place, n_predicted, expected)
    own = tensors_under("selector.", tensors)
    net = _rebuild_selector(found["selector"], own, selector, path)
    weights.append((net, own, selector is not None))
    with damage_reported(path):
        check_candidates(candidates)
    load_weights(weights, path)
    return tuple(candidates), net, Scale(*map(float, found["unit"])), report


def _check_tensors(tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Refuse tensors that belong to nothing in the description.

    Raises:
        Mismatch: there are some.
    """
    owners = {"selector"} | {
        f"candidates.{position}"
        for position, settings in enumerate(found["candidates"])
        if settings.get("solver") is not None
    }
    owners |= set() if found["report"] is None else {"report"}
    for name in tensors:
        first, _, rest = name.partition(".")
        owner = f"{first}.{rest.partition('.')[0]}" if first == "candidates" else first
        if owner not in owners:
            problem = f"the tensor {name!r} belongs to nothing described."
            raise Mismatch(problem, f"tensors of {', '.join(sorted(owners)[:8])}")


def _report(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DiseReport:
    """Return the report.

    Raises:
        Mismatch: it is none of these candidates' and samples'.
        OptionError: its M is smaller than what a right answer costs.
    """
    n = len(found["candidates"])
    names = Items(Text(), least=n, most=n)
    names.check(found["report"]["names"], "report.names")
    own = tensors_under("report.", tensors)
    batch = own["nfe"].shape[0] if "nfe" in own and own["nfe"].dim() == 2 else None
    integer, real = (torch.int64, torch.int32), FLOATS
    rules = Record(
        {
            "nfe": TensorOf((*integer, *real), (batch, n), is_finite=True),
            "is_right": TensorOf((torch.bool,), (batch, n)),
            "weight": TensorOf((*integer, *real), (batch, n)),
            "selection": _positions(n, batch),
            "held_out": _positions(batch or 0, None),
        }
    )
    report = DiseReport.from_parts(found["report"], rules.check(own, "report"))
    _ = report.costs
    return report


def _positions(n: int, count: int | None) -> Such:
    """Return the rule for a tensor of positions among ``n``."""
    return Such(
        TensorOf((torch.int64,), (count,)),
        lambda index: index.numel() == 0 or 0 <= int(index.min()) <= int(index.max()) < n,
        f"each from 0 to {n - 1}",
    )


def _describe(candidate: Candidate, position: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings = {name: getattr(candidate, name) for name in _SETTINGS}
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise StateTypeError(
            explain(
                f"candidate {position} has options that a file cannot hold: {candidate!r}.",
                "options that are numbers, strings, or lists of them.",
                f'tdh.Candidate("{candidate.method}", rtol=1e-3, atol=1e-3)',
            )
        ) from error
    if candidate.solver is None:
        return {"method": candidate.method, **settings}, {}
    tensors, solver = candidate.solver.describe()
    return {"method": candidate.method, **settings, "solver": solver}, tensors


def _rebuild(
    settings: Mapping[str, Any],
    position: int,
    weights: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
) -> tuple[Candidate, Weights | None]:
    given = {name: settings[name] for name in _SETTINGS}
    described = settings.get("solver")
    if described is None:
        with damage_reported(path):
            return Candidate(settings["method"], **given), None
    net_described = described.get("hypernet")
    kind = net_described.get("kind") if isinstance(net_described, dict) else None
    if kind == "custom" and hypernet is None:
        raise FileFormatError(
            explain(
                f"candidate {position} in {os.fspath(path)!r} has a hypernet of your own, a "
                f"{shown(net_described.get('class'))}; the file holds weights and no code.",
                "an instance of that net to load them into.",
                f"tdh.Dise.load({os.fspath(path)!r}, hypernets={{{position}: net}})",
            )
        )
    at = f"candidates[{position}].solver"
    solver, loading = class_described(described).rebuild(described, weights, hypernet, path, at)
    with refused(described_in(path)):
        if settings["method"] != solver.method:
            place = f"candidates[{position}].method"
            raise mismatch(place, settings["method"], f'"{solver.method}", its solver\'s')
        candidate = Candidate(solver, **given)
    return candidate, loading


def _describe_selector(selector: nn.Module) -> dict[str, Any]:
    if isinstance(selector, ReadySelector):
        return selector.architecture
    kind = type(selector)
    return {"kind": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _rebuild_selector(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    selector: nn.Module | None,
    path: str | os.PathLike[str],
) -> nn.Module:
    is_own = selector is not None
    if selector is None:
        if description.get("kind") == "custom":
            raise FileFormatError(
                explain(
                    f"{os.fspath(path)!r} holds the weights of a selector of your own, a "
                    f"{description.get('class')}, and no code.",
                    "an instance of that module to load them into.",
                    f"tdh.Dise.load({os.fspath(path)!r}, selector=MySelector())",
                )
            )
        _check_finite(tensors, path)
        with torch.device("meta"):
            what = described_in(path)
            selector = from_architecture(description, tensors, what=what, at="selector")
    expected = {name: tensor.shape for name, tensor in selector.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise (BaseMismatchError if is_own else FileFormatError)(
            explain(
                f"the selector's weights in {os.fspath(path)!r} are not those of "
                + ("the instance given." if is_own else "its own description."),
                "a module built with the arguments of the one saved.",
                "print({name: w.shape for name, w in selector.state_dict().items()})",
            )
        )
    return selector


def _check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse weights that no ready selector can have: all of one dtype, and finite."""
    dtypes = {tensor.dtype for tensor in tensors.values()} & {*FLOATS}
    rule = TensorOf(tuple(dtypes)[:1] or FLOATS, is_finite=True)
    for name, tensor in tensors.items():
        checked(rule, tensor, repr(os.fspath(path)), f"the tensor 'selector.{name}'")
