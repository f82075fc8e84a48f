"""What a file of kind "dise" holds: candidates, selector, report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper import _files
from torchdiffeq_hyper.bespoke import BespokeSolver
from torchdiffeq_hyper.dise.candidates import Candidate
from torchdiffeq_hyper.dise.report import DiseReport
from torchdiffeq_hyper.dise.selectors import ReadySelector, from_architecture
from torchdiffeq_hyper.dise.training import Scale
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    FileFormatError,
    MissingHypernetError,
    StateTypeError,
    explain,
)
from torchdiffeq_hyper.hypersolver import HyperSolver

KIND = "dise"
_SETTINGS = ("steps", "rtol", "atol", "options")


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
    _files.write(path, tensors, KIND, metadata)


def read(
    path: str | os.PathLike[str],
    selector: nn.Module | None,
    hypernets: Mapping[int, nn.Module],
) -> tuple[list[Candidate], nn.Module, Scale, DiseReport | None]:
    """Return the contents of a file; see `Dise.load`."""
    tensors, metadata = _files.read(path, KIND)
    with _files.damage_reported(path):
        described = list(metadata["candidates"])
        unit = Scale(*map(float, metadata["unit"]))
        report = metadata["report"]
        if report is not None:
            report = DiseReport.from_parts(report, _under("report", tensors))
    candidates = [
        _rebuild(settings, position, tensors, hypernets.get(position), path)
        for position, settings in enumerate(described)
    ]
    net = _rebuild_selector(metadata["selector"], _under("selector", tensors), selector, path)
    return candidates, net, unit, report


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
    if isinstance(candidate.solver, BespokeSolver):
        tensors, solver = _files.describe_bespoke(candidate.solver)
    else:
        tensors, solver = _files.describe_hypersolver(candidate.solver)
    return {"method": candidate.method, **settings, "solver": solver}, tensors


def _rebuild(
    settings: Mapping[str, Any],
    position: int,
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
) -> Candidate:
    with _files.damage_reported(path):
        given = {name: settings[name] for name in _SETTINGS}
        described = settings.get("solver")
        if described is None:
            return Candidate(str(settings["method"]), **given)
        net_described = described["hypernet"]
        kind = "none" if net_described is None else net_described["kind"]
    if kind == "custom" and hypernet is None:
        raise FileFormatError(
            explain(
                f"candidate {position} in {os.fspath(path)!r} has a hypernet of your own, a "
                f"{described['hypernet'].get('class')}; the file holds weights and no code.",
                "an instance of that net to load them into.",
                f"tdh.Dise.load({os.fspath(path)!r}, hypernets={{{position}: net}})",
            )
        )
    weights = _under(f"candidates.{position}", tensors)
    solver: HyperSolver
    net: nn.Module | None
    if described["base"] == "bns":
        arguments, net, weights = _files.rebuild_bespoke(described, weights, hypernet, path)
        with _files.damage_reported(path):
            solver = BespokeSolver(hypernet=net, **arguments)
    else:
        arguments, net = _files.rebuild_hypersolver(described, weights, hypernet, path)
        with _files.damage_reported(path):
            solver = HyperSolver(hypernet=net, **arguments)
    if net is not None:
        net.load_state_dict(weights, assign=hypernet is None)
    return Candidate(solver, **given)


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
        with torch.device("meta"):
            selector = from_architecture(description)
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
    selector.load_state_dict(tensors, assign=not is_own)
    return selector


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
