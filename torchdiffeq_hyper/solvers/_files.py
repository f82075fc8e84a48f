"""What a file of kind "hypersolver" holds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import (
    FLAG,
    FLOATS,
    Choice,
    Default,
    Either,
    Items,
    Maybe,
    Real,
    Record,
    Row,
    Rule,
    Such,
    Table,
    Tagged,
    TensorOf,
    Text,
    Whole,
    checked,
    record_of,
)
from torchdiffeq_hyper._files._container import (
    HEADER,
    damage_reported,
    described_in,
    tensors_under,
)
from torchdiffeq_hyper._state import Hypernet
from torchdiffeq_hyper.errors import BaseMismatchError, explain
from torchdiffeq_hyper.hypernets._files import UNSEEN, match, pack
from torchdiffeq_hyper.hypernets._select import ARCHITECTURES, NAMES_OF_INPUTS
from torchdiffeq_hyper.methods._registry import find_tableau
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._report import BreakEven, FitReport
from torchdiffeq_hyper.tableaus import Tableau

MOST_STEPS = 1_000_000
"""Steps that a solver can be meant to take between two points."""

STATE_DTYPES = Choice(
    ("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128")
)

_STEPS = Whole(1, MOST_STEPS)
STEPS = Either((_STEPS, Such(Row((_STEPS, _STEPS)), lambda s: s[0] <= s[1], "the first no larger")))

_WIDTH = Such(
    Row((Real(), Real())),
    lambda span: span[0] != span[1] and math.isfinite(span[1] - span[0]),
    "that differ",
)
_SHAPE = Items(Whole(), most=64)
_DIRECTIONS = Such(
    Items(Choice((1, -1)), least=1, most=2), lambda signs: len({*signs}) == len(signs), "once each"
)

DOMAIN = record_of(
    FitDomain,
    span=_WIDTH,
    dt_min=Real(above=0.0),
    dt_max=Real(above=0.0),
    directions=_DIRECTIONS,
    shapes=Items(_SHAPE, least=1, most=1000),
    is_tuple=FLAG,
    dtype=STATE_DTYPES,
).on_condition(
    (lambda domain: domain["dt_min"] <= domain["dt_max"], "dt_min no larger than dt_max"),
    (
        lambda domain: domain["is_tuple"] or len(domain["shapes"]) == 1,
        "one shape where the state is no tuple",
    ),
)

_SECONDS = Real(low=0.0)

REPORT = record_of(
    FitReport,
    delta=Table(Real(low=0.0, is_finite=False), required=("0.5", "max")),
    base_delta=Table(Real(low=0.0, is_finite=False), required=("0.5",)),
    seconds=_SECONDS,
    reference_seconds=_SECONDS,
    worst_time=Maybe(Row((Real(), Real(low=0.0, is_finite=False)))),
    seed=Whole(-(2**63), 2**64),
    break_even=Maybe(
        record_of(
            BreakEven,
            predictions=Maybe(_SECONDS),
            seconds=_SECONDS,
            alternative_seconds=_SECONDS,
        )
    ),
)

CUSTOM = Record({"class": Default(Text(1000)), "inputs": Default(NAMES_OF_INPUTS)})
NET = Tagged("kind", {**ARCHITECTURES, "custom": CUSTOM})

_COMMON: dict[str, Rule | Default] = {"domain": Maybe(DOMAIN), "report": Maybe(REPORT)}

HYPERSOLVER = Record(
    {
        **_COMMON,
        "base": Text(100),
        "alpha": Maybe(Real(1e-6, 1e6)),
        "steps": Maybe(STEPS),
        "hypernet": NET,
    },
    ignored=tuple(HEADER),
)
BESPOKE = Record(
    {
        **_COMMON,
        "base": Choice(("bns",)),
        "alpha": Choice((None,)),
        "steps": _STEPS,
        "hypernet": Maybe(NET),
    },
    ignored=tuple(HEADER),
)


def fitted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the domain and report of a checked description."""
    domain, report = settings["domain"], settings["report"]
    return {
        "domain": None if domain is None else FitDomain.from_dict(domain),
        "report": None if report is None else FitReport.from_dict(report),
    }


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


def rebuild_hypersolver(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
    at: str = "",
) -> tuple[dict[str, Any], nn.Module]:
    """Return a hypersolver's arguments and its net from what `describe_hypersolver` gave.

    The weights are not loaded yet; ``at`` is the place in the file. Raises what
    `Solver.rebuild` raises.
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


def rebuild_bespoke(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
    at: str = "",
) -> tuple[dict[str, Any], nn.Module | None, dict[str, Tensor]]:
    """Return a bespoke solver's arguments, its net and the net's weights, not yet loaded.

    From what `describe_bespoke` gave; the rest as in `rebuild_hypersolver`.
    """
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
