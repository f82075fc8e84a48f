"""How the penalties enter a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from torchdiffeq_hyper import recording
from torchdiffeq_hyper.errors import OptionError, closest, explain
from torchdiffeq_hyper.regularizers._steps import (
    Record,
    error_dt_penalty,
    error_penalty,
    local_error_penalty,
    stiffness_penalty,
)

Weights = nn.Module | Iterable[Tensor]
"""A module, or its parameters."""


def l1(weights: Weights) -> Tensor:
    """Return the sum of the absolute values of all parameters, a 0-d tensor.

    Draws parameters to zero (Tibshirani, Regression shrinkage and selection via the lasso,
    1996); one of the regularisers that the DISE paper compares with.

    Args:
        weights: a module (its parameters that require gradients), or tensors.

    Raises:
        OptionError: there are no parameters.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper import regularizers
        >>> regularizers.l1([torch.tensor([3.0, -4.0])])
        tensor(7.)
    """
    return recording.add(weight.abs().sum() for weight in _tensors(weights))


def l2(weights: Weights) -> Tensor:
    """Return the sum of the squares of all parameters, a 0-d tensor.

    Its gradient is twice the parameters: weight decay (Krogh and Hertz, A simple weight
    decay can improve generalization, 1991); one of the regularisers that the DISE paper
    compares with.

    Args:
        weights: a module (its parameters that require gradients), or tensors.

    Raises:
        OptionError: there are no parameters.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper import regularizers
        >>> regularizers.l2([torch.tensor([3.0, -4.0])])
        tensor(25.)
    """
    return recording.add(weight.abs().square().sum() for weight in _tensors(weights))


def _tensors(weights: Weights) -> list[Tensor]:
    if isinstance(weights, nn.Module):
        weights = (parameter for parameter in weights.parameters() if parameter.requires_grad)
    tensors = list(weights)
    if not tensors:
        raise OptionError(
            explain(
                "there are no parameters to penalise.",
                "a module with parameters that require gradients, or a list of tensors.",
                "regularizers.l2(func)",
            )
        )
    return tensors


_OF_RECORD: Mapping[str, Callable[[Record, int | None], Tensor]] = {
    "error": error_penalty,
    "error_dt": error_dt_penalty,
    "stiffness": stiffness_penalty,
    "local": local_error_penalty,
}
_OF_FUNC: Mapping[str, Callable[[nn.Module], Tensor]] = {"l1": l1, "l2": l2}


class LossTerms(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        total: 0-d tensor to call ``backward`` on.
        penalties: each penalty by its name, 0-d, detached, not weighted.
    """

    total: Tensor
    penalties: dict[str, Tensor]


def add_penalties(
    loss: Tensor,
    weights: Mapping[str, float],
    *,
    record: Record | None = None,
    func: nn.Module | None = None,
    part: int | None = None,
) -> LossTerms:
    """Return the task's loss plus weighted penalties.

    Args:
        loss: 0-d tensor, the task's own loss.
        weights: by the penalty's name: "error", "error_dt", "stiffness" and "local" of
            ``record``, "l1" and "l2" of ``func``. The penalties are sums over the batch.
        record: what `tdh.record` or `tdh.odeint_with_errors` gave.
        func: the module whose parameters count.
        part: the part of tuple states that counts; None for all.

    Raises:
        OptionError: a name is unknown, or what it needs is not given.
        NothingRecordedError: the record holds nothing to make a penalty of.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> from torchdiffeq_hyper.regularizers import add_penalties
        >>> class Field(torch.nn.Linear):
        ...     def forward(self, t, y):
        ...         return torch.tanh(super().forward(y))
        >>> func, t = Field(2, 2), torch.tensor([0.0, 1.0])
        >>> optimizer = torch.optim.Adam(func.parameters())
        >>> for y0, target in [(torch.ones(8, 2), torch.zeros(8, 2))] * 3:
        ...     with tdh.record() as rec:
        ...         y = odeint(func, y0, t, rtol=1e-3, atol=1e-3)
        ...     task = (y[-1] - target).square().mean()
        ...     terms = add_penalties(task, {"error": 0.1, "l2": 1e-4}, record=rec, func=func)
        ...     optimizer.zero_grad()
        ...     terms.total.backward()
        ...     optimizer.step()
        >>> sorted(terms.penalties)
        ['error', 'l2']
    """
    penalties: dict[str, Tensor] = {}
    for name, weight in weights.items():
        penalty = _penalty(name, record, func, part)
        penalties[name] = penalty.detach()
        loss = loss + weight * penalty
    return LossTerms(loss, penalties)


def _penalty(name: str, record: Record | None, func: nn.Module | None, part: int | None) -> Tensor:
    if name in _OF_RECORD and record is not None:
        return _OF_RECORD[name](record, part)
    if name in _OF_FUNC and func is not None:
        return _OF_FUNC[name](func)
    known = [*_OF_RECORD, *_OF_FUNC]
    if name not in known:
        raise OptionError(
            explain(
                f"no penalty is called {name!r}.",
                "one of " + ", ".join(f'"{penalty}"' for penalty in known) + ".",
                f'{{"{closest(name, known)}": 0.1}}',
            )
        )
    argument = "record=rec" if name in _OF_RECORD else "func=func"
    raise OptionError(
        explain(
            f'the penalty "{name}" has nothing to work on.',
            f"the argument {argument}.",
            f"add_penalties(loss, weights, {argument})",
        )
    )
