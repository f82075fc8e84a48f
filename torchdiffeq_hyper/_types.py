"""The types that every layer speaks: states, vector fields, one step's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

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
