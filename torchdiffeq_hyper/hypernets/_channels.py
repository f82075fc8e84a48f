"""A state as one tensor (batch, channels, *spatial), as convolutions want it."""

from __future__ import annotations

from torch import Tensor, cat, split

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import StateShapeError, explain


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
