"""The checked arguments of a bespoke solver's fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from torchdiffeq_hyper._state import State, VectorField, parts_of
from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting.bespoke._pieces import samples_needed
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._grid import Steps


@dataclass(frozen=True)
class BespokeProblem(Problem):
    """The checked arguments of a fit of a bespoke solver; ``steps`` is its calls of func."""

    @classmethod
    def of(
        cls,
        func: VectorField,
        t_span: object,
        *,
        base: str,
        steps: Steps,
        alpha: float | None,
        objective: str,
        direction: str,
        config: FitConfig | None,
        group: ProcessGroup | None = None,
        context: object = None,
    ) -> BespokeProblem:
        """Return the problem, checked.

        Raises:
            StateTypeError: ``func`` cannot be called as ``func(t, y, *context)``.
            OptionError: another argument is impossible.
        """
        _refuse(steps, alpha, objective, direction)
        # Euler's slopes along the solution are what the knots between the ends are fitted to.
        checked = super().of(
            func,
            t_span,
            base="euler",
            steps=steps,
            alpha=None,
            objective=objective,
            direction=direction,
            config=config,
            group=group,
            context=context,
        )
        assert isinstance(checked, BespokeProblem)
        return checked

    @property
    def method(self) -> str:
        """Always "bns"."""
        return "bns"

    @property
    def calls(self) -> int:
        """Calls of func, n."""
        assert isinstance(self.steps, int)
        return self.steps

    def domain(self, y0: State) -> FitDomain:
        """Return what the solver is fitted for: the span as one step."""
        width = abs(self.span[1] - self.span[0])
        return replace(super().domain(y0), dt_min=width, dt_max=width)


def with_large_batches(problem: BespokeProblem, y0: object) -> FitConfig:
    """Return the configuration with batches large enough for one step, where fit makes them."""
    if not isinstance(y0, Tensor | tuple):
        return problem.config
    parts = [part for part in parts_of(y0) if isinstance(part, Tensor) and part.dim()]
    if not parts or len(parts[0]) == 0:
        return problem.config  # refused where batches are made
    needed = samples_needed(y0, problem.calls)
    return replace(problem.config, batch_size=max(problem.config.batch_size, needed))


def _refuse(steps: Steps, alpha: float | None, objective: str, direction: str) -> None:
    """Refuse arguments that a bespoke solver has no use for."""
    given = 'and base is "bns".'
    if isinstance(steps, tuple) or steps is None:
        problem, expected, fix = f"steps is {steps!r},", "one number of calls of func.", "steps=8"
    elif alpha is not None:
        problem, expected = f"alpha is {alpha!r},", 'alpha with base="alpha" only.'
        fix = f'base="alpha", alpha={alpha!r}'
    elif direction == "both":
        problem, expected = 'direction is "both",', "one: its weights and times serve one way."
        fix = 'direction="forward"   # and another fit with direction="reverse"'
    elif objective == "residual":
        problem, expected = 'objective is "residual",', "errors at the end: there are no steps."
        fix = 'objective="trajectory"   # or leave it out'
    else:
        return
    raise OptionError(explain(f"{problem} {given}", expected, fix))
