"""func on rows of samples, each at a time of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._fields import (
    HOW_TO_RESTRICT,
    can_restrict,
    check_independence,
    check_kind,
    own,
    restrict,
)
from torchdiffeq_hyper._state import RowLayout, State, VectorField, is_half, shapes_of, time_dtype
from torchdiffeq_hyper.errors import HyperError, OptionError, StateShapeError, first_line

TIME_MODES = {
    "vmap": "func is vectorised by torch.func.vmap: a 0-d t and a batch of 1 for each sample",
    "vector": "func takes t of shape (batch,)",
    "loop": "func is called for one sample after the other",
}
# What torch raises where func cannot be called in a way; anything else is func's own affair.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class SampleField:
    """A vector field whose samples have times of their own."""

    func: VectorField
    layout: RowLayout
    mode: str  # one of `TIME_MODES`
    sign: int  # -1 where the solver's time is the negated true time
    dtype: torch.dtype  # the user's

    def __call__(self, t: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Return the derivatives of the samples ``index``: their positions in the batch.

        ``t`` are the solver's times (active,), ``y`` their states, one a row.
        """
        real = time_dtype(self.dtype)
        t = (t if self.sign > 0 else -t).to(real)
        k = self._in_mode(t, y.to(self.dtype), index)
        if is_half(k.dtype):
            k = k.to(y.dtype)
        return k if self.sign > 0 else -k

    def _in_mode(self, t: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if self.mode == "loop":
            calls = [own(self._one(i, s, row)) for i, s, row in zip(index, t, y, strict=True)]
            return torch.stack(calls)
        evaluate: Callable[[Tensor, Tensor, Tensor], Tensor] = (
            torch.func.vmap(self._one) if self.mode == "vmap" else self._all
        )
        try:
            k = evaluate(index, t, y)
            # Stages are kept over later calls; under vmap func cannot write into a buffer.
            return own(k) if self.mode == "vector" else k
        except HyperError:
            raise
        except _REFUSALS as error:
            self._raise_refused(error)

    def _one(self, index: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the derivative of one sample, whose batch axis of 1 is kept for func."""
        return self._all(index.unsqueeze(0), t, y.unsqueeze(0)).squeeze(0)

    def _all(self, index: Tensor, t: Tensor, y: Tensor) -> Tensor:
        state = self.layout.split(y)
        k = restrict(self.func, index)(t, state)
        self._check(k, state)
        return self.layout.join(k)

    def _check(self, k: State, y: State) -> None:
        """Refuse what would broadcast: shapes are known under vmap too."""
        check_kind(k, y)
        got, expected = shapes_of(k), shapes_of(y)
        if got == expected:
            return
        times = "t of shape (batch,)" if self.mode == "vector" else "a batch of 1"
        raise StateShapeError(
            problem=f"func returned {_listed(got[1])} for a state of {_listed(expected[1])}"
            f' (options["time"] is "{self.mode}": func gets {times}).',
            expected="a derivative of the state's own shape; a field that holds something of every "
            "sample (noise, controls) must say which part of it belongs to which sample.",
            fix=HOW_TO_RESTRICT,
        )

    def _raise_refused(self, error: Exception) -> NoReturn:
        hint = "" if can_restrict(self.func) else "; what it holds of every sample is named"
        fixes = [
            f'options={{"time": "{mode}"}}   # {what}'
            for mode, what in TIME_MODES.items()
            if mode != self.mode
        ]
        raise OptionError(
            problem=f'func failed with options["time"] = "{self.mode}" ({TIME_MODES[self.mode]}): '
            f"{type(error).__name__}: {first_line(error)}",
            expected=f"a func that can be called that way, or another way of calling it{hint}.",
            fix="\n".join(fixes if not hint else [*fixes, HOW_TO_RESTRICT]),
        ) from error


def check_samples_alone(field: SampleField, y0: State, times: Tensor) -> None:
    """Refuse a func whose samples depend on each other: solved alone they would go other ways."""
    layout, sign = field.layout, field.sign

    def alone(t: Tensor, y: State, index: Tensor) -> State:
        return layout.split(sign * field((sign * t).expand(len(index)), layout.join(y), index))

    if field.mode == "vector":
        check_independence(_AtVectorTimes(field.func), y0, sign * times, alone=alone)
        return
    everyone = torch.arange(len(layout.join(y0)), device=times.device)
    check_independence(field.func, y0, sign * times, groups=[everyone], alone=alone)


class _AtVectorTimes:
    """A vector field that takes times (batch,), called at one time."""

    def __init__(self, func: VectorField) -> None:
        self._func = func

    def __call__(self, t: Tensor, y: State) -> State:
        first = y[0] if isinstance(y, tuple) else y
        k: State = self._func(t.expand(len(first)), y)
        return k

    def restrict(self, index: Tensor) -> _AtVectorTimes:
        return _AtVectorTimes(restrict(self._func, index))


def check_times_alone(field: SampleField, t: Tensor, y: Tensor) -> None:
    """Refuse a func that mixes up times of shape (batch,): a wrong broadcast is silent.

    Compares a call at two times inside the span with one call for each; costs four evaluations
    of a sample, and none for a single sample.
    """
    if len(y) < 2:
        return
    ends = torch.tensor([0, len(y) - 1], device=y.device)
    # No round numbers: much that depends on t is zero, or the same, at both ends.
    inside = torch.tensor([0.3819, 0.7236], dtype=t.dtype, device=t.device)
    times, states = torch.lerp(t[:1], t[-1:], inside), y[ends]
    with torch.no_grad():
        both = field(times, states, ends)
        alone = torch.cat(
            [field(times[i : i + 1], states[i : i + 1], ends[i : i + 1]) for i in (0, 1)]
        )
    scale = alone.abs().amax()
    slack = torch.finfo(field.dtype).eps ** 0.5
    if not bool(((both - alone).abs() <= slack * scale).all() | ~torch.isfinite(scale)):
        raise OptionError(
            problem='options["time"] is "vector", and func answers otherwise for two samples at '
            "two times than for each of them alone.",
            expected="a func that takes t of shape (batch,), and samples that do not depend on "
            "others.",
            fix="t = t.reshape(-1, *[1] * (y.dim() - 1))   # in func, before t meets y\n"
            'options={"time": "vmap"}   # or "loop": t is 0-d',
        )


def _listed(shapes: Sequence[object]) -> str:
    return "shape" + "s" * (len(shapes) > 1) + " " + ", ".join(map(str, shapes))
