"""Selectors for states without spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.selectors._base import ReadySelector


class MLP(ReadySelector):
    """A perceptron with ReLU and dropout on the flattened start ([D], for time series).

    Args:
        n_inputs: numbers of a sample, all parts of a tuple state together.
        n_candidates: number of candidates.
        hidden: widths of the hidden layers.
        dropout: probability of dropping a hidden unit while it is fitted.

    Raises:
        OptionError: an argument is impossible.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.dise.selectors import MLP
        >>> MLP(n_inputs=6, n_candidates=3)(torch.ones(5, 2, 3)).shape
        torch.Size([5, 3])
    """

    kind = "mlp"

    def __init__(
        self,
        n_inputs: int,
        n_candidates: int,
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.1,
    ) -> None:
        own = {"n_inputs": n_inputs, "n_candidates": n_candidates, "hidden": list(hidden)}
        super().__init__({**own, "dropout": dropout}, (n_inputs,))
        inner = (nn.ReLU(), nn.Dropout(dropout))
        self.layers = _perceptron([n_inputs, *hidden, n_candidates], inner)

    def features(self, y0: State) -> Tensor:
        """Return the parts of the state, flattened behind each other."""
        return flattened(y0)

    def forward(self, y0: State) -> Tensor:
        """Return predicted costs (batch, candidates)."""
        out: Tensor = self.layers(self.normalised(y0))
        return out


class TanhMLP(ReadySelector):
    """A perceptron with tanh activations on the flattened start ([D], for flows).

    Args:
        n_inputs: numbers of a sample, all parts of a tuple state together.
        n_candidates: number of candidates.
        hidden: widths of the hidden layers.

    Raises:
        OptionError: an argument is impossible.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.dise.selectors import TanhMLP
        >>> TanhMLP(n_inputs=3, n_candidates=2)((torch.ones(5, 2), torch.ones(5, 1))).shape
        torch.Size([5, 2])
    """

    kind = "tanh-mlp"

    def __init__(self, n_inputs: int, n_candidates: int, hidden: Sequence[int] = (64, 64)) -> None:
        own = {"n_inputs": n_inputs, "n_candidates": n_candidates, "hidden": list(hidden)}
        super().__init__(own, (n_inputs,))
        self.layers = _perceptron([n_inputs, *hidden, n_candidates], (nn.Tanh(),))

    def features(self, y0: State) -> Tensor:
        """Return the parts of the state, flattened behind each other."""
        return flattened(y0)

    def forward(self, y0: State) -> Tensor:
        """Return predicted costs (batch, candidates)."""
        out: Tensor = self.layers(self.normalised(y0))
        return out


def flattened(y0: State) -> Tensor:
    """Return the parts of a state behind each other, one row a sample."""
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in parts_of(y0)]
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], 1)


def _perceptron(widths: Sequence[int], inner: Sequence[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), *inner]
    return nn.Sequential(*layers[: -len(inner)])
