"""What the ready selectors share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import OptionError, explain

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class ReadySelector(nn.Module):
    """Base of the ready selectors: normalised inputs, and a description to rebuild it from.

    Attributes:
        kind: name of the class in files.
        architecture: JSON-ready arguments; `from_architecture` rebuilds the net from it.
    """

    kind: ClassVar[str]
    shift: Tensor
    scale: Tensor

    def __init__(self, architecture: Mapping[str, Any], shape: Sequence[int]) -> None:
        super().__init__()
        for name, value in architecture.items():
            _check_argument(name, value)
        self.architecture: dict[str, Any] = {"kind": self.kind, **architecture}
        self.register_buffer("shift", torch.zeros(*shape))
        self.register_buffer("scale", torch.ones(*shape))

    def features(self, y0: State) -> Tensor:
        """Return what the layers are given, (batch, ...)."""
        raise NotImplementedError

    def normalised(self, y0: State) -> Tensor:
        """Return the features at mean 0 and standard deviation 1 in the fitted data."""
        return (self.features(y0).to(self.shift.dtype) - self.shift) * self.scale

    @torch.no_grad()
    def calibrate(self, y0: State) -> None:
        """Set the normalisation from samples: every channel to mean 0, deviation 1."""
        x = self.features(y0).to(self.shift.dtype)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x, dims, correction=0)
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        self.shift.copy_(mean.view_as(self.shift))
        self.scale.copy_(scale.view_as(self.scale))


def _check_argument(name: str, value: Any) -> None:
    if name == "dropout":
        is_valid, expected = 0 <= value < 1, "a probability of at least 0 and below 1"
    elif name == "n_spatial":
        is_valid, expected = value in CONVOLUTIONS, "1, 2 or 3"
    else:
        values = value if isinstance(value, list) else [value]
        is_valid = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in values)
        expected = "an int of at least 1" + (", each" if isinstance(value, list) else "")
    if not is_valid:
        raise OptionError(explain(f"{name} is {value!r}.", f"{expected}.", f"{name}=..."))
