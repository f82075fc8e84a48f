"""Choosing a ready hypernet: for a state and a base method, or from its description."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._files import (
    Choice,
    Default,
    Items,
    Real,
    Record,
    Rule,
    Such,
    Tagged,
    Whole,
    built,
    checked,
    refused,
)
from torchdiffeq_hyper._state import State, StateLayout, stepped_dtype
from torchdiffeq_hyper.hypernets._concat import NAMES, check_real
from torchdiffeq_hyper.hypernets._convolutional import Bottleneck, Conv
from torchdiffeq_hyper.hypernets._ready import MLP, Linear, ReadyHypernet
from torchdiffeq_hyper.hypernets._scaled import CONVOLUTIONS, join_channels
from torchdiffeq_hyper.tableaus import Tableau

KINDS: dict[str, type[ReadyHypernet]] = {net.kind: net for net in (Linear, MLP, Conv, Bottleneck)}

MOST_LAYERS = 1000
MOST_STAGES = 1000

NAMES_OF_INPUTS = Items(Choice(NAMES), least=1, most=1000)
_COUNT = Whole(1)
_COMMON: dict[str, Rule | Default] = {
    "channels": _COUNT,
    "inputs": Default(NAMES_OF_INPUTS),
    "n_stages": Default(Whole(1, MOST_STAGES)),
    "n_context": Default(Whole()),
    "time_unit": Default(Real(above=0.0)),
    "order": Default(Whole(0, MOST_STAGES)),
}
_CONVOLUTION: dict[str, Rule | Default] = {
    **_COMMON,
    "hidden": Default(_COUNT),
    "kernel_size": Default(Such(_COUNT, lambda k: k % 2 == 1, "odd")),
    "n_spatial": Default(Whole(min(CONVOLUTIONS), max(CONVOLUTIONS))),
}
ARCHITECTURES: dict[str, Record] = {
    Linear.kind: Record(_COMMON),
    MLP.kind: Record({**_COMMON, "hidden": Default(Items(_COUNT, most=MOST_LAYERS))}),
    Conv.kind: Record(_CONVOLUTION),
    Bottleneck.kind: Record(_CONVOLUTION),
}
"""What describes a ready net of each kind in a file. A field that a later version adds is a
`Default` with the value that nets of older files have."""

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


def from_architecture(architecture: Mapping[str, Any]) -> ReadyHypernet:
    """Rebuild a ready net, with new weights, from its ``architecture``.

    Args:
        architecture: the net's `ReadyHypernet.architecture`, also after a round trip
            through JSON.

    Raises:
        FileFormatError: the kind is unknown, or an argument is impossible.

    Example:
        >>> from torchdiffeq_hyper.hypernets import Linear, from_architecture
        >>> from_architecture(Linear(channels=2).architecture).channels
        2
    """
    return rebuilt(architecture, None, "the description of a hypernet", "")


def rebuilt(
    architecture: Mapping[str, Any], weights: Mapping[str, Tensor] | None, what: str, at: str
) -> ReadyHypernet:
    """Return the same as `from_architecture`, for a net whose weights are known.

    Args:
        architecture: the net's.
        weights: its ``state_dict()``: a larger net is refused before it is built. None for
            any size.
        what: what the description was read from, for messages.
        at: its place in there.

    Raises:
        FileFormatError: as above, or the net is larger than its weights.
    """
    arguments = checked(Tagged("kind", ARCHITECTURES), architecture, what, at)
    # Files of before time units have none.
    time_unit, order = arguments.pop("time_unit", 1.0), arguments.pop("order", 0)
    with refused(what):
        # n_stages is no size unless the stages are among the inputs: it has its own limit.
        net = built(KINDS, arguments, weights, at, but=("n_stages", "n_context"))
    net.measure_time_in(time_unit, order)
    return net


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
