"""Choosing a ready selector: for a state, or from its description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import is_half, parts_of
from torchdiffeq_hyper._schema import (
    Default,
    Items,
    Real,
    Record,
    Rule,
    Tagged,
    Whole,
    built,
    checked,
    refused,
)
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.selectors._base import CONVOLUTIONS, ReadySelector
from torchdiffeq_hyper.dise.selectors._perceptrons import MLP, TanhMLP, flattened
from torchdiffeq_hyper.dise.selectors._residual import ResidualConv

_KINDS: dict[str, type[ReadySelector]] = {net.kind: net for net in (MLP, TanhMLP, ResidualConv)}

_COUNT, _WIDTHS = Whole(1), Items(Whole(1), most=1000)
_PERCEPTRON: dict[str, Rule | Default] = {
    "n_inputs": _COUNT,
    "n_candidates": _COUNT,
    "hidden": Default(_WIDTHS),
}
ARCHITECTURES: dict[str, Record] = {
    MLP.kind: Record({**_PERCEPTRON, "dropout": Default(Real(low=0.0, high=1 - 1e-9))}),
    TanhMLP.kind: Record(_PERCEPTRON),
    ResidualConv.kind: Record(
        {
            "channels": _COUNT,
            "n_candidates": _COUNT,
            "hidden": Default(_COUNT),
            "blocks": Default(Whole(1, 1000)),
            "n_spatial": Default(Whole(min(CONVOLUTIONS), max(CONVOLUTIONS))),
        }
    ),
}
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
    dtype = first.dtype.to_real() if first.dtype.is_complex else first.dtype
    return net.to(first.device, torch.float32 if is_half(dtype) else dtype)


def from_architecture(
    architecture: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    what: str = "the description of a selector",
    at: str = "",
) -> ReadySelector:
    """Rebuild a ready selector, with new weights, from its ``architecture``.

    Args:
        architecture: the selector's.
        weights: its ``state_dict()``: a larger one is refused before it is built. None for
            any size.
        what: what the description was read from, for messages.
        at: its place in there.

    Raises:
        FileFormatError: the kind is unknown, or an argument is impossible.
    """
    arguments = checked(Tagged("kind", ARCHITECTURES), architecture, what, at)
    with refused(what):
        return built(_KINDS, arguments, weights, at)
