"""What a rule is, and the errors that name a field."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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
