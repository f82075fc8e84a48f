"""What a file of kind "bns" holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._domain import FitDomain
from torchdiffeq_hyper._files._container import described_in, read, tensors_under, write
from torchdiffeq_hyper._files._nets import UNSEEN, match, pack
from torchdiffeq_hyper._files._rules import BESPOKE, fitted
from torchdiffeq_hyper._report import FitReport
from torchdiffeq_hyper._schema import FLOATS, Record, TensorOf, checked
from torchdiffeq_hyper._types import Hypernet
from torchdiffeq_hyper.errors import BaseMismatchError, explain

BNS = "bns"
_OWN = ("weights", "knot_values", "knot_slopes")
_NET = "hypernet."


class SaveableBespoke(Protocol):
    """What is saved of a bespoke solver."""

    @property
    def weights(self) -> Tensor:
        """The weights, (n, n)."""
        ...

    @property
    def hypernet(self) -> Hypernet | None:
        """The correction at the end, if there is one."""
        ...

    @property
    def domain(self) -> FitDomain | None:
        """What it was fitted for."""
        ...

    @property
    def report(self) -> FitReport | None:
        """What the fit measured."""
        ...

    def get_buffer(self, target: str, /) -> Tensor:
        """Return one of the knots' tensors."""
        ...


def write_bespoke(path: str | os.PathLike[str], solver: SaveableBespoke) -> None:
    """Write a bespoke solver to ``path``.

    Raises:
        StateTypeError: the hypernet is a plain function, or holds more than tensors.
        FileWriteError: the file cannot be written; nothing half-written is left.
    """
    tensors, settings = describe_bespoke(solver)
    write(path, tensors, BNS, settings)


def describe_bespoke(solver: SaveableBespoke) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a bespoke solver's tensors and JSON-ready settings.

    Raises:
        StateTypeError: the hypernet is a plain function, or holds more than tensors.
    """
    tensors = {
        "weights": solver.weights.detach(),
        **{name: solver.get_buffer(name) for name in _OWN[1:]},
    }
    description = None
    if solver.hypernet is not None:
        packed, description = pack(solver.hypernet)
        tensors |= {_NET + name: tensor for name, tensor in packed.items()}
    return tensors, {
        "base": BNS,
        "alpha": None,
        "steps": len(solver.weights),
        "domain": None if solver.domain is None else solver.domain.to_dict(),
        "report": None if solver.report is None else solver.report.to_dict(),
        "hypernet": description,
    }


def read_bespoke(
    path: str | os.PathLike[str], hypernet: nn.Module | None
) -> tuple[dict[str, Any], nn.Module | None, dict[str, Tensor]]:
    """Return a bespoke solver's arguments, its net and the net's weights, not yet loaded.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it cannot be used, or holds a net of one's own and ``hypernet``
            is None.
        BaseMismatchError: ``hypernet`` is given and the file has none, or it is another net.
        StateShapeError: its weights have other shapes.
        StateTypeError: its weights have other dtypes.
    """
    tensors, metadata = read(path, BNS)
    return rebuild_bespoke(metadata, tensors, hypernet, path)


def rebuild_bespoke(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
    at: str = "",
) -> tuple[dict[str, Any], nn.Module | None, dict[str, Tensor]]:
    """Return the same as `read_bespoke` from what `describe_bespoke` gave, at a place in a file."""
    settings = checked(BESPOKE, metadata, described_in(path), at)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_NET)}
    description = settings["hypernet"]
    weights = tensors_under(_NET, tensors)
    checked(_tensors(settings["steps"], own), own, f"a solver in {os.fspath(path)!r}")
    arguments: dict[str, Any] = {
        "weights": own["weights"],
        "knots": (own["knot_values"], own["knot_slopes"]),
        **fitted(settings),
    }
    if description is not None:
        place = f"{at}.hypernet" if at else "hypernet"
        net = match(description, weights, hypernet, os.fspath(path), place)
        return arguments, net, weights
    checked(Record({}), weights, f"the description in {os.fspath(path)!r}", "hypernet")
    if hypernet is not None and hypernet is not UNSEEN:
        raise BaseMismatchError(
            explain(
                f"{os.fspath(path)!r} holds a solver without a hypernet.",
                "no instance to load one into.",
                f"tdh.HyperSolver.load({os.fspath(path)!r})",
            )
        )
    return arguments, None, {}


def _tensors(steps: int, found: Mapping[str, Tensor]) -> Record:
    """Return what the tensors of a solver with so many calls are: of one dtype."""
    dtype = found["weights"].dtype if "weights" in found else torch.float32
    dtypes = (dtype,) if dtype in FLOATS else FLOATS
    rows = {"weights": steps, "knot_values": steps - 1, "knot_slopes": steps + 1}
    return Record({name: TensorOf(dtypes, (n, steps), is_finite=True) for name, n in rows.items()})
