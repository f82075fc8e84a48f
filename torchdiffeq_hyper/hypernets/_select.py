"""Choosing a ready hypernet for a state and a base method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, stepped_dtype
from torchdiffeq_hyper.hypernets._concat import check_real, join_channels
from torchdiffeq_hyper.hypernets._kinds import MLP, Bottleneck, Conv, Linear
from torchdiffeq_hyper.hypernets._ready import CONVOLUTIONS, ReadyHypernet
from torchdiffeq_hyper.tableaus import Tableau

INPUTS = ("y", "stages", "dt", "t")
"""What ready nets are given: all that a step knows, but for the start."""


def ready(
    y0: State,
    tableau: Tableau,
    *,
    inputs: Sequence[str] = INPUTS,
    n_context: int = 0,
    time_unit: float = 1.0,
) -> ReadyHypernet:
    """Return a new ready net that fits a state and a base method.

    States with 1 to 3 spatial dimensions get a `Conv` over these, all others an `MLP`.
    The net is on the state's device and in its dtype (float32 for half-precision
    states, which are stepped in float32), with random first layers.

    Args:
        y0: the state, with its batch dimension.
        tableau: the base method, whose number of stages "stages" stands for.
        inputs: see `ConcatHypernet`; without "t" for autonomous problems.
        n_context: channels of the context, if ``inputs`` has "context".
        time_unit: see `ReadyHypernet.measure_time_in`; best the length of the span.

    Raises:
        StateTypeError: the state is of integers, or complex.
        StateShapeError: the parts of a tuple state cannot be concatenated.
        OptionError: ``inputs`` is empty or holds an unknown name.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper import hypernets
        >>> from torchdiffeq_hyper.tableaus import HEUN
        >>> hypernets.ready(torch.zeros(8, 12, 7, 7), HEUN).architecture["kind"]
        'conv'
    """
    joined = join_channels(y0)
    channels, n_spatial = joined.shape[1], joined.dim() - 2
    given: Any = {"inputs": inputs, "n_stages": tableau.calls, "n_context": n_context}
    is_image = n_spatial in CONVOLUTIONS
    net = Conv(channels, n_spatial=n_spatial, **given) if is_image else MLP(channels, **given)
    net.measure_time_in(time_unit, tableau.order)
    return suited(net, joined)


def suited(net: ReadyHypernet, y: Tensor) -> ReadyHypernet:
    """Return a net on the device and in the dtype in which ``y`` is stepped.

    Raises:
        StateTypeError: ``y`` is of integers, or complex.
    """
    StateLayout.of(y)
    check_real(y)
    return net.to(y.device, stepped_dtype(y.dtype))


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
    found: list[list[ReadyHypernet]] = [[Linear(channels, **given)]]
    if n_spatial in CONVOLUTIONS:
        given["n_spatial"] = n_spatial
        kinds: tuple[tuple[type[Conv | Bottleneck], int], ...]
        kinds = ((Conv, 1), (Conv, 3), (Bottleneck, 3), (Bottleneck, 5))
        found += [[kind(channels, width, k, **given) for width in WIDTHS] for kind, k in kinds]
    else:
        found += [[MLP(channels, (width,) * n, **given) for width in WIDTHS] for n in (1, 2)]
    for net in (net for family in found for net in family):
        net.measure_time_in(time_unit, tableau.order)
        suited(net, joined)
    return found
