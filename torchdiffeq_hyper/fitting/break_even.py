"""What a fitted solver saves, against the cheapest classical solver of the same error."""

from __future__ import annotations

import contextvars
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._grid import equal_steps
from torchdiffeq_hyper._layout import is_half
from torchdiffeq_hyper._report import BreakEven
from torchdiffeq_hyper._restrict import restrict
from torchdiffeq_hyper._timing import median_seconds
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.fitting.batches import n_samples, select
from torchdiffeq_hyper.fitting.data import Batch
from torchdiffeq_hyper.fitting.norms import sample_norms

SHARE_OF_FIT = 0.05
"""Share of a fit's time that the measurement may take, if that is more than `LEAST_SECONDS`."""
LEAST_SECONDS = 0.25
MOST_SAMPLES = 8
"""Samples on which the classical solvers' settings are sought."""
MOST_WORK = 16
"""Calls of func that a classical solver may take, over the fitted solver's."""
MOST_TRIES = 6
CLOSE = 1.5
"""Fixed-step methods whose predicted work is within this factor of the least are tried."""
ROUNDS = 3
TURN_SECONDS = 0.005

FIXED = {"euler": (1, 1), "midpoint": (2, 2), "rk4": (4, 4)}
"""torchdiffeq's fixed-step methods: calls of func in a step, and order."""
TOLERANCES = tuple(10.0 ** (-k / 2) for k in range(2, 13))
"""dopri5's, from loose to those that float32 can just meet."""


class Solve(NamedTuple):
    """A solver at one setting.

    Attributes:
        label: for people.
        run: ``(func, y0, t) -> solution`` at the two points of t.
    """

    label: str
    run: Callable[[VectorField, State, Tensor], State]


class _NoTimeError(Exception):
    """The measurement's time is up."""


@dataclass
class _Task:
    """One solve from start to end, and the answer."""

    func: VectorField
    y0: State
    t: Tensor
    answer: State
    deadline: float

    def error(self, solve: Solve) -> float:
        """Return the mean over samples of the L2 error at the end; inf where it is not finite."""
        if time.perf_counter() > self.deadline:
            raise _NoTimeError
        try:
            solution = solve.run(self.func, self.y0, self.t)
        except (ArithmeticError, AssertionError):  # it blew up, as ours or the host reports it
            return math.inf
        error = float(sample_norms(_off(solution, self.answer)).mean())
        return error if math.isfinite(error) else math.inf

    def some(self, count: int) -> _Task:
        """Return the same for the first samples."""
        index = torch.arange(min(count, n_samples(self.y0)))
        y0, answer = select(self.y0, index), select(self.answer, index)
        return _Task(restrict(self.func, index), y0, self.t, answer, self.deadline)


@torch.no_grad()
def measure(
    solve: Callable[[VectorField, State, Tensor], State],
    func: VectorField,
    batch: Batch,
    *,
    calls: int,
    fit_seconds: float,
    seconds_left: float,
) -> BreakEven | None:
    """Measure a fitted solver's time, and that of a classical solver that is as accurate.

    The alternative is the fastest of torchdiffeq's euler, midpoint, rk4 and dopri5, each
    with the fewest steps or the loosest tolerance found that reach the fitted solver's mean
    L2 error at the end of the span, on the same held-out samples. Times are medians of
    interleaved runs of the whole batch, without gradients.

    Args:
        solve: the fitted solver's ``(func, y0, t) -> solution``.
        func: the vector field.
        batch: held-out samples.
        calls: calls of func in one of the fitted solver's solves.
        fit_seconds: what the fit took.
        seconds_left: what the measurement may take at most; it takes a twentieth of the
            fit's time, or a quarter of a second if that is more.

    Returns:
        None if that was not enough, no classical solver gets there, or the samples are of
        half precision.
    """
    if is_half(batch.dtype):  # the host cannot solve in half precision what ours can
        return None
    allowed = min(seconds_left, max(SHARE_OF_FIT * fit_seconds, LEAST_SECONDS))
    samples = batch.routes[0]
    task = _Task(
        func=batch.field(func),
        y0=batch.start(0),
        t=samples.times[[0, -1]],
        answer=batch.layout.split(samples.y[-1]),
        deadline=time.perf_counter() + allowed,
    )
    ours = Solve("", solve)
    try:
        probe = task.some(MOST_SAMPLES)
        target = probe.error(ours)
        rivals = _rivals(probe, target, calls) if math.isfinite(target) else []
        return _race(ours, rivals, task, fit_seconds)
    except _NoTimeError:
        return None


def _rivals(task: _Task, target: float, calls: int) -> list[Solve]:
    """Return the classical solvers that reach an error with little work."""
    predicted = {}
    for method, (each, order) in FIXED.items():
        n = max(1, calls // each)
        growth = _growth(task.error(fixed(method, n)), target, order)
        predicted[method] = max(1.0, n * growth) * each
    least = min(predicted.values())
    found = [
        _fewest_steps(task, method, work, target, most=MOST_WORK * calls)
        for method, work in predicted.items()
        if work <= CLOSE * least
    ]
    reached = (s for s in map(dopri5, TOLERANCES) if task.error(s) <= target)
    return [solve for solve in (*found, next(reached, None)) if solve is not None]


def _growth(error: float, target: float, order: int) -> float:
    """Return by how much to multiply a number of steps to get from one error to another."""
    ratio = error / target if target > 0 and math.isfinite(error) else math.inf
    return float(min(ratio, 1e12) ** (1 / order))


def _fewest_steps(task: _Task, method: str, work: float, target: float, most: int) -> Solve | None:
    """Return a method with the fewest steps that reach the target, if it does so in time."""
    each, order = FIXED[method]
    below, above, n = 0, most // each + 1, math.ceil(work / each)
    found = None
    for _ in range(MOST_TRIES):
        if not below < n < above:
            break
        solve = fixed(method, n)
        error = task.error(solve)
        guess = n * _growth(error, target, order)
        if error <= target:
            found, above = solve, n
            n = max(below + 1, min(above - 1, math.floor(guess)))
        else:
            below = n
            n = min(above - 1, max(below + 1, math.ceil(guess)))
    return found


def _race(ours: Solve, rivals: list[Solve], task: _Task, fit_seconds: float) -> BreakEven | None:
    """Time all on the whole batch."""
    if not rivals:
        return None
    runs = [partial(solve.run, task.func, task.y0, task.t) for solve in (ours, *rivals)]
    began = time.perf_counter()
    for run in runs:  # what is set up once
        run()
    once = time.perf_counter() - began
    if time.perf_counter() + ROUNDS * once > task.deadline:
        raise _NoTimeError
    device = task.t.device
    own, *others = median_seconds(runs, device, ROUNDS, turn_seconds=TURN_SECONDS)
    seconds, rival = min(zip(others, rivals, strict=True), key=lambda pair: pair[0])
    return BreakEven(
        predictions=fit_seconds / (seconds - own) if seconds > own else None,
        seconds=own,
        alternative=rival.label,
        alternative_seconds=seconds,
        samples=n_samples(task.y0),
        error=task.error(ours),
    )


def fixed(method: str, steps: int) -> Solve:
    """Return one of torchdiffeq's fixed-step methods with equal steps."""
    options = {"grid_constructor": lambda func, y0, t: equal_steps(t, steps)}
    label = f"{method} with {steps} step{'s' * (steps > 1)}"
    return Solve(label, partial(_host, method=method, options=options))


def dopri5(tolerance: float) -> Solve:
    """Return torchdiffeq's dopri5 with one tolerance."""
    label = f"dopri5 at rtol = atol = {tolerance:.1e}"
    return Solve(label, partial(_host, method="dopri5", rtol=tolerance, atol=tolerance))


def _host(func: VectorField, y0: State, t: Tensor, **given: Any) -> State:
    # Outside any scope that would answer to these names.
    solution: State = contextvars.Context().run(odeint, func, y0, t, **given)
    return solution


def _off(solution: State, answer: State) -> State:
    if isinstance(solution, Tensor) and isinstance(answer, Tensor):
        return (solution[-1] - answer).unsqueeze(0)
    return tuple((s[-1] - a).unsqueeze(0) for s, a in zip(solution, answer, strict=True))
