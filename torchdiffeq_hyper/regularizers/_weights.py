"""Penalties on func's parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from torchdiffeq_hyper import recording
from torchdiffeq_hyper.errors import OptionError, explain

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
