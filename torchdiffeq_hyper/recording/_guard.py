"""Keeps the gradient of a record from failing in the middle of autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import HyperError, explain


class NothingRecordedError(HyperError, ValueError):
    """A penalty was asked of a record that holds nothing to make it of."""


class FreedGraphError(HyperError, RuntimeError):
    """The gradient of a record was asked for after backward had freed its graph."""


class AdjointGradientError(HyperError, RuntimeError):
    """The gradient of a record was asked for after `odeint_adjoint`, which keeps no graph."""


@dataclass(frozen=True)
class Guard:
    """Knows whether a record's numbers can be differentiated.

    Attributes:
        marks: nodes put into the solve's graph by `mark`, one an accepted step.
        is_adjoint: whether the solve was the forward one of `odeint_adjoint`.
    """

    marks: tuple[Any, ...] = ()
    is_adjoint: bool = False

    def protect(self, value: Tensor) -> Tensor:
        """Return ``value``, whose backward raises where its graph cannot serve it."""
        if not torch.is_grad_enabled():
            return value.detach()
        if self.is_adjoint:
            value = value + torch.zeros((), requires_grad=True)  # for a backward to raise in
        elif value.requires_grad:
            value = value.view_as(value)
        else:
            return value
        value.register_hook(self.check)
        return value

    def check(self, *_: Tensor) -> None:
        """Raise if there is no graph (any more).

        Raises:
            AdjointGradientError: there never was one.
            FreedGraphError: a backward pass has freed it.
        """
        if self.is_adjoint:
            raise AdjointGradientError(
                explain(
                    "odeint_adjoint keeps no graph of its steps: their errors have no gradient.",
                    "a solve by odeint, or a regulariser that is differentiated on its own.",
                    "odeint(func, y0, t, ...)   # instead of odeint_adjoint\n"
                    "tdh.regularizers.local_error_penalty(rec)   # one random step, any adjoint\n"
                    "tdh.regularizers.EnergyField(func)   # integrals carried in the state",
                )
            )
        if not all(map(_is_alive, self.marks)):
            raise FreedGraphError(
                explain(
                    "a backward pass has freed the graph of this record.",
                    "one backward pass for the loss and the penalty together.",
                    "(loss + weight * rec.error_penalty()).backward()\n"
                    "loss.backward(retain_graph=True)   # or keep the graph\n"
                    "with torch.no_grad(): rec.error_penalty()   # the value alone",
                )
            )


def mark(x: Tensor) -> tuple[Tensor, Any]:
    """Return ``x`` with a node of ours in its graph, and that node (None without a graph).

    The node tells `Guard` when the graph is freed.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    marked: Tensor = _Mark.apply(x)  # type: ignore[no-untyped-call]
    return marked, marked.grad_fn


def _is_alive(node: Any) -> bool:
    try:
        _ = node.saved_tensors
    except RuntimeError:
        return False
    return True


class _Mark(torch.autograd.Function):
    """The identity; its saved (empty) tensor goes when the graph's buffers go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
