"""Fitting the weights of a bespoke solver, then a correction at its end, then what lies between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields._independence import find_coupling
from torchdiffeq_hyper._state import State, StateLayout, parts_of, sample_norms, stepped_dtype
from torchdiffeq_hyper.errors import NoiseFloorError, OptionError
from torchdiffeq_hyper.fitting._auto import AUTO, check_auto
from torchdiffeq_hyper.fitting._batches import n_samples
from torchdiffeq_hyper.fitting._budget import ENDLESS, LAST_PHASE, ReferencePlan
from torchdiffeq_hyper.fitting._checkpoint import FitState, snapshot
from torchdiffeq_hyper.fitting._chunks import (
    TrainingChunks,
    cut,
    fit_knots,
    rows_of,
    samples_needed,
)
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import Data
from torchdiffeq_hyper.fitting._engine import Start, Target
from torchdiffeq_hyper.fitting._errors import Comparison, is_worse, quantiles
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._levenberg_marquardt import (
    LevenbergMarquardt,
    LevenbergMarquardtState,
    best_starts,
    mean_error,
)
from torchdiffeq_hyper.fitting._objectives import EndObjective
from torchdiffeq_hyper.fitting._phases import AdamWPhase, AdamWState, Phase
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances, solve_reference
from torchdiffeq_hyper.fitting._signature import signs_of_net
from torchdiffeq_hyper.solvers.bespoke import ORDER, BespokeSolver, compositions

WEIGHTS_FIRST = 0.5  # share of the time that the weights get where a correction follows
MOST_STARTS = 3  # classical methods that weights start from, where there is time
LOOSE = 1e3  # noise, in units of the dtype's rounding, that is more than rounding
FEWEST_TO_PAY = 20  # iterations below which a fit is a trial that nobody has to earn back


class BespokeTarget(Target):
    """A bespoke solver's weights for n calls of func, and the net g at its end if there is one."""

    module: BespokeSolver

    def __init__(self, problem: Problem, hypernet: nn.Module | None) -> None:
        assert isinstance(problem.steps, int)
        self.problem = problem
        self.method = "bns"
        self.order = ORDER
        self.net = hypernet
        self.phase_states = [LevenbergMarquardtState] + [AdamWState] * (hypernet is not None)
        self._n = problem.steps
        self._start = {1: "euler", 2: "midpoint", 3: "heun3"}.get(self._n, "rk4")

    @classmethod
    def of(
        cls, func: Any, t_span: object, *, base: str, alpha: Any, hypernet: Any, **rest: Any
    ) -> BespokeTarget:
        _refuse(base, alpha, hypernet, rest)
        return cls(Problem.of(func, t_span, **rest), hypernet)

    def config_for(self, y0: object) -> FitConfig:
        """Return the configuration with batches large enough for one step, if fit makes them."""
        config = self.problem.config
        parts = parts_of(y0) if isinstance(y0, Tensor | tuple) else ()
        if not parts or not all(isinstance(p, Tensor) and p.dim() and len(p) for p in parts):
            return config  # batches of their own; or refused where batches are made
        return replace(config, batch_size=max(config.batch_size, samples_needed(parts, self._n)))

    def open(self, y0: State) -> None:
        self._device, width = parts_of(y0)[0].device, self.problem.width
        # The span is one step.
        self._domain = replace(self.problem.domain(y0), dt_min=width, dt_max=width)
        self.module = self._classical("euler")
        self.module.hypernet = self.net

    def _classical(self, method: str) -> BespokeSolver:
        return BespokeSolver.classical(method, self._n).to(self._device)

    def signature(self) -> dict[str, Any]:
        return {"base": self.method, "steps": self._n, "weights": signs_of_net(self.module)}

    def measure_noise(self, field: Field, y0: State, tolerances: Tolerances) -> float:
        """Return the relative noise in the ends: of the reference, and of rounding."""
        layout, times = StateLayout.of(y0), self.problem.plan.times[[0, -1]]
        flat = layout.join(y0)
        tight = tolerances.tightened(10.0 if tolerances.rtol >= 1e-12 else 0.1)
        first, second = (solve_reference(field, flat, times, t)[-1:] for t in (tolerances, tight))
        norms = (sample_norms(layout.split(state)) for state in (first, first - second))
        size, noise = (float(norm.mean()) for norm in norms)
        # Half a unit in the last place of the state, and half of one of the state in true units.
        return noise / (size or 1.0) + torch.finfo(stepped_dtype(flat.dtype)).eps

    def prepare(self, data: Data, choice: dict[str, Any] | None) -> dict[str, Any] | None:
        """Cut the held-out samples into chunks, and order the classical starts."""
        self._data, problem, held_out = data, self.problem, data.held_out
        self._held_out = cut(held_out, problem.func, ENDLESS, None)
        times = torch.linspace(*problem.span, 3, dtype=torch.float64)
        with torch.no_grad():
            coupling = find_coupling(held_out.field(problem.func), held_out.y0, times)
        self._rows = rows_of(held_out.y0, self._n) if coupling is None else None
        weights = self.module.weights
        starts = problem.group.from_first(lambda: best_starts(self._held_out, weights))
        self._starts, self._start = starts[:MOST_STARTS], starts[0]
        return None

    def start(self, noise: float | None, plan: ReferencePlan) -> Start:
        """Start as the classical method with the smallest held-out error."""
        rtol = plan.tolerances.rtol
        noise = rtol if noise is None else max(noise, rtol * plan.is_looser)
        self.module.set_weights(compositions(self._n)[self._start])
        error = mean_error(self._held_out, self.module.weights)
        if error <= 2 * noise and not plan.is_looser:
            _refuse_exact(self._start, self._n, error, noise, self._data.held_out.dtype)
        return Start(error, error, noise)

    def phases(self) -> Sequence[Phase]:
        """Return the phase of the weights, and that of the correction if there is one."""
        module, data, problem = self.module, self._data, self.problem
        chunks = TrainingChunks(data, problem, self._rows)
        share = LAST_PHASE if self.net is None else WEIGHTS_FIRST
        first = LevenbergMarquardt(module, self._starts, chunks, self._held_out, problem, share)
        if self.net is None:
            return [first]
        pair, wanted = (EndObjective(module, problem.func),) * 2, problem.config.iterations
        return [first, AdamWPhase(pair, module, data, problem, wanted, is_last=True)]

    def comparison(self, solver: BespokeSolver | None = None) -> Comparison:
        """Return the solver as it is, or another, and the classical method that it started as."""
        own, start = map(self._as_used, (solver or self.module, self._classical(self._start)))
        return Comparison(own.solve, start.solve, self._start, self._n, FEWEST_TO_PAY)

    def _as_used(self, solver: BespokeSolver) -> BespokeSolver:
        knots = solver.get_buffer("knot_values"), solver.get_buffer("knot_slopes")
        net, domain = solver.hypernet, self._domain
        return BespokeSolver(solver.weights, hypernet=net, knots=knots, domain=domain)

    def finish(self, state: FitState) -> Iterator[str]:
        """Be the best of the fit, the weights alone and the start; fit the knots."""
        solver = self.module
        state.fallback = self.problem.group.from_first(lambda: self._fallback(state))
        if state.fallback == "start":
            solver.set_weights(compositions(self._n)[self._start])
        if state.fallback:
            solver.hypernet = None
            state.best_error = mean_error(self._held_out, solver.weights)
        self._fit_knots()
        state.best = {**state.best, **snapshot(solver)}
        return _notes(state, self._data, self._start, self._n)

    def _fallback(self, state: FitState) -> str:
        """Return what is better than what was fitted: "weights", "start", or "" for nothing."""
        func, data = self.problem.func, self._data
        if state.iteration == 0 or not is_worse(self.comparison(), func, data):
            return ""
        if self.net is None:
            return "start"
        alone = self.comparison(BespokeSolver(self.module.weights))
        return "start" if is_worse(alone, func, data) else "weights"

    @torch.no_grad()
    def _fit_knots(self) -> None:
        """Fit what is said between the ends, on the first training batch."""
        if self._n == 1:
            return
        solver, func, batch = self.module, self.problem.func, self._data.first
        added = EndObjective(solver, func).added(batch)
        chunks = cut(batch, func, ENDLESS, self._rows if added is None else None)
        values, slopes = fit_knots(chunks, solver.weights, added)
        solver.get_buffer("knot_values").copy_(values)
        solver.get_buffer("knot_slopes").copy_(slopes)

    @torch.no_grad()
    def deltas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return quantiles of the residuals: the span is one step, its error over its square."""
        batch, solvers = self._data.held_out, (self.module, self._classical(self._start))
        norms = (EndObjective(solver, self.problem.func).norms(batch) for solver in solvers)
        own, start = (quantiles(each, batch.units.residual(ORDER)) for each in norms)
        return own, start

    def restore(self, state: FitState) -> None:
        if state.fallback:
            self.module.hypernet = None
        self.module.load_state_dict(state.best, strict=not state.fallback)

    def leave_unfitted(self) -> str:
        self.module = self._classical(self._start)
        return f"{self._start} in {self._n} calls of func"

    def solver(self, y0: State) -> BespokeSolver:
        self.module.domain = self._domain
        return self.module


def _refuse(base: str, alpha: float | None, hypernet: object, given: dict[str, Any]) -> None:
    """Refuse arguments that a bespoke solver has no use for."""
    steps, objective, direction = given["steps"], given["objective"], given["direction"]
    if isinstance(steps, tuple) or steps is None:
        got, expected, fix = f"steps is {steps!r}", "one number of calls of func.", "steps=8"
    elif alpha is not None:
        got, fix = f"alpha is {alpha!r}", f'base="alpha", alpha={alpha!r}'
        expected = 'alpha with base="alpha" only.'
    elif direction == "both":
        got, expected = 'direction is "both"', "one: its weights and times serve one way."
        fix = 'direction="forward"   # and another fit with direction="reverse"'
    elif objective == "residual":
        got, expected = 'objective is "residual"', "errors at the end: there are no steps."
        fix = 'objective="trajectory"   # or leave it out'
    elif isinstance(hypernet, str):
        check_auto(hypernet)
        got, fix = f'hypernet is "{AUTO}"', "hypernet=None"
        expected = "None (the base learns its coefficients, a net on top is extra) or a module."
    else:
        return
    raise OptionError(problem=f'{got} and base is "{base}".', expected=expected, fix=fix)


def _notes(state: FitState, data: Data, start: str, n: int) -> Iterator[str]:
    if state.iteration == 0:
        yield f"no iteration ended in time: this is {start}; pass a larger max_seconds"
    elif state.fallback == "weights":
        yield "the correction was worse than none in mean or tail: these are the weights alone"
    elif state.fallback:
        yield f"the fitted weights were worse than {start} in mean or tail: this is {start}"
    elif not state.best_error < state.base_error:
        yield f"no better than {start} on held-out samples: do not use it as it is"
    else:
        yield f"the base is {start} with as many calls of func, the best classical start"
    needed = samples_needed(data.held_out.y0, n)
    if data.n_starts < needed:
        yield (
            f"{data.n_starts} samples for {n * (n + 1) // 2} weights: starts unlike them may go "
            f"wrong unseen by {n_samples(data.held_out.y0)} held-out ones; pass {needed} or more"
        )


def _refuse_exact(name: str, n: int, error: float, noise: float, dtype: torch.dtype) -> NoReturn:
    """Refuse to fit where a classical method is exact to rounding, or the reference too loose."""
    what = f"{name} with {n} calls of func"
    figures = f"its mean relative error is {error:.3g}, the noise in it {noise:.3g} ({dtype})"
    fix = "config=tdh.FitConfig(rtol=..., atol=...)   # 100 times smaller, or left out"
    if noise > LOOSE * torch.finfo(dtype).eps:
        problem = f"the reference solution is too loose to fit {what} to: {figures}."
    else:
        problem = f"{what} is already exact to this dtype, as far as can be told: {figures}."
        fix = (
            f"{name} as it is\nor fewer calls: steps={max(1, n // 2)}\n"
            "or, if the digits matter: func.double() and y0.double()\n"
            f"or a tighter reference: {fix}"
        )
    raise NoiseFloorError(problem=problem, expected="noise below half of the error.", fix=fix)
