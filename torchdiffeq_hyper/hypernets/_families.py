"""The ready nets that suit a state, each kind in several widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.hypernets._channels import join_channels
from torchdiffeq_hyper.hypernets._convolutional import Bottleneck, Conv
from torchdiffeq_hyper.hypernets._ready import MLP, Linear, ReadyHypernet
from torchdiffeq_hyper.hypernets._scaled import CONVOLUTIONS
from torchdiffeq_hyper.hypernets._select import INPUTS, suited
from torchdiffeq_hyper.tableaus import Tableau

WIDTHS = (4, 8, 16, 32, 64)


def families(y0: State, tableau: Tableau, *, time_unit: float = 1.0) -> list[list[ReadyHypernet]]:
    """Return new ready nets that fit a state and a base method, those of one kind by width.

    States with 1 to 3 spatial dimensions get linear maps, perceptrons of the channels at
    each point, `Bottleneck` of kernel size 3 and 5, and `Conv`; all others linear maps and
    perceptrons of one and two hidden layers. Kinds that have done well come last.

    Args:
        y0: the state, with its batch dimension.
        tableau: the base method.
        time_unit: see `ReadyHypernet.measure_time_in`.

    Raises:
        StateTypeError: the state is of integers, or complex.
        StateShapeError: the parts of a tuple state cannot be concatenated.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper import hypernets
        >>> from torchdiffeq_hyper.tableaus import HEUN
        >>> [family[0].kind for family in hypernets.families(torch.zeros(8, 12, 7, 7), HEUN)]
        ['linear', 'conv', 'conv', 'bottleneck', 'bottleneck']
    """
    joined = join_channels(y0)
    channels, n_spatial = joined.shape[1], joined.dim() - 2
    given: dict[str, Any] = {"inputs": INPUTS, "n_stages": tableau.calls}
    kinds: Sequence[Callable[[int], ReadyHypernet]]
    if n_spatial in CONVOLUTIONS:
        spatial = {**given, "n_spatial": n_spatial}
        kinds = (
            partial(Conv, channels, kernel_size=1, **spatial),
            partial(Conv, channels, kernel_size=3, **spatial),
            partial(Bottleneck, channels, kernel_size=3, **spatial),
            partial(Bottleneck, channels, kernel_size=5, **spatial),
        )
    else:
        kinds = (
            lambda width: MLP(channels, (width,), **given),
            lambda width: MLP(channels, (width, width), **given),
        )
    linear = Linear(channels, **given)
    found: list[list[ReadyHypernet]] = [[linear]]
    found += [[kind(width) for width in WIDTHS] for kind in kinds]
    for net in (net for family in found for net in family):
        net.measure_time_in(time_unit, tableau.order)
        suited(net, joined)
    return found
