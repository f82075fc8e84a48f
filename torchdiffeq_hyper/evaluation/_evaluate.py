"""Measure methods against each other in one run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from torchdiffeq_hyper._fields import as_found
from torchdiffeq_hyper._rules import Whole, checked_arguments
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, OutsideFitWarning
from torchdiffeq_hyper.evaluation._measure import (
    FAILED,
    Counted,
    Problem,
    count_macs,
    describe_machine,
    errors,
    unless_broken,
)
from torchdiffeq_hyper.evaluation._table import EvaluationRow, EvaluationTable
from torchdiffeq_hyper.evaluation._trials import Trial, expand
from torchdiffeq_hyper.fitting._batches import bound
from torchdiffeq_hyper.recording import median_seconds
from torchdiffeq_hyper.solvers._solver import Solver

Metric: TypeAlias = Callable[[Any], Any]


def evaluate(
    func: VectorField,
    y0: State,
    t_span: tuple[float, float],
    methods: Sequence[str | Solver],
    *,
    steps: int | Sequence[int] | None = None,
    tolerances: float | Sequence[float] = (1e-3,),
    metric: Metric | None = None,
    metric_name: str = "metric",
    rtol: float | None = None,
    atol: float | None = None,
    repeats: int = 5,
    progress: bool = True,
    context: Tensor | tuple[Tensor, ...] | None = None,
) -> EvaluationTable:
    """Measure methods against each other on one problem, all in one run.

    Every method goes through torchdiffeq's `odeint` from ``t_span[0]`` to ``t_span[1]``,
    without gradients. Errors are those of the final state against a dopri5 solution at
    tight tolerances. A method that follows a grid takes exactly n equal steps for each n
    in ``steps``, an adaptive one is run at each of ``tolerances``. A row costs three solves
    (for calls and errors, for MACs, for errors along the span), and for the clock a turn in
    each of ``repeats`` rounds through all rows: one solve, or 20 ms of them.

    ``func`` is used as it is: call ``func.eval()`` first if it has dropout or batch norm.
    Its mode, buffers and attributes, and the hypernets' buffers, come back as they were.
    Use of a solver outside its fitted range is not warned about: the table shows it.
    A method that breaks off or ends in inf or nan gets a row with infinite errors.

    Args:
        func: called as ``func(t, y)``; or a torchdyn `NeuralODE`, whose field is taken.
        y0: tensor, or tuple of tensors; dimension 0 of each is the batch.
        t_span: start and end; the end may be the earlier one (reverse time).
        methods: names of methods, and fitted `Solver` objects. Learned methods given by
            name need a solver that is attached to func, in scope, or published.
        steps: numbers of steps; None runs every fitted one at its own.
        tolerances: rtol = atol of the adaptive methods.
        metric: ``metric(y_final) -> float``, e.g. an accuracy.
        metric_name: its heading.
        rtol: of the reference; default 1e-7, in float64 1e-10. Half-precision states
            are integrated in float32, at 1e-3 (bfloat16: 1e-2).
        atol: of the reference; default rtol times the states' size.
        repeats: timed rounds.
        progress: show a progress bar.
        context: what else func is called with, as in `fit`: a tensor or a tuple of tensors
            with the samples along dim 0. `Conditioned` as func means the same.

    Returns:
        A table with a row a method and setting.

    Raises:
        OptionError: an argument is impossible, or a grid method has no ``steps``.
        UnknownMethodError: no method has that name.
        StateTypeError: ``y0`` is not a state, a method is neither name nor solver, or
            func's answer is not built like the state.
        StateShapeError: the batch is empty, or parts or func's answer have another shape.
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
    trials = expand(methods, steps, tolerances)
    checked_arguments({"repeats": Whole(1)}, {"repeats": repeats}, fix="repeats=5")
    total = 1 + len(trials) * (3 + repeats)
    with (
        _left_as_found(func, trials),
        torch.no_grad(),
        tqdm(total=total, disable=not progress, unit="solve", desc="reference") as bar,
    ):
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


@contextmanager
def _left_as_found(func: object, trials: list[Trial]) -> Iterator[None]:
    """Give func and the hypernets back as they were; do not warn of use outside a fit."""
    with ExitStack() as stack:
        for item in (func, *(trial.solver for trial in trials)):
            stack.enter_context(as_found(item))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", OutsideFitWarning)
        yield


def _row(
    trial: Trial,
    problem: Problem,
    reference: dict[float, State],
    metric: Metric | None,
    bar: Any,
) -> EvaluationRow:
    """Return a trial's row, its time still open: calls and errors, then MACs, then errors along."""
    bar.set_description(trial.label)
    counted = Counted(problem.func)
    end = unless_broken(lambda: trial.solve(replace(problem, func=counted)))
    off, along, macs, value = FAILED, math.inf, (math.nan, math.nan), None
    if end is not None:
        off = errors(end[0], reference[1.0])
        macs = count_macs(trial.solve, problem, has_hypernet=trial.is_learned)
        along = _along(trial, problem, reference)
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
    if trial.steps_between_points:
        return math.nan
    shares = trial.shares()
    states = unless_broken(lambda: trial.solve(problem, shares))
    if states is None:
        return math.inf
    pairs = zip(states, shares, strict=True)
    return sum(errors(y, reference[share]).relative_l2 for y, share in pairs) / len(shares)


def _timed(
    rows: list[EvaluationRow], trials: list[Trial], problem: Problem, repeats: int, bar: Any
) -> list[EvaluationRow]:
    """Return the rows with their times; solves that broke off have none."""
    bar.set_description("timing")
    whole = [i for i, row in enumerate(rows) if not math.isnan(row.macs_func)]
    bar.total -= repeats * (len(rows) - len(whole))
    runs = [partial(trials[i].solve, problem) for i in whole]
    seconds = median_seconds(runs, problem.t.device, repeats, bar.update)
    timed = list(rows)
    for i, each in zip(whole, seconds, strict=True):
        timed[i] = replace(rows[i], ms=1000 * each)
    return timed


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            problem=f"metric returned {value!r}.",
            expected="one number.",
            fix="metric=lambda y: float((predict(y).argmax(1) == labels).float().mean())",
        ) from error
