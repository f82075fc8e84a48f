"""What may stand for a vector field: a callable ``func(t, y)``, or a model of a host.

A host adds how its models are told and what their field is; fits, evaluation, dise and
look-ups of attached solvers ask here, and know no host.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from torch import Tensor, nn

from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError


class ModelField(ABC):
    """The vector field inside a host's model, as ``func(t, y)``."""

    model: nn.Module
    """The host's model."""

    @property
    @abstractmethod
    def field(self) -> VectorField:
        """What the model solves."""

    @property
    @abstractmethod
    def has_noise(self) -> bool:
        """Whether each solve of the model draws noise at its start."""

    @abstractmethod
    def __call__(self, t: Tensor, y: Tensor) -> Any:
        """Return dy/dt."""

    @abstractmethod
    def given(self, y0: State) -> VectorField:
        """Return the field of the solve that starts at ``y0``.

        Raises:
            StateTypeError: the host solves no such states.
        """

    @abstractmethod
    def as_found(self) -> AbstractContextManager[None]:
        """Give the model's parts back what solves inside the block set on them."""


FieldIn: TypeAlias = Callable[[object], ModelField | None]
"""Returns the field inside a host's model; None for other objects."""

_hosts: list[FieldIn] = []


def add_models(field_in: FieldIn) -> None:
    """Let the models that ``field_in`` knows stand for their vector field."""
    _hosts.append(field_in)


def model_field(func: object) -> ModelField | None:
    """Return the field inside a host's model; None for other objects."""
    for field_in in _hosts:
        field = field_in(func)
        if field is not None:
            return field
    return None


def vector_field(func: VectorField) -> VectorField:
    """Return func, or the field inside it where func is a host's model."""
    return model_field(func) or func


def check_shareable(func: VectorField, n_processes: int) -> None:
    """Refuse to share noise among processes: each would draw its own.

    Raises:
        OptionError: func is a host's model with a noisy trace estimator.
    """
    if n_processes > 1 and isinstance(func, ModelField) and func.has_noise:
        raise OptionError(
            problem=f"func estimates a trace from noise, and {n_processes} processes fit together.",
            expected="an exact trace, or a fit in one process.",
            fix="CNF(net, trace_estimator=autograd_trace)",
        )


def model_as_found(func: object) -> AbstractContextManager[None]:
    """Give a host's model back what its solves set on it; other funcs are left alone."""
    return func.as_found() if isinstance(func, ModelField) else nullcontext()


def check_call(func: VectorField, n_context: int = 0) -> VectorField:
    """Return func after checking that it can be called as ``func(t, y, *context)``.

    Raises:
        StateTypeError: it cannot.
    """
    if not callable(func):
        raise StateTypeError(
            problem=f"func is a {type(func).__name__}.",
            expected="a callable func(t, y).",
            fix="func=model",
        )
    called = func.forward if isinstance(func, nn.Module) else func
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # built-in and scripted functions do not tell
        return func
    try:
        signature.bind("t", "y", *["context"] * n_context)
    except TypeError as error:
        what = f"func takes {signature} and cannot be called as func(t, y"
        if n_context:
            raise StateTypeError(
                problem=f"{what}, *context) with {n_context} "
                f"tensor{'s' * (n_context > 1)} of context: {error}.",
                expected="a vector field that takes the context after t and y.",
                fix="func = lambda t, y, labels: model(y, labels)",
            ) from error
        raise StateTypeError(
            problem=f"{what}): {error}.",
            expected="a vector field func(t, y), or a torchdyn NeuralODE; what else it takes of "
            "each sample is its context.",
            fix="func = lambda t, y: model(y)\n"
            "or func = tdh.Conditioned(func, labels)   # calls func(t, y, labels)",
        ) from error
    return func
