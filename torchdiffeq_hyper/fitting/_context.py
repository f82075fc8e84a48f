"""What belongs to each sample of a fit beside its state, and the field of some samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from torchdiffeq_hyper._fields import Conditioned
from torchdiffeq_hyper._state import State, StateLayout, VectorField
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, explain
from torchdiffeq_hyper.fitting._neural_ode import NeuralODEField, check_call, vector_field

Context: TypeAlias = tuple[Tensor, ...] | Literal["batch"]
"""Tensors with the samples along dim 0; or "batch", where each batch brings its own."""


@dataclass(frozen=True)
class Starts:
    """Some samples: where they start, and their context.

    Attributes:
        y0: the state.
        context: tensors with as many samples along dim 0; empty where func takes none.
    """

    y0: State
    context: tuple[Tensor, ...] = ()


def bind(func: VectorField, starts: Starts) -> VectorField:
    """Return the field ``func(t, y)`` of some samples; costs no copy of their context."""
    if isinstance(func, NeuralODEField):
        return func.given(starts.y0)
    return Conditioned(func, *starts.context) if starts.context else func


def split_context(func: VectorField, context: object) -> tuple[VectorField, Context]:
    """Return the field and the context it takes, from a `Conditioned` func or an argument.

    Args:
        func: the vector field, also `Conditioned` or a torchdyn `NeuralODE`.
        context: tensors, "batch" or None.

    Raises:
        StateTypeError: func cannot be called with the context, or this is no tensor.
        StateShapeError: its tensors differ in their number of samples.
        OptionError: it is given twice, an unknown name, or func is a `NeuralODE`.
    """
    if isinstance(func, Conditioned):
        if context is not None:
            raise OptionError(
                explain(
                    "func is a Conditioned, and context is given, too.",
                    "one of the two: they mean the same.",
                    "tdh.fit(func.func, y0, t_span, ..., context=context)",
                )
            )
        context, func = func.inputs, func.func
    checked = _check_context(context)
    field = vector_field(func)
    if checked and isinstance(field, NeuralODEField):
        raise OptionError(
            explain(
                f"context is given, and func is a {type(func).__name__}: torchdyn calls its field "
                "with t and y alone.",
                "the field itself, called as func(t, y, *context).",
                "tdh.fit(net, y0, t_span, ..., context=labels)",
            )
        )
    n_context = 0 if checked == "batch" else len(checked)
    return (field if checked == "batch" else check_call(field, n_context)), checked


def bound(func: VectorField, y0: State, context: object) -> VectorField:
    """Return the field of the samples that start at ``y0``, as `split_context` and `bind`.

    Raises:
        OptionError: ``context`` is "batch": there is one batch.
        StateShapeError: the context has another number of samples than ``y0``.
    """
    field, found = split_context(func, context)
    if found == "batch":
        raise one_batch()
    check_rows(found, y0)
    # What is attached to a Conditioned is found through that very object.
    return func if isinstance(func, Conditioned) else bind(field, Starts(y0, found))


def _check_context(context: object) -> Context:
    if context is None:
        return ()
    if isinstance(context, str):
        if context == "batch":
            return "batch"
        raise OptionError(
            explain(
                f"context is {context!r}.",
                'a tensor or a tuple of tensors; "batch" where each batch of y0 brings its own.',
                'context="batch"',
            )
        )
    parts: Sequence[Any] = context if isinstance(context, tuple | list) else (context,)
    kinds = [type(part).__name__ for part in parts if not isinstance(part, Tensor)]
    if kinds or not parts:
        raise StateTypeError(
            explain(
                f"context {'holds a ' + kinds[0] if kinds else 'is empty'}.",
                "a tensor or a tuple of tensors, with the samples along dim 0.",
                "context=torch.as_tensor(labels)",
            )
        )
    return tuple(owned(part) for part in parts)


def check_rows(context: tuple[Tensor, ...], y0: State) -> None:
    """Refuse a context of other samples than those of a state.

    Raises:
        StateShapeError: a tensor has another number of samples.
        StateTypeError: ``y0`` is no state.
    """
    if not context:
        return
    StateLayout.of(y0)
    first = y0 if isinstance(y0, Tensor) else y0[0]
    if any(part.shape[:1] != first.shape[:1] for part in context):
        shapes = ", ".join(str(tuple(part.shape)) for part in context)
        raise StateShapeError(
            explain(
                f"the context has shape{'s' * (len(context) > 1)} {shapes}, and y0 has "
                f"{len(first) if first.dim() else 'no'} samples.",
                "the samples of y0 along dim 0, in the same order.",
                "context=labels   # of shape (batch, ...)",
            )
        )


def check_context_like(context: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> None:
    """Refuse the context of a batch that is not built as that of the first one.

    Raises:
        StateShapeError: another number of tensors, other trailing shapes or dtypes.
    """
    found, expected = described(context), described(first)
    if found != expected:
        raise StateShapeError(
            explain(
                f"a batch has the context {found} (trailing shapes and dtypes).",
                f"{expected}, as the first batch.",
                "batches that differ in their number of samples only",
            )
        )


def described(context: tuple[Tensor, ...]) -> list[list[Any]]:
    """Return trailing shape and dtype of each tensor, as plain values."""
    return [[list(part.shape[1:]), str(part.dtype)] for part in context]


def context_signature(context: tuple[Tensor, ...]) -> list[list[Any]] | None:
    """Return what tells a fit's context from others; None without, as in older checkpoints."""
    return described(context) or None


def one_batch() -> OptionError:
    """Return the error for "batch" where ``y0`` is one state."""
    return OptionError(
        explain(
            'context is "batch", and y0 is one state (a tensor, or a tuple: a tuple state).',
            "an iterable of batches, each a state and its context; or the context itself.",
            "context=labels\nor y0=[(y0, labels)]   # or a DataLoader that yields such",
        )
    )


def many_batches() -> OptionError:
    """Return the error for one context where ``y0`` is many batches."""
    return OptionError(
        explain(
            "y0 is an iterable of batches, and the context is one for all samples: which rows "
            "belong to which batch cannot be told.",
            'context="batch" with batches (state, *context), and func without them.',
            'tdh.fit(func, loader, t_span, ..., context="batch")',
        )
    )


def owned(part: Tensor) -> Tensor:
    """Return a tensor that can take part in a fit, without gradient."""
    # A tensor made under inference mode cannot take part in a fit; its copy can.
    return part.clone() if part.is_inference() else part.detach()
