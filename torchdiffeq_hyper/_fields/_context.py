"""Context: what belongs to each sample beside its state, such as labels, controls, noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields._wrappers import look_through, owners_in, registered_in
from torchdiffeq_hyper._state import State, VectorField, parts_of
from torchdiffeq_hyper.errors import CoupledSamplesError, StateShapeError, StateTypeError


class Conditioned(nn.Module):
    """A vector field with inputs of its own for each sample: labels, controls, noise.

    Calls ``func(t, y, *inputs)``. Solvers that work on part of a batch (``"dise"``,
    ``"dopri5_per_sample"``) and `fit` take the same part of the inputs; hypernets that ask
    for them see them as ``step.context``. Costs nothing beside func.

    Args:
        func: called as ``func(t, y, *inputs)``.
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

    def forward(self, t: Tensor, y: State) -> State:
        """Return ``func(t, y, *inputs)``."""
        out: State = self.func(t, y, *self.inputs)
        return out

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


SHAPE_CLASHES = (RuntimeError, ValueError, IndexError, TypeError)
"""What torch raises where shapes do not go together, e.g. in a func of the whole batch only."""

HOW_TO_RESTRICT = (
    "tdh.Conditioned(func, noise)   # calls func(t, y, noise), with the rows of its samples\n"
    "or give func's class the method restrict(self, index) -> func of these samples"
)


def restrict(func: VectorField, index: Tensor) -> VectorField:
    """Return the field of the samples at ``index``; ``func`` itself if it has no ``restrict``."""
    method = _method_of(func)
    if method is None:
        return func
    part: Any = method(index)
    is_of_instance = isinstance(func, MethodType) and getattr(func, "restrict", None) is None
    restricted: VectorField = getattr(part, func.__name__) if is_of_instance else part
    return restricted


def can_restrict(func: VectorField) -> bool:
    """Return whether ``func`` has the method ``restrict``, or is bound to what has it."""
    return _method_of(func) is not None


def _method_of(func: Any) -> Callable[[Tensor], Any] | None:
    owner = func.__self__ if isinstance(func, MethodType) else func
    method = getattr(owner, "restrict", None)
    return method if callable(method) else None


def cannot_take_part(what: str, y0: State) -> StateShapeError | CoupledSamplesError:
    """Return the error about a func that does ``what`` with part of the batch ``y0``."""
    parts = parts_of(y0)
    # A vector (D,) may be a single sample, whose numbers func needs together.
    is_vector = all(part.dim() == 1 for part in parts)
    return (CoupledSamplesError if is_vector else StateShapeError)(
        problem=f"func {what}, part of a batch of {len(parts[0])}.",
        expected="a derivative of the state's own shape for any part of the batch; a func that "
        "holds something of every sample (noise, controls, conditioning) must say which part of "
        "it belongs to which sample.",
        fix=(ways_of_one_sample(y0) if is_vector else "")
        + f"{HOW_TO_RESTRICT}\n"
        + "or, if batch norm in training mode couples the samples: func.eval()",
    )


def ways_of_one_sample(y0: State) -> str:
    """Return the lines to paste where ``y0`` is a single sample, or is to be solved as one."""
    is_tuple = isinstance(y0, tuple)
    one = "tuple(part.unsqueeze(0) for part in y0)" if is_tuple else "y0.unsqueeze(0)"
    return (
        f"y0 = {one}   # if y0 is a single sample: dim 0 counts the samples\n"
        'odeint(func, y0, t, method="dopri5")   # takes the whole batch as one\n'
    )
