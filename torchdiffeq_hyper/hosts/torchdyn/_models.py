"""Keeps fitted solvers out of torchdyn's models: they are given to a model, not part of it.

torchdyn (1.0.6) assigns ``solver=`` to an attribute, and torch makes a submodule of every
module assigned to another: the solver's weights would be the model's parameters, and
checkpoints of the model would load with this solver only. Ours stay plain attributes. They
follow the model to other devices and dtypes; train and evaluation mode are their own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from torchdiffeq_hyper.errors import HostWarning
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.hosts.torchdyn._stepper import part_classes

_given: list[tuple[type[Any], str]] = []


def put() -> None:
    """Have torchdyn's classes, as far as they are imported, hold our solvers so."""
    for kind, names in _upstream.holders_of_solvers():
        for name, function in _functions(kind, names).items():
            if name not in vars(kind):
                setattr(kind, name, function)
                _given.append((kind, name))


def take_back() -> None:
    """Leave torchdyn's classes as `put` found them; models keep what they hold."""
    while _given:
        delattr(*_given.pop())


def _functions(kind: type[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return what a class of torchdyn's is given to hold solvers under these names."""

    def set_attribute(model: Any, name: str, value: Any) -> None:
        if name in names and _is_ours(value):
            model._modules.pop(name, None)
            object.__setattr__(model, name, value)
        else:
            super(kind, model).__setattr__(name, value)

    def apply(model: Any, *positional: Any, **named: Any) -> Any:
        applied = super(kind, model)._apply(*positional, **named)
        for solver in dict.fromkeys(_held(model, names)):
            solver._apply(*positional, **named)
        return applied

    def load(
        model: Any, state: dict[str, Any], prefix: str, metadata: Any, *others: Any, **named: Any
    ) -> None:
        _take_out_solvers(model, names, state, prefix, metadata)
        super(kind, model)._load_from_state_dict(state, prefix, metadata, *others, **named)

    def set_state(model: Any, state: dict[str, Any]) -> None:
        super(kind, model).__setstate__(state)
        for name in names:  # whole models saved while the solver was part of them
            if _is_ours(model._modules.get(name)):
                set_attribute(model, name, model._modules[name])

    return {
        "__setattr__": set_attribute,
        "__setstate__": set_state,
        "_apply": apply,
        "_load_from_state_dict": load,
    }


def _is_ours(value: object) -> bool:
    return isinstance(value, nn.Module) and isinstance(value, part_classes())


def _held(model: Any, names: Sequence[str]) -> Iterator[nn.Module]:
    for name in names:
        solver = vars(model).get(name)
        if isinstance(solver, nn.Module):
            yield solver


def _take_out_solvers(
    model: Any, names: Sequence[str], state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Take a solver's weights, which older checkpoints hold, out of a model's ``state``.

    The model's own solver gets them if they are such a solver's, as it did when it was
    part of the model.
    """
    left_out = []
    for name in names:
        if name in model._modules and model._modules[name].state_dict():
            continue  # one of torchdyn's own, with weights
        start = f"{prefix}{name}."
        weights = {key: state.pop(key) for key in list(state) if key.startswith(start)}
        own = {key.removeprefix(start): value for key, value in weights.items()}
        solver = vars(model).get(name)
        is_assigned = bool(metadata.get("assign_to_params_buffers", False))
        if own and not (isinstance(solver, nn.Module) and _load(solver, own, assign=is_assigned)):
            left_out += list(weights)
    if left_out:
        warnings.warn(
            f"the checkpoint holds weights of a solver, {left_out[0]} and others, which this "
            "model's solver cannot take: they are left out. A solver is no part of a NeuralODE; "
            "solver.save(path) and tdh.HyperSolver.load(path) keep it.",
            HostWarning,
            stacklevel=2,
        )


def _load(solver: nn.Module, weights: dict[str, Any], *, assign: bool) -> bool:
    try:
        # A load that fails halfway has changed what came before.
        copy.deepcopy(solver).load_state_dict(weights, assign=assign)
    except RuntimeError:
        return False
    solver.load_state_dict(weights, assign=assign)
    return True
