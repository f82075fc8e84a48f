r"""Ready hypernets that couple neighbouring points of space."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.hypernets._ready import ReadyHypernet, channel_counts, check_count
from torchdiffeq_hyper.hypernets._scaled import CONVOLUTIONS


class Conv(ReadyHypernet):
    r"""Two convolutions, k x k and 1 x 1, with a SiLU between.

    For states (batch, channels, \*spatial) with 1 to 3 spatial dimensions; zero padding
    keeps their size. Costs hidden * (k^n_spatial * channels_in + channels)
    multiply-adds a point.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        hidden: channels between the two convolutions.
        kernel_size: k, odd.
        n_spatial: spatial dimensions of the state: 1, 2 or 3.
        inputs: see `ConcatHypernet`.
        n_stages: stages of the base method; matters if ``inputs`` has "stages".
        n_context: channels of the context, all its tensors together; if ``inputs`` has
            "context".

    Raises:
        OptionError: an argument is impossible.
        StateShapeError: (when called) the state has other spatial dimensions.

    Example:
        >>> from torchdiffeq_hyper.hypernets import Conv
        >>> sorted(Conv(channels=12).architecture)
        ['channels', 'hidden', 'inputs', 'kernel_size', 'kind', 'n_spatial', 'n_stages']
    """

    kind = "conv"

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        kernel_size: int = 3,
        n_spatial: int = 2,
        *,
        inputs: Sequence[str] = ("y", "f0", "dt"),
        n_stages: int = 1,
        n_context: int = 0,
    ) -> None:
        n_in = sum(channel_counts(channels, inputs, n_stages, n_context))
        convolution = _convolution(hidden, kernel_size, n_spatial)
        layers = nn.Sequential(
            convolution(n_in, hidden, kernel_size, padding=kernel_size // 2),
            nn.SiLU(),
            convolution(hidden, channels, 1),
        )
        own = {"hidden": hidden, "kernel_size": kernel_size, "n_spatial": n_spatial}
        super().__init__(layers, channels, inputs, n_stages, n_context, **own)


class Bottleneck(ReadyHypernet):
    r"""Two convolutions, 1 x 1 to a few channels and k x k back, with a SiLU between.

    The cheap net for states with 1 to 3 spatial dimensions: the wide convolution runs over
    ``hidden`` channels in place of all inputs, of which there are many. Zero padding keeps
    the state's size. Costs hidden * (channels_in + k^n_spatial * channels) multiply-adds a
    point.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        hidden: channels between the two convolutions.
        kernel_size: k, odd.
        n_spatial: spatial dimensions of the state: 1, 2 or 3.
        inputs: see `ConcatHypernet`.
        n_stages: stages of the base method; matters if ``inputs`` has "stages".
        n_context: channels of the context, all its tensors together; if ``inputs`` has
            "context".

    Raises:
        OptionError: an argument is impossible.
        StateShapeError: (when called) the state has other spatial dimensions.

    Example:
        >>> from torchdiffeq_hyper.hypernets import Bottleneck, Conv
        >>> sizes = [sum(p.numel() for p in net(channels=12).parameters())
        ...          for net in (Bottleneck, Conv)]
        >>> sizes
        [1084, 7628]
    """

    kind = "bottleneck"

    def __init__(
        self,
        channels: int,
        hidden: int = 8,
        kernel_size: int = 3,
        n_spatial: int = 2,
        *,
        inputs: Sequence[str] = ("y", "f0", "dt"),
        n_stages: int = 1,
        n_context: int = 0,
    ) -> None:
        n_in = sum(channel_counts(channels, inputs, n_stages, n_context))
        convolution = _convolution(hidden, kernel_size, n_spatial)
        layers = nn.Sequential(
            convolution(n_in, hidden, 1),
            nn.SiLU(),
            convolution(hidden, channels, kernel_size, padding=kernel_size // 2),
        )
        own = {"hidden": hidden, "kernel_size": kernel_size, "n_spatial": n_spatial}
        super().__init__(layers, channels, inputs, n_stages, n_context, **own)


def _convolution(
    hidden: int, kernel_size: int, n_spatial: int
) -> type[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Return the convolution over ``n_spatial`` dimensions.

    Raises:
        OptionError: an argument is impossible.
    """
    check_count("hidden", hidden)
    check_count("kernel_size", kernel_size)
    if n_spatial not in CONVOLUTIONS or kernel_size % 2 == 0:
        raise OptionError(
            explain(
                f"kernel_size is {kernel_size!r} and n_spatial is {n_spatial!r}.",
                "an odd kernel_size (the state's size is kept) and 1, 2 or 3 for n_spatial.",
                "kernel_size=3, n_spatial=2",
            )
        )
    return CONVOLUTIONS[n_spatial]
