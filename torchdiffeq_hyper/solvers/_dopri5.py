"""Dopri5 with step sizes of its own for every sample: those that passed all times leave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import State, StateLayout, part_norms, time_dtype
from torchdiffeq_hyper.errors import NonFiniteError, UnfinishedSolveError, explain

if TYPE_CHECKING:
    from torchdiffeq_hyper.solvers._per_sample import PerSampleDopri5, SampleField

ORDER = 5
# Nodes and stages are those of Dormand and Prince (1980), the embedded method and the state in
# the middle of a step those of Shampine (1986): all as in torchdiffeq.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_EMBEDDED = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
_ERROR = tuple(b - e for b, e in zip((*_STAGES[-1], 0.0), _EMBEDDED, strict=True))
_MIDDLE = (
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)


class _Attempt(NamedTuple):
    """A step that was tried."""

    y1: Tensor  # the states at its end
    error: Tensor
    stages: tuple[Tensor, ...]  # derivatives, the last one at its end


def _attempt(
    func: Callable[[Tensor, Tensor], Tensor], t: Tensor, dt: Tensor, y: Tensor, f: Tensor
) -> _Attempt:
    """Return a step of size ``dt`` (active,) from ``t``; six calls of the field."""
    real = time_dtype(y.dtype)
    end, start, size = (t + dt).to(real), t.to(real), dt.to(real)
    with torch.no_grad():
        ulp = torch.nextafter(end, end - 1) - end
    end = end + ulp  # just before the end, which may be a discontinuity of func
    h = size.unsqueeze(1)
    y1, stages = y, [f]
    for node, weights in zip(_NODES, _STAGES, strict=True):
        time = end if node == 1.0 else start + node * size
        y1 = y + _combine(stages, weights, h)
        stages.append(func(time, y1))
    return _Attempt(y1, _combine(stages, _ERROR, h), tuple(stages))


def _interpolate(step: _Attempt, y: Tensor, dt: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Return the states of some rows at shares ``x`` of their steps, of order 4.

    The quartic with the step's values and derivatives at both ends and its value in the middle.
    """
    h, x = dt[rows].to(x.dtype).unsqueeze(1), x.unsqueeze(1)
    stages = [k[rows] for k in step.stages]
    y0, y1, f0, f1 = y[rows], step.y1[rows], h * stages[0], h * stages[-1]
    middle = y0 + _combine(stages, _MIDDLE, h)
    quartic = 2 * (f1 - f0) - 8 * (y1 + y0) + 16 * middle
    cubic = 5 * f0 - 3 * f1 + 18 * y0 + 14 * y1 - 32 * middle
    square = f1 - 4 * f0 - 11 * y0 - 5 * y1 + 16 * middle
    return y0 + x * (f0 + x * (square + x * (cubic + x * quartic)))


def _combine(stages: list[Tensor], weights: tuple[float, ...], h: Tensor) -> Tensor:
    total = stages[0] * (weights[0] * h)
    for k, weight in zip(stages[1:], weights[1:], strict=True):
        if weight:
            total = total + k * (weight * h)
    return total


class _Active(NamedTuple):
    """The samples that still step; every field has one entry a sample."""

    samples: Tensor  # positions in the batch
    y: Tensor  # states, one a row
    f: Tensor
    t: Tensor  # float64
    dt: Tensor  # of the next steps
    due: Tensor  # which of the output times comes next
    tried: Tensor  # steps since the last output time
    is_still: Tensor  # the last step left the finite range, although it hardly moved the state

    def at(self, which: Tensor) -> _Active:
        return _Active(*(values[which] for values in self))


@dataclass
class Loop:
    """One solve; ``nfe`` (batch,) counts the evaluations of func for each sample."""

    func: SampleField
    control: PerSampleDopri5
    tolerances: tuple[Tensor, Tensor]  # relative and absolute, 0-d or one row a sample
    times: Tensor  # float64 and increasing, the first one the start's
    is_recorded: bool
    calls: int = 0
    rounds: int = 0
    noted: list[tuple[Tensor, ...]] = field(default_factory=list)
    marks: list[object] = field(default_factory=list)

    def run(self, y0: Tensor) -> Tensor:
        """Return the solution from ``y0``, one row a sample: (times, batch, width)."""
        everyone = torch.arange(len(y0), device=y0.device)
        self.nfe, tried = torch.zeros_like(everyone), torch.zeros_like(everyone)
        self._values, self._places = [y0], [everyone]
        t = self.times[0].expand(len(y0))
        f = self._evaluate(everyone, t, y0)
        dt = self._first_step(everyone, t, y0, f)
        active = _Active(everyone, y0, f, t, dt, tried + 1, tried, tried.bool())
        while len(active.samples):
            self._check(active)
            active = self._round(active)
        return self._solution()

    def _evaluate(self, index: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.nfe[index] += 1
        self.calls += len(index) if self.func.mode == "loop" else 1
        return self.func(t, y, index)

    def _scale(self, index: Tensor, size: Tensor) -> Tensor:
        rtol, atol = (tol if tol.dim() == 0 else tol[index] for tol in self.tolerances)
        return atol + rtol * size

    @torch.no_grad()
    def _first_step(self, index: Tensor, t: Tensor, y: Tensor, f: Tensor) -> Tensor:
        """Return first step sizes as in Hairer, Norsett, Wanner, Solving ODEs I, section II.4."""
        if self.control.first_step is not None:
            return self._clamp(torch.full_like(t, self.control.first_step))
        scale, norm = self._scale(index, y.abs()), self.func.layout.norm
        d0, d1 = norm(y / scale), norm(f / scale)
        tiny = torch.as_tensor(1e-6, dtype=d0.dtype, device=d0.device)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), tiny, 0.01 * d0 / d1)
        f1 = self._evaluate(index, (t + h0).to(d0.dtype), y + h0.unsqueeze(1).to(f.dtype) * f)
        d2 = norm((f1 - f) / scale) / h0
        most = torch.maximum(d1, d2)
        curved = (0.01 / most) ** (1 / ORDER)
        h1 = torch.where(most <= 1e-15, torch.maximum(tiny, h0 * 1e-3), curved)
        return self._clamp(torch.minimum(100 * h0, h1).to(t.dtype))

    @torch.no_grad()
    def _next_step(self, dt: Tensor, ratio: Tensor) -> Tensor:
        """Return the sizes of the next steps, from the error ratios of these.

        0 after a step of the smallest size that is not finite: no smaller one may be tried.
        """
        control, ratio = self.control, ratio.to(dt.dtype)
        lowest = torch.where(ratio < 1, 1.0, control.dfactor)
        factor = (control.safety / ratio ** (1 / ORDER)).maximum(lowest).clamp(max=control.ifactor)
        after = self._clamp(dt * torch.where(ratio == 0, control.ifactor, factor))
        return torch.where((dt <= control.min_step) & ratio.isinf(), 0.0, after)

    def _clamp(self, dt: Tensor) -> Tensor:
        return dt.clamp(self.control.min_step, min(self.control.max_step, sys.float_info.max))

    def _round(self, active: _Active) -> _Active:
        """Try one step of every active sample."""
        index, y, f, t, dt, due, tried, _ = active
        if self.is_recorded:
            f, mark = recording.mark(f)
            self.marks += [] if mark is None else [mark]
        step = _attempt(partial(self._evaluate, index), t, dt, y, f)
        with torch.no_grad():
            scale = self._scale(index, torch.maximum(y.abs(), step.y1.abs()))
            ratio = self.func.layout.norm(step.error / scale)
            # A step so large that func overflows is too large, like any with a large error.
            ratio = torch.where(ratio.isnan(), torch.inf, ratio)
            accept = (ratio <= 1) | ((dt <= self.control.min_step) & ratio.isfinite())
            move, digits = dt * f.abs().amax(1), torch.finfo(self.func.dtype).eps
            is_still = ratio.isinf() & (move <= digits * y.abs().amax(1))
        if self.is_recorded:
            self._note(active, ratio, accept, step.error)
        end = torch.where(accept, t + dt, t)
        passed = self._write(active, step, end, accept)
        tried = torch.where(passed > due, 0, tried + 1)
        chosen = accept.unsqueeze(1)
        y, f = torch.where(chosen, step.y1, y), torch.where(chosen, step.stages[-1], f)
        self.rounds += 1
        after = _Active(index, y, f, end, self._next_step(dt, ratio), passed, tried, is_still)
        left = (passed < len(self.times)).nonzero().squeeze(1)
        return after if len(left) == len(index) else after.at(left)

    def _write(self, active: _Active, step: _Attempt, end: Tensor, accept: Tensor) -> Tensor:
        """Keep the states at the times that were passed; return the next times due."""
        due, last = active.due, len(self.times) - 1
        while True:
            inside = accept & (due <= last) & (self.times[due.clamp(max=last)] <= end)
            rows = inside.nonzero().squeeze(1)
            if len(rows) == 0:
                return due
            times, start = self.times[due[rows]], active.t[rows]
            x = ((times - start) / (end[rows] - start)).to(time_dtype(step.y1.dtype))
            self._values.append(_interpolate(step, active.y, active.dt, x, rows))
            self._places.append(due[rows] * len(self.nfe) + active.samples[rows])
            due = due + inside.long()

    def _note(self, active: _Active, ratio: Tensor, is_accepted: Tensor, error: Tensor) -> None:
        """Keep a round for the record."""
        norms = part_norms(self.func.layout, error)
        errors = [torch.where(is_accepted, norm, norm.detach()) for norm in norms]
        batch, sign, index = (len(self.nfe),), self.func.sign, active.samples
        flags = is_accepted.new_zeros(batch).index_copy(0, index, is_accepted)
        values = (sign * active.t.detach(), sign * active.dt, ratio, *errors)
        padded = (x.new_full(batch, torch.nan).index_copy(0, index, x) for x in values)
        self.noted.append((flags, *padded))

    def steps(self, y0: State) -> recording.Steps | None:
        """Return the steps for the record, None if there were none."""
        if not self.noted:
            return None
        is_accepted, t0, dt, ratio, *errors = map(torch.stack, zip(*self.noted, strict=True))
        check = recording.GraphCheck(tuple(self.marks))
        return recording.Steps(
            t0, dt, ratio, is_accepted, tuple(errors), StateLayout.of(y0), graph_check=check
        )

    def _solution(self) -> Tensor:
        """Return the states written so far, nan where there are none yet."""
        values, places = torch.cat(self._values), torch.cat(self._places)
        solution = values.new_full((len(self.times) * len(self.nfe), values.shape[1]), torch.nan)
        solution[places] = values
        return solution.reshape(len(self.times), len(self.nfe), -1)

    def _check(self, active: _Active) -> None:
        """Refuse to go on with a step that leads nowhere."""
        stuck = ~(active.t + active.dt > active.t) | active.is_still
        if self.rounds >= self.control.max_num_steps:
            stuck = stuck | (active.tried >= self.control.max_num_steps)
        for sample in stuck.nonzero():
            one = active.at(sample)
            # Ever smaller steps would approach for ever where func, or the state's dtype, ends a
            # few roundings ahead of a state; such an end in time is met by steps.
            ahead = 4 * torch.finfo(self.func.dtype).eps * one.y.abs() * one.f.sgn()
            if not bool(one.is_still) or not self._is_finite_at(one, one.y + ahead):
                self._raise_stuck(one)

    @torch.no_grad()
    def _is_finite_at(self, one: _Active, y: Tensor) -> bool:
        return bool(torch.isfinite(self._evaluate(one.samples, one.t, y)).all())

    def _raise_stuck(self, one: _Active) -> NoReturn:
        where = f"sample {int(one.samples)} at t = {self.func.sign * float(one.t):.6g}"
        is_finite = self._is_finite_at(one, one.y)
        if bool(one.is_still) and is_finite:
            raise NonFiniteError(
                problem=f"the solution of {where} has reached {float(one.y.abs().amax()):.6g}, and "
                "a little further func returns inf or nan, or the state's dtype ends.",
                expected="a solution that stays where func and the state's dtype are finite.",
                fix="y0 = y0.double()   # or a span that ends before",
            )
        if not is_finite or not bool(torch.isfinite(one.y).all()):
            problem, fix = f"func returned inf or nan for {where}.", "torch.isfinite(func(t, y))"
            raise NonFiniteError(problem, "finite derivatives along the solution.", fix)
        smallest, most = self.control.min_step, self.control.max_num_steps
        if float(one.dt) == 0 < smallest:
            problem = f"{where} leaves the finite range in a step of min_step = {smallest:g}."
            fix = f'options={{"min_step": {smallest / 100:g}}}   # or none'
        elif int(one.tried) >= most:
            problem = f"{where} took max_num_steps = {most} steps."
            fix = 'rtol=1e-3, atol=1e-3   # or options={"max_num_steps": 100000}'
        else:
            problem = f"the step size of {where} underflows: {float(one.dt):.3g}."
            fix = 'rtol=1e-3, atol=1e-3   # or options={"min_step": 1e-6}'
        expected = "a problem that dopri5 can follow at these tolerances (is it stiff?)."
        reached = self.func.layout.split(self._solution().to(self.func.dtype))
        raise UnfinishedSolveError(explain(problem, expected, fix), reached)
