"""The method "dopri5_per_sample": its options, its control of the step sizes, and a solve."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import RowLayout, State, VectorField, is_finite, is_half
from torchdiffeq_hyper.errors import (
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
    closest,
)
from torchdiffeq_hyper.solvers._grid import check_times
from torchdiffeq_hyper.solvers.per_sample._field import (
    TIME_MODES,
    SampleField,
    check_samples_alone,
    check_times_alone,
)
from torchdiffeq_hyper.solvers.per_sample._loop import Field, Loop, StepLog

ORDER = 5

Tolerance: TypeAlias = float | Tensor | Sequence[float | Tensor]
"""A number, a tensor that broadcasts against y0, or for tuple states one of these a part."""


@dataclass(frozen=True)
class PerSampleDopri5:
    """Dopri5 in which every sample keeps its own step size and stops on its own.

    Order 5, six evaluations of func a step and sample, two at the start. Each sample takes
    the steps it would take alone, to rounding; the samples that still step are evaluated
    together. Step sizes are constants to the gradient.

    The other options are the step controls of torchdiffeq's dopri5, by its names and defaults.

    Attributes:
        safety: factor on the step size that the error estimate allows.
        ifactor: most by which a step may grow.
        dfactor: least by which a rejected step may shrink.
        first_step: size of the first step; None chooses one for each sample.
        min_step: steps are never smaller, and accepted at this size while they are finite.
        max_step: steps are never larger.
        max_num_steps: most steps a sample may try between two points of t.
        time: how func meets samples at different times. "vmap" (default): through
            `torch.func.vmap`, with a batch of 1 and a 0-d t for each sample; cannot take
            funcs that branch on values, draw random numbers, update buffers, or call
            autograd or numpy. "vector": t of shape (batch,) in one call; cannot take funcs
            that expect a 0-d t. "loop": one call a sample; takes any func, and is slow.

    Raises:
        OptionError: a value is impossible; the text names it.
    """

    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1
    time: str = "vmap"

    def __post_init__(self) -> None:
        """Check every value."""
        if self.time not in TIME_MODES:
            raise OptionError(
                problem=f"time is {self.time!r}.",
                expected="; ".join(f'"{mode}": {what}' for mode, what in TIME_MODES.items()) + ".",
                fix=f'options={{"time": "{closest(self.time, TIME_MODES)}"}}',
            )
        for field in fields(self)[:-1]:
            value, example = getattr(self, field.name), 1e-3 if field.default is None else 1.0
            is_left_out = value is None and field.default is None
            self._require(field.name, is_left_out or _is_number(value), "(real)", example)
        self._require("safety", 0 < self.safety <= 1, "above 0, at most 1", 0.9)
        self._require("ifactor", 1 <= self.ifactor < math.inf, "at least 1, finite", 10.0)
        self._require("dfactor", 0 < self.dfactor < 1, "between 0 and 1", 0.2)
        first = self.first_step
        is_size = first is None or 0 < first < math.inf
        self._require("first_step", is_size, "above 0, finite, also in reverse", 0.1)
        self._require("min_step", 0 <= self.min_step < math.inf, "at least 0", 1e-4)
        is_most = self.max_step > 0 and self.max_step >= self.min_step
        self._require("max_step", is_most, "above 0, at least min_step", 0.1)
        self._require("max_num_steps", self.max_num_steps >= 1, "at least 1", 1000)

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
            func: see `time`. A field that holds something of every sample needs a method
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
            UnfinishedSolveError: too many steps, or too small ones; has the ``solution``
                so far.
        """
        return self.run(func, y0, t, rtol=rtol, atol=atol)[0]

    def run(
        self, func: VectorField, y0: State, t: Tensor, *, rtol: Tolerance, atol: Tolerance
    ) -> tuple[State, Tensor]:
        """Return the solution, and how often func was evaluated for each sample (batch,)."""
        draft = recording.take_over(self)
        layout = RowLayout.of(y0)
        rows = layout.join(y0)
        t = check_times(t, rows)
        dtype = rows.dtype
        sign = -1 if len(t) > 1 and bool(t[1] < t[0]) else 1
        # Sums of many small steps need more digits than the state has.
        times = sign * t.to(torch.float64)
        _check_order(times, t)
        if rows.numel() == 0 or len(t) == 1:
            start = rows.expand(len(t), *rows.shape).clone()
            return layout.split(start), torch.zeros(len(rows), dtype=torch.long, device=t.device)
        rows = rows.float() if is_half(dtype) else rows
        field = SampleField(func, layout, self.time, sign, dtype)
        check_samples_alone(field, y0, times)
        if self.time == "vector":
            check_times_alone(field, times, rows)
        limits = _in_rows(layout, "rtol", rtol, rows), _in_rows(layout, "atol", atol, rows)
        log = None if draft is None else StepLog(len(rows), layout, sign)
        loop = Loop(field, self, limits, times, log)
        found = loop.run(rows)
        if draft is not None and log is not None:
            draft.nfe, draft.sample_nfe = loop.calls, loop.nfe
            draft.steps = log.steps(y0)
        solution = found.to(dtype)
        if not is_finite(solution):
            _raise_non_finite(solution, found, t)
        return layout.split(solution), loop.nfe

    def _require(self, name: str, is_valid: object, expected: str, example: float) -> None:
        if not is_valid:
            raise OptionError(
                problem=f"{name} is {getattr(self, name)!r}.",
                expected=f"a number {expected}.",
                fix=f'options={{"{name}": {example}}}',
            )

    @torch.no_grad()
    def first(
        self,
        field: Field,
        norm: Callable[[Tensor], Tensor],
        start: tuple[Tensor, Tensor, Tensor],
        scale: Tensor,
    ) -> Tensor:
        """Return the first step size of each sample, at one call of field.

        The choice is that of Hairer, Norsett and Wanner, Solving Ordinary Differential
        Equations I, section II.4. ``start`` is time, state and derivative; ``scale`` what errors
        are measured in.
        """
        t, y, f = start
        if self.first_step is not None:
            return self.clamp(torch.full_like(t, self.first_step))
        d0, d1 = norm(y / scale), norm(f / scale)
        tiny = torch.as_tensor(1e-6, dtype=d0.dtype, device=d0.device)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), tiny, 0.01 * d0 / d1)
        f1 = field((t + h0).to(d0.dtype), y + h0.unsqueeze(1).to(f.dtype) * f)
        d2 = norm((f1 - f) / scale) / h0
        flat = (d1 <= 1e-15) & (d2 <= 1e-15)
        h1 = torch.where(
            flat, torch.maximum(tiny, h0 * 1e-3), (0.01 / torch.maximum(d1, d2)) ** (1 / ORDER)
        )
        return self.clamp(torch.minimum(100 * h0, h1).to(t.dtype))

    @torch.no_grad()
    def next(self, dt: Tensor, ratio: Tensor) -> Tensor:
        """Return the sizes of the next steps, from the error ratios of these.

        0 after a step of the smallest size that is not finite: no smaller one may be tried.
        """
        ratio = ratio.to(dt.dtype)
        lowest = torch.where(ratio < 1, 1.0, self.dfactor)
        factor = (self.safety / ratio ** (1 / ORDER)).maximum(lowest).clamp(max=self.ifactor)
        after = self.clamp(dt * torch.where(ratio == 0, self.ifactor, factor))
        return torch.where((dt <= self.min_step) & ratio.isinf(), 0.0, after)

    def clamp(self, dt: Tensor) -> Tensor:
        """Return the sizes, kept between the smallest and the largest."""
        return dt.clamp(self.min_step, min(self.max_step, sys.float_info.max))


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, float | int)


def _in_rows(layout: RowLayout, name: str, given: Tolerance, rows: Tensor) -> Tensor:
    """Return a tolerance as a 0-d tensor or as a matrix like ``rows``, in float64."""
    if isinstance(given, float | int) or (isinstance(given, Tensor) and given.dim() == 0):
        return torch.as_tensor(given, dtype=torch.float64, device=rows.device)
    tolerances = [given] if isinstance(given, Tensor) else list(given)
    if len(tolerances) != len(layout.shapes):
        error = StateShapeError if layout.is_tuple else StateTypeError
        raise error(
            problem=f"{name} has {len(tolerances)} entries.",
            expected=f"one a part: {len(layout.shapes)}." if layout.is_tuple else "one number.",
            fix=f"{name}=1e-3",
        )
    parts = []
    for tolerance, shape, width in zip(tolerances, layout.shapes, layout.widths, strict=True):
        # As the host does: a number in a tuple is rounded to the default dtype first.
        part = torch.as_tensor(tolerance).to(rows.device, torch.float64)
        full = (len(rows), *shape)
        try:
            parts.append(part.expand(full).reshape(len(rows), width))
        except RuntimeError as problem:
            raise StateShapeError(
                problem=f"{name} has shape {tuple(part.shape)}.",
                expected=f"a number, or a shape that broadcasts to y0's {full}.",
                fix=f"{name}=1e-3",
            ) from problem
    return torch.cat(parts, dim=1)


def _check_order(times: Tensor, t: Tensor) -> None:
    are_finite = is_finite(times)
    if are_finite and bool((times.diff() > 0).all()):
        return
    how = "goes back and forth" if are_finite else "holds inf or nan"
    raise OptionError(
        problem=f"t {how}: {t.tolist()[:8]}.",
        expected="finite times that strictly increase, or strictly decrease.",
        fix="t = t.unique()" if are_finite else "t = t[torch.isfinite(t)]",
    )


def _raise_non_finite(solution: Tensor, rows: Tensor, t: Tensor) -> NoReturn:
    """Name where a solution (times, batch, width), ``rows`` as integrated, is not finite first."""
    broken = ~torch.isfinite(solution).all(dim=2)
    time, sample = broken.nonzero()[0].tolist()
    where = f"sample {sample} at t = {float(t[time]):.6g}"
    if bool(torch.isfinite(rows[time, sample]).all()):
        most = torch.finfo(solution.dtype).max
        problem = f"{where} overflows the state's dtype, {solution.dtype} (at most {most:.4g})."
        fix = "y0 = y0.float()"
    else:
        problem = f"{where} left the finite range of {rows.dtype}."
        fix = "y0 = y0.double()   # or a span that ends before the solution blows up"
    raise NonFiniteError(problem=problem, expected="a solution that stays finite.", fix=fix)
