"""A hypernet as tensors and a JSON-ready description, and back; what descriptions may hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchdiffeq_hyper._files import checked, described_in, refused
from torchdiffeq_hyper._rules import (
    FLOATS,
    Mismatch,
    Real,
    Record,
    Rule,
    Tagged,
    TensorOf,
    Whole,
    mismatch,
    under,
)
from torchdiffeq_hyper._state import Hypernet
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    FileFormatError,
    StateShapeError,
    StateTypeError,
)
from torchdiffeq_hyper.hypernets._concat import NAMES_OF_INPUTS, ConcatHypernet
from torchdiffeq_hyper.hypernets._kinds import MLP, Bottleneck, Conv, Linear
from torchdiffeq_hyper.hypernets._multistep import Multistep
from torchdiffeq_hyper.hypernets._ready import SIZES, TIME_UNIT, ReadyHypernet

NetT = TypeVar("NetT", bound=nn.Module)

KINDS: dict[str, type[ReadyHypernet]]
KINDS = {net.kind: net for net in (Linear, MLP, Conv, Bottleneck, Multistep)}

_OPTIONAL: dict[str, Rule] = {
    "n_stages": SIZES["n_stages"],
    "time_unit": Real(above=0.0),
    "order": Whole(0, 1000),
}
_OF_CONCAT: dict[str, Rule] = {"inputs": NAMES_OF_INPUTS, "n_context": Whole()}
ARCHITECTURES: dict[str, Record] = {
    kind: Record(
        {"channels": SIZES["channels"]},
        optional={
            **_OPTIONAL,
            **(_OF_CONCAT if issubclass(net, ConcatHypernet) else {}),
            **net.rules,
        },
    )
    for kind, net in KINDS.items()
}
"""What describes a ready net of each kind in a file."""

UNSEEN: nn.Module = nn.Identity()
"""Stands for a net of the user's own whose class is not at hand, to look at a file without it."""


def from_architecture(
    architecture: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    what: str = "the description of a hypernet",
    at: str = "",
) -> ReadyHypernet:
    """Rebuild a ready net, with new weights, from its `ReadyHypernet.architecture`.

    Args:
        architecture: the net's, also after a round trip through JSON.
        weights: where given, a net that is larger than these is refused.
        what: what errors call that which was read.
        at: the architecture's place in it.

    Raises:
        FileFormatError: the kind is unknown, or an argument is impossible.

    Example:
        >>> from torchdiffeq_hyper.hypernets import Linear, from_architecture
        >>> from_architecture(Linear(channels=2).architecture).channels
        2
    """
    arguments = checked(Tagged(ARCHITECTURES), architecture, what, at)
    # Files of before time units have none.
    time_unit, order = arguments.pop("time_unit", 1.0), arguments.pop("order", 0)
    with refused(what):
        # n_stages is no size unless the stages are among the inputs: it has its own limit.
        net = built(KINDS, arguments, weights, at, but=("n_stages", "n_context"))
    net.measure_time_in(time_unit, order)
    return net


def check_sizes(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    at: str,
    but: Sequence[str] = (),
) -> None:
    """Refuse a net described as larger than its tensors, before it is built.

    The description's ints are sizes, except those ``but``; lists of ints one size a layer.
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
    """Return the net of a checked description, not larger than its ``weights`` (None: any)."""
    own = {name: value for name, value in arguments.items() if name != "kind"}
    if weights is not None:
        check_sizes(own, weights, at, but)
    kind = arguments["kind"]
    try:
        return kinds[kind](**own)
    except RuntimeError as error:  # tensors of more numbers than can be counted
        problem = f"a net of kind {kind!r} cannot be built: {error}"
        raise Mismatch(problem, "sizes that fit its weights") from error


def check_weights(tensors: Mapping[str, Tensor], what: str, prefix: str = "") -> None:
    """Refuse weights that no ready net can have: all of one dtype, and finite."""
    dtypes = {tensor.dtype for tensor in tensors.values()} & {*FLOATS}
    rule = TensorOf(tuple(dtypes)[:1] or FLOATS, is_finite=True)
    for name, tensor in tensors.items():
        checked(rule, tensor, what, f"the tensor {prefix + name!r}")


def pack(hypernet: Hypernet) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a hypernet's tensors and its description."""
    if not isinstance(hypernet, nn.Module):
        raise StateTypeError(
            problem=f"the hypernet is a {type(hypernet).__name__}, which has no weights to write.",
            expected="an nn.Module.",
            fix="class MyNet(torch.nn.Module):\n    def forward(self, step): ...",
        )
    module: nn.Module = getattr(hypernet, "_orig_mod", hypernet)  # in torch.compile's wrapper
    tensors = module.state_dict()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            raise StateTypeError(
                problem=f"{name!r} in the hypernet's state_dict() is a {type(tensor).__name__}.",
                expected="tensors only: a file holds nothing else.",
                fix="keep the value in a buffer; run a net with lazy layers once before saving",
            )
    return tensors, _describe(module)


def _describe(hypernet: nn.Module) -> dict[str, Any]:
    if isinstance(hypernet, ReadyHypernet) and type(hypernet) is KINDS.get(hypernet.kind):
        with torch.device("meta"):
            plain = from_architecture(hypernet.architecture)
        # A ready net whose layers were exchanged is one no more.
        if repr(plain) == repr(hypernet):
            return hypernet.architecture
    kind = type(hypernet)
    described = {"kind": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(hypernet, ConcatHypernet):
        return {**described, "inputs": list(hypernet.inputs)}
    return described


def match(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hypernet: nn.Module | None,
    path: str,
    at: str = "hypernet",
) -> nn.Module:
    """Return the module that the tensors of a description at a place can be loaded into.

    That is the instance given, `UNSEEN` for any, or, for None, a ready net, which is rebuilt on
    the "meta" device: load with ``assign=True``.
    """
    weights = {name: tensor for name, tensor in tensors.items() if name != TIME_UNIT}
    if description["kind"] != "custom":
        _check_time_unit(description, tensors.get(TIME_UNIT), path)
        check_weights(weights, repr(path))
    elif hypernet is UNSEEN:
        return hypernet
    elif hypernet is None:
        raise _no_instance(description, path)
    if hypernet is not None and hypernet is not UNSEEN:
        _check_description(description, hypernet, path)
        _check_fits(hypernet, weights, path)
        for name, tensor in _weights_of(hypernet).items():
            saved = weights[name].dtype
            if tensor.dtype != saved:
                raise StateTypeError(
                    problem=f"{name!r} is {saved} in {path!r}, {tensor.dtype} in the net given.",
                    expected="the dtype that was saved: loading would round, or feign digits.",
                    fix=f"hypernet.to({saved})",
                )
        return hypernet
    with torch.device("meta"):
        net = from_architecture(description, tensors, what=described_in(path), at=at)
    try:
        _check_fits(net, weights, path)
    except (BaseMismatchError, StateShapeError) as error:
        raise FileFormatError(
            problem=f"the weights in {path!r} do not fit its own description: {error.problem}",
            expected="a file as `save` wrote it.",
            fix="fit and save again",
        ) from error
    return net


def load_weights(
    parts: Sequence[tuple[nn.Module, Mapping[str, Tensor], bool]], path: str | os.PathLike[str]
) -> None:
    """Load the weights of one or more nets; all of them, or none.

    ``parts`` has for each net itself, its weights, and whether it is an instance of the
    caller's; one that is not was built on the "meta" device.
    """
    own = [net for net, _, is_own in parts if is_own]
    before = [
        {name: value.clone() for name, value in net.state_dict().items() if not is_lazy(value)}
        for net in own
    ]
    try:
        for net, weights, is_own in parts:
            net.load_state_dict(weights, assign=not is_own)
    except BaseException as error:
        for net, state in zip(own, before, strict=True):
            with suppress(RuntimeError):  # of what could not be written to in the first place
                net.load_state_dict(state, strict=False)
        if not isinstance(error, RuntimeError):
            raise
        reasons = str(error).splitlines()
        raise BaseMismatchError(
            problem=f"the instance given cannot take the weights in {os.fspath(path)!r}: "
            f"{reasons[-1].strip()}",
            expected="an instance whose tensors can be written to.",
            fix="buffers that own their memory: buffer.clone() in place of buffer.expand(...)",
        ) from error


def _no_instance(description: Mapping[str, Any], path: str) -> FileFormatError:
    name = str(description.get("class", "MyNet"))
    instance = name.rpartition(".")[2] + "()"
    if "inputs" in description:
        instance = f"tdh.ConcatHypernet(net, inputs={tuple(description['inputs'])!r})"
    return FileFormatError(
        problem=f"{path!r} holds the weights of a net of your own, a {name}, and no code.",
        expected="an instance of that net to load them into.",
        fix=f"HyperSolver.load({path!r}, hypernet={instance})",
    )


def _check_time_unit(description: Mapping[str, Any], tensor: Tensor | None, path: str) -> None:
    """Refuse a time unit and order of the tensors that are not those of the description."""
    span = description.get("span", [])
    described = [description.get("time_unit", 1.0), description.get("order", 0), *span]
    found = None
    with refused(repr(path)):
        if tensor is not None:
            rule = TensorOf((torch.float64,), (len(described),))
            found = rule.check(tensor, TIME_UNIT).tolist()
        if found != (None if described[0] == 1 and not span else described):
            raise mismatch(TIME_UNIT, found, expected=f"{described}, as described")


def _check_description(description: Mapping[str, Any], hypernet: nn.Module, path: str) -> None:
    own = _describe(hypernet)
    # The time unit is loaded with the weights.
    others = {*description, *own} - {"kind", "class", TIME_UNIT, "order", "span"}
    for key in ("kind", *sorted(others)):
        if own.get(key) != description.get(key):
            is_custom = description["kind"] == "custom"
            raise BaseMismatchError(
                problem=f"the net in {path!r} has {key} {description.get(key)!r}, the instance "
                f"given has {own.get(key)!r}.",
                expected="an instance built as the saved net was.",
                fix=f"an instance with {key}={description.get(key)!r}"
                if is_custom
                else f"HyperSolver.load({path!r})",
            )


def _weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if name != TIME_UNIT}


def _check_fits(net: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Refuse weights with other names or shapes than a net's."""
    own = _weights_of(net)
    if own.keys() != weights.keys():
        names = sorted(own.keys() ^ weights.keys())
        raise BaseMismatchError(
            problem=f"the weights in {path!r} are another net's: {len(names)} are only in the file "
            f"or only in the net, e.g. {names[0]!r}.",
            expected="an instance of the class that was saved, built with the same arguments.",
            fix="print(hypernet.state_dict().keys())",
        )
    for name, tensor in own.items():
        if not is_lazy(tensor) and tensor.shape != weights[name].shape:
            raise StateShapeError(
                problem=f"{name!r} has shape {tuple(weights[name].shape)} in {path!r}, "
                f"{tuple(tensor.shape)} in the net given.",
                expected="an instance built with the arguments of the saved one.",
                fix="the same numbers of channels, stages and hidden units",
            )
