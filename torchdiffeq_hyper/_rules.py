"""Rules for what was read from files: numbers, strings, tensors, lists and records of them."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import HyperError, OptionError

FIX = "copy the file again, or fit and save again"
UPGRADE = "pip install -U torchdiffeq_hyper   # if a later version wrote the file"

MOST = 2**62
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a net can compute in


class Mismatch(HyperError, ValueError):  # noqa: N818 - never leaves the package
    """A field is not what its rule says."""

    def __init__(self, problem: str, expected: str, fix: str = FIX) -> None:
        super().__init__(problem, f"{expected}.", fix)


def mismatch(name: str, value: object, expected: str, fix: str = FIX) -> Mismatch:
    """Return the error for a value at a place."""
    return Mismatch(f"{name or 'it'} is {shown(value)}.", expected, fix)


def missing(name: str, expected: str) -> Mismatch:
    """Return the error for a field that is not there."""
    return Mismatch(f"{name} is missing.", expected)


def shown(value: object) -> str:
    """Return a value in a few words, however large it is."""
    if isinstance(value, Tensor):
        return f"a tensor {reprlib.repr(tuple(value.shape))} of {value.dtype}"
    try:
        return reprlib.repr(value)
    except ValueError:  # an int with more digits than Python writes out
        return f"a huge {type(value).__name__}"


def under(name: str, key: str) -> str:
    """Return the place of a field in what lies at ``name``."""
    return f"{name}.{key}" if name else key


class Rule(ABC):
    """What a value may be; ``expected`` says it in words."""

    expected: str

    @abstractmethod
    def check(self, value: Any, name: str) -> Any:
        """Return the value at the place ``name``, or raise `Mismatch`."""


def checked_arguments(
    rules: Mapping[str, Rule], arguments: Mapping[str, Any], fix: str | None = None
) -> dict[str, Any]:
    """Return arguments, or raise `OptionError` if one is not what its rule says."""
    found: dict[str, Any] = {}
    for name, rule in rules.items():
        try:
            found[name] = rule.check(arguments[name], name)
        except Mismatch as error:
            problem = f"{name} is {shown(arguments[name])}."
            raise OptionError(problem, f"{rule.expected}.", fix or f"{name}=...") from error
    return found


class Value(Rule):
    """A value that is right or wrong as a whole."""

    def __init__(self, holds: Callable[[Any], bool], expected: str) -> None:
        self.holds, self.expected = holds, expected

    def check(self, value: Any, name: str) -> Any:
        if not self.holds(value):
            raise mismatch(name, value, self.expected)
        return value


class Whole(Value):
    """An int in a range, both ends included."""

    def __init__(self, low: int = 0, high: int = MOST) -> None:
        limits = f"of at least {low:,}" if high == MOST else f"from {low:,} to {high:,}"
        expected = f"an int {limits}"
        super().__init__(lambda value: type(value) is int and low <= value <= high, expected)


class Real(Value):
    """A number in a range; finite, unless it is something measured."""

    def __init__(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
        *,
        is_finite: bool = True,
    ) -> None:
        def holds(value: Any) -> bool:
            if type(value) not in (int, float) or (type(value) is int and abs(value) > 1e308):
                return False
            if not math.isfinite(value) and is_finite:
                return False
            return math.isnan(value) or (low <= value <= high and value > above)

        limits = (("above", above), ("of at least", low), ("up to", high))
        words = [f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
        super().__init__(holds, " ".join(["a finite number" if is_finite else "a number", *words]))


class Text(Value):
    """A string that can be written out, which half of a surrogate pair cannot."""

    def __init__(self, longest: int = 10_000) -> None:
        def holds(value: Any) -> bool:
            is_short = isinstance(value, str) and len(value) <= longest
            return is_short and value.encode(errors="ignore").decode() == value

        super().__init__(holds, f"a string of up to {longest:,} characters")


class Choice(Value):
    """One of a few strings, ints or bools."""

    def __init__(self, *values: Any) -> None:
        def holds(value: Any) -> bool:
            return any(type(value) is type(known) and value == known for known in values)

        super().__init__(holds, " or ".join(map(repr, values)))


class TensorOf(Value):
    """A tensor without nan (or inf), of some dtypes and of a shape; None there is any size."""

    def __init__(
        self,
        dtypes: Sequence[torch.dtype] = (),
        shape: tuple[int | None, ...] | None = None,
        *,
        is_finite: bool = False,
    ) -> None:
        def holds(value: Any) -> bool:
            if not isinstance(value, Tensor) or (dtypes and value.dtype not in dtypes):
                return False
            sizes = value.shape if shape is None else shape
            if len(sizes) != value.dim():
                return False
            if any(n not in (size, None) for n, size in zip(sizes, value.shape, strict=True)):
                return False
            if value.dtype not in FLOATS and not value.is_complex():
                return True
            return not bool((~torch.isfinite(value) if is_finite else torch.isnan(value)).any())

        of = " of " + " or ".join(map(str, dtypes)) if dtypes else ""
        sizes = "" if shape is None else f" {shape}".replace("None", "any")
        super().__init__(holds, f"a tensor{sizes}{of} without {'inf or ' * is_finite}nan")


FLAG = Value(lambda value: isinstance(value, bool), "True or False")
ANYTHING = Value(lambda _: True, "a value")  # what is somebody else's to check


# Rules made of rules


class Such(Rule):
    """What a rule says, on a further condition."""

    def __init__(self, rule: Rule, holds: Callable[[Any], bool], words: str) -> None:
        self._rule, self._holds = rule, holds
        self.expected = f"{rule.expected}, {words}"

    def check(self, value: Any, name: str) -> Any:
        found = self._rule.check(value, name)
        if not self._holds(found):
            raise mismatch(name, value, self.expected)
        return found


class Maybe(Rule):
    """None, or what a rule says."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.expected = f"None, or {rule.expected}"

    def check(self, value: Any, name: str) -> Any:
        return None if value is None else self._rule.check(value, name)


class Items(Rule):
    """A list of what a rule says."""

    def __init__(self, rule: Rule, least: int = 0, most: int = 1_000_000) -> None:
        self._rule, self._least, self._most = rule, least, most
        self.expected = f"a list of {least:,} to {most:,}, each {rule.expected}"

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list | tuple) or not self._least <= len(value) <= self._most:
            raise mismatch(name, value, self.expected)
        return [self._rule.check(item, f"{name}[{i}]") for i, item in enumerate(value)]


class Row(Rule):
    """A list of known length, a rule for each entry."""

    def __init__(self, *rules: Rule) -> None:
        self._rules = rules
        self.expected = "[" + ", ".join(rule.expected for rule in rules) + "]"

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) != len(self._rules):
            raise mismatch(name, value, self.expected)
        return [self._rules[i].check(item, f"{name}[{i}]") for i, item in enumerate(value)]


class Table(Rule):
    """A dictionary of strings to what a rule says, in which some keys have to be."""

    def __init__(self, rule: Rule, required: Sequence[str] = ()) -> None:
        self._rule, self._required = rule, required
        self.expected = f"a dictionary of values that are each {rule.expected}"

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise mismatch(name, value, self.expected)
        for key in self._required:
            if key not in value:
                raise missing(under(name, key), self.expected)
        return {key: self._rule.check(item, under(name, key)) for key, item in value.items()}


class Record(Rule):
    """A dictionary of known fields, with a rule for each; ``optional`` ones may be missing."""

    def __init__(
        self, required: Mapping[str, Rule], *, optional: Mapping[str, Rule] | None = None
    ) -> None:
        self._required = tuple(required)
        self.fields = {**required, **(optional or {})}
        self.expected = "a dictionary of " + ", ".join(self.fields)

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise mismatch(name, value, self.expected)
        for key in value:
            if key not in self.fields:
                problem = f"{under(name, str(key))} is a field that this version does not know."
                raise Mismatch(problem, self.expected, UPGRADE)
        found: dict[str, Any] = {}
        for key, rule in self.fields.items():
            if key in value:
                found[key] = rule.check(value[key], under(name, key))
            elif key in self._required:
                raise missing(under(name, key), rule.expected)
        return found


class Tagged(Rule):
    """A dictionary whose "kind" says which other fields there are."""

    def __init__(self, kinds: Mapping[str, Record]) -> None:
        self._kinds = kinds
        self._known = "one of " + ", ".join(f'"{kind}"' for kind in kinds)
        self.expected = f"a dictionary of kind, {self._known}, and its own fields"

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise mismatch(name, value, self.expected)
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in self._kinds:
            raise mismatch(under(name, "kind"), kind, self._known, UPGRADE)
        own = {key: item for key, item in value.items() if key != "kind"}
        return {"kind": kind, **self._kinds[kind].check(own, name)}


def record_of(cls: type, *, is_complete: bool = False, **own: Rule) -> Record:
    """Return the rules that a dataclass's annotations give, fields with a default optional.

    Ints are counts, floats are measurements: of at least 0, and may be inf or nan. ``own``
    are the rules of some fields in place of these; where ``is_complete``, none is optional.
    """
    hints = typing.get_type_hints(cls)
    required: dict[str, Rule] = {}
    optional: dict[str, Rule] = {}
    for field in dataclasses.fields(cls):
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        fields = optional if has_default and not is_complete else required
        fields[field.name] = own.get(field.name) or _rule_of(hints[field.name])
    return Record(required, optional=optional)


_PLAIN: dict[Any, Rule] = {
    int: Whole(),
    float: Real(low=0.0, is_finite=False),
    str: Text(),
    bool: FLAG,
    Any: ANYTHING,
    Tensor: TensorOf(),
}


def _rule_of(hint: Any) -> Rule:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return record_of(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # of a kind and None
        return Maybe(_rule_of(arguments[0]))
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return Items(_rule_of(arguments[0]))
    if origin is tuple:
        return Row(*map(_rule_of, arguments))
    assert origin is dict, f"no rule for {hint}"
    return Table(_rule_of(arguments[1]))
