"""The checked arguments of a fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchdiffeq_hyper._state import Hypernet, State, StateLayout, VectorField, parts_of
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._context import Context, split_context
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._phases import OBJECTIVES
from torchdiffeq_hyper.fitting._reference import Plan, check_choice, check_span, step_counts
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.tableaus import Tableau

RESIDUAL_SHARE = 0.25
"""Share of the iterations of a combined fit that its residual phase takes."""


@dataclass(frozen=True)
class Problem:
    """The checked arguments of a fit, apart from data and net.

    Attributes:
        func: the vector field, called with the context of each batch.
        span: start and end.
        steps: as the user gave them.
        plan: times and grids.
        tableau: the base.
        direction: "forward", "reverse" or "both".
        objective: "combined", "residual" or "trajectory".
        config: lengths, rates, tolerances.
        group: the processes that share the work.
        context: that of all samples; "batch" where each batch brings its own.
    """

    func: VectorField
    span: tuple[float, float]
    steps: Steps
    plan: Plan
    tableau: Tableau
    direction: str
    objective: str
    config: FitConfig
    group: ProcessGroup = field(default_factory=ProcessGroup)
    context: Context = ()

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
    ) -> Problem:
        """Return the problem, checked.

        Raises:
            StateTypeError: ``func`` cannot be called as ``func(t, y, *context)``.
            StateShapeError: tensors of ``context`` differ in their number of samples.
            OptionError: another argument is impossible.
        """
        checked, checked_context = split_context(func, context)
        span = check_span(t_span)
        return cls(
            func=checked,
            span=span,
            steps=steps,
            plan=Plan.of(span, steps, direction),
            tableau=_registry.find_tableau(base, alpha),
            direction=direction,
            objective=check_choice("objective", objective, OBJECTIVES),
            config=FitConfig() if config is None else config,
            group=ProcessGroup() if group is None else group,
            context=checked_context,
        )

    @property
    def width(self) -> float:
        """Length of the span, above 0."""
        return abs(self.span[1] - self.span[0])

    @property
    def method(self) -> str:
        """The method string of the solver to be fitted."""
        return _registry.method_of(self.tableau.name).name

    @property
    def iterations(self) -> list[int]:
        """Iterations of each phase."""
        total = self.config.iterations
        if self.objective != "combined":
            return [total]
        first = max(1, round(RESIDUAL_SHARE * total))
        return [first, total - first]

    def solver(self, net: Hypernet, steps: Steps = None, **filled: Any) -> HyperSolver:
        """Return a solver with this base."""
        base, alpha = self.tableau.name, self.tableau.alpha
        return HyperSolver(base, net, steps, alpha=alpha, **filled)

    def domain(self, y0: State) -> FitDomain:
        """Return what the solver is fitted for."""
        parts = parts_of(y0)
        width, counts = self.width, step_counts(self.steps)
        return FitDomain(
            span=self.span,
            dt_min=width / counts[-1],
            dt_max=width / counts[0],
            directions=self.plan.signs,
            shapes=tuple(tuple(part.shape[1:]) for part in parts),
            is_tuple=isinstance(y0, tuple),
            dtype=str(StateLayout.of(y0).join(y0).dtype).removeprefix("torch."),
        )
