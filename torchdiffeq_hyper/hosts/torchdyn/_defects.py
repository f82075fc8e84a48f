"""Warnings about what torchdyn 1.0.6 itself does wrong, whatever the solver."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

from torchdiffeq_hyper.errors import AdjointWarning, HostWarning
from torchdiffeq_hyper.hypersolver import HyperSolver

_TEXTS = {
    "t_eval": "torchdyn returns the times of a reverse-time solve negated, for every solver. The "
    "solution is right, and belongs to t_span as you gave it: use that in place of t_eval.",
    "reverse adjoint": "torchdyn's adjoint gradients of a reverse-time solve have the wrong value "
    "and sign, for every solver. The solution is right. For gradients use "
    'sensitivity="autograd", or torchdiffeq\'s odeint_adjoint.',
    "save_at": "torchdyn ignores save_at under adjoint sensitivities, for every solver, and "
    'returns all of t_span. Use sensitivity="autograd", or pick points out of the solution.',
    "args": "torchdyn keeps args from the vector field where order > 1 or an integral loss is "
    "set, for every solver. Let the vector field hold them itself.",
}

_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn(what: str, part: Any) -> None:
    """Warn, once a solver, of a defect of the host.

    Args:
        what: which of them: "t_eval", "reverse adjoint", "save_at" or "args".
        part: the solver it happens to.
    """
    known = _warned.setdefault(_key(part), set())
    if what not in known:
        known.add(what)
        warnings.warn(_TEXTS[what], HostWarning, stacklevel=2)


def warn_if_trained_through_adjoint(part: Any) -> None:
    """Warn, once a solver, that torchdyn's adjoints give a hypernet no gradient."""
    known = _warned.setdefault(_key(part), set())
    if "untrained" in known or not isinstance(part, HyperSolver):
        return
    if any(parameter.requires_grad for parameter in part.parameters()):
        known.add("untrained")
        warnings.warn(
            "torchdyn's adjoint sensitivities give a solver's own parameters (the hypernet's) no "
            'gradient, and they require one. To train them use sensitivity="autograd"; otherwise '
            "solver.requires_grad_(False).",
            AdjointWarning,
            stacklevel=2,
        )


def _key(part: Any) -> Any:
    """Return what stands for a part: itself, or its class where equal parts are the same."""
    is_itself = getattr(type(part), "__hash__", None) is object.__hash__
    return part if is_itself else type(part)
