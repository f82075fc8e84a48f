"""A fitted solver against classical ones: the best in its time, the fastest of its error."""

from __future__ import annotations

import contextvars
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._state import State, StateLayout, VectorField, is_half
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._data import Batch
from torchdiffeq_hyper.fitting._errors import BROKEN, Run, end_errors
from torchdiffeq_hyper.recording import median_seconds
from torchdiffeq_hyper.solvers._fit_report import BreakEven, ClassicalAlternative, ErrorSummary
from torchdiffeq_hyper.solvers._grid import equal_steps
from torchdiffeq_hyper.solvers._stepping import stage_call
from torchdiffeq_hyper.tableaus import MIDPOINT


class Solve(NamedTuple):
    """A solver at one setting."""

    label: str
    run: Run  # on two points of t


class FixedStep(NamedTuple):
    """A method with equal steps."""

    each: int  # calls of func in a step
    start: int  # calls of func that the first step takes beside
    order: int
    run: Callable[..., State]  # a `Run` that takes ``steps``

    def with_steps(self, name: str, steps: int) -> Solve:
        label = f"{name} with {steps} step{'s' * (steps > 1)}"
        return Solve(label, partial(self.run, steps=steps))


def dopri5(tolerance: float, size: float) -> Solve:
    """Return torchdiffeq's dopri5 with one tolerance, the absolute one for states of a size."""
    run = partial(_host, method="dopri5", rtol=tolerance, atol=tolerance * size)
    return Solve(f"dopri5 at rtol = {tolerance:.1e}", run)


def _host(func: VectorField, y0: State, t: Tensor, **given: Any) -> State:
    # Outside any scope that would answer to these names.
    solution: State = contextvars.Context().run(odeint, func, y0, t, **given)
    return solution


def _fixed(func: VectorField, y0: State, t: Tensor, steps: int, *, method: str) -> State:
    options = {"grid_constructor": lambda func, y0, t: equal_steps(t, steps)}
    return _host(func, y0, t, method=method, options=options)


# Weights of the derivatives at the last steps, newest first, times the step size.
_ADAMS_BASHFORTH = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}


def _adams_bashforth(func: VectorField, y0: State, t: Tensor, steps: int, *, order: int) -> State:
    """Solve by the method of Adams and Bashforth, started by one midpoint step."""
    layout = StateLayout.of(y0)
    y = start = layout.join(y0)
    call, history = stage_call(func, layout, y.dtype), list[Tensor]()
    for t0, t1 in pairwise(equal_steps(t.to(y.device), steps).unbind()):
        dt = t1 - t0
        if history:
            history = [call(t0, y), *history][:order]
            weights = _ADAMS_BASHFORTH[len(history)]
            terms = [w * f for w, f in zip(weights, history, strict=True)]
            dy = dt * torch.stack(terms).sum(0)
        else:
            dy, (f0, _) = MIDPOINT.increment(call, t0, dt, t1, y)
            history = [f0]
        y = y + dy.to(y.dtype)
    return layout.split(torch.stack([start, y]))


_ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # and calls in a step
FIXED = {
    **{name: FixedStep(p, 0, p, partial(_fixed, method=name)) for name, p in _ORDERS.items()},
    "Adams-Bashforth 2": FixedStep(1, 1, 2, partial(_adams_bashforth, order=2)),
    "Adams-Bashforth 3": FixedStep(1, 1, 3, partial(_adams_bashforth, order=3)),
}

SHARE_OF_FIT = 0.05  # share of a fit's time that the measurement may take
LEAST_SECONDS = 5.0  # what it may take at least
MOST_SAMPLES = 8  # samples on which the classical solvers' settings are sought, where time is short
SEARCH = 100  # solves that such a search takes at most
MOST_WORK = 16  # calls of func that a classical solver may take, over the fitted solver's
MOST_TRIES = 6
CLOSE = 1.5  # fixed-step methods whose predicted work is within this factor of the least are tried
ROUNDS = 3
TURN_SECONDS = 0.005

QUICK = 0.05  # seconds of a solve below which the shorter of two runs counts
MOST_SECONDS = 2.0  # of a comparison at equal time: with more to do, fewer samples are solved
FEWEST = 8  # samples that are solved at least
TOLERANCES = [10.0 ** (-k / 2) for k in range(2, 13)]  # the tightest that float32 can just meet


class _NoTimeError(Exception):
    """The measurement's time is up."""


@dataclass(frozen=True)
class _Task:
    """Some held-out samples, to be solved from start to end."""

    func: VectorField
    batch: Batch
    deadline: float = math.inf

    def __len__(self) -> int:
        return n_samples(self.batch.y0)

    def error(self, run: Run) -> float:
        """Return the mean relative error at the end; inf where a sample blows up."""
        if time.perf_counter() > self.deadline:
            raise _NoTimeError
        return float(end_errors(run, self.func, self.batch).mean())

    def some(self, count: int) -> _Task:
        """Return the same for the first samples."""
        return replace(self, batch=self.batch.some(torch.arange(len(self))[:count]))

    def timed(self, run: Run) -> tuple[ErrorSummary, float]:
        """Return the errors at the end and the wall time of a solve."""
        seconds = math.inf
        for _ in range(2):
            began = time.perf_counter()
            errors = end_errors(run, self.func, self.batch).cpu()  # waits for the device
            seconds = min(seconds, time.perf_counter() - began)
            if seconds >= QUICK:  # else what is set up once counts
                break
        return ErrorSummary.of(errors), seconds


@torch.no_grad()
def measure(
    run: Run, func: VectorField, batch: Batch, *, calls: int, budget: Budget
) -> BreakEven | str:
    """Return the break-even with a classical solver as accurate, or why there is none."""
    if is_half(batch.dtype):
        return "the host cannot solve in half precision"
    used = budget.seconds
    allowed = min(budget.max_seconds - used, max(SHARE_OF_FIT * used, LEAST_SECONDS))
    if allowed <= 0:
        return "no time was left to measure it"
    task = _Task(func, batch, time.perf_counter() + allowed)
    try:
        _, seconds = task.timed(run)
        # All samples, if there is time for the search on them.
        probe = task if SEARCH * seconds < allowed else task.some(MOST_SAMPLES)
        target = probe.error(run)
        if not math.isfinite(target):
            return "the fitted solver blows up on held-out samples"
        return _race(run, _as_accurate(probe, target, calls), task, used)
    except _NoTimeError:
        return f"its measurement would have taken more than {allowed:.2g} s"


def _as_accurate(task: _Task, target: float, calls: int) -> list[Solve]:
    """Return the classical solvers that reach an error with little work."""
    predicted, most = {}, MOST_WORK * calls
    for name, method in FIXED.items():
        n = max(1, calls // method.each)
        growth = _growth(task.error(method.with_steps(name, n).run), target, method.order)
        predicted[name] = max(1.0, n * growth) * method.each
    close = {name: w for name, w in predicted.items() if w <= CLOSE * min(predicted.values())}
    found = [_fewest_steps(task, name, work, target, most) for name, work in close.items()]
    adaptive = (dopri5(tolerance, task.batch.units.state) for tolerance in TOLERANCES)
    reached = (solve for solve in adaptive if task.error(solve.run) <= target)
    return [solve for solve in (*found, next(reached, None)) if solve is not None]


def _growth(error: float, target: float, order: int) -> float:
    """Return by how much to multiply a number of steps to get from one error to another."""
    ratio = error / target if target > 0 and math.isfinite(error) else math.inf
    return float(min(ratio, 1e12) ** (1 / order))


def _fewest_steps(task: _Task, name: str, work: float, target: float, most: int) -> Solve | None:
    """Return a method with the fewest steps that reach the target, if it does so in time."""
    method, found = FIXED[name], None
    below, above, n = 0, most // method.each + 1, math.ceil(work / method.each)
    for _ in range(MOST_TRIES):
        if not below < n < above:
            break
        solve = method.with_steps(name, n)
        error = task.error(solve.run)
        guess = n * _growth(error, target, method.order)
        if error <= target:
            found, above, guess = solve, n, math.floor(guess)
        else:
            below, guess = n, math.ceil(guess)
        n = min(above - 1, max(below + 1, guess))
    return found


def _race(run: Run, classical: list[Solve], task: _Task, fit_seconds: float) -> BreakEven | str:
    """Time all on the whole batch; a classical solver that breaks down there is out."""
    began, batch = time.perf_counter(), task.batch
    times = batch.grids[0].times[[0, -1]]
    arguments = batch.field(task.func), batch.start(0), times
    error = task.error(run)
    # Settings were sought on a few samples: what is less accurate on all is no alternative.
    left = []
    for solve in classical:
        with suppress(*BROKEN):
            solve.run(*arguments)  # sets up what is timed
            if task.error(solve.run) <= error:
                left.append(solve)
    if not left:
        return f"no classical solver is as accurate in {MOST_WORK} times as many calls of func"
    now = time.perf_counter()
    if now + ROUNDS * (now - began) > task.deadline:
        raise _NoTimeError
    runs = [partial(each, *arguments) for each in (run, *(solve.run for solve in left))]
    own, *others = median_seconds(runs, times.device, ROUNDS, turn_seconds=TURN_SECONDS)
    seconds, fastest = min(zip(others, left, strict=True), key=lambda pair: pair[0])
    predictions = fit_seconds / (seconds - own) if seconds > own else None
    return BreakEven(predictions, own, fastest.label, seconds, len(task), error)


@torch.no_grad()
def best_classical(
    run: Run, func: VectorField, batch: Batch, *, calls: int
) -> ClassicalAlternative | None:
    """Return the classical solver with the smallest mean error in a fitted one's time, if any.

    As times are only roughly known, each has as many calls of func as the fitted one at least.
    """
    if is_half(batch.dtype):  # the host cannot solve these as ours do
        return None
    task = _Task(func, batch)
    own_errors, own_seconds = task.timed(run)
    wanted = max(FEWEST, int(len(task) * MOST_SECONDS / max(2 * len(FIXED) * own_seconds, 1e-9)))
    if wanted < len(task):
        task = task.some(wanted)
        own_errors, own_seconds = task.timed(run)
    found = [_in_time(name, task, calls, own_seconds) for name in FIXED]
    label, errors, seconds = min(found, key=lambda each: each[1].mean)
    p95 = min(each.p95 for _, each, _ in found)
    return ClassicalAlternative(label, errors, own_errors, p95, seconds, own_seconds)


def _in_time(
    name: str, task: _Task, calls: int, own_seconds: float
) -> tuple[str, ErrorSummary, float]:
    """Return label, errors and seconds of a method in the fitted solver's calls and time."""
    method = FIXED[name]
    steps = max(1, calls // method.each)
    solve = method.with_steps(name, steps)
    errors, seconds = task.timed(solve.run)
    in_time = (steps * method.each + method.start) * own_seconds / max(seconds, 1e-9)
    if (more := int((in_time - method.start) / method.each)) > steps:
        solve = method.with_steps(name, more)
        errors, seconds = task.timed(solve.run)
    return solve.label, errors, seconds
