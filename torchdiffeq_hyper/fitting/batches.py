"""y0 as a held-out state and a sequence of training batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import StateLayout, how_to_batch
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, explain
from torchdiffeq_hyper.fitting.config import FitConfig

MOST_HELD_OUT = 2
"""Batches that are held out at most: a validation must cost little beside training."""


class Batches:
    """Training batches by number, and the held-out state.

    Batches of an iterable are pulled when first asked for and never again: one-shot
    generators work. Numbers beyond the last batch start over.

    Args:
        y0: a tensor, a tuple of tensors, or an iterable of such.
        config: batch size, held-out fraction and seed.

    Raises:
        OptionError: no batch, an empty one, or one of a single sample.
        StateTypeError: a batch is not a real floating-point state.
        StateShapeError: parts of a tuple state differ in their number of samples.
    """

    def __init__(self, y0: State | Iterable[object], config: FitConfig) -> None:
        self._most: int | None = None
        generator = torch.Generator().manual_seed(config.seed)
        if isinstance(y0, Tensor | tuple):
            state = checked_batch(y0)
            rest, held = _split(state, config, generator)
            self._source: Iterator[object] = _chunks(state, rest, config.batch_size)
            self._pulled = [_first(self._source)]
        else:
            self._source = _iterate(y0)
            state = _first(self._source)
            rest, held = _split(state, config, generator)
            self._pulled = [select(state, rest)]
        self.held_out = select(state, held)

    def __getitem__(self, number: int) -> State:
        """Return a batch."""
        return self._pulled[self.position(number)]

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
            self._pulled.append(_like(checked_batch(batch), self._pulled[0]))
        return number


def checked_batch(batch: object) -> State:
    """Return a batch as a detached state, after checking that it is one.

    Raises:
        OptionError: it is empty.
        StateTypeError: it is not a real floating-point state.
        StateShapeError: parts of a tuple state differ in their number of samples.
    """
    state = _unwrapped(batch)
    layout = StateLayout.of(state)  # refuses what is not a state
    parts = state if isinstance(state, tuple) else (state,)
    if any(part.is_complex() for part in parts):
        raise StateTypeError(
            explain(
                f"y0 has dtype {next(p.dtype for p in parts if p.is_complex())}.",
                "a real state: hypernets take real channels.",
                "func on torch.view_as_real(y), with real and imaginary parts as channels",
            )
        )
    sizes = {part.shape[0] if part.dim() else None for part in parts}
    if len(sizes) > 1 or None in sizes:
        raise StateShapeError(
            explain(
                f"y0 has shape{'s' * (len(parts) > 1)} "
                f"{', '.join(str(tuple(part.shape)) for part in parts)}.",
                "the samples along dim 0, as many in every part.",
                how_to_batch(state)
                if len(parts) > 1
                else "y0 = torch.stack(starts)   # a fit takes many samples",
            )
        )
    if layout.join(state).numel() == 0:
        raise OptionError(
            explain("y0 is empty.", "at least two samples.", "y0 = torch.randn(256, 2)")
        )
    return tuple(_owned(part) for part in state) if isinstance(state, tuple) else _owned(state)


def _owned(part: Tensor) -> Tensor:
    # A tensor made under inference mode cannot take part in a fit; its copy can.
    return part.clone() if part.is_inference() else part.detach()


def _unwrapped(batch: object) -> State:
    """Return the state in a batch: a list stands for its elements."""
    if not isinstance(batch, list):
        return batch  # type: ignore[return-value]
    if len(batch) > 1 and any(_is_integer(part) for part in batch):
        raise StateTypeError(
            explain(
                f"a batch is a list of {len(batch)} tensors, one of them of integers (labels?).",
                "a list of the state's parts only, or word that the rest is context.",
                'tdh.fit(func, loader, ..., context="batch")   # func(t, y, labels)\n'
                "y0 = (batch[0] for batch in loader)          # if func needs no labels",
            )
        )
    return batch[0] if len(batch) == 1 else tuple(batch)


def _is_integer(part: object) -> bool:
    return isinstance(part, Tensor) and not (part.is_floating_point() or part.is_complex())


def _iterate(y0: object) -> Iterator[object]:
    if not isinstance(y0, Iterable):
        raise StateTypeError(
            explain(
                f"y0 is a {type(y0).__name__}.",
                "a tensor, a tuple of tensors, or an iterable of batches.",
                "y0 = torch.as_tensor(y0)",
            )
        )
    return iter(y0)


def _first(source: Iterator[object]) -> State:
    for batch in source:
        return checked_batch(batch)
    raise OptionError(
        explain("y0 yields no batch.", "at least one batch.", "y0 = [torch.randn(256, 2)]")
    )


def _like(batch: State, first: State) -> State:
    """Return a batch on the device and in the dtype of the first one."""
    check_like(batch, first)
    pairs = zip(parts_of(batch), parts_of(first), strict=True)
    moved = tuple(part.to(model) for part, model in pairs)
    return moved if isinstance(batch, tuple) else moved[0]


def check_like(batch: State, first: State) -> State:
    """Return a batch after checking that it is built as the first one.

    Raises:
        StateShapeError: it has other trailing shapes.
    """
    shapes, expected = ([tuple(p.shape[1:]) for p in parts_of(s)] for s in (batch, first))
    if shapes != expected or isinstance(batch, tuple) != isinstance(first, tuple):
        raise StateShapeError(
            explain(
                f"a batch has trailing shapes {shapes}.",
                f"{expected}, as the first batch.",
                "batches that differ in their number of samples only",
            )
        )
    return batch


def _split(state: State, config: FitConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the positions along dim 0 to train on and those to hold out."""
    count = n_samples(state)
    if count < 2:
        raise OptionError(
            explain(
                "y0 has a single sample: none would be left to measure the fit on.",
                "at least two samples along dim 0, better hundreds.",
                "y0 = torch.randn(256, 2)   # starts like those the solver will meet",
            )
        )
    wanted = min(round(config.validation * count), MOST_HELD_OUT * config.batch_size)
    held = min(max(1, wanted), count - 1)
    order = torch.randperm(count, generator=generator)
    return order[held:], order[:held]


def _chunks(state: State, positions: Tensor, size: int) -> Iterator[State]:
    """Yield batches of nearly equal sizes, none above ``size``."""
    for index in positions.tensor_split(-(-len(positions) // size)):
        yield select(state, index)


def n_samples(state: State) -> int:
    """Return the number of samples of a state."""
    return parts_of(state)[0].shape[0]


def select(state: State, index: Tensor) -> State:
    """Return some samples of a state."""
    parts = tuple(part[index.to(part.device)] for part in parts_of(state))
    return parts if isinstance(state, tuple) else parts[0]


def parts_of(state: State) -> Sequence[Tensor]:
    """Return the tensors of a state."""
    return state if isinstance(state, tuple) else (state,)
