"""What wraps a vector field: `Conditioned`, wrappers that change nothing, a host's model.

Wrappers are known by their type, which is registered here: a user's module may call what it
holds as ``module`` or ``func`` and return something else.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import FunctionType, MethodType, MethodWrapperType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import StateShapeError, StateTypeError


class ModelField(ABC):
    """The vector field inside a host's ``model``, as ``func(t, y)``."""

    model: nn.Module

    @property
    @abstractmethod
    def field(self) -> VectorField:
        """What the model solves."""

    @abstractmethod
    def check_shareable(self, n_processes: int) -> None:
        """Refuse a fit by several processes, if each solve draws noise at its start."""

    @abstractmethod
    def __call__(self, t: Tensor, y: Tensor) -> Any:
        """Return dy/dt."""

    @abstractmethod
    def given(self, y0: State) -> VectorField:
        """Return the field of the solve that starts at ``y0``."""

    @abstractmethod
    def as_found(self) -> AbstractContextManager[None]:
        """Give the model's parts back what solves inside the block set on them."""


_hosts: list[Callable[[object], ModelField | None]] = []


def add_models(field_in: Callable[[object], ModelField | None]) -> None:
    """Let the models that ``field_in`` returns the field of stand for that field."""
    _hosts.append(field_in)


def model_field(func: object) -> ModelField | None:
    """Return the field inside a host's model; None for other objects."""
    return next((field for field_in in _hosts if (field := field_in(func)) is not None), None)


def check_shareable(func: VectorField, n_processes: int) -> None:
    """Refuse to share a host's model among processes if each would draw its own noise."""
    if isinstance(func, ModelField):
        func.check_shareable(n_processes)


_attributes: dict[type, tuple[str, ...]] = {}
_looks: list[Callable[[object], object | None]] = []


def look_through(wrapper: type, *attributes: str) -> None:
    """Let look-ups go from objects of a class, if called as its own are, to ``attributes``."""
    _attributes[wrapper] = attributes


def look_through_by(look: Callable[[object], object | None]) -> None:
    """Let look-ups go to what ``look`` says is inside: for types that are not imported yet."""
    _looks.append(look)


class Owner(NamedTuple):
    """What a solver is attached to: an object, or the function of a bound method of it."""

    target: object
    function: object | None


def owner_of(func: object) -> Owner:
    """Return what ``func`` is to attachments; a model of a host stands for its field."""
    if isinstance(func, MethodType):
        target = func.__self__
        # `super().forward` has the name, and is another method.
        if all(func != getattr(target, name, None) for name in ("forward", "__call__")):
            return Owner(target, func.__func__)
        func = target
    elif isinstance(func, MethodWrapperType) and func.__name__ == "__call__":
        func = func.__self__  # of a function or a partial, made anew at every access
    model = model_field(func)
    return Owner(func if model is None else model.field, None)


def owners_in(func: object) -> Iterator[Owner]:
    """Yield what ``func`` is to attachments, then what is inside it, from the outermost on."""
    seen: set[tuple[int, int]] = set()
    pending = [func]
    while pending:
        owner = owner_of(pending.pop(0))
        key = id(owner.target), id(owner.function)
        if key in seen:
            continue
        seen.add(key)
        yield owner
        if owner.function is None:
            inside = _registered(owner.target) or [look(owner.target) for look in _looks]
            pending.extend(item for item in inside if item is not None)


def registered_in(func: object) -> Iterator[object]:
    """Yield ``func`` and what is inside it, as far as wrappers of registered types go."""
    # For calls that are compiled: what hosts know depends on the modules imported, and a
    # compiled call that looks at these is compiled anew after every import.
    pending = [func]
    while pending:
        current = pending.pop(0)
        yield current
        pending.extend(item for item in _registered(current) if item is not None)


def _registered(wrapper: Any) -> Sequence[object | None]:
    """Return what a wrapper of a registered type holds; nothing of others."""
    kind, calls = type(wrapper), ("__call__", "forward")
    if "forward" in getattr(wrapper, "__dict__", ()):
        return []
    for known in kind.__mro__:
        if known in _attributes and all(
            getattr(kind, name, None) is getattr(known, name, None) for name in calls
        ):
            return [getattr(wrapper, name, None) for name in _attributes[known]]
    return []


def _of_partial(func: object) -> object | None:
    # One with arguments is another field.
    is_plain = type(func) is partial and not func.args and not func.keywords
    return func.func if is_plain else None  # type: ignore[attr-defined]


def _of_compiled(func: object) -> object | None:
    """Return what `torch.compile` was given (checked against torch 2.4 to 2.13)."""
    # torch imports its compiler, which takes seconds, when it is asked for one.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return None
    if type(func) is compiler.OptimizedModule:
        return getattr(func, "_orig_mod", None)
    # `functools.wraps` copies attributes to the user's functions, but not where these are from.
    if not isinstance(func, FunctionType):
        return None
    name = func.__globals__.get("__name__")
    if name == compiler.__name__:
        return getattr(func, "_torchdynamo_orig_callable", None)
    # Callable objects are put into one more function.
    is_inline = name == "torch._dynamo.external_utils"
    return getattr(func, "__wrapped__", None) if is_inline else None


look_through(nn.DataParallel, "module")
look_through(DistributedDataParallel, "module")
look_through_by(_of_partial)
look_through_by(_of_compiled)


class Conditioned(nn.Module):
    """A vector field with inputs of its own for each sample: labels, controls, noise.

    Solvers that work on part of a batch (``"dise"``, ``"dopri5_per_sample"``) and `fit` take the
    same part of the inputs; hypernets that ask for them see them as ``step.context``.

    Args:
        func: called as ``func(t, y, *inputs)``, at no further cost.
        inputs: tensors of any dtype with the samples along dim 0, as many in each. They are
            no part of the state_dict, and gradients flow into them.

    Raises:
        StateTypeError: ``func`` is not callable, or an input is not a tensor.
        StateShapeError: the inputs differ in their number of samples.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> rate = torch.tensor([[1.0], [2.0], [3.0]])
        >>> func = tdh.Conditioned(lambda t, y, rate: -rate * y, rate)
        >>> func.restrict(torch.tensor([2]))(torch.tensor(0.0), torch.ones(1, 1))
        tensor([[-3.]])
    """

    def __init__(self, func: Callable[..., Any], *inputs: Tensor) -> None:
        super().__init__()
        if not callable(func) or not all(isinstance(item, Tensor) for item in inputs):
            kinds = ", ".join(type(item).__name__ for item in (func, *inputs))
            raise StateTypeError(
                problem=f"Conditioned got {kinds}.",
                expected="a callable func(t, y, *inputs) and its tensors.",
                fix="tdh.Conditioned(func, noise)",
            )
        sizes = {item.shape[:1] for item in inputs}
        if len(sizes) != 1 or not sizes.pop():
            raise StateShapeError(
                problem=f"the inputs have shapes {[tuple(item.shape) for item in inputs]}.",
                expected="at least one input; the samples along dim 0, as many in each.",
                fix="tdh.Conditioned(func, noise)   # noise of shape (batch, ...)",
            )
        self.func = func
        self.inputs = inputs

    def forward(self, t: Tensor, y: State) -> Any:
        """Return ``func(t, y, *inputs)``."""
        return self.func(t, y, *self.inputs)

    def restrict(self, index: Tensor) -> Conditioned:
        """Return the field of the samples at ``index``; func and its weights are shared."""
        part = copy.copy(self)
        part.inputs = tuple(item[index.to(item.device)] for item in self.inputs)
        return part


look_through(Conditioned, "func")


def context_of(func: VectorField) -> tuple[Tensor, ...]:
    """Return the inputs of the `Conditioned` inside func; none where there is no such wrapper."""
    is_compiling = torch.compiler.is_compiling()
    found = registered_in(func) if is_compiling else (o.target for o in owners_in(func))
    return next((item.inputs for item in found if isinstance(item, Conditioned)), ())


SHAPE_CLASHES = (RuntimeError, ValueError, IndexError, TypeError)  # as torch raises them

HOW_TO_RESTRICT = (
    "tdh.Conditioned(func, noise)   # calls func(t, y, noise), with the rows of its samples\n"
    "or give func's class the method restrict(self, index) -> func of these samples"
)


def restrict(func: VectorField, index: Tensor) -> VectorField:
    """Return the field of the samples at ``index``; ``func`` itself if it has no ``restrict``."""
    if not can_restrict(func):
        return func
    owner: Any = getattr(func, "__self__", func)
    part: VectorField = owner.restrict(index)
    return getattr(part, func.__name__) if isinstance(func, MethodType) else part


def can_restrict(func: VectorField) -> bool:
    """Return whether ``func`` has the method ``restrict``, or is bound to what has it."""
    return callable(getattr(getattr(func, "__self__", func), "restrict", None))
