"""Warnings that each fitted part gives once."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from torchdiffeq_hyper.errors import AdjointWarning

_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(part: Any, what: str, text: str, category: type[Warning]) -> None:
    """Warn of ``what``, unless ``part`` has given that warning before."""
    # Equal parts are the same to a dictionary: their class stands for them.
    is_itself = getattr(type(part), "__hash__", None) is object.__hash__
    known = _warned.setdefault(part if is_itself else type(part), set())
    if what not in known:
        known.add(what)
        warnings.warn(text, category, stacklevel=2)


_UNTRAINED = {
    "hypernet": "odeint_adjoint gives the hypernet no gradient, and its parameters require one. "
    "To train it use odeint; otherwise hypernet.requires_grad_(False).",
    "solver": "odeint_adjoint gives the solver no gradient, and its parameters require one. "
    "To train it use odeint; otherwise solver.requires_grad_(False).",
    "torchdyn": "torchdyn's adjoint sensitivities give a solver's own parameters (the "
    "hypernet's) no gradient, and they require one. To train them use "
    'sensitivity="autograd"; otherwise solver.requires_grad_(False).',
}


def warn_if_untrained(part: Any, which: str) -> None:
    """Warn, once a part, that an adjoint gives it no gradient, if it wants one.

    Args:
        part: a hypernet, or a fitted solver.
        which: the text: "hypernet" or "solver" of torchdiffeq, or "torchdyn".
    """
    if not isinstance(part, nn.Module) or torch.is_inference_mode_enabled():
        return
    if any(parameter.requires_grad for parameter in part.parameters()):
        warn_once(part, which, _UNTRAINED[which], AdjointWarning)
