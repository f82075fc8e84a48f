"""What one call of torchdyn is: whose field, which times, which way, which role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.hosts.torchdyn import _upstream


@dataclass(frozen=True)
class HostCall:
    """One call of the host, seen through its reverse-time wrapper.

    Attributes:
        func: the field as it was given to `odeint`.
        t: the true times, decreasing in reverse time.
        negated: whether the host gave time and derivative negated.
        is_adjoint_backward: whether this is a backward solve of an adjoint.
    """

    func: Callable[..., Any]
    t: Tensor
    negated: bool
    is_adjoint_backward: bool

    @classmethod
    def of(cls, func: Any, t: Tensor) -> HostCall:
        """Look through the wrapper that `odeint` may have put around ``func``."""
        inner = _upstream.unreversed(func)
        negated = inner is not None
        func = func if inner is None else inner
        return cls(func, -t if negated else t, negated, _upstream.is_adjoint_dynamics(func))


def saved_points(save_at: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``save_at`` as a tensor, and where its times lie in ``t``.

    Raises:
        OptionError: a time is not in ``t``.
    """
    wanted = torch.as_tensor(save_at, dtype=t.dtype, device=t.device)
    is_same = torch.isclose(wanted.reshape(-1, 1), t.detach())
    missing = wanted[~is_same.any(dim=1)]
    if len(missing):
        raise OptionError(
            explain(
                f"save_at holds {missing[0].item():.6g}, which is not in t_span.",
                "times of t_span.",
                "odeint(f, x, t_span, solver, save_at=t_span[[0, -1]])",
            )
        )
    return wanted, is_same.int().argmax(dim=1)
