"""y0 and context as held-out samples and a sequence of training batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._answers import check_call
from torchdiffeq_hyper._fields._wrappers import Conditioned, ModelField, model_field
from torchdiffeq_hyper._state import (
    State,
    StateLayout,
    VectorField,
    check_samples_first,
    how_to_batch,
    map_parts,
    parts_of,
    take,
)
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError
from torchdiffeq_hyper.fitting._config import FitConfig

Context: TypeAlias = tuple[Tensor, ...] | Literal["batch"]
"""Tensors with the samples along dim 0; or "batch", where each batch brings its own."""

MOST_HELD_OUT = 2  # batches that are held out at most: a validation must cost little


@dataclass(frozen=True)
class Starts:
    """Some samples: the state they start at, and their context (empty where func takes none)."""

    y0: State
    context: tuple[Tensor, ...] = ()


def n_samples(samples: State | Starts) -> int:
    """Return the number of samples."""
    return len(parts_of(samples.y0 if isinstance(samples, Starts) else samples)[0])


def select(starts: Starts, index: Tensor) -> Starts:
    """Return some of the samples, with their context."""
    return Starts(take(starts.y0, index), parts_of(take(starts.context, index)))


def head(starts: Starts, count: int) -> Starts:
    """Return the first samples, at most ``count``."""
    return starts if n_samples(starts) <= count else select(starts, torch.arange(count))


def bind(func: VectorField, starts: Starts) -> VectorField:
    """Return the field ``func(t, y)`` of some samples; costs no copy of their context."""
    if isinstance(func, ModelField):
        return func.given(starts.y0)
    return Conditioned(func, *starts.context) if starts.context else func


class Batches:
    """Training batches by number, which start over behind the last, and the held-out samples.

    Batches of an iterable are pulled when first asked for and never again: one-shot
    generators work.
    """

    def __init__(
        self, y0: State | Iterable[object], config: FitConfig, context: Context = ()
    ) -> None:
        self.most = sys.maxsize  # batches after which to start over, however many there are
        self._in_batch = sys.maxsize
        is_one = isinstance(y0, Tensor | tuple)
        later = iter([_checked_starts(y0, context)]) if is_one else _checked_batches(y0, context)
        starts = next(later)
        self.count = n_samples(starts)  # in y0, or in its first batch
        most = MOST_HELD_OUT * config.batch_size
        rest, held = split(self.count, config.validation, most, config.seed)
        size = config.batch_size if is_one else len(rest)
        chunks = rest.tensor_split(math.ceil(len(rest) / size))
        self._source = chain((select(starts, index) for index in chunks), later)
        self._pulled = [next(self._source)]
        self.held_out = select(starts, held)

    def __getitem__(self, number: int) -> Starts:
        """Return a batch."""
        return head(self._pulled[self.position(number)], self._in_batch)

    def keep(self, held_out: int, batch: int) -> None:
        """Keep the first samples only of the held-out state and of each training batch."""
        self.held_out = head(self.held_out, held_out)
        self._in_batch = batch

    def position(self, number: int) -> int:
        """Return which distinct batch a number stands for, pulling it if it is new."""
        number %= self.most
        while number >= len(self._pulled):
            batch = next(self._source, None)
            if batch is None:
                return number % len(self._pulled)
            first = self._pulled[0]
            check_like(batch, first)
            y0 = map_parts(Tensor.to, batch.y0, first.y0)  # on its device and in its dtype
            context = map_parts(Tensor.to, batch.context, first.context)
            self._pulled.append(Starts(y0, parts_of(context)))
        return number


def split(count: int, share: float, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return positions among ``count`` samples: those to train on, and a share to hold out."""
    if count < 2:
        raise OptionError(
            problem=f"y0 has {count} sample{'s' * (count != 1)}: none is left to measure a fit on.",
            expected="at least two samples along dim 0, better hundreds.",
            fix="y0 = torch.randn(256, 2)   # starts like those that will be met",
        )
    held = min(max(1, min(round(share * count), most)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:], order[:held]


def _checked_batches(y0: object, context: Context) -> Iterator[Starts]:
    if context and context != "batch":
        raise many_batches()
    if not isinstance(y0, Iterable):
        raise StateTypeError(
            problem=f"y0 is a {type(y0).__name__}.",
            expected="a tensor, a tuple of tensors, or an iterable of batches.",
            fix="y0 = torch.as_tensor(y0)",
        )
    batch = None
    for batch in y0:
        yield checked_batch(batch, has_context=context == "batch")
    if batch is None:
        raise OptionError(
            problem="y0 yields no batch.",
            expected="at least one batch.",
            fix="y0 = [torch.randn(256, 2)]",
        )


def checked_batch(batch: Any, *, has_context: bool = False) -> Starts:
    """Return a state or (state, *context), checked and detached; a list stands for its elements."""
    state, context = batch, []
    if has_context:
        items = batch if isinstance(batch, tuple | list) else (batch,)
        kinds = [type(item).__name__ for item in items]
        if items is not batch or kinds[1:] != ["Tensor"] * max(1, len(kinds) - 1):
            found = f"a {type(batch).__name__} of {', '.join(kinds) or 'nothing'}"
            raise StateTypeError(
                problem=f'context is "batch", and a batch is {found}.',
                expected="(state, *context): a state (a tensor or a tuple), and then tensors.",
                fix="DataLoader(TensorDataset(y0, labels), batch_size=256)",
            )
        state, *context = batch
    if isinstance(state, list):
        tensors = [part for part in state if isinstance(part, Tensor)]
        if len(state) > 1 and not all(p.is_floating_point() or p.is_complex() for p in tensors):
            raise StateTypeError(
                problem=f"a batch is a list of {len(state)} tensors, one of integers (labels?).",
                expected="a list of the state's parts only, or word that the rest is context.",
                fix='tdh.fit(func, loader, ..., context="batch")   # func(t, y, labels)\n'
                "y0 = (batch[0] for batch in loader)          # if func needs no labels",
            )
        state = state[0] if len(state) == 1 else tuple(state)
    return _checked_starts(state, tuple(map(_owned, context)))


def _checked_starts(state: Any, context: Context) -> Starts:
    rows = _checked_rows(context, state)
    StateLayout.of(state)  # refuses what is not a state
    parts = parts_of(state)
    if any(part.is_complex() for part in parts):
        raise StateTypeError(
            problem=f"y0 has dtype {', '.join(str(part.dtype) for part in parts)}.",
            expected="a real state: hypernets take real channels.",
            fix="func on torch.view_as_real(y), with real and imaginary parts as channels",
        )
    fix = how_to_batch(state) if len(parts) > 1 else "y0 = torch.stack(starts)"
    check_samples_first(state, fix)
    if not any(part.numel() for part in parts):
        raise OptionError(
            problem="y0 is empty.", expected="at least two samples.", fix="y0 = torch.randn(256, 2)"
        )
    return Starts(map_parts(_owned, state), rows)


def _owned(part: Tensor) -> Tensor:
    """Return a tensor that can take part in a fit, without gradient."""
    # A tensor made under inference mode cannot take part in a fit; its copy can.
    return part.clone() if part.is_inference() else part.detach()


def check_like(batch: Starts, first: Starts) -> None:
    """Refuse a batch that is not built as the first one."""
    found, wanted = (_built(starts) for starts in (batch, first))
    if found != wanted:
        raise StateShapeError(
            problem=f"a batch has {found}.",
            expected=f"{wanted}, as the first batch.",
            fix="batches that differ in their number of samples only",
        )


def _built(starts: Starts) -> str:
    """Return what the batches of a fit have in common, for people."""
    shapes = [tuple(part.shape[1:]) for part in parts_of(starts.y0)]
    kind = "a tuple of" if isinstance(starts.y0, tuple) else "the"
    context = context_signature(starts.context)
    more = f" and the context {context}, with dtypes" if context else ""
    return f"{kind} trailing shapes {shapes}{more}"


def context_signature(context: tuple[Tensor, ...]) -> list[list[Any]] | None:
    """Return trailing shape and dtype of each tensor, as plain values; None without context."""
    return [[list(part.shape[1:]), str(part.dtype)] for part in context] or None


def split_context(func: VectorField, context: object) -> tuple[VectorField, Context]:
    """Return the field and the context it takes, from a `Conditioned` func or an argument."""
    if isinstance(func, Conditioned):
        if context is not None:
            raise OptionError(
                problem="func is a Conditioned, and context is given, too.",
                expected="one of the two: they mean the same.",
                fix="tdh.fit(func.func, y0, t_span, ..., context=context)",
            )
        context, func = func.inputs, func.func
    checked = _checked_context(context)
    model = model_field(func)
    if checked and model is not None:
        raise OptionError(
            problem="context is given, and torchdyn calls its field with t and y alone.",
            expected="the field itself, called as func(t, y, *context).",
            fix="tdh.fit(net, y0, t_span, ..., context=labels)",
        )
    field = model or func
    # How many tensors a batch brings is only known once there is one.
    return (field if checked == "batch" else check_call(field, len(checked))), checked


def bound(func: VectorField, y0: State, context: object) -> VectorField:
    """Return the field of the samples that start at ``y0``, with their context checked."""
    field, found = split_context(func, context)
    starts = Starts(y0, _checked_rows(found, y0))
    # What is attached to a Conditioned is found through that very object.
    return func if isinstance(func, Conditioned) else bind(field, starts)


def _checked_context(context: object) -> Context:
    if context is None:
        return ()
    if isinstance(context, str):
        if context == "batch":
            return "batch"
        raise OptionError(
            problem=f"context is {context!r}.",
            expected='a tensor or a tuple of tensors; "batch" where batches bring their own.',
            fix='context="batch"',
        )
    parts: Sequence[Any] = context if isinstance(context, tuple | list) else (context,)
    kinds = [type(part).__name__ for part in parts if not isinstance(part, Tensor)]
    if kinds or not parts:
        raise StateTypeError(
            problem=f"context {'holds a ' + kinds[0] if kinds else 'is empty'}.",
            expected="a tensor or a tuple of tensors, with the samples along dim 0.",
            fix="context=torch.as_tensor(labels)",
        )
    return tuple(map(_owned, parts))


def _checked_rows(context: Context, y0: State) -> tuple[Tensor, ...]:
    """Return the context of one state, after checking that it is of as many samples."""
    if isinstance(context, str):
        raise OptionError(
            problem='context is "batch", and y0 is one state (a tensor or a tuple: a tuple state).',
            expected="an iterable of batches, each a state and its context; or the context itself.",
            fix="context=labels\nor y0=[(y0, labels)]   # or a DataLoader that yields such",
        )
    if not context:
        return context
    StateLayout.of(y0)  # refuses what is not a state
    first = parts_of(y0)[0]
    if any(part.shape[:1] != first.shape[:1] for part in context):
        shapes = ", ".join(str(tuple(part.shape)) for part in context)
        count = len(first) if first.dim() else "no"
        raise StateShapeError(
            problem=f"the context is of shape {shapes}, and y0 has {count} samples.",
            expected="the samples of y0 along dim 0, in the same order.",
            fix="context=labels   # of shape (batch, ...)",
        )
    return context


def many_batches() -> OptionError:
    """Return the error for one context where ``y0`` is many batches."""
    return OptionError(
        problem="y0 is an iterable of batches, and the context does not say which rows are whose.",
        expected='context="batch" with batches (state, *context), and func without them.',
        fix='tdh.fit(func, loader, t_span, ..., context="batch")',
    )
