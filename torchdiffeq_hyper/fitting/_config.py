"""How a fit is run: lengths, rates, tolerances, all checked at construction."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchdiffeq_hyper.errors import OptionError, explain


@dataclass(frozen=True)
class FitConfig:
    """How `fit` is run; the defaults follow the schedule of [H].

    AdamW with cosine annealing: `pretrain_iterations` on the first batch, then a new
    batch every `swap_every` iterations, the residual phase before the trajectory phase.

    Attributes:
        iterations: iterations of all phases ("combined" gives the residual phase a quarter).
            Fewer are planned where they would not end in time.
        max_seconds: wall time the fit may take, reference solutions included.
        lr: initial learning rate of AdamW; annealed to a hundredth of it in each phase.
        weight_decay: weight decay of AdamW.
        pretrain_iterations: iterations on the first batch.
        swap_every: iterations on each batch after that.
        batch_size: samples in a batch (for tensor data; iterables bring their own).
        rtol: relative tolerance of the reference solutions. None chooses by dtype: 1e-9 for
            float64, 1e-6 for float32, 1e-3 for half precision.
        atol: absolute tolerance of the same, in the units of the state; None takes ``rtol``
            times the size of the states.
        method: torchdiffeq method of the reference solutions, best one that controls its error.
        validation: fraction of the samples that is held out, at most two batches of them;
            with an iterable, of the first batch.
        patience: validations without improvement, of about 40 in a phase, after which the
            phase lands: it anneals within a quarter of the iterations done, and ends.
        seed: seeds the split, the batches and the net's start. Global state is not touched.
        hypernet_budget: what ``hypernet="auto"`` may cost: multiply-adds of one call, as a
            share of func's in one step of the base.
        checkpoint: file to write the fit's state to at each validation. The same call again
            goes on from there, to bitwise the same result for tensor data (iterables are
            pulled anew); once the fit is finished, it returns the result.

    Raises:
        OptionError: a value is impossible; the text names it.

    Example:
        >>> from torchdiffeq_hyper import FitConfig
        >>> FitConfig(max_seconds=30.0, seed=1).max_seconds
        30.0
    """

    iterations: int = 2000
    max_seconds: float = 120.0
    lr: float = 1e-2
    weight_decay: float = 1e-6
    pretrain_iterations: int = 100
    swap_every: int = 10
    batch_size: int = 32
    rtol: float | None = None
    atol: float | None = None
    method: str = "dopri5"
    validation: float = 0.15
    patience: int = 15
    seed: int = 0
    hypernet_budget: float = 0.1
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("iterations", "swap_every", "batch_size", "patience"):
            self._require(name, lambda n: _is_int(n) and n >= 1, "an int of at least 1", "100")
        for name in ("pretrain_iterations", "seed"):
            self._require(name, lambda n: _is_int(n) and n >= 0, "an int of at least 0", "0")
        for name, example in (("max_seconds", "120.0"), ("lr", "1e-2"), ("hypernet_budget", "0.1")):
            self._require(name, lambda x: _is_real(x) and x > 0, "a finite number above 0", example)
        self._require(
            "weight_decay",
            lambda x: _is_real(x) and x >= 0,
            "a finite number of at least 0",
            "1e-6",
        )
        for name in ("rtol", "atol"):
            self._require(
                name,
                lambda x: x is None or (_is_real(x) and x > 0),
                "None or a finite number above 0",
                "1e-6",
            )
        self._require(
            "validation",
            lambda x: _is_real(x) and 0 < x < 1,
            "a fraction between 0 and 1, both excluded",
            "0.15",
        )
        self._require("method", lambda x: isinstance(x, str), "a method string", '"dopri5"')
        self._require(
            "checkpoint",
            lambda x: x is None or isinstance(x, str | os.PathLike),
            "None or a path",
            '"fit.pt"',
        )

    def _require(
        self, name: str, is_valid: Callable[[Any], bool], expected: str, example: str
    ) -> None:
        value = getattr(self, name)
        if not is_valid(value):
            raise OptionError(
                explain(f"{name} is {value!r}.", f"{expected}.", f"FitConfig({name}={example})")
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
