"""The package's exceptions and warnings; every error derives from the builtin one would expect."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class HyperError(Exception):
    """Base of every error raised by this package, each also of the builtin class one would expect.

    Args:
        problem: what was wrong with the value got, a sentence; or the whole text.
        expected: what was expected.
        fix: lines to paste.

    >>> print(OptionError(problem="steps is 0.", expected="an int of at least 1.", fix="steps=10"))
    steps is 0.
      expected: an int of at least 1.
      fix:      steps=10
    """

    def __init__(self, problem: str, expected: str = "", fix: str = "") -> None:
        super().__init__(explain(problem, expected, fix) if expected else problem)
        self.problem, self.expected, self.fix = problem, expected, fix


class MissingHypernetError(HyperError, ValueError):
    """A learned method was called and no fitted part was found for it."""


class OptionError(HyperError, ValueError):
    """An argument or option has an unknown name or an impossible value."""


class StateTypeError(HyperError, TypeError):
    """A state, time or output has a dtype, device or kind that cannot be used."""


class StateShapeError(HyperError, ValueError):
    """A state, derivative or correction has the wrong shape."""


class BaseMismatchError(HyperError, ValueError):
    """A net fitted for one base method was given to another."""


class NonFiniteError(HyperError, ArithmeticError):
    """A solve produced inf or nan; the text names the step and the time."""


class NoiseFloorError(HyperError, ValueError):
    """The residuals are smaller than the rounding and tolerance noise in them."""


class NoisyFieldError(HyperError, ValueError):
    """func answers differently twice at one point, so it has no solution to fit."""


class CoupledSamplesError(HyperError, ValueError):
    """A sample's derivative depends on the other samples of its batch."""


class UnfinishedSolveError(HyperError, AssertionError):
    """A solve could not reach the last point of t; ``solution`` has what it did, nan beyond."""

    def __init__(self, text: str, solution: Any) -> None:
        super().__init__(text)
        self.solution = solution


class FitDivergedError(HyperError, ArithmeticError):
    """A fit turned non-finite; the text names the iteration."""


class RankError(HyperError, RuntimeError):
    """Another process of a distributed fit failed, or went another way."""


class ExportError(HyperError, RuntimeError):
    """A solve does what `torch.export` cannot write down."""


class FileFormatError(HyperError, ValueError):
    """A file is truncated, of another kind, or of a newer format."""


class FileWriteError(HyperError, OSError):
    """A file could not be written; nothing half-written was left."""


class MissingExtraError(HyperError, ImportError):
    """An optional package is needed and not installed."""


class DuplicateMethodError(HyperError, ValueError):
    """A method name is taken; the text names both owners."""


class UnknownMethodError(HyperError, ValueError):
    """A method name is not known."""


class HyperWarning(UserWarning):
    """Base of every warning of this package."""


class OutsideFitWarning(HyperWarning):
    """A solver is used outside the direction or step sizes it was fitted for."""


class AdjointWarning(HyperWarning):
    """A hypernet that requires gradients is used through `odeint_adjoint`."""


class HostWarning(HyperWarning):
    """The host itself goes wrong here, whatever the solver; the text says where and how."""


class OneCandidateWarning(HyperWarning):
    """A fitted selector sends every sample to the same candidate."""


class PluginWarning(HyperWarning):
    """A plugin broke or clashed and was skipped."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_breakdown(error: AssertionError) -> bool:
    """Return whether torchdiffeq (0.2.5) says by it that a method cannot go on, or func fails."""
    known = ("underflow in dt", "non-finite values in state", "max_num_steps exceeded")
    return str(error).startswith(known)


def explain(problem: str, expected: str, fix: str) -> str:
    """Lay out an error text: what was wrong, what was expected, a fix to paste."""
    fix = "\n            ".join(fix.splitlines())
    return f"{problem}\n  expected: {expected}\n  fix:      {fix}"


def closest(name: object, known: Iterable[str]) -> str:
    """Return the known name nearest to ``name``, or the first one."""
    names = list(known)
    return next(iter(difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)), names[0])


def check_callable(name: str, value: object, fix: str, expected: str = "a callable.") -> None:
    """Refuse what cannot be called, by `StateTypeError`."""
    if not callable(value):
        problem = f"{name} is a {type(value).__name__}."
        raise StateTypeError(problem, expected, fix)


def unknown_method(name: object, known: Iterable[str], fix: str) -> UnknownMethodError:
    """Return the error for an unknown method; in ``fix`` "{}" stands for the nearest known name."""
    names = list(known)
    listed = "one of " + ", ".join(f'"{other}"' for other in names) + "."
    fix = fix.format(closest(name, names or ["hypereuler"]))
    return UnknownMethodError(f"no method is called {name!r}.", listed, fix)


def unwritable(path: str | os.PathLike[str], error: OSError) -> FileWriteError:
    """Return the error for a file that the system refuses to write."""
    return FileWriteError(
        problem=f"{os.fspath(path)!r} cannot be written: {error.strerror or error}.",
        expected="a file name in an existing folder that you may write to.",
        fix=f"os.makedirs({str(Path(path).parent)!r}, exist_ok=True)",
    )
