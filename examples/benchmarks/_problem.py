"""What every benchmarked model offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import torchdiffeq_hyper as tdh


@dataclass(frozen=True)
class Benchmark:
    """A vector field, starts to fit on, and other starts to measure on.

    Attributes:
        name: one word, for files and ``--only``.
        title: what the model is, in words.
        func: the vector field.
        fit_y0: states at ``span[0]`` that solvers are fitted on.
        test_y0: other states that they are measured on.
        span: start and end time.
        fit_seconds: what fitting one solver may take.
        hypernet: returns a correction that knows only y and t, as torchdyn's HyperEuler
            can call it.
        fit_batch: samples in a batch of the fits.
        fit_tolerance: rtol = atol of their reference solutions; None leaves the choice.
        repeats: rounds of timing.
    """

    name: str
    title: str
    func: Callable[[Tensor, Tensor], Tensor]
    fit_y0: Tensor
    test_y0: Tensor
    span: tuple[float, float]
    fit_seconds: float
    hypernet: Callable[[], tdh.ConcatHypernet]
    fit_batch: int = 32
    fit_tolerance: float | None = None
    repeats: int = 7
