"""The user's vector field inside calls and models of torchdyn (1.0.6), called as torchdyn does."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from torchdiffeq_hyper._fields._restore import attributes_as_found, own_random_state
from torchdiffeq_hyper._fields._wrappers import (
    ModelField,
    add_models,
    can_restrict,
    look_through,
    look_through_by,
    restrict,
)
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError

ODEINT = "torchdyn.numerics.odeint"
PROBLEMS = "torchdyn.core.problems"
_FIELDS = "torchdyn.core.defunc"


def imported(module: str, name: str) -> Any:
    """Return what a module of torchdyn's calls ``name``; None while it is not imported."""
    return getattr(sys.modules.get(module), name, None)


@dataclass(frozen=True)
class HostCall:
    """One call of torchdyn, seen through the wrapper that negates time and derivative."""

    func: Callable[..., Any]  # as it was given to `odeint`
    t: Tensor  # the true times, decreasing in reverse time
    negated: bool  # whether there is such a wrapper

    @classmethod
    def of(cls, func: Any, t: Tensor) -> HostCall:
        """Look through the wrapper that `odeint` may have put around ``func``."""
        wrappers = ("odeint.<locals>.<lambda>", "odeint_symplectic.<locals>.<lambda>")
        is_function = isinstance(func, FunctionType) and func.__module__ == ODEINT
        if is_function and func.__qualname__ in wrappers:
            return cls(inspect.getclosurevars(func).nonlocals["f"], -t, negated=True)
        return cls(func, t, negated=False)


def as_called(func: VectorField, args: Any, batch: int | None = None) -> VectorField:
    """Return ``func`` of (t, y), called with the ``args`` of `odeint` if it takes them.

    Given the size of the batch, it has a method ``restrict`` if it holds something of each sample.
    """
    try:
        parameters = inspect.signature(getattr(func, "forward", func)).parameters
    except (TypeError, ValueError):  # no signature to look at: builtins
        return func
    named = parameters.get("args")
    takes_args = named is not None and named.kind is not inspect.Parameter.VAR_POSITIONAL
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_args |= bool(args) and inspect.Parameter.VAR_KEYWORD in kinds
    held: list[Held] = []
    if batch is not None and isinstance(func, nn.Module) and not can_restrict(func):
        held = _held_in(func, batch)
    return Field(func, {"args": args} if takes_args else {}, held) if takes_args or held else func


def drops_args(func: Any) -> bool:
    """Return whether ``func`` is a `DEFunc` that keeps ``args`` from the user's field."""
    order, loss = getattr(func, "order", 1), getattr(func, "integral_loss", None)
    return type(func).__module__ == _FIELDS and (order > 1 or loss is not None)


Held: TypeAlias = tuple[nn.Module, str, Tensor | None]
"""A layer, an attribute of it, and its value for each sample; None: only put back after calls."""


def _held_by(held: Sequence[Held], index: Tensor) -> list[Held]:
    """Return what layers hold of the samples at ``index``."""
    return [
        (module, name, None if value is None else value[index.to(value.device)])
        for module, name, value in held
    ]


def _held_in(func: nn.Module, batch: int) -> list[Held]:
    """Return the data control and the noise that layers hold of every sample."""
    held: list[Held] = []
    for part, name in itertools.product(func.modules(), ("_control", "noise")):
        value = getattr(part, name, None)
        if isinstance(value, Tensor) and value.dim() and len(value) == batch:
            held.append((part, name, value))
    # Depth, which layers are told at every call, is put back with the rest.
    depths: list[Held] = [(part, "t", None) for part in func.modules() if hasattr(part, "t")]
    return [*held, *depths] if held else []


class Field:
    """A vector field called as torchdyn does, with what its layers hold during each call."""

    def __init__(self, func: VectorField, given: dict[str, Any], held: Sequence[Held]) -> None:
        self.base_func = func
        self._given = given
        self._held = held
        if held or can_restrict(func):
            self.restrict = lambda index: Field(restrict(func, index), given, _held_by(held, index))

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        before = [getattr(module, name) for module, name, _ in self._held]
        try:
            for module, name, value in self._held:
                if value is not None:
                    setattr(module, name, value)
            return self.base_func(t, y, **self._given)
        finally:
            for (module, name, _), value in zip(self._held, before, strict=True):
                setattr(module, name, value)


class NeuralODEField(ModelField):
    """A `NeuralODE`'s vector field as ``func(t, y)``; solvers attached to the model are found.

    For one start it sets at each call what a solve sets on layers, since solves may be interleaved.
    """

    def __init__(self, model: nn.Module, held: Sequence[Held] | None = None) -> None:
        self.model = model
        self._held = held or ()
        if held is not None:
            self.restrict = lambda index: NeuralODEField(model, _held_by(held, index))

    @property
    def field(self) -> VectorField:
        return cast("VectorField", self.model.vf)

    def check_shareable(self, n_processes: int) -> None:
        noise = [getattr(part, "noise_dist", None) for part in self.model.modules()]
        if n_processes > 1 and any(dist is not None for dist in noise):
            raise OptionError(
                problem=f"func estimates a trace from noise, and {n_processes} processes fit.",
                expected="an exact trace, or a fit in one process.",
                fix="CNF(net, trace_estimator=autograd_trace)",
            )

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        for part, name, value in self._held:
            setattr(part, name, value)
        return self.field(t, y)

    def given(self, y0: State) -> NeuralODEField:
        """Return the field of the solve that starts at ``y0``; refuse tuples."""
        if not isinstance(y0, Tensor):
            raise StateTypeError(
                problem=f"y0 is a {type(y0).__name__}, func is a {type(self.model).__name__}.",
                expected="one tensor: that is what torchdyn solves.",
                fix="y0 = torch.cat(y0, dim=1)",
            )
        y0, model, held = y0.detach(), cast("Any", self.model), []
        # An integral loss and each log-density come before the state proper.
        has_integral = getattr(model, "integral_loss", None) is not None
        excess = int(has_integral and getattr(model, "sensitivity", "") == "autograd")
        for part in model.vf.modules():
            if hasattr(part, "trace_estimator"):
                noise_dist = getattr(part, "noise_dist", None)
                if noise_dist is not None:
                    with own_random_state(0):
                        held.append((part, "noise", noise_dist.sample((len(y0),)).to(y0)))
                excess += 1
            if hasattr(part, "_control"):
                held.append((part, "_control", y0[:, excess:]))
        return NeuralODEField(model, held)

    def as_found(self) -> AbstractContextManager[None]:
        return attributes_as_found(self.model)


def _in_model(model: object) -> NeuralODEField | None:
    """Return the field of a `NeuralODE`, or another `ODEProblem`; None for other objects."""
    kind = imported(PROBLEMS, "ODEProblem")
    return NeuralODEField(model) if kind and isinstance(model, kind) else None


def _in_wrapper(func: object) -> object | None:
    """Return the field inside torchdyn's wrapper if the two are the same; else None."""
    kinds = (imported(_FIELDS, "DEFunc"), imported(_FIELDS, "DEFuncBase"))
    # One that drops args has more states than the field inside.
    return func.vf if type(func) in kinds and not drops_args(func) else None  # type: ignore[attr-defined]


add_models(_in_model)
look_through_by(_in_wrapper)
look_through(Field, "base_func")
look_through(NeuralODEField, "field")
