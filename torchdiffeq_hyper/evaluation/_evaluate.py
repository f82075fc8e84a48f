"""Measure methods against each other in one run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_hyper._fields._restore import as_found
from torchdiffeq_hyper._rules import Real, Whole, checked_arguments
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, OutsideFitWarning, StateTypeError, unknown_method
from torchdiffeq_hyper.evaluation import _measure
from torchdiffeq_hyper.evaluation._measure import Problem, describe_machine, unless_broken
from torchdiffeq_hyper.evaluation._table import EvaluationRow, EvaluationTable, distinct
from torchdiffeq_hyper.fitting._batches import bound
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.recording import median_seconds
from torchdiffeq_hyper.solvers._grid import equal_steps
from torchdiffeq_hyper.solvers._solver import Solver


def evaluate(
    func: VectorField,
    y0: State,
    t_span: tuple[float, float],
    methods: Sequence[str | Solver],
    *,
    steps: int | Sequence[int] | None = None,
    tolerances: float | Sequence[float] = (1e-3,),
    metric: Callable[[Any], Any] | None = None,
    metric_name: str = "metric",
    rtol: float | None = None,
    atol: float | None = None,
    repeats: int = 5,
    progress: bool = True,
    context: Tensor | tuple[Tensor, ...] | None = None,
) -> EvaluationTable:
    """Measure methods against each other on one problem; return a row a method and setting.

    Every method goes through torchdiffeq's `odeint` from ``t_span[0]`` to ``t_span[1]``,
    without gradients. Errors are those of the final state against a dopri5 solution at
    tight tolerances; infinite for a method that breaks off or ends in inf or nan. A row
    costs three solves (for calls and errors, for MACs, for errors along the span), and for the
    clock a turn in each of ``repeats`` rounds through all rows: one solve, or 20 ms of them.

    ``func`` is used as it is: call ``func.eval()`` first if it has dropout or batch norm.
    Its mode, buffers and attributes, and the hypernets' buffers, come back as they were.
    Use of a solver outside its fitted range is not warned about: the table shows it.

    Args:
        func: called as ``func(t, y)``; or a torchdyn `NeuralODE`, whose field is taken.
        y0: tensor, or tuple of tensors; dimension 0 of each is the batch.
        t_span: start and end; the end may be the earlier one (reverse time).
        methods: names of methods, and fitted `Solver` objects. Learned methods given by
            name need a solver that is attached to func, in scope, or published.
        steps: numbers of equal steps of methods that follow a grid; None runs every fitted
            one at its own.
        tolerances: rtol = atol of the adaptive methods.
        metric: ``metric(y_final) -> float``, e.g. an accuracy.
        metric_name: its heading.
        rtol: of the reference; default 1e-7, in float64 1e-10. Half-precision states
            are integrated in float32, at 1e-3 (bfloat16: 1e-2).
        atol: of the reference; default rtol times the states' size.
        repeats: timed rounds.
        progress: show a progress bar.
        context: as in `fit`. `Conditioned` as func means the same.

    Raises:
        OptionError: an argument is impossible, or a grid method has no ``steps``.
        UnknownMethodError: no method has that name.
        StateTypeError, StateShapeError: ``y0``, a method or func's answer has wrong type or shape.
        NoisyFieldError: func answers differently twice at one point.
        NonFiniteError: the reference solution is not finite, or dopri5 cannot reach it.
        MissingHypernetError: a learned method was given by name and nothing is bound.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> func = lambda t, y: -y
        >>> solver = tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)
        >>> table = tdh.evaluate(func, torch.ones(4, 2), (0.0, 1.0), ["euler", "dopri5", solver],
        ...                      steps=[10], progress=False)
        >>> [(row.method, row.setting) for row in table.rows]
        [('euler', '10'), ('dopri5', 'tol 0.001'), ('hypereuler', '10')]
    """
    field = bound(func, y0, context)
    problem = Problem.of(field, y0, t_span)
    trials = _trials(methods, steps, tolerances)
    checked_arguments({"repeats": Whole(1)}, {"repeats": repeats}, fix="repeats=5")
    total = 1 + len(trials) * (3 + repeats)
    with (
        ExitStack() as stack,
        warnings.catch_warnings(),
        torch.no_grad(),
        tqdm(total=total, disable=not progress, unit="solve", desc="reference") as bar,
    ):
        warnings.simplefilter("ignore", OutsideFitWarning)
        for item in (func, *(trial.solver for trial in trials)):
            stack.enter_context(as_found(item))
        rtol, atol = problem.tolerances(rtol, atol)
        shares = sorted({share for trial in trials for share in trial.shares()})
        reference = problem.reference(rtol, atol, shares)
        bar.update()
        rows = [_row(trial, problem, reference, metric, bar) for trial in trials]
        rows = _timed(rows, trials, problem, repeats, bar)
    start, end = problem.t.tolist()
    measured = (
        f"Batch {problem.batch}, {str(problem.dtype).removeprefix('torch.')}, "
        f"t = {start:g} to {end:g}. Errors: against dopri5 at rtol {rtol:g}, atol {atol:g}. "
        f"Times: median of {repeats} interleaved runs, {describe_machine(problem.t.device)}."
    )
    return EvaluationTable(tuple(rows), metric_name, measured)


OWN_POINTS = 8  # points along the span at which a method that chooses its own steps is looked at
MOST_POINTS = 16  # points of a grid that are looked at


@dataclass(frozen=True)
class Trial:
    """One method at one setting: equal steps where it follows a grid, else a tolerance."""

    label: str  # how tables call the method
    method: str  # how the host calls it
    follows_grid: bool
    is_learned: bool = False
    solver: Solver | None = None  # the fitted one, where it is known here
    steps: int | None = None  # for "bns" its calls of func
    tolerance: float | None = None  # rtol = atol
    steps_between_points: bool = False  # as of "dise": there are no other points to look at

    def shares(self) -> list[float]:
        """Return shares of the span at which the method has states at no further call."""
        if self.steps_between_points:
            return [1.0]
        n = self.steps or OWN_POINTS
        every = -(-n // MOST_POINTS)
        return [k / n for k in range(n, 0, -every)][::-1]

    def solve(self, problem: Problem, shares: Sequence[float] = (1.0,)) -> list[State]:
        """Return the states at some shares of the problem's span, of those in `shares`."""
        options: dict[str, object] = {}
        how: dict[str, Any] = {"method": self.method, "options": options}
        if self.steps is not None and self.follows_grid:
            # Not step_size: the host rounds the number of steps up, often to one too many.
            options["grid_constructor"] = lambda func, y0, t: equal_steps(t[[0, -1]], self.steps)
        if self.solver is not None:
            options["solver"] = self.solver
        if self.tolerance is not None:
            how |= {"rtol": self.tolerance, "atol": self.tolerance}
        return problem.solve(shares, **how)


def _trials(
    methods: Sequence[str | Solver],
    steps: int | Sequence[int] | None,
    tolerances: float | Sequence[float],
) -> list[Trial]:
    """Return the trials in the order of ``methods``, after checking all three arguments."""
    is_single = isinstance(methods, str | Solver)
    if is_single or not len(methods):
        raise OptionError(
            problem=f"methods is {'a single method' if is_single else 'empty'}.",
            expected="a list of method names and fitted solvers.",
            fix='methods=["euler", "dopri5", solver]',
        )
    counts: list[Any] = []
    if steps is not None:
        counts = [steps] if isinstance(steps, int) else list(steps)
        for n in counts or [counts]:
            checked_arguments({"steps": Whole(1)}, {"steps": n}, fix="steps=[2, 4, 8]")
    limits = [tolerances] if isinstance(tolerances, int | float) else list(tolerances)
    numbers: list[Any] = [float(limit) for limit in limits]
    for number in numbers or [limits]:
        given, fix = {"tolerances": number}, "tolerances=[1e-2, 1e-3]"
        checked_arguments({"tolerances": Real(above=0.0)}, given, fix)
    trials: list[Trial] = []
    for method in methods:
        first = _first_trial(method)
        alike = (t for t in trials if None in (t.steps, first.steps) or t.steps == first.steps)
        first = replace(first, label=distinct(first.label, {trial.label for trial in alike}))
        if first.follows_grid:
            own = None if first.solver is None else first.solver.n_steps
            if not counts and own is None:
                raise OptionError(
                    problem=f'"{first.label}" follows a time grid, and steps is None.',
                    expected="the numbers of steps to measure it at.",
                    fix="steps=[2, 4, 8]",
                )
            trials += [replace(first, steps=n) for n in counts or [own]]
        elif first.is_learned:  # all its steps belong to the fit
            trials.append(first)
        else:
            trials += [replace(first, tolerance=limit) for limit in limits]
    return trials


def _first_trial(method: str | Solver) -> Trial:
    """Return a trial of a method, its settings still to be filled in."""
    entry = _registry.methods().get(method) if isinstance(method, str) else None
    solver = method if entry is None else entry.fitted
    if isinstance(solver, Solver):
        return Trial(
            method.label if isinstance(method, Solver) else method,
            solver.method,
            solver.follows_grid,
            is_learned=True,
            # So that its one warning is not used up here.
            solver=solver.without_warnings(),
            steps=None if solver.follows_grid else solver.n_steps,
        )
    if not isinstance(method, str):
        raise StateTypeError(
            problem=f"a method is a {type(method).__name__}.",
            expected="a method's name or a fitted solver.",
            fix='methods=["euler", tdh.HyperSolver("euler", net, steps=10)]',
        )
    hosts = _registry.host_methods()
    if entry is None:
        if method not in hosts:
            raise unknown_method(method, [*_registry.methods(), *hosts], 'methods=["{}"]')
        return Trial(method, method, hosts[method])
    between = entry.option not in ("solver", None)
    is_learned = entry.option == "solver"
    return Trial(method, method, entry.follows_grid, is_learned, steps_between_points=between)


def _row(
    trial: Trial, problem: Problem, reference: dict[float, State], metric: Any, bar: Any
) -> EvaluationRow:
    """Return a trial's row, its time still open."""
    bar.set_description(trial.label)
    counted = _measure.Counted(problem.func)
    end = unless_broken(lambda: trial.solve(replace(problem, func=counted)))
    off, along, macs, value = _measure.FAILED, math.inf, (math.nan, math.nan), None
    if end is not None:
        off = _measure.errors(end[0], reference[1.0])
        macs = _measure.count_macs(trial.solve, problem, has_hypernet=trial.is_learned)
        along = math.nan if trial.steps_between_points else _along(trial, problem, reference)
        if metric is not None and math.isfinite(off.worst_relative_l2):
            value = _number(metric(end[0]))
    bar.update(3)
    return EvaluationRow(
        method=trial.label,
        steps=trial.steps,
        tolerance=trial.tolerance,
        nfe=counted.calls,
        macs_func=macs[0],
        macs_g=macs[1],
        ms=math.nan,
        **off._asdict(),
        metric=value,
        is_learned=trial.is_learned,
        along=along,
    )


def _along(trial: Trial, problem: Problem, reference: dict[float, State]) -> float:
    """Return the mean relative error over the points of the method's own grid."""
    # A solve of its own: a solver that is not told its steps takes these points for its grid.
    shares = trial.shares()
    states = unless_broken(lambda: trial.solve(problem, shares))
    if states is None:
        return math.inf
    pairs = zip(states, [reference[share] for share in shares], strict=True)
    return sum(_measure.errors(*pair).relative_l2 for pair in pairs) / len(shares)


def _timed(
    rows: list[EvaluationRow], trials: list[Trial], problem: Problem, repeats: int, bar: Any
) -> list[EvaluationRow]:
    """Return the rows with their times; solves that broke off have none."""
    bar.set_description("timing")
    whole = [i for i, row in enumerate(rows) if not math.isnan(row.macs_func)]
    bar.total -= repeats * (len(rows) - len(whole))
    runs = [partial(trials[i].solve, problem) for i in whole]
    times = median_seconds(runs, problem.t.device, repeats, bar.update)
    seconds = dict(zip(whole, times, strict=True))
    return [replace(row, ms=1000 * seconds.get(i, math.nan)) for i, row in enumerate(rows)]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            problem=f"metric returned {value!r}.",
            expected="one number.",
            fix="metric=lambda y: float((predict(y).argmax(1) == labels).float().mean())",
        ) from error
