"""Nets built from their descriptions, in sizes that fit the weights read with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from torchdiffeq_hyper._files._schema import Mismatch, mismatch, under

NetT = TypeVar("NetT", bound=nn.Module)


def check_sizes(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    at: str,
    but: Sequence[str] = (),
) -> None:
    """Refuse a net described as larger than its tensors are, before it is built.

    Args:
        description: the net's; its ints are sizes, lists of ints one size a layer.
        tensors: its weights.
        at: the place of the description, for the message.
        but: ints that are no sizes.

    Raises:
        Mismatch: a size is above all numbers in the tensors, or there are more layers.
    """
    numbers = sum(tensor.numel() for tensor in tensors.values())
    for name, value in description.items():
        sizes = value if isinstance(value, list) else [value]
        is_size = name not in but and all(type(size) is int for size in sizes)
        if is_size and (max(sizes, default=0) > numbers or len(sizes) > len(tensors)):
            expected = f"sizes that fit the {numbers:,} numbers in {len(tensors)} tensors"
            raise mismatch(under(at, name), value, expected)


def built(
    kinds: Mapping[str, type[NetT]],
    arguments: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None,
    at: str,
    *,
    but: Sequence[str] = (),
) -> NetT:
    """Return the net of a checked description.

    Args:
        kinds: the classes.
        arguments: the net's "kind" and its arguments.
        weights: its tensors: a larger net is refused before it is built. None for any size.
        at: the place of the description, for messages.
        but: ints that are no sizes.

    Raises:
        Mismatch: its sizes do not fit the weights, or are impossible.
    """
    own = {name: value for name, value in arguments.items() if name != "kind"}
    if weights is not None:
        check_sizes(own, weights, at, but)
    kind = arguments["kind"]
    try:
        return kinds[kind](**own)
    except RuntimeError as error:  # tensors of more numbers than can be counted
        problem = f"a net of kind {kind!r} cannot be built: {error}"
        raise Mismatch(problem, "sizes that fit its weights") from error
