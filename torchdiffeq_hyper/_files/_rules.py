"""What the descriptions of solvers hold: one rule for each field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchdiffeq_hyper._files._container import HEADER
from torchdiffeq_hyper._domain import FitDomain
from torchdiffeq_hyper._report import BreakEven, FitReport
from torchdiffeq_hyper._schema import (
    FLAG,
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
    Text,
    Whole,
    record_of,
)
from torchdiffeq_hyper.hypernets._select import ARCHITECTURES, NAMES_OF_INPUTS

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
