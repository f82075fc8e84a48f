"""What the state of a running fit may be when it is read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

from torchdiffeq_hyper._files import (
    FLAG,
    FLOATS,
    Anything,
    Choice,
    Either,
    Items,
    Maybe,
    Mismatch,
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
    check_sizes,
    mismatch,
    missing,
    refused,
)
from torchdiffeq_hyper.hypernets._files import ARCHITECTURES
from torchdiffeq_hyper.solvers._files import REPORT

_MOMENT = TensorOf(FLOATS, is_finite=True)
ADAMW = Record(
    {
        "state": Table(
            Record({"step": _MOMENT, "exp_avg": _MOMENT, "exp_avg_sq": _MOMENT}), keys=int
        ),
        "param_groups": Items(Table(Anything())),
    }
)
"""The state of the optimizer of a net."""
_SQUARE = TensorOf((torch.float64,), (None, None))
GAUSS_NEWTON = Record(
    {
        "number": Whole(),
        "damping": Real(above=0.0),
        "count": Whole(1),
        "position": Whole(),
        "recent": Items(Whole()),
        "memory": Items(Row((_SQUARE, TensorOf((torch.float64,), (None,)))), most=1),
        "mark": Real(is_finite=False),
    }
)
"""The state of the descent of a bespoke solver's weights."""

CHOICE = Record({"architecture": Tagged("kind", ARCHITECTURES), "note": Text()})
_TOLERANCE = Real(above=0.0)
REFERENCES = Record(
    {
        "tolerances": Record({"method": Text(100), "rtol": _TOLERANCE, "atol": _TOLERANCE}),
        "held_out": Whole(1),
        "batch": Whole(1),
        "has_noise": FLAG,
        "note": Text(),
    }
)
"""What is solved, and how exactly."""
_RANDOM = TensorOf((torch.uint8,), (None,))

RULES: dict[str, Rule] = {
    "optimizer": Maybe(Either((GAUSS_NEWTON, ADAMW))),
    "random": Items(_RANDOM, most=1025),
    "most_batches": Whole(1),
    "report": Maybe(REPORT),
    "choice": Maybe(CHOICE),
    "landing": Maybe(Whole(1)),
    "references": Maybe(REFERENCES),
    "fallback": Choice(("", "weights", "start")),
    "seconds": Real(low=0.0),
}
"""Rules of fields of a `FitState`; the others' come from their annotations."""


def check_state(values: Mapping[str, Any], signature: Mapping[str, Any]) -> None:
    """Refuse a state that is not of this fit, or that no fit can be in.

    Args:
        values: the fields of a `FitState`, each checked by its own rule.
        signature: what tells this fit from others; the shapes of its weights among it.

    Raises:
        Mismatch: it is no state of this fit.
    """
    shapes = signature.get("weights", signature.get("hypernet"))
    for place in ("net", "best"):
        tensors, name = values[place], f"state.{place}"
        if isinstance(shapes, dict):
            _weights_of(shapes).check(tensors, name)
    choice = values.get("choice")
    if isinstance(shapes, str):  # the name of a way to choose a net
        if choice is None and values.get("report") is not None:
            raise missing(name="state.choice", expected="the net that was chosen")
        if choice is not None:
            at = "state.choice.architecture"
            no_sizes = ("n_stages", "order")
            check_sizes(choice["architecture"], values["best"], at, but=no_sizes)
    if values.get("phase", 0) > len(values.get("planned", ())):
        expected = "a phase that was planned"
        raise mismatch(name="state.phase", value=values["phase"], expected=expected)
    if values.get("phase_start", 0) > values.get("iteration", 0):
        start, expected = values["phase_start"], "no more than the iterations"
        raise mismatch(name="state.phase_start", value=start, expected=expected)
    _check_random(values.get("random", []))


def _weights_of(shapes: Mapping[str, list[Any]]) -> Record:
    """Return the rule for weights of known shapes and dtypes."""
    rules: dict[str, Any] = {}
    for name, (*shape, dtype) in shapes.items():
        rules[name] = TensorOf((getattr(torch, dtype.removeprefix("torch.")),), tuple(shape))
    return Record(rules)


def _check_random(states: list[Tensor]) -> None:
    """Refuse states that the generators would not take."""
    if not states:
        return
    try:
        torch.Generator().set_state(states[0])
    except (RuntimeError, TypeError) as error:
        expected = "a generator's state"
        raise mismatch(name="state.random[0]", value=states[0], expected=expected) from error


def restore(optimizer: optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give an optimizer the state that was saved; its settings stay those of this fit.

    Raises:
        FileFormatError: it is that of other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with refused("the checkpoint"):
        checked_state = ADAMW.check(saved, "state.optimizer")["state"]
        for number, entry in checked_state.items():
            at = f"state.optimizer.state[{number}]"
            if not 0 <= number < len(parameters):
                problem = f"{at} belongs to no parameter."
                raise Mismatch(problem, f"positions of {len(parameters)} parameters")
            shape = tuple(parameters[number].shape)
            for name in ("exp_avg", "exp_avg_sq"):
                TensorOf(FLOATS, shape).check(entry[name], f"{at}.{name}")
            Such(TensorOf(FLOATS, ()), lambda step: float(step) >= 1, "of at least 1").check(
                entry["step"], f"{at}.step"
            )
    optimizer.load_state_dict({"state": dict(saved["state"]), "param_groups": own})
