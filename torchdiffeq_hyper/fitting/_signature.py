"""What tells one fit from another: its arguments, its starts and its field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchdiffeq_hyper._files import shown
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting._field import SHARES
from torchdiffeq_hyper.fitting._units import differing, fingerprint

FUNC = "func(t, y)"
POINTS_OF: dict[str, Sequence[str]] = {
    "y0": ("",),
    FUNC: [f", {share:.0%} of t_span passed" for share in SHARES],
}
"""Entries of a signature that are fingerprints, and how each of their points is called."""


def signs_of_field(probes: Sequence[Tensor]) -> dict[str, Any]:
    """Return what tells starts and a field from others: of flat starts and `check_field`."""
    dtype = probes[0].dtype
    return {"y0": fingerprint(probes[:1], dtype), FUNC: fingerprint(probes[1:], dtype)}


def signs_of_net(net: nn.Module) -> dict[str, list[Any]]:
    """Return what a checkpoint's weights are held against: shapes and dtypes."""
    return {
        name: [*value.shape, str(value.dtype)]
        for name, value in net.state_dict().items()
        if isinstance(value, Tensor)
    }


def check_same_call(signatures: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes, given by their signatures in the order of ranks, that differ."""
    for rank, other in enumerate(signatures[1:], 1):
        difference = _difference(other, signatures[0], "in process 0")
        if difference:
            raise OptionError(
                problem=f"process {rank} of this fit makes another call than process 0: "
                f"{difference}.",
                expected="the same arguments in every process, y0 among them: fit shares it out "
                "itself.",
                fix="torch.manual_seed(0)   # before y0 is drawn; and no DistributedSampler",
            )


def check_same_fit(
    found: Mapping[str, Any], wanted: Mapping[str, Any], path: str, fix: str
) -> None:
    """Refuse the checkpoint at ``path`` if its signature is that of another fit."""
    difference = _difference(found, wanted)
    if difference:
        raise OptionError(
            problem=f"the checkpoint {path!r} belongs to another fit: {difference}.",
            expected="the same call as the one that was interrupted.",
            fix=fix,
        )


def check_same_field(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Refuse what was fitted to another field, if it was looked at from the same starts.

    Both are what `signs_of_field` returned; ``found`` is None where it was not kept.
    """
    if found is None or _difference(found, {"y0": wanted["y0"]}):
        return
    difference = _difference(found, {FUNC: wanted[FUNC]})
    if difference:
        raise OptionError(
            problem=f"the checkpoint belongs to another field: {difference}.",
            expected="the func that it was fitted to.",
            fix="a new fit that begins with its net: HyperSolverModule(func, ..., hypernet=net)",
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], here: str = "here") -> str:
    """Return in which way the first entry of ``wanted`` differs that does; "" if none does."""
    for name, own in wanted.items():
        other = found.get(name)
        if name in POINTS_OF:
            position = differing(other, own)
            if position is not None:
                return f"{name} has other values there than {here}{POINTS_OF[name][position]}"
        elif not _agree(other, own):
            return f"{name} is {shown(other)} there and {shown(own)} {here}"
    return ""


def _agree(first: Any, second: Any) -> bool:
    """Return whether plain values are the same; nan is the same as nan, 1 as 1.0."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_agree, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_agree(first[k], second[k]) for k in second)
    kinds = {type(first), type(second)}
    if kinds <= {int, float}:
        return bool(first == second) or (first != first and second != second)  # noqa: PLR0124
    return len(kinds) == 1 and not isinstance(first, Tensor) and bool(first == second)
