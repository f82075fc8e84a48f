"""A selector for images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.selectors._base import CONVOLUTIONS, ReadySelector


class ResidualConv(ReadySelector):
    r"""A convolution of stride 2, residual blocks, and a linear layer ([D], for images).

    Of a tuple state it sees the first part. The linear layer sees the means over both
    halves of every spatial dimension, so that position counts.

    Args:
        channels: channels of the state.
        n_candidates: number of candidates.
        hidden: channels of the blocks.
        blocks: number of residual blocks.
        n_spatial: spatial dimensions of the state: 1, 2 or 3.

    Raises:
        OptionError: an argument is impossible.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.dise.selectors import ResidualConv
        >>> ResidualConv(channels=12, n_candidates=3)(torch.ones(5, 12, 8, 8)).shape
        torch.Size([5, 3])
    """

    kind = "residual-conv"

    def __init__(
        self,
        channels: int,
        n_candidates: int,
        hidden: int = 16,
        blocks: int = 2,
        n_spatial: int = 2,
    ) -> None:
        own = {"channels": channels, "n_candidates": n_candidates, "hidden": hidden}
        own |= {"blocks": blocks, "n_spatial": n_spatial}
        super().__init__(own, (channels, *(1,) * n_spatial))
        convolution = CONVOLUTIONS[n_spatial]
        self.first = convolution(channels, hidden, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(convolution, hidden) for _ in range(blocks))
        pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
        head = nn.Linear(hidden * 2**n_spatial, n_candidates)
        self.last = nn.Sequential(nn.ReLU(), pool[n_spatial](2), nn.Flatten(), head)

    def features(self, y0: State) -> Tensor:
        """Return the first part of the state."""
        return parts_of(y0)[0]

    def forward(self, y0: State) -> Tensor:
        """Return predicted costs (batch, candidates)."""
        x = self.first(self.normalised(y0))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.last(x)
        return out


class _Block(nn.Module):
    def __init__(self, convolution: Any, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            convolution(channels, channels, 3, padding=1),
            nn.ReLU(),
            convolution(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out
