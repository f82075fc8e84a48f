"""y0 and context as held-out samples and a sequence of training batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import overload

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, how_to_batch, map_parts, parts_of, take
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._context import (
    Context,
    Starts,
    check_context_like,
    check_rows,
    many_batches,
    one_batch,
    owned,
)

MOST_HELD_OUT = 2
"""Batches that are held out at most: a validation must cost little beside training."""


class Batches:
    """Training batches by number, and the held-out samples.

    Batches of an iterable are pulled when first asked for and never again: one-shot
    generators work. Numbers beyond the last batch start over.

    Args:
        y0: a tensor, a tuple of tensors, or an iterable of such.
        config: batch size, held-out fraction and seed.
        context: of all samples of one state; "batch" where ``y0`` is an iterable of batches
            (state, *context).

    Attributes:
        held_out: the samples that are not trained on.
        count: samples in ``y0``, or in its first batch.
    """

    def __init__(
        self, y0: State | Iterable[object], config: FitConfig, context: Context = ()
    ) -> None:
        self._most: int | None = None
        self._kept: int | None = None
        has_context = context == "batch"
        self._source: Iterator[Starts]
        if isinstance(y0, Tensor | tuple):
            if context == "batch":
                raise one_batch()
            starts = _checked_starts(y0, context)
            rest, held = _split(starts, config)
            self._source = _chunks(starts, rest, config.batch_size)
            self._pulled = [next(self._source)]
        else:
            if context and not has_context:
                raise many_batches()
            batches = _iterate(y0)
            self._source = (checked_batch(each, has_context=has_context) for each in batches)
            starts = _first(self._source)
            rest, held = _split(starts, config)
            self._pulled = [select(starts, rest)]
        self.count = n_samples(starts)
        self.held_out = select(starts, held)

    def __getitem__(self, number: int) -> Starts:
        """Return a batch."""
        batch = self._pulled[self.position(number)]
        return batch if self._kept is None else _head(batch, self._kept)

    @property
    def size(self) -> int:
        """Number of samples in the first training batch."""
        return n_samples(self[0])

    def keep(self, held_out: int, batch: int) -> None:
        """Keep the first samples only of the held-out state and of each training batch."""
        self.held_out = _head(self.held_out, held_out)
        self._kept = batch

    def limit(self, most: int) -> None:
        """Start over after ``most`` batches, however many there are."""
        self._most = most

    def position(self, number: int) -> int:
        """Return which distinct batch a number stands for, pulling it if it is new."""
        if self._most is not None:
            number %= self._most
        while number >= len(self._pulled):
            batch = next(self._source, None)
            if batch is None:
                return number % len(self._pulled)
            self._pulled.append(_moved_to(batch, self._pulled[0]))
        return number


def checked_batch(batch: object, *, has_context: bool = False) -> Starts:
    """Return a batch, detached, after checking that it is one.

    It is a state, or (state, *context); a list stands for its elements.
    """
    if not has_context:
        return _checked_starts(_unwrapped(batch), ())
    items = batch if isinstance(batch, tuple | list) else (batch,)
    kinds = [type(item).__name__ for item in items]
    if items is not batch or kinds[1:] != ["Tensor"] * max(1, len(kinds) - 1):
        found = f"a {type(batch).__name__} of {', '.join(kinds) or 'nothing'}"
        raise StateTypeError(
            problem=f'context is "batch", and a batch is {found}.',
            expected="(state, *context): a state, itself a tensor or a tuple, and then tensors.",
            fix="DataLoader(TensorDataset(y0, labels), batch_size=256)",
        )
    state, *context = items
    return _checked_starts(_unwrapped(state), tuple(map(owned, context)))


def _checked_starts(state: State, context: tuple[Tensor, ...]) -> Starts:
    StateLayout.of(state)  # refuses what is not a state
    parts = parts_of(state)
    dtype = next((part.dtype for part in parts if part.is_complex()), None)
    if dtype is not None:
        raise StateTypeError(
            problem=f"y0 has dtype {dtype}.",
            expected="a real state: hypernets take real channels.",
            fix="func on torch.view_as_real(y), with real and imaginary parts as channels",
        )
    sizes = {part.shape[0] if part.dim() else None for part in parts}
    if len(sizes) > 1 or None in sizes:
        raise StateShapeError(
            problem=f"y0 has shape{'s' * (len(parts) > 1)} "
            f"{', '.join(str(tuple(part.shape)) for part in parts)}.",
            expected="the samples along dim 0, as many in every part.",
            fix=how_to_batch(state)
            if len(parts) > 1
            else "y0 = torch.stack(starts)   # a fit takes many samples",
        )
    if not any(part.numel() for part in parts):
        raise OptionError(
            problem="y0 is empty.", expected="at least two samples.", fix="y0 = torch.randn(256, 2)"
        )
    check_rows(context, state)
    return Starts(map_parts(owned, state), context)


def _unwrapped(batch: object) -> State:
    """Return the state in a batch: a list stands for its elements."""
    if not isinstance(batch, list):
        return batch  # type: ignore[return-value]
    if len(batch) > 1 and any(_is_integer(part) for part in batch):
        raise StateTypeError(
            problem=f"a batch is a list of {len(batch)} tensors, one of them of integers "
            "(labels?).",
            expected="a list of the state's parts only, or word that the rest is context.",
            fix='tdh.fit(func, loader, ..., context="batch")   # func(t, y, labels)\n'
            "y0 = (batch[0] for batch in loader)          # if func needs no labels",
        )
    return batch[0] if len(batch) == 1 else tuple(batch)


def _is_integer(part: object) -> bool:
    return isinstance(part, Tensor) and not (part.is_floating_point() or part.is_complex())


def _iterate(y0: object) -> Iterator[object]:
    if not isinstance(y0, Iterable):
        raise StateTypeError(
            problem=f"y0 is a {type(y0).__name__}.",
            expected="a tensor, a tuple of tensors, or an iterable of batches.",
            fix="y0 = torch.as_tensor(y0)",
        )
    return iter(y0)


def _first(source: Iterator[Starts]) -> Starts:
    for batch in source:
        return batch
    raise OptionError(
        problem="y0 yields no batch.",
        expected="at least one batch.",
        fix="y0 = [torch.randn(256, 2)]",
    )


def _moved_to(batch: Starts, first: Starts) -> Starts:
    """Return a batch on the device and in the dtype of the first one."""
    check_like(batch, first)
    y0 = map_parts(_to, batch.y0, first.y0)
    return Starts(y0, parts_of(map_parts(_to, batch.context, first.context)))


def _to(part: Tensor, other: Tensor) -> Tensor:
    return part.to(other)


def check_like(batch: Starts, first: Starts) -> Starts:
    """Return a batch after checking that it is built as the first one."""
    shapes, expected = ([tuple(p.shape[1:]) for p in parts_of(s.y0)] for s in (batch, first))
    if shapes != expected or isinstance(batch.y0, tuple) != isinstance(first.y0, tuple):
        raise StateShapeError(
            problem=f"a batch has trailing shapes {shapes}.",
            expected=f"{expected}, as the first batch.",
            fix="batches that differ in their number of samples only",
        )
    check_context_like(batch.context, first.context)
    return batch


def _split(starts: Starts, config: FitConfig) -> tuple[Tensor, Tensor]:
    """Return the positions along dim 0 to train on and those to hold out."""
    count = n_samples(starts)
    if count < 2:
        raise OptionError(
            problem="y0 has a single sample: none would be left to measure the fit on.",
            expected="at least two samples along dim 0, better hundreds.",
            fix="y0 = torch.randn(256, 2)   # starts like those the solver will meet",
        )
    wanted = min(round(config.validation * count), MOST_HELD_OUT * config.batch_size)
    held = min(max(1, wanted), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    return order[held:], order[:held]


def _chunks(starts: Starts, positions: Tensor, size: int) -> Iterator[Starts]:
    """Yield batches of nearly equal sizes, none above ``size``."""
    for index in positions.tensor_split(-(-len(positions) // size)):
        yield select(starts, index)


def _head(starts: Starts, count: int) -> Starts:
    return starts if n_samples(starts) <= count else select(starts, torch.arange(count))


def n_samples(samples: State | Starts) -> int:
    """Return the number of samples."""
    return parts_of(samples.y0 if isinstance(samples, Starts) else samples)[0].shape[0]


@overload
def select(samples: Starts, index: Tensor) -> Starts: ...
@overload
def select(samples: State, index: Tensor) -> State: ...
def select(samples: State | Starts, index: Tensor) -> State | Starts:
    """Return some of the samples, with their context."""
    if isinstance(samples, Starts):
        return Starts(take(samples.y0, index), parts_of(take(samples.context, index)))
    return take(samples, index)
