"""Rules made of rules: lists, dictionaries, records with known fields; nets of records."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from torchdiffeq_hyper._files._rules import (
    FLAG,
    FLOATS,
    UPGRADE,
    Anything,
    Mismatch,
    Real,
    Rule,
    TensorOf,
    Text,
    Whole,
    checked,
    mismatch,
    missing,
    under,
)

MOST_ITEMS = 1_000_000
_LEFT_OUT = object()

NetT = TypeVar("NetT", bound=nn.Module)
Condition: TypeAlias = tuple[Callable[[dict[str, Any]], bool], str]


class Maybe(Rule):
    """None, or what a rule says."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.expected = f"None, or {rule.expected}"

    def check(self, value: Any, name: str) -> Any:
        if value is None:
            return None
        try:
            return self._rule.check(value, name)
        except Mismatch as error:
            if error.expected == self._rule.expected:
                error.expected = self.expected
            raise


class Either(Rule):
    """What one of some rules says; as the first that takes the value returns it."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self.expected = "; or ".join(rule.expected for rule in rules)

    def check(self, value: Any, name: str) -> Any:
        for rule in self._rules:
            try:
                return rule.check(value, name)
            except Mismatch:
                continue
        raise mismatch(name, value, self.expected)


class Items(Rule):
    """A list of what a rule says."""

    def __init__(self, rule: Rule, least: int = 0, most: int = MOST_ITEMS) -> None:
        self._rule, self._least, self._most = rule, least, most
        self.expected = f"a list of {least:,} to {most:,}, each {rule.expected}"

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list | tuple) or not self._least <= len(value) <= self._most:
            raise mismatch(name, value, self.expected)
        return [self._rule.check(item, f"{name}[{i}]") for i, item in enumerate(value)]


class Row(Rule):
    """A list of known length, a rule for each entry."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self.expected = "[" + ", ".join(rule.expected for rule in rules) + "]"

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) != len(self._rules):
            raise mismatch(name, value, self.expected)
        pairs = enumerate(zip(self._rules, value, strict=True))
        return [rule.check(item, f"{name}[{i}]") for i, (rule, item) in pairs]


class Table(Rule):
    """A dictionary of strings (or ints) to what a rule says, in which some keys have to be."""

    def __init__(self, rule: Rule, required: Sequence[str] = (), keys: type = str) -> None:
        self._rule, self._required, self._keys = rule, required, keys
        kind = "dictionary" if keys is str else f"dictionary of {keys.__name__}s"
        needed = f" with {', '.join(map(repr, required))}" if required else ""
        self.expected = f"a {kind}{needed} of values that are each {rule.expected}"

    def check(self, value: Any, name: str) -> dict[Any, Any]:
        if not isinstance(value, Mapping) or any(type(key) is not self._keys for key in value):
            raise mismatch(name, value, self.expected)
        for key in self._required:
            if key not in value:
                raise missing(under(name, key), self.expected)
        return {key: self._rule.check(item, self._place(name, key)) for key, item in value.items()}

    def _place(self, name: str, key: Any) -> str:
        return under(name, key) if self._keys is str else f"{name}[{key}]"


@dataclass(frozen=True)
class Default:
    """A field that may be missing: its value is then ``value``, or it stays missing."""

    rule: Rule
    value: Any = _LEFT_OUT


class Record(Rule):
    """A dictionary of known fields.

    Args:
        fields: a rule for each; `Default` where it may be missing.
        ignored: fields that are somebody else's to check.
        conditions: what the fields have to be together, with the words for it.
    """

    def __init__(
        self,
        fields: Mapping[str, Rule | Default],
        ignored: Sequence[str] = (),
        conditions: Sequence[Condition] = (),
    ) -> None:
        self.fields, self._ignored, self._conditions = fields, ignored, conditions
        self.expected = "a dictionary of " + ", ".join(fields)

    def on_condition(self, *conditions: Condition) -> Record:
        """Return the same with conditions."""
        return Record(self.fields, self._ignored, conditions)

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise mismatch(name, value, self.expected)
        for key in value:
            if key not in self.fields and key not in self._ignored:
                problem = f"{under(name, str(key))} is a field that this version does not know."
                raise Mismatch(problem, self.expected, UPGRADE)
        found: dict[str, Any] = {}
        for key, field in self.fields.items():
            place = under(name, key)
            if key in value:
                rule = field.rule if isinstance(field, Default) else field
                found[key] = rule.check(value[key], place)
            elif not isinstance(field, Default):
                raise missing(place, field.expected)
            elif field.value is not _LEFT_OUT:
                found[key] = field.value
        for holds, words in self._conditions:
            if not holds(found):
                raise mismatch(name, {key: found[key] for key in list(found)[:6]}, words)
        return found


class Tagged(Rule):
    """A dictionary whose fields depend on one of them."""

    def __init__(self, tag: str, kinds: Mapping[str, Record]) -> None:
        self._tag, self._kinds = tag, kinds
        self._known = "one of " + ", ".join(f'"{kind}"' for kind in kinds)
        self.expected = f"a dictionary of {tag}, {self._known}, and its own fields"

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise mismatch(name, value, self.expected)
        kind = value.get(self._tag)
        if not isinstance(kind, str) or kind not in self._kinds:
            raise mismatch(under(name, self._tag), kind, self._known, UPGRADE)
        others = {key: item for key, item in value.items() if key != self._tag}
        return {self._tag: kind, **self._kinds[kind].check(others, name)}


def record_of(cls: type, *, is_complete: bool = False, **own: Rule) -> Record:
    """Return the rules that a dataclass's annotations give, fields with a default optional.

    Ints are counts, floats are measurements: of at least 0, and may be inf or nan.

    Args:
        cls: the dataclass.
        is_complete: whether fields with a default have to be there all the same.
        own: rules of some of its fields, in place of what the annotation gives.
    """
    hints = typing.get_type_hints(cls)
    fields: dict[str, Rule | Default] = {}
    for field in dataclasses.fields(cls):
        rule = own.get(field.name) or _rule_of(hints[field.name])
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        fields[field.name] = Default(rule) if has_default and not is_complete else rule
    return Record(fields)


_PLAIN: dict[Any, Rule] = {
    int: Whole(),
    float: Real(low=0.0, is_finite=False),
    str: Text(),
    bool: FLAG,
    Any: Anything(),
    Tensor: TensorOf(),
}


def _rule_of(hint: Any) -> Rule:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return record_of(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        rules = [_rule_of(kind) for kind in arguments if kind is not types.NoneType]
        rule = rules[0] if len(rules) == 1 else Either(rules)
        return Maybe(rule) if types.NoneType in arguments else rule
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return Items(_rule_of(arguments[0]))
    if origin is tuple:
        return Row([_rule_of(kind) for kind in arguments])
    assert origin is dict, f"no rule for {hint}"
    return Table(_rule_of(arguments[1]))


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
    """Return the net of a checked description: its "kind" out of ``kinds``, and arguments.

    A net larger than its ``weights`` is refused before it is built; None for any size. For
    ``at`` and ``but`` see `check_sizes`.

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


def check_weights(tensors: Mapping[str, Tensor], what: str, prefix: str = "") -> None:
    """Refuse weights that no ready net can have: all of one dtype, and finite.

    Raises:
        FileFormatError: they are not; ``what`` they were read from, as ``prefix`` + name.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()} & {*FLOATS}
    rule = TensorOf(tuple(dtypes)[:1] or FLOATS, is_finite=True)
    for name, tensor in tensors.items():
        checked(rule, tensor, what, f"the tensor {prefix + name!r}")
