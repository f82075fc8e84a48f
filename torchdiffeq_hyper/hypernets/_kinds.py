"""The ready hypernets: linear maps, perceptrons, convolutions; and those that fit a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn

from torchdiffeq_hyper._rules import Items, Rule, Such, Whole
from torchdiffeq_hyper._state import State, StateLayout, stepped_dtype
from torchdiffeq_hyper.hypernets._concat import join_channels, refuse_complex
from torchdiffeq_hyper.hypernets._layers import CONVOLUTIONS, ReadyConcatHypernet, perceptron
from torchdiffeq_hyper.hypernets._ready import COUNT, ReadyHypernet
from torchdiffeq_hyper.tableaus import Tableau


class Linear(ReadyConcatHypernet):
    r"""One linear map of the input channels, the same at every point of space.

    Costs channels_in * channels multiply-adds a point.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        common: ``inputs``, ``n_stages`` and ``n_context``; with the errors, see
            `ReadyConcatHypernet`.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> solver = tdh.HyperSolver("euler", tdh.hypernets.Linear(channels=2), steps=2)
        >>> y = solver.solve(lambda t, y: -y, torch.ones(1, 2), torch.tensor([0.0, 1.0]))
        >>> y[-1].detach()  # unfitted: the base method
        tensor([[0.2500, 0.2500]])
    """

    kind = "linear"

    def __init__(self, channels: int, **common: Any) -> None:
        def layers(n_in: int) -> nn.Sequential:
            return perceptron([n_in, channels])

        super().__init__(layers, channels, {}, **common)


class MLP(ReadyConcatHypernet):
    r"""A perceptron with SiLU activations on the channels, the same at every point of space.

    For states without spatial dimensions; where there are some, no points are coupled.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        hidden: widths of the hidden layers.
        common: ``inputs``, ``n_stages`` and ``n_context``; with the errors, see
            `ReadyConcatHypernet`.

    Example:
        >>> from torchdiffeq_hyper.hypernets import MLP
        >>> MLP(channels=2, hidden=(32,)).architecture["hidden"]
        [32]
    """

    kind = "mlp"
    rules: ClassVar[Mapping[str, Rule]] = {"hidden": Items(COUNT, most=1000)}

    def __init__(self, channels: int, hidden: Sequence[int] = (64, 64), **common: Any) -> None:
        def layers(n_in: int) -> nn.Sequential:
            # SiLU is smooth, and several times cheaper than tanh on CPUs.
            return perceptron([n_in, *hidden, channels], nn.SiLU())

        super().__init__(layers, channels, {"hidden": hidden}, **common)


_CONVOLUTION: dict[str, Rule] = {
    "hidden": COUNT,
    "kernel_size": Such(COUNT, lambda k: k % 2 == 1, "odd, which keeps the state's size"),
    "n_spatial": Whole(min(CONVOLUTIONS), max(CONVOLUTIONS)),
}


class Conv(ReadyConcatHypernet):
    r"""Two convolutions, k x k and 1 x 1, with a SiLU between.

    For states (batch, channels, \*spatial) with 1 to 3 spatial dimensions (others raise
    `StateShapeError`); zero padding keeps their size. Costs hidden * (k^n_spatial *
    channels_in + channels) multiply-adds a point.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        hidden: channels between the two convolutions.
        kernel_size: k, odd.
        n_spatial: spatial dimensions of the state: 1, 2 or 3.
        common: ``inputs``, ``n_stages`` and ``n_context``; with the errors, see
            `ReadyConcatHypernet`.

    Example:
        >>> from torchdiffeq_hyper.hypernets import Conv
        >>> sorted(Conv(channels=12).architecture)
        ['channels', 'hidden', 'inputs', 'kernel_size', 'kind', 'n_spatial', 'n_stages']
    """

    kind = "conv"
    rules = _CONVOLUTION

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        kernel_size: int = 3,
        n_spatial: int = 2,
        **common: Any,
    ) -> None:
        layers = _convolutions(hidden, channels, n_spatial, (kernel_size, 1))
        own = {"hidden": hidden, "kernel_size": kernel_size, "n_spatial": n_spatial}
        super().__init__(layers, channels, own, **common)


class Bottleneck(ReadyConcatHypernet):
    r"""Two convolutions, 1 x 1 to a few channels and k x k back, with a SiLU between.

    The cheap net for states with 1 to 3 spatial dimensions: the wide convolution runs over
    ``hidden`` channels in place of all inputs, of which there are many. Zero padding keeps
    the state's size. Costs hidden * (channels_in + k^n_spatial * channels) multiply-adds a
    point.

    Arguments and errors are those of `Conv`.

    Example:
        >>> from torchdiffeq_hyper.hypernets import Bottleneck, Conv
        >>> sizes = [sum(p.numel() for p in net(channels=12).parameters())
        ...          for net in (Bottleneck, Conv)]
        >>> sizes
        [1084, 7628]
    """

    kind = "bottleneck"
    rules = _CONVOLUTION

    def __init__(
        self,
        channels: int,
        hidden: int = 8,
        kernel_size: int = 3,
        n_spatial: int = 2,
        **common: Any,
    ) -> None:
        layers = _convolutions(hidden, channels, n_spatial, (1, kernel_size))
        own = {"hidden": hidden, "kernel_size": kernel_size, "n_spatial": n_spatial}
        super().__init__(layers, channels, own, **common)


def _convolutions(
    hidden: int, channels: int, n_spatial: int, kernels: tuple[int, int]
) -> Callable[[int], nn.Sequential]:
    """Return what makes two convolutions of these kernel sizes, given the input channels."""

    def layers(n_in: int) -> nn.Sequential:
        convolve, (first, last) = CONVOLUTIONS[n_spatial], kernels
        return nn.Sequential(
            convolve(n_in, hidden, first, padding=first // 2),
            nn.SiLU(),
            convolve(hidden, channels, last, padding=last // 2),
        )

    return layers


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

    States with 1 to 3 spatial dimensions get a `Conv` over these, all others an `MLP`, on the
    state's device and in its dtype (float32 for half-precision states).

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
    refuse_complex(y)
    return net.to(y.device, stepped_dtype(y.dtype))


WIDTHS = (4, 8, 16, 32, 64)


def families(y0: State, tableau: Tableau, *, time_unit: float = 1.0) -> list[list[ReadyHypernet]]:
    """Return new ready nets that fit a state and a base method, those of one kind by width.

    States with 1 to 3 spatial dimensions get linear maps, perceptrons of the channels at
    each point, `Bottleneck` of kernel size 3 and 5, and `Conv`; all others linear maps and
    perceptrons of one and two hidden layers. Kinds that have done well come last. Arguments
    and errors are those of `ready`.

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
    for net in chain.from_iterable(found):
        net.measure_time_in(time_unit, tableau.order)
        suited(net, joined)
    return found
