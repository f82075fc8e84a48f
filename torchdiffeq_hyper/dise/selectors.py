"""Ready selectors: small nets from a start to the predicted cost of every candidate.

They are those of "DISE: Dynamic Integrator Selection to Minimize Forward-pass Time in Neural
ODEs", ICLR 2021 submission. Any module that maps y0 to (batch, candidates) does as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import checked, refused
from torchdiffeq_hyper._rules import (
    Items,
    Real,
    Record,
    Such,
    Tagged,
    Whole,
    checked_arguments,
    shown,
)
from torchdiffeq_hyper._state import State, parts_of, stepped_dtype
from torchdiffeq_hyper.dise._candidates import count_samples
from torchdiffeq_hyper.errors import NonFiniteError, StateShapeError, StateTypeError
from torchdiffeq_hyper.hypernets._files import built
from torchdiffeq_hyper.hypernets._layers import CONVOLUTIONS

_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_COUNT = Whole(1)


class ReadySelector(nn.Module):
    """Base of the ready selectors: normalised inputs, and a description to rebuild it from.

    Attributes:
        kind: name of the class in files.
        architecture: JSON-ready arguments; `from_architecture` rebuilds the net from it.
    """

    kind: ClassVar[str]
    arguments: ClassVar[Record]
    layers: nn.Module
    shift: Tensor
    scale: Tensor

    def __init__(self, architecture: Mapping[str, Any], shape: Sequence[int]) -> None:
        super().__init__()
        checked_arguments(self.arguments.fields, architecture)
        self.architecture: dict[str, Any] = {"kind": self.kind, **architecture}
        self.register_buffer("shift", torch.zeros(*shape))
        self.register_buffer("scale", torch.ones(*shape))

    def features(self, y0: State) -> Tensor:
        """Return what the layers are given, (batch, ...): all parts, flattened."""
        return flattened(y0)

    def normalised(self, y0: State) -> Tensor:
        """Return the features at mean 0 and standard deviation 1 in the fitted data."""
        return (self.features(y0).to(self.shift.dtype) - self.shift) * self.scale

    @torch.no_grad()
    def calibrate(self, y0: State) -> None:
        """Set the normalisation from samples: every channel to mean 0, deviation 1."""
        x = self.features(y0).to(self.shift.dtype)
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        self.shift.copy_(mean.view_as(self.shift))
        self.scale.copy_(scale.view_as(self.scale))

    def forward(self, y0: State) -> Tensor:
        """Return predicted costs (batch, candidates)."""
        out: Tensor = self.layers(self.normalised(y0))
        return out


def flattened(y0: State) -> Tensor:
    """Return the parts of a state behind each other, one row a sample."""
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in parts_of(y0)]
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], 1)


def _perceptron(widths: Sequence[int], *between: nn.Module) -> nn.Sequential:
    layers = [(nn.Linear(*pair), *between) for pair in pairwise(widths)]
    return nn.Sequential(*chain(*layers[:-1]), layers[-1][0])


_SIZES = {"n_inputs": _COUNT, "n_candidates": _COUNT}
_HIDDEN = Items(_COUNT, most=1000)


class MLP(ReadySelector):
    """A perceptron with ReLU and dropout on the flattened start, as the paper's for time series.

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
    _DROPOUT = Such(Real(low=0.0), lambda share: share < 1, "and below 1")
    arguments = Record(_SIZES, optional={"hidden": _HIDDEN, "dropout": _DROPOUT})

    def __init__(
        self,
        n_inputs: int,
        n_candidates: int,
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.1,
    ) -> None:
        own = {"n_inputs": n_inputs, "n_candidates": n_candidates, "hidden": list(hidden)}
        super().__init__({**own, "dropout": float(dropout)}, (n_inputs,))
        widths = [n_inputs, *hidden, n_candidates]
        self.layers = _perceptron(widths, nn.ReLU(), nn.Dropout(dropout))


class TanhMLP(ReadySelector):
    """A perceptron with tanh activations on the flattened start, as the paper's for flows.

    Its arguments are those of `MLP`, without the dropout.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.dise.selectors import TanhMLP
        >>> TanhMLP(n_inputs=3, n_candidates=2)((torch.ones(5, 2), torch.ones(5, 1))).shape
        torch.Size([5, 2])
    """

    kind = "tanh-mlp"
    arguments = Record(_SIZES, optional={"hidden": _HIDDEN})

    def __init__(self, n_inputs: int, n_candidates: int, hidden: Sequence[int] = (64, 64)) -> None:
        own = {"n_inputs": n_inputs, "n_candidates": n_candidates, "hidden": list(hidden)}
        super().__init__(own, (n_inputs,))
        self.layers = _perceptron([n_inputs, *hidden, n_candidates], nn.Tanh())


class ResidualConv(ReadySelector):
    r"""A convolution of stride 2, residual blocks, and a linear layer, as the paper's for images.

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
    arguments = Record(
        {"channels": _COUNT, "n_candidates": _COUNT},
        optional={"hidden": _COUNT, "blocks": Whole(1, 1000), "n_spatial": Whole(1, 3)},
    )

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
        self.blocks = nn.Sequential(*(_Block(convolution, hidden) for _ in range(blocks)))
        head = nn.Linear(hidden * 2**n_spatial, n_candidates)
        self.last = nn.Sequential(nn.ReLU(), _POOLS[n_spatial](2), nn.Flatten(), head)

    def features(self, y0: State) -> Tensor:
        """Return the first part of the state."""
        return parts_of(y0)[0]

    def forward(self, y0: State) -> Tensor:
        """Return predicted costs (batch, candidates)."""
        out: Tensor = self.last(self.blocks(self.first(self.normalised(y0))))
        return out


class _Block(nn.Module):
    def __init__(self, convolution: Any, channels: int) -> None:
        super().__init__()
        first, second = (convolution(channels, channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


_KINDS: dict[str, type[ReadySelector]] = {net.kind: net for net in (MLP, TanhMLP, ResidualConv)}
ARCHITECTURES = {kind: net.arguments for kind, net in _KINDS.items()}
"""What describes a ready selector of each kind in a file."""


def ready(y0: State, n_candidates: int) -> ReadySelector:
    """Return a new selector for a kind of state: `ResidualConv` for images, else `MLP`.

    It is on the state's device and in its dtype (float32 for half precision).

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.dise import selectors
        >>> selectors.ready(torch.ones(5, 2), n_candidates=3).architecture["kind"]
        'mlp'
    """
    first = parts_of(y0)[0]
    net: ReadySelector
    if first.dim() - 2 in CONVOLUTIONS:
        net = ResidualConv(first.shape[1], n_candidates, n_spatial=first.dim() - 2)
    else:
        net = MLP(flattened(y0).shape[1], n_candidates)
    return net.to(first.device, stepped_dtype(first.dtype.to_real()))


def from_architecture(
    architecture: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    what: str = "the description of a selector",
    at: str = "",
) -> ReadySelector:
    """Rebuild a ready selector, with new weights, from its ``architecture``.

    One larger than ``weights``, a ``state_dict()``, is refused before it is built. Messages name
    ``what`` the description was read from, and its place ``at`` in there.

    Raises:
        FileFormatError: the kind is unknown, or an argument is impossible.
    """
    arguments = checked(Tagged(ARCHITECTURES), architecture, what, at)
    with refused(what):
        return built(_KINDS, arguments, weights, at)


def predict(selector: Callable[[State], Tensor], y0: State, n_candidates: int) -> Tensor:
    """Return a selector's predictions (batch, candidates), in its own unit, checked."""
    out, wanted = selector(y0), (count_samples(y0), n_candidates)
    problem = f"the selector returned {shown(out)}."
    expected = f"floats of shape {wanted}: for every sample, the cost of every candidate."
    fix = f"a last layer with {n_candidates} outputs"
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise StateTypeError(problem=problem, expected=expected, fix=fix)
    if out.shape != wanted:
        raise StateShapeError(problem=problem, expected=expected, fix=fix)
    if not bool(torch.isfinite(out).all()):
        problem = "the selector predicted inf or nan costs."
        fix = "torch.isfinite(y0).all()   # or fit the selector again with a lower lr"
        raise NonFiniteError(problem=problem, expected="finite costs.", fix=fix)
    return out
