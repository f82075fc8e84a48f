"""How a selector is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchdiffeq_hyper.errors import OptionError, explain


@dataclass(frozen=True)
class SelectorConfig:
    """How `Dise.fit` trains a selector: AdamW on the squared error of its costs.

    Attributes:
        iterations: batches trained on.
        lr: initial learning rate, annealed to a hundredth of it along a cosine.
        weight_decay: weight decay of AdamW.
        batch_size: samples in a batch.
        validation: fraction of the samples that is held out; the best state on them is kept.
        seed: seeds the split, the batches, the net's start and its dropout. Global random
            state is not touched.

    Raises:
        OptionError: a value is impossible; the text names it.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> tdh.SelectorConfig(iterations=500, seed=1).validation
        0.2
    """

    iterations: int = 1500
    lr: float = 3e-3
    weight_decay: float = 1e-3
    batch_size: int = 64
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name, low in (("iterations", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, is_int and value >= low, f"an int of at least {low}", low)
        for name, lowest in (("lr", 1e-9), ("weight_decay", 0.0)):
            value = getattr(self, name)
            is_number = isinstance(value, float | int) and math.isfinite(value)
            self._require(name, is_number and value >= lowest, "a finite number above 0", 1e-3)
        share = self.validation
        is_share = isinstance(share, float) and 0 < share < 1
        self._require("validation", is_share, "a fraction between 0 and 1, both excluded", 0.2)

    def _require(self, name: str, is_valid: object, expected: str, example: float) -> None:
        if not is_valid:
            raise OptionError(
                explain(
                    f"{name} is {getattr(self, name)!r}.",
                    f"{expected}.",
                    f"tdh.SelectorConfig({name}={example})",
                )
            )
