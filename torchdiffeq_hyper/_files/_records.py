"""Rules made of rules: lists, dictionaries, records with known fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._files._schema import (
    FLAG,
    UPGRADE,
    Anything,
    Mismatch,
    Real,
    Rule,
    TensorOf,
    Text,
    Whole,
    mismatch,
    missing,
    under,
)

MOST_ITEMS = 1_000_000
_LEFT_OUT = object()


@dataclass(frozen=True)
class Maybe:
    """None, or what a rule says."""

    rule: Rule

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return f"None, or {self.rule.expected}"

    def check(self, value: Any, name: str) -> Any:
        """Return the value."""
        if value is None:
            return None
        try:
            return self.rule.check(value, name)
        except Mismatch as error:
            if error.expected == self.rule.expected:
                error.expected = self.expected
            raise


@dataclass(frozen=True)
class Either:
    """What one of some rules says."""

    rules: tuple[Rule, ...]

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return "; or ".join(rule.expected for rule in self.rules)

    def check(self, value: Any, name: str) -> Any:
        """Return the value as the first rule that takes it returns it."""
        for rule in self.rules:
            try:
                return rule.check(value, name)
            except Mismatch:
                continue
        raise mismatch(name, value, self.expected)


@dataclass(frozen=True)
class Items:
    """A list of what a rule says."""

    rule: Rule
    least: int = 0
    most: int = MOST_ITEMS

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return f"a list of {self.least:,} to {self.most:,}, each {self.rule.expected}"

    def check(self, value: Any, name: str) -> list[Any]:
        """Return the list."""
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            raise mismatch(name, value, self.expected)
        return [self.rule.check(item, f"{name}[{i}]") for i, item in enumerate(value)]


@dataclass(frozen=True)
class Row:
    """A list of known length, a rule for each entry."""

    rules: tuple[Rule, ...]

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return "[" + ", ".join(rule.expected for rule in self.rules) + "]"

    def check(self, value: Any, name: str) -> list[Any]:
        """Return the list."""
        if not isinstance(value, list | tuple) or len(value) != len(self.rules):
            raise mismatch(name, value, self.expected)
        pairs = enumerate(zip(self.rules, value, strict=True))
        return [rule.check(item, f"{name}[{i}]") for i, (rule, item) in pairs]


@dataclass(frozen=True)
class Table:
    """A dictionary of strings to what a rule says, in which some keys have to be."""

    rule: Rule
    required: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        keys = f" with {', '.join(map(repr, self.required))}" if self.required else ""
        return f"a dictionary{keys} of values that are each {self.rule.expected}"

    def check(self, value: Any, name: str) -> dict[str, Any]:
        """Return the dictionary."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise mismatch(name, value, self.expected)
        for key in self.required:
            if key not in value:
                raise missing(under(name, key), self.expected)
        return {key: self.rule.check(item, under(name, key)) for key, item in value.items()}


@dataclass(frozen=True)
class Such:
    """What a rule says, on a further condition."""

    rule: Rule
    holds: Callable[[Any], bool]
    words: str

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return f"{self.rule.expected}, {self.words}"

    def check(self, value: Any, name: str) -> Any:
        """Return the value."""
        found = self.rule.check(value, name)
        if not self.holds(found):
            raise mismatch(name, value, self.expected)
        return found


@dataclass(frozen=True)
class Default:
    """A field that may be missing: its value is then ``value``, or it stays missing."""

    rule: Rule
    value: Any = _LEFT_OUT


@dataclass(frozen=True)
class Record:
    """A dictionary of known fields.

    Attributes:
        fields: a rule for each; `Default` where it may be missing.
        ignored: fields that are somebody else's to check.
        conditions: what the fields have to be together, with the words for it.
    """

    fields: Mapping[str, Rule | Default]
    ignored: tuple[str, ...] = ()
    conditions: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = ()

    def on_condition(self, *conditions: tuple[Callable[[dict[str, Any]], bool], str]) -> Record:
        """Return the same with conditions."""
        return dataclasses.replace(self, conditions=conditions)

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return "a dictionary of " + ", ".join(self.fields)

    def check(self, value: Any, name: str) -> dict[str, Any]:
        """Return the dictionary, what may be missing filled in."""
        if not isinstance(value, Mapping):
            raise mismatch(name, value, self.expected)
        for key in value:
            if key not in self.fields and key not in self.ignored:
                problem = f"{under(name, str(key))} is a field that this version does not know."
                raise Mismatch(problem, self.expected, UPGRADE)
        found: dict[str, Any] = {}
        for key, rule in self.fields.items():
            place = under(name, key)
            if key in value:
                plain = rule.rule if isinstance(rule, Default) else rule
                found[key] = plain.check(value[key], place)
            elif not isinstance(rule, Default):
                raise missing(place, rule.expected)
            elif rule.value is not _LEFT_OUT:
                found[key] = rule.value
        for holds, words in self.conditions:
            if not holds(found):
                raise mismatch(name, {key: found[key] for key in list(found)[:6]}, words)
        return found


@dataclass(frozen=True)
class Tagged:
    """A dictionary whose fields depend on one of them."""

    tag: str
    kinds: Mapping[str, Record]

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        known = ", ".join(f'"{kind}"' for kind in self.kinds)
        return f"a dictionary of {self.tag}, one of {known}, and its own fields"

    def check(self, value: Any, name: str) -> dict[str, Any]:
        """Return the dictionary, what may be missing filled in."""
        if not isinstance(value, Mapping):
            raise mismatch(name, value, self.expected)
        kind = value.get(self.tag)
        if not isinstance(kind, str) or kind not in self.kinds:
            known = ", ".join(f'"{kind}"' for kind in self.kinds)
            raise mismatch(under(name, self.tag), kind, f"one of {known}", UPGRADE)
        others = {key: item for key, item in value.items() if key != self.tag}
        return {self.tag: kind, **self.kinds[kind].check(others, name)}


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


def _rule_of(hint: Any) -> Rule:
    plain: dict[Any, Rule] = {
        int: Whole(),
        float: Real(low=0.0, is_finite=False),
        str: Text(),
        bool: FLAG,
        Any: Anything(),
        Tensor: TensorOf(),
    }
    if hint in plain:
        return plain[hint]
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return record_of(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        rules = tuple(_rule_of(kind) for kind in arguments if kind is not types.NoneType)
        rule = rules[0] if len(rules) == 1 else Either(rules)
        return Maybe(rule) if types.NoneType in arguments else rule
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return Items(_rule_of(arguments[0]))
    if origin is tuple:
        return Row(tuple(map(_rule_of, arguments)))
    assert origin is dict, f"no rule for {hint}"
    return Table(_rule_of(arguments[1]))
