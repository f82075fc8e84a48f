"""The checked arguments of a fit, and the check of its field."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from torchdiffeq_hyper._state import Hypernet, State, StateLayout, VectorField, parts_of
from torchdiffeq_hyper.fitting._batches import Context, Starts, context_signature, split_context
from torchdiffeq_hyper.fitting._budget import ENDLESS
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import References
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import Field, Units, check_field, check_samples
from torchdiffeq_hyper.fitting._reference import (
    Plan,
    Tolerances,
    check_choice,
    check_span,
    counts_around,
    step_counts,
)
from torchdiffeq_hyper.fitting._signature import signs_of_field
from torchdiffeq_hyper.hypernets import ReadyHypernet
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.tableaus import Tableau

OBJECTIVES = ("combined", "residual", "trajectory")
RESIDUAL_SHARE = 0.25  # share of the iterations of a combined fit that its residual phase takes


@dataclass(frozen=True)
class Problem:
    """The checked arguments of any fit, apart from data and net."""

    func: VectorField  # called with the context of each batch
    span: tuple[float, float]
    steps: Steps
    counts: list[int]  # of the steps over the span that are fitted
    plan: Plan
    direction: str
    objective: str
    config: FitConfig
    group: ProcessGroup
    context: Context  # that of all samples; "batch" where each batch brings its own
    tableau: Tableau | None  # the base whose residuals are measured along references

    @classmethod
    def of(
        cls,
        func: VectorField,
        t_span: object,
        *,
        steps: Steps,
        objective: str,
        direction: str,
        config: FitConfig | None,
        base: str | None = None,
        alpha: float | None = None,
        group: ProcessGroup | None = None,
        context: object = None,
        is_scalable: bool = False,
    ) -> Self:
        """Return the problem of these arguments, checked.

        ``is_scalable`` says whether one fit serves many step sizes: then numbers of steps around
        the one asked for are fitted as well.
        """
        checked, checked_context = split_context(func, context)
        span, counts = check_span(t_span), step_counts(steps)
        if is_scalable and len(counts) == 1:
            counts = counts_around(counts[0])
        return cls(
            func=checked,
            span=span,
            steps=steps,
            counts=counts,
            plan=Plan.of(span, counts, direction),
            direction=direction,
            objective=check_choice("objective", objective, OBJECTIVES),
            config=config or FitConfig(),
            group=group or ProcessGroup(),
            context=checked_context,
            tableau=None if base is None else _registry.find_tableau(base, alpha),
        )

    @property
    def width(self) -> float:
        """Length of the span, above 0."""
        return abs(self.span[1] - self.span[0])

    def domain(self, y0: State) -> FitDomain:
        """Return what the solver is fitted for."""
        return FitDomain(
            span=self.span,
            dt_min=self.width / self.counts[-1],
            dt_max=self.width / self.counts[0],
            directions=self.plan.signs,
            shapes=tuple(tuple(part.shape[1:]) for part in parts_of(y0)),
            is_tuple=isinstance(y0, tuple),
            dtype=str(StateLayout.of(y0).join(y0).dtype).removeprefix("torch."),
        )

    def check_field(self, starts: Starts, count: int) -> tuple[References, dict[str, Any]]:
        """Look at the field on some of ``count`` samples; refuse one that cannot be fitted.

        Returns what solves references as exactly as wanted, and what tells the starts and
        the field from others.
        """
        field = Field(self.func, starts, ENDLESS)
        check_samples(field, count, self.span)
        answers = check_field(field, self.span, field.flat)
        units = Units.of(self.span, field.flat, answers[0])
        tolerances = Tolerances.of(self.config, field.dtype, units)
        references = References(self.func, self.plan, tolerances, units, self.tableau)
        return references, signs_of_field((field.flat, *answers))

    def signature(self, starts: Starts, signs: dict[str, Any]) -> dict[str, Any]:
        """Return what tells fits of one kind apart, but for what is fitted."""
        settings = asdict(self.config)
        for name in ("max_seconds", "checkpoint"):  # these may differ when a fit goes on
            del settings[name]
        return {
            "t_span": list(self.span),
            "direction": self.direction,
            "dtype": str(StateLayout.of(starts.y0).join(starts.y0).dtype),
            **settings,
            "context": context_signature(starts.context),
            **signs,
        }


@dataclass(frozen=True)
class HypersolverProblem(Problem):
    """The checked arguments of a hypersolver's fit; ``tableau`` is its base."""

    tableau: Tableau

    @classmethod
    def for_net(
        cls, func: VectorField, t_span: object, hypernet: object, *, base: str, **given: Any
    ) -> Self:
        """Return the problem of fitting a net, of the arguments of `Problem.of`."""
        _registry.check_base(base, _registry.bases())  # None would be no base
        is_scalable = isinstance(hypernet, ReadyHypernet) and hypernet.is_scalable
        return cls.of(func, t_span, base=base, is_scalable=is_scalable, **given)

    def iterations(self, n_phases: int) -> list[int]:
        """Return the iterations of each phase."""
        total = self.config.iterations
        if n_phases == 1:
            return [total]
        first = max(1, round(RESIDUAL_SHARE * total))
        return [first, total - first]

    def solver(self, net: Hypernet, steps: Steps = None, **filled: Any) -> HyperSolver:
        """Return a solver with this base."""
        base, alpha = self.tableau.name, self.tableau.alpha
        return HyperSolver(base, net, steps, alpha=alpha, **filled)
