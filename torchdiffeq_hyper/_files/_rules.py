"""Rules for values: numbers, strings, tensors; and the errors that name a field."""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import FileFormatError, HyperError, explain

FIX = "copy the file again, or fit and save again"
UPGRADE = "pip install -U torchdiffeq_hyper   # if a later version wrote the file"

MOST = 2**62
DEEPEST = 50
"""Lists and dictionaries within each other in a value that is not ours to know."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a net can compute in."""


class Mismatch(ValueError):  # noqa: N818 - never leaves the package
    """A field is not what its rule says: the problem, what is expected, and what to do."""

    def __init__(self, problem: str, expected: str, fix: str = FIX) -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected
        self.fix = fix


class Rule(ABC):
    """What a value may be; ``expected`` says it in words."""

    expected: str

    @abstractmethod
    def check(self, value: Any, name: str) -> Any:
        """Return the value at the place ``name``, with what is missing filled in.

        Raises:
            Mismatch: it is something else.
        """


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
        >>> from torchdiffeq_hyper._files import Record, Whole, checked
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

    ``what`` was read, e.g. "the description in 'a.safetensors'"; a `Mismatch` has a fix of
    its own.
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


class _Value(Rule):
    """A value that is right or wrong as a whole."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Return whether it is right."""

    def check(self, value: Any, name: str) -> Any:
        if not self.holds(value):
            raise mismatch(name, value, self.expected)
        return value


class Whole(_Value):
    """An int in a range, both ends included."""

    def __init__(self, low: int = 0, high: int = MOST) -> None:
        self._low, self._high = low, high
        limits = f"of at least {low:,}" if high == MOST else f"from {low:,} to {high:,}"
        self.expected = f"an int {limits}"

    def holds(self, value: Any) -> bool:
        return type(value) is int and self._low <= value <= self._high


class Real(_Value):
    """A number in a range; finite, unless it is something measured."""

    def __init__(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
        *,
        is_finite: bool = True,
    ) -> None:
        self._low, self._high, self._above, self._is_finite = low, high, above, is_finite
        limits = (("above", above), ("of at least", low), ("up to", high))
        words = [f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
        self.expected = " ".join(["a finite number" if is_finite else "a number", *words])

    def holds(self, value: Any) -> bool:
        if type(value) not in (int, float) or (type(value) is int and abs(value) > 1e308):
            return False
        if not math.isfinite(value) and self._is_finite:
            return False
        return math.isnan(value) or (self._low <= value <= self._high and value > self._above)


class Text(_Value):
    """A string that can be written out."""

    def __init__(self, longest: int = 10_000) -> None:
        self._longest = longest
        self.expected = f"a string of up to {longest:,} characters"

    def holds(self, value: Any) -> bool:
        if not isinstance(value, str) or len(value) > self._longest:
            return False
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            return False
        return True


class Choice(_Value):
    """One of a few strings, ints or bools."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values
        self.expected = " or ".join(map(repr, values))

    def holds(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self._values)


FLAG = Choice((True, False))


class Anything(Rule):
    """Whatever is somebody else's to check; of JSON's kinds, and not nan, if ``is_json``."""

    def __init__(self, *, is_json: bool = False) -> None:
        self._is_json = is_json
        kinds = "a number, string, bool, None, or lists and dictionaries of these"
        self.expected = kinds if is_json else "a value"

    def check(self, value: Any, name: str) -> Any:
        if self._is_json:
            self._check_json(value, name, DEEPEST)
        return value

    def _check_json(self, value: Any, name: str, levels: int) -> None:
        if isinstance(value, str):
            Text().check(value, name)
        elif levels and isinstance(value, list):
            for i, item in enumerate(value):
                self._check_json(item, f"{name}[{i}]", levels - 1)
        elif levels and isinstance(value, dict):
            for key, item in value.items():
                self._check_json(item, under(name, key), levels - 1)
        elif not (value is None or isinstance(value, bool | int | float)) or value != value:  # noqa: PLR0124 - nan
            raise mismatch(name, value, self.expected)


class TensorOf(Rule):
    """A tensor without nan; of some dtypes, shape and finiteness if these are given.

    Args:
        dtypes: any of them, all if empty.
        shape: None for any size of a dimension; None in place of a shape for any.
        is_finite: whether inf is refused, too; nan always is.
    """

    def __init__(
        self,
        dtypes: Sequence[torch.dtype] = (),
        shape: tuple[int | None, ...] | None = None,
        *,
        is_finite: bool = False,
    ) -> None:
        self._dtypes, self._shape, self._is_finite = dtypes, shape, is_finite
        of = " of " + " or ".join(map(str, dtypes)) if dtypes else ""
        sizes = "" if shape is None else f" {shape}".replace("None", "any")
        self.expected = f"a tensor{sizes}{of} without {'inf or ' if is_finite else ''}nan"

    def check(self, value: Any, name: str) -> Tensor:
        if not isinstance(value, Tensor) or (self._dtypes and value.dtype not in self._dtypes):
            raise mismatch(name, value, self.expected)
        if self._shape is not None:
            wanted = [a if b is None else b for a, b in zip(value.shape, self._shape, strict=False)]
            if value.dim() != len(self._shape) or list(value.shape) != wanted:
                raise mismatch(name, value, self.expected)
        if value.dtype in FLOATS or value.is_complex():
            bad = ~torch.isfinite(value) if self._is_finite else torch.isnan(value)
            if bool(bad.any()):
                kind = "inf or nan" if self._is_finite else "nan"
                problem = f"{name} holds {int(bad.sum()):,} numbers that are {kind}."
                raise Mismatch(problem, self.expected)
        return value


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
