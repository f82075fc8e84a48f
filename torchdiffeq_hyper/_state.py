"""A state as one flat tensor, the way the host integrates tuples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, explain

State: TypeAlias = Tensor | tuple[Tensor, ...]
"""A state: one tensor of any shape, or a tuple of tensors."""

VectorField: TypeAlias = Callable[..., Any]
"""``func(t, y) -> dy/dt``, with ``t`` a 0-d tensor and the result like ``y``."""


class StepInput(NamedTuple):
    """What a hypernet is given for one step.

    All values are those of the true problem: in reverse time ``t`` decreases,
    ``dt`` is negative and the derivatives are func's own.

    Attributes:
        dt: 0-d tensor, at least float32, signed: the step's size.
        t: 0-d tensor, at least float32: the time at the step's start.
        y: state at the step's start (a tensor, or a tuple for tuple states).
        f0: ``func(t, y)``, like ``y``; the same object as ``stages[0]``.
        stages: the derivatives k_1..k_s of the base method's stages, each like ``y``.
        y0: the state at the start of the solve, like ``y``.
        context: the inputs of the samples' `Conditioned` func; empty for other funcs.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper import StepInput
        >>> y, f = torch.ones(3, 2), torch.zeros(3, 2)
        >>> step = StepInput(torch.tensor(0.1), torch.tensor(0.0), y, f, (f,), y)
        >>> step.f0.shape
        torch.Size([3, 2])
    """

    dt: Tensor
    t: Tensor
    y: State
    f0: State
    stages: tuple[State, ...]
    y0: State
    context: tuple[Tensor, ...] = ()


Hypernet: TypeAlias = Callable[[StepInput], State]
"""``g(step) -> correction like step.y``: the learned part of a hypersolver."""


@dataclass(frozen=True)
class StateLayout:
    """How a state lies in one tensor: as it is, or parts behind each other.

    Attributes:
        shapes: the parts' shapes for a tuple state, None for one tensor.
    """

    shapes: tuple[tuple[int, ...], ...] | None

    @classmethod
    def of(cls, y: State) -> StateLayout:
        """Return the layout of a state, after checking that it is one.

        Raises:
            StateTypeError: not a tensor or a tuple of tensors, or of integers.
        """
        if isinstance(y, Tensor):
            check_dtype(y.dtype)
            return _TENSOR
        parts: Sequence[object] = y if isinstance(y, tuple) else ()
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise StateTypeError(
                explain(
                    f"y0 is a {type(y).__name__}.",
                    "a tensor, or a tuple of tensors.",
                    "y0 = torch.as_tensor(y0)" if not isinstance(y, list) else "y0 = tuple(y0)",
                )
            )
        shapes = []
        for part in parts:
            assert isinstance(part, Tensor)
            check_dtype(part.dtype, is_tuple=True)
            shapes.append(tuple(part.shape))
        return cls(tuple(shapes))

    def split(self, flat: Tensor) -> State:
        """Return the state lying in ``flat``; leading dimensions stay in front."""
        if self.shapes is None:
            return flat
        parts, start = [], 0
        for shape in self.shapes:
            end = start + prod(shape)
            parts.append(flat[..., start:end].reshape((*flat.shape[:-1], *shape)))
            start = end
        return tuple(parts)

    def join(self, y: State) -> Tensor:
        """Return the state as one tensor."""
        if isinstance(y, Tensor):
            return y
        return torch.cat([part.reshape(-1) for part in y])

    def bounds(self, part: int) -> tuple[int, int]:
        """Return where a part of a tuple state starts and ends in the flat tensor."""
        assert self.shapes is not None
        start = sum(prod(shape) for shape in self.shapes[:part])
        return start, start + prod(self.shapes[part])


_TENSOR = StateLayout(None)


def parts_of(y: State) -> tuple[Tensor, ...]:
    """Return the tensors of a state."""
    return y if isinstance(y, tuple) else (y,)


def map_parts(f: Callable[..., Tensor], *states: State) -> State:
    """Return ``f`` of a state, or of several of one kind: tuples part by part."""
    if isinstance(states[0], Tensor):
        return f(*states)
    return tuple(f(*parts) for parts in zip(*states, strict=True))


def take_samples(y: State, index: Tensor, dim: int = 0) -> State:
    """Return the samples at some positions along ``dim``."""
    return map_parts(lambda part: part.index_select(dim, index), y)


def how_to_batch(y0: State) -> str:
    """Return the fix for a state without samples along dim 0."""
    if isinstance(y0, Tensor):
        return "y0 = y0.unsqueeze(0)   # for a single sample"
    return (
        "y0 = tuple(part.unsqueeze(0) for part in y0)   # for a single sample\n"
        "part.expand(n_samples, *part.shape)            # for a part that all samples share"
    )


def check_dtype(dtype: torch.dtype, *, is_tuple: bool = False) -> None:
    """Refuse states of integers.

    Args:
        dtype: the state's, or that of a part.
        is_tuple: whether the state is a tuple.

    Raises:
        StateTypeError: the dtype is neither floating nor complex.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        raise StateTypeError(
            explain(
                f"y0 has dtype {dtype}: derivatives would be rounded to integers.",
                "a floating-point (or complex) state.",
                "y0 = tuple(part.float() for part in y0)" if is_tuple else "y0 = y0.float()",
            )
        )


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype has too few digits to add up steps in."""
    return dtype in (torch.float16, torch.bfloat16)


FLOOR = 0.1
"""Smallest size of a state to divide its error by, as a share of the root mean square."""


def sample_norms(states: State, unit: float = 1.0) -> Tensor:
    """Return the 2-norm over all but the first two dimensions, the parts taken together.

    Args:
        states: (n, batch, ...), or a tuple of such.
        unit: what states are divided by first: squares of large ones would overflow.

    Returns:
        (n, batch) norms.
    """
    parts = (states,) if isinstance(states, Tensor) else states
    columns = [part.reshape(*part.shape[:2], -1) for part in parts]
    joined = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
    norms: Tensor = torch.linalg.vector_norm(joined if unit == 1 else joined / unit, dim=-1)
    return norms


def sample_sizes(states: State, unit: float = 1.0) -> Tensor:
    """Return the norms that relative errors are divided by, (n, batch).

    Where a state happens to be near zero, a tenth of the root mean square over all stands
    in for its norm.
    """
    norms = sample_norms(states, unit)
    floor = FLOOR * norms.square().mean().sqrt()
    return norms.clamp_min(floor).clamp_min(1e-30)


def part_norms(layout: StateLayout, flat: Tensor) -> tuple[Tensor, ...]:
    """Return each part's norms over its non-batch dimensions, (batch,); 0-d parts give (1,)."""
    state = layout.split(flat)
    parts = (state,) if isinstance(state, Tensor) else state
    return tuple(
        torch.linalg.vector_norm(_rows(part), dim=-1) if part.numel() else _no_norms(part)
        for part in parts
    )


def _rows(part: Tensor) -> Tensor:
    return part.reshape(len(part) if part.dim() else 1, -1)


def _no_norms(part: Tensor) -> Tensor:
    return part.abs().new_zeros(len(part))


def batch_size(y: State) -> int:
    """Return the number of samples: the length that all parts with dimensions share, else 1."""
    parts = (y,) if isinstance(y, Tensor) else y
    sizes = {len(part) for part in parts if part.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def select(norms: Sequence[Tensor], layout: StateLayout, part: int | None) -> Tensor:
    """Return one part's norms, or those of all parts that have a batch dimension.

    Args:
        norms: per part, (..., batch of the part).
        layout: the state's parts.
        part: index of a part of a tuple state; None for all.

    Raises:
        OptionError: there is no such part.
        StateShapeError: all parts are asked for and their batches differ.
    """
    if part is not None:
        return norms[_check_part(part, layout)]
    if layout.shapes is None:
        return norms[0]
    with_batch = [n for n, shape in zip(norms, layout.shapes, strict=True) if shape] or list(norms)
    if len({n.shape for n in with_batch}) > 1:
        raise StateShapeError(
            explain(
                f"the state's parts have shapes {list(layout.shapes)}: they share no batch.",
                "parts with one leading batch dimension, or the choice of one part.",
                "rec.error_penalty(part=0)   # or solve.steps.error_of(0)",
            )
        )
    joint: Tensor = torch.linalg.vector_norm(torch.stack(with_batch, -1), dim=-1)
    return joint


def _check_part(part: int, layout: StateLayout) -> int:
    n_parts = 0 if layout.shapes is None else len(layout.shapes)
    if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part < n_parts:
        raise OptionError(
            explain(
                f"part is {part!r}.",
                f"None, or an index of one of the state's {n_parts} parts."
                if n_parts
                else "None: the state is one tensor.",
                "part=0" if n_parts else "part=None",
            )
        )
    return part
