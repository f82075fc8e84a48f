"""What tells one fit from another: its arguments, its starts and its field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchdiffeq_hyper._files import shown
from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.fitting._field import SHARES
from torchdiffeq_hyper.fitting._units import differing, fingerprint

FUNC = "func(t, y)"
POINTS_OF: dict[str, Sequence[str]] = {
    "y0": ("",),
    FUNC: [f", {share:.0%} of t_span passed" for share in SHARES],
}
"""Entries of a signature that are fingerprints, and how each of their points is called."""


def check_same_call(signatures: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that fit different things.

    Args:
        signatures: what tells a fit from others, in the order of ranks.

    Raises:
        OptionError: two differ.
    """
    first = signatures[0]
    for rank, other in enumerate(signatures[1:], 1):
        name = _difference(other, first)
        if name is not None:
            raise OptionError(
                explain(
                    f"process {rank} of this fit makes another call than process 0: "
                    f"{_told(name, other, first, 'there', 'in process 0')}.",
                    "the same arguments in every process, y0 among them: fit shares it out itself.",
                    "torch.manual_seed(0)   # before y0 is drawn; and no DistributedSampler",
                )
            )


def check_same_fit(
    found: Mapping[str, Any], wanted: Mapping[str, Any], path: str, fix: str
) -> None:
    """Refuse the checkpoint of another fit.

    Args:
        found: the signature in the checkpoint.
        wanted: that of this fit.
        path: the checkpoint, for the message.
        fix: what to do, for the message.

    Raises:
        OptionError: they differ.
    """
    name = _difference(found, wanted)
    if name is not None:
        raise OptionError(
            explain(
                f"the checkpoint {path!r} belongs to another fit: "
                f"{_told(name, found, wanted, 'there', 'here')}.",
                "the same call as the one that was interrupted.",
                fix,
            )
        )


def check_same_field(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Refuse what was fitted to another field, if it was looked at from the same starts.

    Args:
        found: what `signs_of_field` returned then, None if it was not kept.
        wanted: what it returns now.

    Raises:
        OptionError: func has other values.
    """
    if found is None or not _are_same("y0", found.get("y0"), wanted["y0"]):
        return
    if not _are_same(FUNC, found.get(FUNC), wanted[FUNC]):
        raise OptionError(
            explain(
                "the checkpoint belongs to another field: "
                f"{_told(FUNC, found, wanted, 'there', 'here')}.",
                "the func that it was fitted to.",
                "a new fit that begins with its net: HyperSolverModule(func, ..., hypernet=net)",
            )
        )


def signs_of_field(probes: Sequence[Tensor]) -> dict[str, Any]:
    """Return what tells starts and a field from others.

    Args:
        probes: the starts, flat, and what `field.check_field` returned.
    """
    dtype = probes[0].dtype
    return {
        "y0": fingerprint(probes[:1], dtype),
        FUNC: fingerprint(probes[1:], dtype),
    }


def signs_of_net(net: nn.Module) -> dict[str, list[Any]]:
    """Return what a checkpoint's weights are held against: shapes and dtypes."""
    return {
        name: [*value.shape, str(value.dtype)]
        for name, value in net.state_dict().items()
        if isinstance(value, Tensor)
    }


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return the name of the first entry of ``wanted`` that is another one in ``found``."""
    return next((key for key in wanted if not _are_same(key, found.get(key), wanted[key])), None)


def _are_same(name: str, first: object, second: object) -> bool:
    return differing(first, second) is None if name in POINTS_OF else _agree(first, second)


def _told(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], there: str, here: str
) -> str:
    """Return in which way an entry differs."""
    if name not in POINTS_OF:
        return f"{name} is {shown(found.get(name))} {there} and {shown(wanted[name])} {here}"
    position = differing(found.get(name), wanted[name]) or 0
    return f"{name} has other values {there} than {here}{POINTS_OF[name][position]}"


def _agree(first: Any, second: Any) -> bool:
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_agree, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_agree(first[k], second[k]) for k in second)
    kinds = {type(first), type(second)}
    if kinds <= {int, float}:
        return bool(first == second) or (first != first and second != second)  # noqa: PLR0124
    return len(kinds) == 1 and not isinstance(first, Tensor) and bool(first == second)
