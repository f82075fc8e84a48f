"""Fitting the correction g of a hypersolver with AdamW: on residuals, on roll-outs, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchdiffeq_hyper._fields._restore import own_random_state
from torchdiffeq_hyper._state import (
    Hypernet,
    State,
    StateLayout,
    VectorField,
    history_of,
    sample_norms,
    stepped_dtype,
)
from torchdiffeq_hyper.errors import HyperError, NoiseFloorError
from torchdiffeq_hyper.fitting._auto import check_auto, choose
from torchdiffeq_hyper.fitting._budget import ReferencePlan
from torchdiffeq_hyper.fitting._checkpoint import FitState
from torchdiffeq_hyper.fitting._data import Data, measure_residuals
from torchdiffeq_hyper.fitting._engine import Start, Target
from torchdiffeq_hyper.fitting._errors import Comparison, is_worse
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._objectives import (
    Objective,
    calibrate,
    delta_quantiles,
    no_correction,
    objectives_of,
    take_classical_start,
)
from torchdiffeq_hyper.fitting._phases import AdamWPhase, AdamWState, Phase
from torchdiffeq_hyper.fitting._problem import HypersolverProblem
from torchdiffeq_hyper.fitting._reference import Plan, Tolerances, solve_reference
from torchdiffeq_hyper.fitting._signature import signs_of_net
from torchdiffeq_hyper.hypernets import (
    ReadyHypernet,
    from_architecture,
    join_channels,
    ready,
    suited,
)
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.tableaus import Tableau

HIGHEST = 0.5  # share of the residual's size that may be noise
TIGHTEST = 1e-13  # tolerance below which float64 itself ends the search for a better solution
FEWEST_TO_PAY = 200  # iterations below which a fit is a trial that nobody has to earn back


class HypersolverTarget(Target):
    """A hypersolver's net g, for one base and one or more step sizes.

    ``hypernet`` is the net, None for a ready one, or "auto" for one to be chosen.
    """

    problem: HypersolverProblem

    def __init__(self, problem: HypersolverProblem, hypernet: nn.Module | str | None) -> None:
        self.problem = problem
        self.method = _registry.method_of(problem.tableau.name).name
        self.order = problem.tableau.order
        self._given = hypernet
        self._used: Hypernet = no_correction

    @classmethod
    def of(
        cls, func: VectorField, t_span: object, *, hypernet: nn.Module | str | None, **given: Any
    ) -> HypersolverTarget:
        """Return the target of the arguments of `fit`, checked."""
        if isinstance(hypernet, str):
            check_auto(hypernet)
        problem = HypersolverProblem.for_net(func, t_span, hypernet, **given)
        return cls(problem, hypernet)

    def open(self, y0: State) -> None:
        """Make a ready net where none was given; one that is to be chosen needs data first."""
        self._y0 = y0
        if self._given is None:
            self._given = self._ready_net()
        self.net = self._given if isinstance(self._given, nn.Module) else None
        has_two = self.problem.objective == "combined" and not history_of(self.net)
        self.phase_states = [AdamWState] * (1 + has_two)

    def _ready_net(self) -> ReadyHypernet:
        problem = self.problem
        return ready(self._y0, problem.tableau, time_unit=problem.width)

    def signature(self) -> dict[str, Any]:
        """Return the base, the steps, the objective, and the net's shapes."""
        problem, given = self.problem, self._given
        return {
            "base": problem.tableau.name,
            "alpha": problem.tableau.alpha,
            "steps": str(problem.steps),
            "objective": problem.objective,
            "hypernet": given if self.net is None else signs_of_net(self.net),
        }

    def measure_noise(self, field: Field, y0: State, tolerances: Tolerances) -> float:
        """Return the noise in the residuals, after checking that they stand above it."""
        return measure_noise(field, y0, self.problem.tableau, self.problem.plan, tolerances)

    def prepare(self, data: Data, choice: dict[str, Any] | None) -> dict[str, Any] | None:
        """Choose a net where that was asked for."""
        self._data, problem = data, self.problem
        if self.net is None and choice is None:
            choice = problem.group.from_first(lambda: choose(problem, data.first, data.held_out))
        self._take_net(choice)
        return choice

    def _take_net(self, choice: dict[str, Any] | None) -> None:
        """Train the net that was given, or a new one as it was chosen."""
        net = self.net
        if net is None:
            assert choice is not None
            net = suited(from_architecture(choice["architecture"]), join_channels(self._y0))
        self.module = self._used = net

    def start(self, noise: float | None, plan: ReferencePlan) -> Start:
        """Calibrate the net: as the best classical method that it can be, it is the start."""
        is_new = calibrate(self.module, self._data.first)
        self.module.eval()
        held_out, selection = self._data.held_out, self._objectives()[-1]
        base_error = selection.base_error(held_out)
        if is_new:
            error = take_classical_start(self.module, selection, held_out)
        else:
            error = selection.error(held_out)
        return Start(error, base_error, noise or 0.0)

    def _objectives(self) -> tuple[Objective, ...]:
        problem = self.problem
        return objectives_of(problem.objective, problem.solver(self.module), problem.func)

    def phases(self) -> Sequence[Phase]:
        """Return a phase on residuals, one on roll-outs, or both."""
        objectives, problem = self._objectives(), self.problem
        last = objectives[-1]
        return [
            AdamWPhase((one, last), self.module, self._data, problem, wanted, is_last=one is last)
            for one, wanted in zip(objectives, problem.iterations(len(objectives)), strict=True)
        ]

    def comparison(self) -> Comparison:
        """Return the solver as it is, and its base alone."""
        problem = self.problem
        solver, base = (problem.solver(g, problem.steps) for g in (self._used, no_correction))
        assert solver.n_steps is not None
        calls = solver.n_steps * problem.tableau.calls
        return Comparison(solver.solve, base.solve, problem.tableau.name, calls, FEWEST_TO_PAY)

    def finish(self, state: FitState) -> Iterator[str]:
        """Give up a net that is worse than none; say so, and which net was chosen."""
        problem, compared = self.problem, self.comparison()
        if problem.group.from_first(lambda: is_worse(compared, problem.func, self._data)):
            state.fallback, state.best_error = "start", state.base_error
            if isinstance(self.module, ReadyHypernet):
                self.module.reset()
                state.best = self.module.state_dict()
            else:
                self._used = self._zero_net()
        return _notes(state)

    def _zero_net(self) -> Hypernet:
        """Return a ready net that is zero, so that the solver is its base and can be saved."""
        try:
            with own_random_state(self.problem.config.seed):
                return self._ready_net()
        except HyperError:  # no ready net for such a state
            return no_correction

    def deltas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return quantiles over held-out samples, steps and grids."""
        held_out, pair = self._data.held_out, (self._used, no_correction)
        own, base = (delta_quantiles(g, self.order, held_out) for g in pair)
        return own, base

    def restore(self, state: FitState) -> None:
        """Take the net of an earlier run; none where that had given up the user's own."""
        self._take_net(state.choice)
        if state.fallback and not isinstance(self.module, ReadyHypernet):
            self._used = self._zero_net()
        else:
            self.module.load_state_dict(state.best)

    def leave_unfitted(self) -> str:
        """Be the base alone."""
        self._used = self._zero_net()
        return f"{self.problem.tableau.name} without a correction"

    def solver(self, y0: State) -> HyperSolver:
        """Return the hypersolver."""
        problem = self.problem
        return problem.solver(self._used, problem.steps, domain=problem.domain(y0))


def _notes(state: FitState) -> Iterator[str]:
    if state.iteration == 0:
        yield "no iteration ended in time: this is the base; pass a larger max_seconds"
    elif state.fallback:
        yield "the fitted net was worse than none in mean or tail: this is the base alone"
    elif not state.best_error < state.base_error:
        yield "no better than the base on held-out samples: do not use it as it is"
    if state.choice is not None:
        yield state.choice["note"]


def measure_noise(
    field: Field, y0: State, tableau: Tableau, plan: Plan, tolerances: Tolerances
) -> float:
    """Return the mean noise in |R|_2, after checking that it is at most half of |R|_2.

    The residuals are compared with those of a solution that is ten times tighter and steps
    on twice as many points, so that even a fixed-step method takes other steps. To the
    difference comes what a solver cannot help: half a unit in the last place of the state
    that it keeps, over dt^(p+1).
    """
    layout, units = StateLayout.of(y0), field.units
    flat = layout.join(y0)
    tight = 10.0 if tolerances.rtol / 10 >= TIGHTEST else 0.1
    solution = solve_reference(field, flat, plan.times, tolerances)
    middles = (plan.times[:-1] + plan.times[1:]) / 2
    refined = torch.cat([plan.times[:1], torch.stack([middles, plan.times[1:]], 1).flatten()])
    finer = solve_reference(field, flat, refined, tolerances.tightened(tight))[::2]
    half_unit = torch.finfo(stepped_dtype(flat.dtype)).eps / 2
    noises, unit = [], units.residual(tableau.order)
    for grid in plan.grids:
        first = measure_residuals(field, tableau, grid, solution)
        second = measure_residuals(field, tableau, grid, finer)
        dt = float(units.times(grid.times[:2]).diff())
        rounding = half_unit / dt ** (tableau.order + 1) * (first.y[1:] / units.state)
        size, noise, rounding_noise = (
            float(sample_norms(layout.split(values)).mean())
            for values in (first.residual, first.residual - second.residual, rounding)
        )
        noise += rounding_noise
        if noise > HIGHEST * size or size == 0:
            raise NoiseFloorError(
                problem=f"{tableau.name} at {grid.n_steps} steps is already exact to this dtype, "
                f"as far as can be told: its mean residual |R| is {unit * size:.3g}, the noise in "
                f"it {unit * noise:.3g} ({flat.dtype}, reference by {tolerances}).",
                expected=f"noise below {HIGHEST:g} of |R|: nothing else could be learned.",
                fix="the base as it is, without a correction\n"
                f"or fewer steps: steps={max(1, grid.n_steps // 2)}\n"
                "or, if the digits matter: func.double() and y0.double()\n"
                "or, if the reference is the loose part: "
                "FitConfig(rtol=..., atol=...), 100 times smaller",
            )
        noises.append(unit * noise)
    return sum(noises) / len(noises)
