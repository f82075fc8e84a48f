"""Choosing a ready selector: for a state, or from its description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchdiffeq_hyper._layout import is_half
from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.samples import parts_of
from torchdiffeq_hyper.dise.selectors._base import CONVOLUTIONS, ReadySelector
from torchdiffeq_hyper.dise.selectors._perceptrons import MLP, TanhMLP, flattened
from torchdiffeq_hyper.dise.selectors._residual import ResidualConv
from torchdiffeq_hyper.errors import FileFormatError, HyperError, closest, explain

_KINDS: dict[str, type[ReadySelector]] = {net.kind: net for net in (MLP, TanhMLP, ResidualConv)}


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


def from_architecture(architecture: Mapping[str, Any]) -> ReadySelector:
    """Rebuild a ready selector, with new weights, from its ``architecture``.

    Raises:
        FileFormatError: the kind is unknown, or an argument is impossible.
    """
    arguments = dict(architecture)
    kind = arguments.pop("kind", None)
    try:
        return _KINDS[kind](**arguments)
    except (KeyError, TypeError, HyperError) as error:
        raise FileFormatError(
            explain(
                f"a selector is described as {dict(architecture)!r}.",
                "one of " + ", ".join(f'"{known}"' for known in _KINDS) + " and its arguments.",
                f'"kind": "{closest(kind, _KINDS)}"   # or: pip install -U torchdiffeq_hyper',
            )
        ) from error
