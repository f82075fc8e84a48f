"""What a file of kind "hypersolver" holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from torchdiffeq_hyper._domain import FitDomain
from torchdiffeq_hyper._files._container import damage_reported, described_in, read, write
from torchdiffeq_hyper._files._nets import match, pack
from torchdiffeq_hyper._files._rules import HYPERSOLVER, fitted
from torchdiffeq_hyper._grid import Steps
from torchdiffeq_hyper._registry import find_tableau
from torchdiffeq_hyper._report import FitReport
from torchdiffeq_hyper._schema import checked
from torchdiffeq_hyper._types import Hypernet
from torchdiffeq_hyper.tableaus import Tableau

KIND = "hypersolver"


class Saveable(Protocol):
    """What is saved of a hypersolver."""

    @property
    def tableau(self) -> Tableau:
        """The base method."""
        ...

    @property
    def hypernet(self) -> Hypernet:
        """The correction g."""
        ...

    @property
    def steps(self) -> Steps:
        """Equal steps between two time points."""
        ...

    @property
    def domain(self) -> FitDomain | None:
        """What it was fitted for."""
        ...

    @property
    def report(self) -> FitReport | None:
        """What the fit measured."""
        ...


def write_hypersolver(path: str | os.PathLike[str], solver: Saveable) -> None:
    """Write a hypersolver to ``path``.

    Raises:
        StateTypeError: the hypernet is a plain function, or holds more than tensors.
        FileWriteError: the file cannot be written; nothing half-written is left.
    """
    tensors, settings = describe_hypersolver(solver)
    write(path, tensors, KIND, settings)


def describe_hypersolver(solver: Saveable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a hypersolver's tensors and JSON-ready settings.

    Raises:
        StateTypeError: the hypernet is a plain function, or holds more than tensors.
    """
    tensors, description = pack(solver.hypernet)
    return tensors, {
        "base": solver.tableau.name,
        "alpha": solver.tableau.alpha,
        "steps": solver.steps,
        "domain": None if solver.domain is None else solver.domain.to_dict(),
        "report": None if solver.report is None else solver.report.to_dict(),
        "hypernet": description,
    }


def read_hypersolver(
    path: str | os.PathLike[str], hypernet: nn.Module | None
) -> tuple[dict[str, Any], nn.Module, dict[str, Tensor]]:
    """Return a hypersolver's arguments, its net and the net's weights, not yet loaded.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it cannot be used, or holds a net of one's own and ``hypernet``
            is None.
        BaseMismatchError: ``hypernet`` has other inputs or weights than the net saved.
        StateShapeError: its weights have other shapes.
        StateTypeError: its weights have other dtypes.
    """
    tensors, metadata = read(path, KIND)
    arguments, net = rebuild_hypersolver(metadata, tensors, hypernet, path)
    return arguments, net, tensors


def rebuild_hypersolver(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
    at: str = "",
) -> tuple[dict[str, Any], nn.Module]:
    """Return a hypersolver's arguments and its net from what `describe_hypersolver` gave.

    The weights are not loaded yet; ``at`` is the place in the file. Raises what
    `read_hypersolver` raises of the contents.
    """
    settings = checked(HYPERSOLVER, metadata, described_in(path), at)
    steps = settings["steps"]
    arguments: dict[str, Any] = {
        "base": settings["base"],
        "alpha": settings["alpha"],
        "steps": tuple(steps) if isinstance(steps, list) else steps,
        **fitted(settings),
    }
    with damage_reported(path):
        find_tableau(settings["base"], settings["alpha"])
    place = f"{at}.hypernet" if at else "hypernet"
    return arguments, match(settings["hypernet"], tensors, hypernet, os.fspath(path), place)
