"""What tells one fit from another: its arguments, its starts and its field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._rules import shown
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting._field import SEED, SHARES, size_of

FUNC = "func(t, y)"
# Entries of a signature that are fingerprints, and how each of their points is called.
POINTS_OF = {"y0": [""], FUNC: [f", {share:.0%} of t_span passed" for share in SHARES]}

N_DIRECTIONS = 4
SLACK = 1e-4  # relative difference of one field: sums depend on the number of threads
HALF_SLACK = 4  # roundings that a field in half precision may differ by
# Roundings of the largest of all points that a value may differ by as well: where terms cancel,
# little else is left of it.
ROUNDINGS = 64

Fingerprint: TypeAlias = dict[str, Any]


@torch.no_grad()
def fingerprint(points: Sequence[Tensor], dtype: torch.dtype) -> list[Fingerprint | None]:
    """Return what tells values, computed in ``dtype``, from others; None for what is not finite.

    Sizes, and projections relative to them, so that they overflow for no unit.
    """
    real = (torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in points)
    values = [point.detach().cpu().double().flatten() for point in real]
    generator, like = torch.Generator().manual_seed(SEED), values[0]
    directions = [torch.empty_like(like).normal_(generator=generator) for _ in range(N_DIRECTIONS)]
    found: list[Fingerprint | None] = []
    for value in values:
        if not bool(torch.isfinite(value).all()):
            found.append(None)
            continue
        size = size_of(value)
        relative = value / size if size > 0 else value
        # Of the order of one, whatever the number of values.
        projections = [float(relative @ d) / math.sqrt(max(1, len(value))) for d in directions]
        found.append({"size": size, "projections": projections, "eps": torch.finfo(dtype).eps})
    return found


def differing(first: object, second: object) -> int | None:
    """Return the first point at which anything read from a file differs from a fingerprint."""
    assert isinstance(second, list)
    if not isinstance(first, list) or len(first) != len(second):
        return 0
    largest = max((own["size"] for own in second if own is not None), default=0.0)
    alike = [_alike(one, other, largest) for one, other in zip(first, second, strict=True)]
    return None if all(alike) else alike.index(False)


def _alike(one: Any, other: Fingerprint | None, largest: float) -> bool:
    if one is None or other is None:
        return one is other
    try:
        size, own, eps = float(one["size"]), float(other["size"]), float(other["eps"])
        slack = max(SLACK, HALF_SLACK * eps) * max(size, own) + ROUNDINGS * eps * largest
        pairs = zip([1.0, *one["projections"]], [1.0, *other["projections"]], strict=True)
        return all(abs(a * size - b * own) <= slack for a, b in pairs)
    except (KeyError, TypeError, ValueError):
        return False


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
    """Refuse processes that differ in their signatures, given in the order of ranks."""
    for rank, other in enumerate(signatures[1:], 1):
        if what := _difference(other, signatures[0], "in process 0"):
            raise OptionError(
                problem=f"process {rank} of this fit makes another call than process 0: {what}.",
                expected="the same arguments and y0 in every process: fit shares y0 out itself.",
                fix="torch.manual_seed(0)   # before y0 is drawn; and no DistributedSampler",
            )


def check_same_fit(
    found: Mapping[str, Any], wanted: Mapping[str, Any], path: str, fix: str
) -> None:
    """Refuse the checkpoint at ``path`` if its signature is that of another fit."""
    if difference := _difference(found, wanted):
        raise OptionError(
            problem=f"the checkpoint {path!r} belongs to another fit: {difference}.",
            expected="the same call as the one that was interrupted.",
            fix=fix,
        )


def check_same_field(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Refuse what was fitted to another field, if `signs_of_field` were kept of the same starts."""
    if found is None or _difference(found, {"y0": wanted["y0"]}):
        return
    if difference := _difference(found, {FUNC: wanted[FUNC]}):
        raise OptionError(
            problem=f"the checkpoint belongs to another field: {difference}.",
            expected="the func that it was fitted to.",
            fix="a new fit that begins with its net: HyperSolverModule(func, ..., hypernet=net)",
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], here: str = "here") -> str:
    """Return how the first entry of ``wanted`` differs that does; "" if none does."""
    for name, own in wanted.items():
        other = found.get(name)
        if name in POINTS_OF:
            if (position := differing(other, own)) is not None:
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
