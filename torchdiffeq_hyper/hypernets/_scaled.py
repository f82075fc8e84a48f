"""Layers between a normalisation of their input and a scale of their output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, cat, nn, split
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.errors import StateShapeError, explain

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}

_FUNCTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}


class Scaled(nn.Module):
    r"""``output_scale * layers(input_scale * x + input_shift)``, channel by channel.

    The last layer starts at zero. The scales start as the identity; `calibrate` sets them.

    Args:
        layers: what lies between.
        n_in: input channels.
        n_out: output channels.
        n_spatial: number of spatial dimensions that ``layers`` convolve over; None if
            they act on the last dimension, which then is the channels' at every point.
    """

    input_scale: Tensor
    input_shift: Tensor
    output_scale: Tensor

    def __init__(
        self, layers: nn.Sequential, n_in: int, n_out: int, n_spatial: int | None = None
    ) -> None:
        super().__init__()
        self.layers = layers
        self.n_spatial = n_spatial
        trailing = (1,) * (n_spatial or 0)
        self.register_buffer("input_scale", torch.ones(n_in, *trailing))
        self.register_buffer("input_shift", torch.zeros(n_in, *trailing))
        self.register_buffer("output_scale", torch.ones(n_out, *trailing))
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        r"""Map (batch, n_in, \*spatial) to (batch, n_out, \*spatial)."""
        if self.n_spatial is None:
            if x.dim() == 2:
                return self._evaluate(x)
            return self._evaluate(x.movedim(1, -1)).movedim(-1, 1)
        if x.dim() != self.n_spatial + 2:
            # torch would take a missing dimension for an unbatched input.
            is_short = x.dim() == self.n_spatial + 1
            raise StateShapeError(
                explain(
                    f"the hypernet convolves over n_spatial={self.n_spatial} dimensions, the "
                    f"state has {x.dim() - 2} after (batch, channels).",
                    f"a state of {self.n_spatial + 2} dimensions.",
                    (
                        "y0 = y0.unsqueeze(0)   # if the batch dimension is missing\n"
                        if is_short
                        else ""
                    )
                    + (
                        f"tdh.hypernets.Conv(..., n_spatial={x.dim() - 2})"
                        if x.dim() - 2 in CONVOLUTIONS
                        else "tdh.hypernets.MLP(...), which takes any number of dimensions"
                    ),
                )
            )
        return self._evaluate(x)

    def _evaluate(self, x: Tensor) -> Tensor:
        first, last = self.layers[0], self.layers[-1]
        if _is_pointwise(first) and first is not last and isinstance(last, _ConvNd):
            return self._evaluate_folded(x, first, last)
        # One fused kernel in place of a subtraction and a division.
        normalised = torch.addcmul(self.input_shift, x, self.input_scale)
        out: Tensor = self.layers(normalised)
        return out * self.output_scale

    def _evaluate_folded(self, x: Tensor, first: _ConvNd, last: _ConvNd) -> Tensor:
        """Evaluate with the scales multiplied into the weights: these are small, x is not.

        Where the first convolution pads, its border would see another shift than the rest.
        """
        assert first.bias is not None
        assert last.bias is not None
        convolve = _FUNCTIONS[x.dim() - 2]
        weight = first.weight * self.input_scale
        bias = torch.addmv(first.bias, first.weight.flatten(1), self.input_shift.flatten())
        x = convolve(x, weight, bias)
        for layer in list(self.layers)[1:-1]:
            x = layer(x)
        weight = last.weight * self.output_scale.unsqueeze(1)
        return convolve(x, weight, last.bias * self.output_scale.flatten(), padding=last.padding)

    @torch.no_grad()
    def calibrate(
        self, inputs: Tensor, residual: Tensor, steady: Sequence[float], unit: float = 1.0
    ) -> None:
        """Set the scales from samples of the input and of the wanted output.

        Args:
            inputs: (N, n_in, ...).
            residual: (N, n_out, ...).
            steady: for each input channel, the standard deviation relative to the mean
                below which it counts as constant.
            unit: that of the wanted output.

        Raises:
            StateShapeError: no samples, or another number of channels.
        """
        _check_samples("inputs", inputs, self.input_scale)
        _check_samples("residual", residual, self.output_scale)
        inputs, residual = _wide(inputs), _wide(residual)
        variance, mean = torch.var_mean(inputs, _all_but_channels(inputs), correction=0)
        size = mean.abs()
        spread = variance.sqrt()
        spread = torch.where(spread > mean.new_tensor(steady) * size, spread, size)
        scale = torch.where(spread > 0, spread, 1.0).reciprocal()
        self.input_scale.copy_(scale.view_as(self.input_scale))
        self.input_shift.copy_((-mean * scale).view_as(self.input_shift))
        size = residual.square().mean(_all_but_channels(residual)).sqrt()
        # A channel that happens to be exact in these samples keeps some room in others.
        size = torch.maximum(size, 1e-3 * size.max())
        size = torch.where(size > 0, size, 1.0) * unit
        self.output_scale.copy_(size.view_as(self.output_scale))


def _is_pointwise(layer: nn.Module) -> TypeGuard[_ConvNd]:
    return isinstance(layer, _ConvNd) and all(size == 1 for size in layer.kernel_size)


def _wide(x: Tensor) -> Tensor:
    """Return samples in float64, where squares of large or small ones stay in range."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _check_samples(name: str, given: Tensor, scale: Tensor) -> None:
    if given.dim() < 2 or given.shape[1] != len(scale) or given.numel() == 0:
        raise StateShapeError(
            explain(
                f"{name} has shape {tuple(given.shape)}.",
                f"at least one sample, and {len(scale)} channels along dim 1.",
                "hypernet.calibrate(hypernet.concat(step), join_channels(residual))",
            )
        )


def join_channels(state: State) -> Tensor:
    r"""Return a state as one tensor of shape (batch, channels, \*spatial).

    A tensor of two or more dimensions is returned as it is; (batch,) becomes one
    channel, a 0-d tensor one sample of one channel. The parts of a tuple state are
    concatenated along dim 1, after repeating a part over the dimensions that only the
    others have. Keeps dtype and device. Costs at most one copy of the state.

    Raises:
        StateShapeError: parts of different batch or spatial sizes.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.hypernets import join_channels
        >>> image, log_density = torch.zeros(8, 3, 28, 28), torch.zeros(8)
        >>> join_channels((image, log_density)).shape
        torch.Size([8, 4, 28, 28])
    """
    if isinstance(state, Tensor):
        return state if state.dim() > 1 else state.reshape(-1, 1)
    dims = [part.dim() for part in state]
    widest = join_channels(state[dims.index(max(dims))])
    batch, spatial = widest.shape[0], widest.shape[2:]
    columns = []
    for part in state:
        has_batch, has_spatial = part.dim() > 0, part.dim() > 2
        if (has_batch and part.shape[0] != batch) or (has_spatial and part.shape[2:] != spatial):
            raise StateShapeError(
                explain(
                    "the parts of the tuple state cannot be concatenated along dim 1: their "
                    f"shapes are {[tuple(part.shape) for part in state]}.",
                    "parts of one batch size and one spatial shape (or none).",
                    "a hypernet of your own, called as g(step) and returning a tuple like step.y",
                )
            )
        channels = part.shape[1] if part.dim() > 1 else 1
        column = part.reshape(*part.shape, *(1,) * (widest.dim() - part.dim()))
        columns.append(column.expand(batch, channels, *spatial))
    return cat(columns, dim=1)


def split_channels(joined: Tensor, like: State) -> State:
    r"""Return what lies in ``joined`` as a state shaped like ``like``.

    The inverse of `join_channels`, except that a part gets the mean over the dimensions
    that only the others have.

    Args:
        joined: (batch, channels, \*spatial), as a net returns it.
        like: the state whose structure is wanted.

    Raises:
        StateShapeError: the number of channels is not that of the parts together.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.hypernets import split_channels
        >>> like = torch.zeros(8, 3, 28, 28), torch.zeros(8)
        >>> [part.shape for part in split_channels(torch.zeros(8, 4, 28, 28), like)]
        [torch.Size([8, 3, 28, 28]), torch.Size([8])]
    """
    if isinstance(like, Tensor):
        return _drop_channel(joined, like)
    channels = [part.shape[1] if part.dim() > 1 else 1 for part in like]
    if joined.dim() < 2 or joined.shape[1] != sum(channels):
        raise StateShapeError(
            explain(
                f"the net returned shape {tuple(joined.shape)} for a tuple state of "
                f"{sum(channels)} channels ({' + '.join(map(str, channels))}).",
                f"{sum(channels)} channels along dim 1, which are split back into the parts.",
                f"a net whose last layer has {sum(channels)} output channels",
            )
        )
    return tuple(
        _average(part, wanted)
        for part, wanted in zip(split(joined, channels, dim=1), like, strict=True)
    )


def _average(joined: Tensor, like: Tensor) -> Tensor:
    """Return a part with the mean over the dimensions that it was repeated over."""
    if like.dim() < 3 <= joined.dim():
        joined = joined.flatten(2).mean(2)
    return joined.mean() if like.dim() == 0 else _drop_channel(joined, like)


def _drop_channel(joined: Tensor, like: Tensor) -> Tensor:
    """Return (n, 1) as the 1-D or 0-d tensor it stands for; other shapes as they are."""
    if like.dim() < 2 and joined.shape == (like.numel(), 1):
        return joined.reshape(like.shape)
    return joined
