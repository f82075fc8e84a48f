"""The method "dopri5_per_sample": its options, and func at a time of its own for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields._answers import check_kind, own
from torchdiffeq_hyper._fields._independence import check_independence
from torchdiffeq_hyper._fields._wrappers import HOW_TO_RESTRICT, can_restrict, restrict
from torchdiffeq_hyper._rules import Choice, checked_arguments, shown
from torchdiffeq_hyper._state import (
    RowLayout,
    State,
    VectorField,
    is_finite,
    is_half,
    parts_of,
    shapes_of,
    time_dtype,
)
from torchdiffeq_hyper.errors import (
    HyperError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
    closest,
    first_line,
)
from torchdiffeq_hyper.solvers._dopri5 import Loop
from torchdiffeq_hyper.solvers._grid import check_times

Tolerance: TypeAlias = float | Tensor | Sequence[float | Tensor]
TIME_MODES = {
    "vmap": "func is vectorised by torch.func.vmap: a 0-d t and a batch of 1 for each sample",
    "vector": "func takes t of shape (batch,)",
    "loop": "func is called for one sample after the other",
}
# What torch raises where func cannot be called in a way; anything else is func's own affair.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class PerSampleDopri5:
    """Dopri5 in which every sample keeps its own step size and stops on its own.

    Order 5, six evaluations of func a step and sample, two at the start. Each sample takes
    the steps it would take alone, to rounding; the samples that still step are evaluated
    together. Step sizes are constants to the gradient. The options are the step controls of
    torchdiffeq's dopri5, by its names and defaults, and ``time``: how func meets samples at
    different times.

    - "vmap" (default): through `torch.func.vmap`, with a batch of 1 and a 0-d t for each
      sample; cannot take funcs that branch on values, draw random numbers, update buffers,
      or call autograd or numpy.
    - "vector": t of shape (batch,) in one call; cannot take funcs that expect a 0-d t.
    - "loop": one call a sample; takes any func, and is slow.

    Raises:
        OptionError: a value is impossible; the text names it.
    """

    safety: float = 0.9  # factor on the step size that the error estimate allows
    ifactor: float = 10.0  # most by which a step may grow
    dfactor: float = 0.2  # least by which a rejected step may shrink
    first_step: float | None = None  # None chooses one for each sample
    min_step: float = 0.0  # steps of this size are accepted while they are finite
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1  # that a sample may try between two points of t
    time: str = "vmap"

    def __post_init__(self) -> None:
        """Check every value."""
        fix = f'options={{"time": "{closest(self.time, TIME_MODES)}"}}'
        checked_arguments({"time": Choice(*TIME_MODES)}, {"time": self.time}, fix)
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            if not (_is_number(value) or value is field.default):
                self._refuse(field.name, "(real)", 1.0)
        first = 1.0 if self.first_step is None else self.first_step
        is_most = self.max_step > 0 and self.max_step >= self.min_step
        for name, is_possible, expected, example in (
            ("safety", 0 < self.safety <= 1, "above 0, at most 1", 0.9),
            ("ifactor", 1 <= self.ifactor < math.inf, "at least 1, finite", 10.0),
            ("dfactor", 0 < self.dfactor < 1, "between 0 and 1", 0.2),
            ("first_step", 0 < first < math.inf, "above 0, finite, also in reverse", 0.1),
            ("min_step", 0 <= self.min_step < math.inf, "at least 0", 1e-4),
            ("max_step", is_most, "above 0, at least min_step", 0.1),
            ("max_num_steps", self.max_num_steps >= 1, "at least 1", 1000),
        ):
            if not is_possible:
                self._refuse(name, expected, example)

    def _refuse(self, name: str, expected: str, example: object) -> NoReturn:
        problem, fix = f"{name} is {getattr(self, name)!r}.", f'options={{"{name}": {example}}}'
        raise OptionError(problem=problem, expected=f"a number {expected}.", fix=fix)

    def solve(
        self,
        func: VectorField,
        y0: State,
        t: Tensor,
        *,
        rtol: Tolerance = 1e-7,
        atol: Tolerance = 1e-9,
    ) -> State:
        """Solve dy/dt = func(t, y) from ``y0`` without a host.

        Args:
            func: see ``time``. A field that holds something of every sample needs a method
                ``restrict``, see `Conditioned`.
            y0: tensor or tuple of tensors, the samples along dim 0. Half precision is
                integrated in float32 and cast for each call.
            t: 1-D floating tensor, strictly increasing or decreasing.
            rtol: relative tolerance: a number, a tensor that broadcasts against y0, or for
                tuple states one of these a part.
            atol: absolute tolerance, in the same forms.

        Returns:
            The state at every point of ``t``: like ``y0`` with ``len(t)`` in front.

        Raises:
            StateTypeError: integer state, or t is no floating tensor.
            StateShapeError: no batch dimension, or func returned another shape.
            OptionError: func cannot be called as `time` says, or t goes back and forth.
            CoupledSamplesError: samples depend on each other (e.g. a single state (D,)).
            NonFiniteError: func returned inf or nan, or the solution left the finite range.
            UnfinishedSolveError: too many steps, or too small; has the ``solution`` so far.
        """
        return self.run(func, y0, t, rtol=rtol, atol=atol)[0]

    def run(
        self, func: VectorField, y0: State, t: Tensor, *, rtol: Tolerance, atol: Tolerance
    ) -> tuple[State, Tensor]:
        """Return the solution, and how often func was evaluated for each sample (batch,)."""
        draft = recording.take_over(self)
        layout = RowLayout.of(y0)
        rows = layout.join(y0)
        dtype, t = rows.dtype, check_times(t, rows)
        steps, are_finite = t.diff(), is_finite(t)
        sign = -1 if bool((steps < 0).any()) else 1
        if not are_finite or not bool((sign * steps > 0).all()):
            how = "goes back and forth" if are_finite else "holds inf or nan"
            problem, expected = f"t {how}: {t.tolist()[:8]}.", "strictly monotonic finite times."
            fix = "t = t.unique()" if are_finite else "t = t[torch.isfinite(t)]"
            raise OptionError(problem, expected, fix)
        # Sums of many small steps need more digits than the state has.
        times = sign * t.to(torch.float64)
        if rows.numel() == 0 or len(t) == 1:
            start = rows.expand(len(t), *rows.shape).clone()
            return layout.split(start), torch.zeros(len(rows), dtype=torch.long, device=t.device)
        rows = rows.float() if is_half(dtype) else rows
        field = SampleField(func, layout, self.time, sign, dtype)
        _check_samples_alone(field, y0, times)
        if self.time == "vector":
            _check_times_alone(field, times, rows)
        limits = _in_rows(layout, "rtol", rtol, rows), _in_rows(layout, "atol", atol, rows)
        loop = Loop(field, self, limits, times, is_recorded=draft is not None)
        found = loop.run(rows)
        if draft is not None:
            draft.nfe, draft.sample_nfe, draft.steps = loop.calls, loop.nfe, loop.steps(y0)
        solution = found.to(dtype)
        if not is_finite(solution):
            _raise_non_finite(solution, found, t)
        return layout.split(solution), loop.nfe


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, float | int)


def _in_rows(layout: RowLayout, name: str, given: Tolerance, rows: Tensor) -> Tensor:
    """Return a tolerance as a 0-d tensor or as a matrix like ``rows``, in float64."""
    if isinstance(given, float | int) or (isinstance(given, Tensor) and given.dim() == 0):
        return torch.as_tensor(given, dtype=torch.float64, device=rows.device)
    tolerances = [given] if isinstance(given, Tensor) else list(given)
    shapes = [(len(rows), *shape) for shape in layout.shapes]
    try:
        # As the host does: a number in a tuple is rounded to the default dtype first.
        wide = [torch.as_tensor(given).to(rows.device, torch.float64) for given in tolerances]
        parts = [part.expand(shape) for part, shape in zip(wide, shapes, strict=True)]
    except (RuntimeError, ValueError) as error:
        is_listed = not isinstance(given, Tensor) and not layout.is_tuple
        expected = f"a number, a tensor that broadcasts to y0's {shapes[0]}, or a tuple of these."
        problem, fix = f"{name} is {shown(given)}.", f"{name}=1e-3"
        raise (StateTypeError if is_listed else StateShapeError)(problem, expected, fix) from error
    return layout.join(tuple(parts))


def _raise_non_finite(solution: Tensor, rows: Tensor, t: Tensor) -> NoReturn:
    """Name where a solution (times, batch, width), ``rows`` as integrated, is not finite first."""
    time, sample = (~torch.isfinite(solution).all(dim=2)).nonzero()[0].tolist()
    is_overflow = bool(torch.isfinite(rows[time, sample]).all())
    how = "overflows the state's dtype," if is_overflow else "left the finite range of"
    dtype = solution.dtype if is_overflow else rows.dtype
    problem = f"sample {sample} at t = {float(t[time]):.6g} {how} {dtype}."
    fix = f"y0 = y0.{'float' if is_overflow else 'double'}()   # or a span that ends before"
    raise NonFiniteError(problem=problem, expected="a solution that stays finite.", fix=fix)


@dataclass(frozen=True)
class SampleField:
    """A vector field whose samples have times of their own."""

    func: VectorField
    layout: RowLayout
    mode: str  # one of `TIME_MODES`
    sign: int  # -1 where the solver's time is the negated true time
    dtype: torch.dtype  # the user's

    def __call__(self, t: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Return the derivatives at the solver's times (active,) of the samples at ``index``."""
        k = self._in_mode((self.sign * t).to(time_dtype(self.dtype)), y.to(self.dtype), index)
        k = k.to(y.dtype) if is_half(k.dtype) else k
        return k if self.sign > 0 else -k

    def _in_mode(self, t: Tensor, y: Tensor, index: Tensor) -> Tensor:
        # Stages are kept over later calls; under vmap func cannot write into a buffer.
        if self.mode == "loop":
            calls = [own(self._one(i, s, row)) for i, s, row in zip(index, t, y, strict=True)]
            return torch.stack(calls)
        try:
            if self.mode == "vector":
                return own(self._all(index, t, y))
            k: Tensor = torch.func.vmap(self._one)(index, t, y)
        except HyperError:
            raise
        except _REFUSALS as error:
            others = (mode for mode in TIME_MODES if mode != self.mode)
            fixes = [f'options={{"time": "{mode}"}}   # {TIME_MODES[mode]}' for mode in others]
            fixes += [] if can_restrict(self.func) else [HOW_TO_RESTRICT]
            raise OptionError(
                problem=f'func failed with options["time"] = "{self.mode}" '
                f"({TIME_MODES[self.mode]}): {type(error).__name__}: {first_line(error)}",
                expected="a func that can be called that way, or another way of calling it.",
                fix="\n".join(fixes),
            ) from error
        return k

    def _one(self, index: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._all(index.unsqueeze(0), t, y.unsqueeze(0)).squeeze(0)

    def _all(self, index: Tensor, t: Tensor, y: Tensor) -> Tensor:
        state = self.layout.split(y)
        k = restrict(self.func, index)(t, state)
        check_kind(k, state)
        (_, got), (_, expected) = shapes_of(k), shapes_of(state)
        if got != expected:  # would broadcast
            raise StateShapeError(
                problem=f"func returned shape {', '.join(map(str, got))} for a state of shape "
                f'{", ".join(map(str, expected))} (options["time"] is "{self.mode}").',
                expected="a derivative of the state's own shape; a field that holds something of "
                "every sample (noise, controls) must say which part of it belongs to which sample.",
                fix=HOW_TO_RESTRICT,
            )
        return self.layout.join(k)


@dataclass(frozen=True)
class _AtVectorTimes:
    """A vector field that takes times (batch,), called at one time."""

    func: VectorField

    def __call__(self, t: Tensor, y: State) -> Any:
        return self.func(t.expand(len(parts_of(y)[0])), y)

    def restrict(self, index: Tensor) -> _AtVectorTimes:
        return _AtVectorTimes(restrict(self.func, index))


def _check_samples_alone(field: SampleField, y0: State, times: Tensor) -> None:
    """Refuse a func whose samples depend on each other: solved alone they would go other ways."""
    layout, sign = field.layout, field.sign

    def alone(t: Tensor, y: State, index: Tensor) -> State:
        return layout.split(sign * field((sign * t).expand(len(index)), layout.join(y), index))

    if field.mode == "vector":
        check_independence(_AtVectorTimes(field.func), y0, sign * times, alone=alone)
        return
    everyone = torch.arange(len(parts_of(y0)[0]), device=times.device)
    check_independence(field.func, y0, sign * times, groups=[everyone], alone=alone)


def _check_times_alone(field: SampleField, t: Tensor, y: Tensor) -> None:
    """Refuse a func that mixes up times of shape (batch,): a wrong broadcast is silent."""
    if len(y) < 2:
        return
    ends = torch.tensor([0, len(y) - 1], device=y.device)
    # No round numbers: much that depends on t is zero, or the same, at both ends.
    inside = torch.tensor([0.3819, 0.7236], dtype=t.dtype, device=t.device)
    times, states = torch.lerp(t[:1], t[-1:], inside), y[ends]
    with torch.no_grad():
        both = field(times, states, ends)
        pairs = zip(times.split(1), states.split(1), ends.split(1), strict=True)
        alone = torch.cat([field(*one) for one in pairs])
    scale = alone.abs().amax()
    slack = torch.finfo(field.dtype).eps ** 0.5
    if not bool(((both - alone).abs() <= slack * scale).all() | ~torch.isfinite(scale)):
        raise OptionError(
            problem='options["time"] is "vector", and func answers otherwise for two samples at '
            "two times than for each of them alone.",
            expected="a func that takes t of shape (batch,), and independent samples.",
            fix="t = t.reshape(-1, *[1] * (y.dim() - 1))   # in func, before t meets y\n"
            'options={"time": "vmap"}   # or "loop": t is 0-d',
        )
