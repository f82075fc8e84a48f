"""How a fit is run: lengths, rates, tolerances, all checked at construction."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from torchdiffeq_hyper.errors import OptionError


@dataclass(frozen=True)
class FitConfig:
    """How `fit` is run; `OptionError` names an impossible value.

    AdamW with cosine annealing, the residual phase before the trajectory phase. The defaults
    follow the schedule of Poli et al., "Hypersolvers: Toward Fast Continuous-Depth Models",
    NeurIPS 2020, https://arxiv.org/abs/2007.09601.

    Attributes:
        iterations: of all phases ("combined" gives the residual phase a quarter); fewer are
            planned where they would not end in time.
        max_seconds: wall time the fit may take, reference solutions included.
        lr, weight_decay: AdamW's; lr is annealed to a hundredth of this in each phase.
        pretrain_iterations, swap_every: iterations on the first batch, and on each other.
        batch_size: samples in a batch (for tensor data; iterables bring their own).
        rtol: relative tolerance of the reference solutions. None chooses by dtype: 1e-9 for
            float64, 1e-6 for float32, 1e-3 for half precision.
        atol: the absolute one, in the state's units; None is ``rtol`` times the states' size.
        method: torchdiffeq method of the reference solutions, best one that controls its error.
        validation: fraction of the samples that is held out, at most two batches of them;
            with an iterable, of the first batch.
        patience: validations without improvement, of about 40 in a phase, after which the
            phase cools down: it anneals within a quarter of the iterations done, and ends.
            "bns" validates each iteration; a descent ends after this many, 10 at most.
        seed: seeds the split, the batches and the net's start. Global state is not touched.
        hypernet_budget: what ``hypernet="auto"`` may cost: multiply-adds of one call, as a
            share of func's in one step of the base.
        checkpoint: file to write the fit's state to at each validation. The same call again
            goes on from there, to bitwise the same result for tensor data (iterables are
            pulled anew); once the fit is finished, it returns the result.

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
            self._require(name, _is_int(getattr(self, name), 1), "an int of at least 1")
        for name in ("pretrain_iterations", "seed"):
            self._require(name, _is_int(getattr(self, name), 0), "an int of at least 0")
        for name in ("max_seconds", "lr", "hypernet_budget"):
            value = getattr(self, name)
            self._require(name, _is_real(value) and value > 0, "a finite number above 0")
        is_valid = _is_real(self.weight_decay) and self.weight_decay >= 0
        self._require("weight_decay", is_valid, "a finite number of at least 0")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            is_valid = value is None or (_is_real(value) and value > 0)
            self._require(name, is_valid, "None or a finite number above 0")
        is_valid = _is_real(self.validation) and 0 < self.validation < 1
        self._require("validation", is_valid, "a fraction between 0 and 1, both excluded")
        self._require("method", isinstance(self.method, str), "a method string")
        is_valid = self.checkpoint is None or isinstance(self.checkpoint, str | os.PathLike)
        self._require("checkpoint", is_valid, "None or a path")

    def _require(self, name: str, is_valid: bool, expected: str) -> None:  # noqa: FBT001
        if not is_valid:
            problem, default = f"{name} is {getattr(self, name)!r}.", getattr(FitConfig, name)
            raise OptionError(problem, f"{expected}.", f"FitConfig({name}={default!r})")


def _is_int(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
