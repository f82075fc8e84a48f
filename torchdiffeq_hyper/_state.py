"""States, which are tensors or tuples of tensors, and what is done to them part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError

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
        history: the derivatives f0 at the starts of earlier steps, each like ``y``, with the
            (signed) sizes of these steps; newest first. As many as the hypernet's attribute
            ``history`` asks for (0 without one); fewer at a solve's first steps.

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
    history: tuple[tuple[State, Tensor], ...] = ()


Hypernet: TypeAlias = Callable[[StepInput], State]
"""``g(step) -> correction like step.y``: the learned part of a hypersolver."""


def history_of(hypernet: object) -> int:
    """Return how many earlier derivatives a hypernet asks for by its attribute ``history``."""
    wanted = getattr(hypernet, "history", 0)
    return wanted if type(wanted) is int else 0  # a user's net may call a log of losses so


def parts_of(y: State) -> tuple[Tensor, ...]:
    """Return the tensors of a state."""
    return y if isinstance(y, tuple) else (y,)


def map_parts(f: Callable[..., Tensor], *states: State) -> State:
    """Return what ``f`` returns for each part of one or more states, as such a state."""
    if isinstance(states[0], tuple):
        return tuple(f(*parts) for parts in zip(*states, strict=True))
    return f(*states)


def take(y: State, index: Tensor, dim: int = 0) -> State:
    """Return the samples at some positions; those of a solution lie along dim 1."""
    return map_parts(lambda part: part.index_select(dim, index.to(part.device)), y)


def cast(y: State, dtype: torch.dtype) -> State:
    """Return a state in another dtype."""
    return map_parts(lambda part: part.to(dtype), y)


def shapes_of(y: object) -> tuple[bool, list[tuple[int, ...]]]:
    """Return whether ``y`` is a tuple, and the shapes in it; what is no tensor has (-1,)."""
    parts = y if isinstance(y, tuple) else (y,)
    return isinstance(y, tuple), [tuple(getattr(part, "shape", (-1,))) for part in parts]


def n_samples(y: State) -> int:
    """Return the number of samples; 0 where the parts have none in common, or no numbers."""
    parts = parts_of(y)
    sizes = {len(part) if part.dim() else 0 for part in parts}
    return sizes.pop() if len(sizes) == 1 and any(part.numel() for part in parts) else 0


def batch_size(y: State) -> int:
    """Return the number of samples: the length that all parts with dimensions share, else 1."""
    sizes = {len(part) for part in parts_of(y) if part.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def how_to_batch(y0: State) -> str:
    """Return the fix for a state without samples along dim 0."""
    if isinstance(y0, Tensor):
        return "y0 = y0.unsqueeze(0)   # for a single sample"
    single = "y0 = tuple(part.unsqueeze(0) for part in y0)   # for a single sample"
    return f"{single}\npart.expand(n_samples, *part.shape)   # for a part that all samples share"


def check_samples_first(y0: State, fix: str) -> None:
    """Refuse states without the same number of samples along dim 0 in all parts."""
    shapes = [tuple(part.shape) for part in parts_of(y0)]
    if len({shape[:1] for shape in shapes}) > 1 or not shapes[0]:
        problem = f"y0 has shape{'s' * (len(shapes) > 1)} {', '.join(map(str, shapes))}."
        raise StateShapeError(problem, "the samples along dim 0, as many in every part.", fix)


def check_part(part: object, n_parts: int) -> None:
    """Refuse what is no index of one of so many parts, 0 for a state of one tensor."""
    if type(part) is not int or not 0 <= part < n_parts:
        index = f", or an index of one of the state's {n_parts} parts."
        expected = "None" + (index if n_parts else ": the state is one tensor.")
        fix = "part=0" if n_parts else "part=None"
        raise OptionError(problem=f"part is {part!r}.", expected=expected, fix=fix)


def check_dtype(dtype: torch.dtype, *, is_tuple: bool = False) -> None:
    """Refuse states of integers, the dtype being a state's or that of a part of a tuple."""
    if not (dtype.is_floating_point or dtype.is_complex):
        problem = f"y0 has dtype {dtype}: derivatives would be rounded to integers."
        fix = "y0 = tuple(part.float() for part in y0)" if is_tuple else "y0 = y0.float()"
        raise StateTypeError(problem, "a floating-point (or complex) state.", fix)


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype has too few digits to add up steps in."""
    return dtype in (torch.float16, torch.bfloat16)


def stepped_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a state is stepped in: float32 for half precision, else its own."""
    return torch.float32 if is_half(dtype) else dtype


def time_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which func is given the time, for states of a dtype."""
    # Asked first: `torch.compile` (torch 2.13) cannot trace `to_real`.
    return dtype.to_real() if dtype.is_complex else dtype


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which differences of nearly equal states are formed."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class StateLayout:
    """How a state lies in one tensor: as it is, or parts behind each other, as in the host."""

    shapes: tuple[tuple[int, ...], ...] | None  # a tuple's; None for one tensor

    @classmethod
    def of(cls, y: State) -> StateLayout:
        """Return the layout of a state, after checking that it is one, and not of integers."""
        if isinstance(y, Tensor):
            check_dtype(y.dtype)
            return cls(None)
        if not isinstance(y, tuple) or not y or not all(isinstance(part, Tensor) for part in y):
            problem = f"y0 is a {type(y).__name__}."
            fix = "y0 = tuple(y0)" if isinstance(y, list) else "y0 = torch.as_tensor(y0)"
            raise StateTypeError(problem, "a tensor, or a tuple of tensors.", fix)
        for part in y:
            check_dtype(part.dtype, is_tuple=True)
        return cls(tuple(tuple(part.shape) for part in y))

    def split(self, flat: Tensor) -> State:
        """Return the state lying in ``flat``; leading dimensions stay in front."""
        if self.shapes is None:
            return flat
        # Not `Tensor.split`: func may write into a slice, but not into one of several views.
        slices = (flat[..., slice(*self.bounds(i))] for i in range(len(self.shapes)))
        front = flat.shape[:-1]
        return tuple(p.reshape((*front, *s)) for p, s in zip(slices, self.shapes, strict=True))

    def join(self, y: State) -> Tensor:
        """Return the state as one tensor."""
        return y if isinstance(y, Tensor) else torch.cat([part.reshape(-1) for part in y])

    def bounds(self, part: int) -> tuple[int, int]:
        """Return where a part of a tuple state starts and ends in the flat tensor."""
        assert self.shapes is not None
        start = sum(prod(shape) for shape in self.shapes[:part])
        return start, start + prod(self.shapes[part])


@dataclass(frozen=True)
class RowLayout:
    """How the samples of a state lie in a matrix of shape (samples, numbers of a sample)."""

    shapes: tuple[tuple[int, ...], ...]  # without the batch dimension
    is_tuple: bool

    @classmethod
    def of(cls, y: State) -> RowLayout:
        """Return the layout of a state, after checking that it has samples along dim 0."""
        StateLayout.of(y)
        check_samples_first(y, how_to_batch(y))
        return cls(tuple(tuple(part.shape[1:]) for part in parts_of(y)), isinstance(y, tuple))

    @property
    def widths(self) -> list[int]:
        """Numbers of a sample in each part."""
        return [prod(shape) for shape in self.shapes]

    def join(self, y: State) -> Tensor:
        """Return the matrix of a state."""
        if isinstance(y, Tensor):
            return y.reshape(len(y), self.widths[0])
        return torch.cat([p.reshape(len(p), w) for p, w in zip(y, self.widths, strict=True)], 1)

    def split(self, rows: Tensor) -> State:
        """Return the state in a matrix; more dimensions in front of its last stay there."""
        front = rows.shape[:-1]
        if not self.is_tuple:
            return rows.reshape(*front, *self.shapes[0])
        parts = rows.split(self.widths, dim=-1)
        return tuple(p.reshape(*front, *s) for p, s in zip(parts, self.shapes, strict=True))

    def norm(self, rows: Tensor) -> Tensor:
        """Return each row's root mean square, of a tuple state its parts' largest."""
        parts = rows.split(self.widths, dim=1)
        norms = [part.abs().pow(2).mean(dim=1).sqrt() for part in parts if part.shape[1]]
        return norms[0] if len(norms) == 1 else torch.stack(norms).amax(dim=0)


def sample_norms(states: State, unit: float = 1.0) -> Tensor:
    """Return the 2-norms (n, batch) of states (n, batch, ...), all parts taken together.

    Divided by ``unit`` first, since the squares of large numbers would overflow.
    """
    joined = torch.cat([_rows(part, 2) for part in parts_of(states)], dim=-1)
    norms: Tensor = torch.linalg.vector_norm(joined if unit == 1 else joined / unit, dim=-1)
    return norms


def sample_sizes(states: State, unit: float = 1.0) -> Tensor:
    """Return the norms that relative errors are divided by: at least a tenth of their rms."""
    norms = sample_norms(states, unit)
    return norms.clamp_min(0.1 * norms.square().mean().sqrt()).clamp_min(1e-30)


def part_norms(layout: StateLayout | RowLayout, flat: Tensor) -> tuple[Tensor, ...]:
    """Return each part's norms over its non-batch dimensions, (batch,); 0-d parts give (1,)."""
    parts = (torch.atleast_1d(part) for part in parts_of(layout.split(flat)))
    return tuple(torch.linalg.vector_norm(_rows(part, 1), dim=-1) for part in parts)


def _rows(part: Tensor, n_leading: int) -> Tensor:
    """Return the numbers of each sample in one row, behind the first dimensions."""
    return part.reshape(*part.shape[:n_leading], prod(part.shape[n_leading:]))


def select(norms: Sequence[Tensor], layout: StateLayout, part: int | None) -> Tensor:
    """Return one part's norms (..., batch), or those of all parts that have a batch, together."""
    if part is not None:
        check_part(part, 0 if layout.shapes is None else len(layout.shapes))
        return norms[part]
    if layout.shapes is None:
        return norms[0]
    with_batch = [n for n, shape in zip(norms, layout.shapes, strict=True) if shape] or list(norms)
    if len({n.shape for n in with_batch}) > 1:
        problem = f"the state's parts have shapes {list(layout.shapes)}: they share no batch."
        expected = "parts with one leading batch dimension, or the choice of one part."
        fix = "rec.error_penalty(part=0)   # or solve.steps.error_of(0)"
        raise StateShapeError(problem, expected, fix)
    joint: Tensor = torch.linalg.vector_norm(torch.stack(with_batch, -1), dim=-1)
    return joint


def is_traced(tensor: Tensor) -> bool:
    """Return whether a tensor has no values to look at: while compiling or capturing a graph."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a tensor may carry a gradient or a tangent; vmap hides that."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_batchedtensor(tensor):  # noqa: SLF001 - there is no public way
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def values_of(tensor: Tensor) -> list[float] | None:
    """Return a tensor's numbers, at one device sync; None where there are none to look at."""
    if is_traced(tensor):
        return None
    try:
        return [float(value) for value in tensor.detach().reshape(-1).tolist()]
    except RuntimeError:  # under vmap, of fake and meta tensors, of symbols in tracing
        return None


def is_finite(y: State) -> bool:
    """Return False only if ``y`` is known to hold inf or nan (one device sync a part)."""
    for part in parts_of(y):
        if is_traced(part):
            return True
        try:
            # A finite sum proves every term finite, at half the cost of looking at each.
            total = part.sum().item()
            # Only a finite number, real or complex, less itself is zero.
            if total - total != 0 and not bool(torch.isfinite(part).all()):
                return False
        except RuntimeError:  # no values to look at: vmap, fake and meta tensors
            return True
    return True
