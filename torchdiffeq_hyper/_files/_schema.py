"""What a rule is, and the errors that name a field."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import FileFormatError, HyperError, explain

FIX = "copy the file again, or fit and save again"
UPGRADE = "pip install -U torchdiffeq_hyper   # if a later version wrote the file"


class Mismatch(ValueError):  # noqa: N818 - never leaves the package
    """A field is not what its rule says.

    Args:
        problem: the field and what is wrong with it, a sentence.
        expected: what it should be.
        fix: what to do.
    """

    def __init__(self, problem: str, expected: str, fix: str = FIX) -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.fix = fix


class Rule(Protocol):
    """What a value may be."""

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        ...

    def check(self, value: Any, name: str) -> Any:
        """Return the value, with what is missing filled in.

        Raises:
            Mismatch: it is something else.
        """
        ...


def checked(rule: Rule, value: object, what: str, at: str = "") -> Any:
    """Return a value as its rule returns it.

    Args:
        rule: what it may be.
        value: what was read.
        what: what it was read from, e.g. "the description in 'a.safetensors'".
        at: its place in there, "" for the whole.

    Raises:
        FileFormatError: it is something else; the text names the field.

    Example:
        >>> from torchdiffeq_hyper._schema import Record, Whole, checked
        >>> checked(Record({"steps": Whole(1, 9)}), {"steps": 0}, "the file")
        Traceback (most recent call last):
            ...
        torchdiffeq_hyper.errors.FileFormatError: the file cannot be used: steps is 0.
          expected: an int from 1 to 9.
          fix:      copy the file again, or fit and save again
    """
    with refused(what):
        return rule.check(value, at)


@contextmanager
def refused(what: str, fix: str = FIX) -> Iterator[None]:
    """Turn a `Mismatch`, or another refusal of what was read, into a `FileFormatError`.

    Args:
        what: what was read, e.g. "the description in 'a.safetensors'".
        fix: what to do where it is not a `Mismatch`, which has its own.
    """
    try:
        yield
    except Mismatch as error:
        text = explain(f"{what} cannot be used: {error.problem}", f"{error.expected}.", error.fix)
        raise FileFormatError(text) from error
    except FileFormatError:
        raise
    except HyperError as error:
        problem, *others = str(error).splitlines()
        expected = next((x for x in others if x.startswith("  expected: ")), "")
        wanted = expected.removeprefix("  expected: ") or "what `save` wrote."
        text = explain(f"{what} cannot be used: {problem}", wanted, fix)
        raise FileFormatError(text) from error


def mismatch(name: str, value: object, expected: str, fix: str = FIX) -> Mismatch:
    """Return the error for a value at a place."""
    return Mismatch(f"{name or 'it'} is {shown(value)}.", expected, fix)


def missing(name: str, expected: str) -> Mismatch:
    """Return the error for a field that has to be there and is not."""
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


MOST = 2**62
DEEPEST = 50
"""Lists and dictionaries within each other in a value that is not ours to know."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a net can compute in."""


@dataclass(frozen=True)
class Whole:
    """An int in a range, both ends included."""

    low: int = 0
    high: int = MOST

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        if self.high == MOST:
            return f"an int of at least {self.low:,}"
        return f"an int from {self.low:,} to {self.high:,}"

    def check(self, value: Any, name: str) -> int:
        """Return the int."""
        if type(value) is not int or not self.low <= value <= self.high:
            raise mismatch(name, value, self.expected)
        return value


@dataclass(frozen=True)
class Real:
    """A number in a range; finite, unless it is something measured."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    is_finite: bool = True

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        limits = [
            f"{word} {limit:g}"
            for word, limit in (
                ("above", self.above),
                ("of at least", self.low),
                ("up to", self.high),
            )
            if math.isfinite(limit)
        ]
        return " ".join(["a finite number" if self.is_finite else "a number", *limits])

    def check(self, value: Any, name: str) -> float:
        """Return the number."""
        if type(value) not in (int, float) or (type(value) is int and abs(value) > 1e308):
            raise mismatch(name, value, self.expected)
        is_in_range = self.low <= value <= self.high and value > self.above
        if not (is_in_range or (math.isnan(value) and not self.is_finite)) or (
            math.isinf(value) and self.is_finite
        ):
            raise mismatch(name, value, self.expected)
        number: float = value
        return number


@dataclass(frozen=True)
class Text:
    """A string that can be written out."""

    longest: int = 10_000

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return f"a string of up to {self.longest:,} characters"

    def check(self, value: Any, name: str) -> str:
        """Return the string."""
        if not isinstance(value, str) or len(value) > self.longest:
            raise mismatch(name, value, self.expected)
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise mismatch(name, value, self.expected) from error
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few strings, ints or bools."""

    values: tuple[Any, ...]

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        return " or ".join(map(repr, self.values))

    def check(self, value: Any, name: str) -> Any:
        """Return the value."""
        if not any(type(value) is type(known) and value == known for known in self.values):
            raise mismatch(name, value, self.expected)
        return value


FLAG = Choice((True, False))


@dataclass(frozen=True)
class Anything:
    """Whatever is somebody else's to check; of JSON's kinds, and not nan, if ``is_json``."""

    is_json: bool = False

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        kinds = "a number, string, bool, None, or lists and dictionaries of these"
        return kinds if self.is_json else "a value"

    def check(self, value: Any, name: str) -> Any:
        """Return the value."""
        if self.is_json:
            self._look(value, name, DEEPEST)
        return value

    def _look(self, value: Any, name: str, levels: int) -> None:
        if value is None or isinstance(value, bool | int):
            return
        if levels and isinstance(value, float):
            if math.isnan(value):
                raise mismatch(name, value, self.expected)
        elif levels and isinstance(value, str):
            Text().check(value, name)
        elif levels and isinstance(value, list):
            for i, item in enumerate(value):
                self._look(item, f"{name}[{i}]", levels - 1)
        elif levels and isinstance(value, dict):
            for key, item in value.items():
                self._look(item, under(name, key), levels - 1)
        else:
            raise mismatch(name, value, self.expected)


@dataclass(frozen=True)
class TensorOf:
    """A tensor; of some dtypes, shape and finiteness if these are given.

    Attributes:
        dtypes: any of them, all if empty.
        shape: None for any size of a dimension; None in place of a shape for any.
        is_finite: whether inf is refused, too; nan always is.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    shape: tuple[int | None, ...] | None = None
    is_finite: bool = False

    @property
    def expected(self) -> str:
        """What it may be, for people."""
        of = " or ".join(map(str, self.dtypes))
        shape = "" if self.shape is None else f" {self.shape}".replace("None", "any")
        return f"a tensor{shape}{of and ' of ' + of} without {'inf or ' * self.is_finite}nan"

    def check(self, value: Any, name: str) -> Tensor:
        """Return the tensor."""
        if not isinstance(value, Tensor) or (self.dtypes and value.dtype not in self.dtypes):
            raise mismatch(name, value, self.expected)
        if self.shape is not None and not self._has_shape(value, self.shape):
            raise mismatch(name, value, self.expected)
        if value.dtype in FLOATS or value.is_complex():
            bad = ~torch.isfinite(value) if self.is_finite else torch.isnan(value)
            if bool(bad.any()):
                problem = f"{name} holds {int(bad.sum()):,} numbers that are "
                raise Mismatch(problem + ("inf or nan." * self.is_finite or "nan."), self.expected)
        return value

    def _has_shape(self, value: Tensor, shape: tuple[int | None, ...]) -> bool:
        pairs = zip(value.shape, shape, strict=False)
        return value.dim() == len(shape) and all(b is None or a == b for a, b in pairs)
