"""What files of the kinds "hypersolver" and "bns" hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import (
    HEADER,
    checked,
    damage_reported,
    described_in,
    tensors_under,
)
from torchdiffeq_hyper._rules import (
    FLOATS,
    Choice,
    Items,
    Maybe,
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
    record_of,
    under,
)
from torchdiffeq_hyper.errors import BaseMismatchError
from torchdiffeq_hyper.hypernets._concat import NAMES_OF_INPUTS
from torchdiffeq_hyper.hypernets._files import ARCHITECTURES, UNSEEN, match, pack
from torchdiffeq_hyper.methods._registry import find_tableau
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._fit_report import BreakEven, FitReport

if TYPE_CHECKING:
    from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
    from torchdiffeq_hyper.solvers._solver import Solver
    from torchdiffeq_hyper.solvers.bespoke import BespokeSolver

MOST_STEPS = 1_000_000
"""Steps that a solver can be meant to take between two points."""

_STEPS = Whole(1, MOST_STEPS)


def _is_range(steps: Any) -> bool:
    if not isinstance(steps, list):
        return _STEPS.holds(steps)
    return len(steps) == 2 and all(map(_STEPS.holds, steps)) and steps[0] <= steps[1]


_SPAN = Such(
    Row(Real(), Real()),
    lambda span: span[0] != span[1] and math.isfinite(span[1] - span[0]),
    "that differ",
)
_DIRECTIONS = Such(
    Items(Choice(1, -1), least=1, most=2), lambda signs: len({*signs}) == len(signs), "once each"
)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128")
_DOMAIN = Such(
    record_of(
        FitDomain,
        span=_SPAN,
        dt_min=Real(above=0.0),
        dt_max=Real(above=0.0),
        directions=_DIRECTIONS,
        shapes=Items(Items(Whole(), most=64), least=1, most=1000),
        dtype=Choice(*_DTYPES),
    ),
    lambda domain: (
        domain["dt_min"] <= domain["dt_max"] and (domain["is_tuple"] or len(domain["shapes"]) == 1)
    ),
    "dt_min no larger than dt_max, and one shape where the state is no tuple",
)

_SECONDS = Real(low=0.0)
_MEASURED = Real(low=0.0, is_finite=False)
REPORT = record_of(
    FitReport,
    delta=Table(_MEASURED, required=("0.5", "max")),
    base_delta=Table(_MEASURED, required=("0.5",)),
    seconds=_SECONDS,
    reference_seconds=_SECONDS,
    worst_time=Maybe(Row(Real(), _MEASURED)),
    seed=Whole(-(2**63), 2**64),
    break_even=Maybe(
        record_of(
            BreakEven, predictions=Maybe(_SECONDS), seconds=_SECONDS, alternative_seconds=_SECONDS
        )
    ),
)

_CUSTOM = Record({}, optional={"class": Text(1000), "inputs": NAMES_OF_INPUTS})
_NET = Tagged({**ARCHITECTURES, "custom": _CUSTOM})
_FIT = {"domain": Maybe(_DOMAIN), "report": Maybe(REPORT)}
_HYPERSOLVER = Record(
    {
        **_FIT,
        "base": Text(100),
        "alpha": Maybe(Real(1e-6, 1e6)),
        "steps": Maybe(Value(_is_range, f"{_STEPS.expected}, or [low, high] of two such")),
        "hypernet": _NET,
    },
    optional=HEADER,
)
_BESPOKE = Record(
    {
        **_FIT,
        "base": Choice("bns"),
        "alpha": Choice(None),
        "steps": _STEPS,
        "hypernet": Maybe(_NET),
    },
    optional=HEADER,
)


KIND = "hypersolver"
BNS = "bns"
_PREFIX = "hypernet."
"""What the names of a net's tensors begin with in the file of a bespoke solver."""


def describe_hypersolver(solver: HyperSolver) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a hypersolver's tensors and JSON-ready settings."""
    tensors, description = pack(solver.hypernet)
    return tensors, {
        "base": solver.tableau.name,
        "alpha": solver.tableau.alpha,
        "steps": solver.steps,
        "hypernet": description,
        **_describe_fit(solver),
    }


def describe_bespoke(solver: BespokeSolver) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a bespoke solver's tensors and JSON-ready settings."""
    knots = {name: solver.get_buffer(name) for name in ("knot_values", "knot_slopes")}
    tensors = {"weights": solver.weights.detach(), **knots}
    description = None
    if solver.hypernet is not None:
        packed, description = pack(solver.hypernet)
        tensors |= {_PREFIX + name: tensor for name, tensor in packed.items()}
    return tensors, {
        "base": BNS,
        "alpha": None,
        "steps": len(solver.weights),
        "hypernet": description,
        **_describe_fit(solver),
    }


def _describe_fit(solver: Solver) -> dict[str, Any]:
    return {
        "domain": None if solver.domain is None else solver.domain.to_dict(),
        "report": None if solver.report is None else solver.report.to_dict(),
    }


def _rebuild_fit(settings: Mapping[str, Any]) -> dict[str, Any]:
    domain, report = settings["domain"], settings["report"]
    return {
        "domain": None if domain is None else FitDomain.from_dict(domain),
        "report": None if report is None else FitReport.from_dict(report),
    }


def rebuild_hypersolver(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
    at: str = "",
) -> tuple[dict[str, Any], nn.Module, dict[str, Tensor]]:
    """Return a hypersolver's arguments, its net and the net's weights, not yet loaded.

    The settings lie at a place in a file. Raises what `Solver.rebuild` raises.
    """
    settings = checked(_HYPERSOLVER, metadata, described_in(path), at)
    steps = settings["steps"]
    arguments: dict[str, Any] = {
        "base": settings["base"],
        "alpha": settings["alpha"],
        "steps": tuple(steps) if isinstance(steps, list) else steps,
        **_rebuild_fit(settings),
    }
    with damage_reported(path):
        find_tableau(settings["base"], settings["alpha"])
    net = match(settings["hypernet"], tensors, hypernet, os.fspath(path), under(at, "hypernet"))
    return arguments, net, dict(tensors)


def rebuild_bespoke(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str | os.PathLike[str],
    at: str = "",
) -> tuple[dict[str, Any], nn.Module | None, dict[str, Tensor]]:
    """Return the same of a bespoke solver, which may have no net."""
    what = described_in(path)
    settings = checked(_BESPOKE, metadata, what, at)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
    weights = tensors_under(_PREFIX, tensors)
    checked(_tensors(settings["steps"], own), own, f"a solver in {os.fspath(path)!r}")
    arguments: dict[str, Any] = {
        "weights": own["weights"],
        "knots": (own["knot_values"], own["knot_slopes"]),
        **_rebuild_fit(settings),
    }
    if settings["hypernet"] is not None:
        place = under(at, "hypernet")
        net = match(settings["hypernet"], weights, hypernet, os.fspath(path), place)
        return arguments, net, weights
    checked(Record({}), weights, what, "hypernet")
    if hypernet is not None and hypernet is not UNSEEN:
        raise BaseMismatchError(
            problem=f"{os.fspath(path)!r} holds a solver without a hypernet.",
            expected="no instance to load one into.",
            fix=f"tdh.HyperSolver.load({os.fspath(path)!r})",
        )
    return arguments, None, {}


def _tensors(steps: int, found: Mapping[str, Tensor]) -> Record:
    """Return what the tensors of a solver with so many calls are: of one dtype."""
    dtype = found["weights"].dtype if "weights" in found else torch.float32
    dtypes = (dtype,) if dtype in FLOATS else FLOATS
    rows = {"weights": steps, "knot_values": steps - 1, "knot_slopes": steps + 1}
    return Record({name: TensorOf(dtypes, (n, steps), is_finite=True) for name, n in rows.items()})
