"""The checked arguments of a fit, and what tells one fit from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from torchdiffeq_hyper._files import shown
from torchdiffeq_hyper._state import Hypernet, State, StateLayout, VectorField, parts_of
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._context import Context, split_context
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._field import SHARES
from torchdiffeq_hyper.fitting._reference import Plan, check_choice, check_span, step_counts
from torchdiffeq_hyper.fitting._units import differing, fingerprint
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.tableaus import Tableau

OBJECTIVES = ("combined", "residual", "trajectory")
RESIDUAL_SHARE = 0.25
"""Share of the iterations of a combined fit that its residual phase takes."""


@dataclass(frozen=True)
class Problem:
    """The checked arguments of any fit, apart from data and net."""

    func: VectorField  # called with the context of each batch
    span: tuple[float, float]
    steps: Steps
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
        tableau: Tableau | None = None,
        group: ProcessGroup | None = None,
        context: object = None,
    ) -> Self:
        """Return the problem of these arguments, checked."""
        checked, checked_context = split_context(func, context)
        span = check_span(t_span)
        return cls(
            func=checked,
            span=span,
            steps=steps,
            plan=Plan.of(span, steps, direction),
            direction=direction,
            objective=check_choice("objective", objective, OBJECTIVES),
            config=FitConfig() if config is None else config,
            group=ProcessGroup() if group is None else group,
            context=checked_context,
            tableau=tableau,
        )

    @property
    def width(self) -> float:
        """Length of the span, above 0."""
        return abs(self.span[1] - self.span[0])

    def domain(self, y0: State) -> FitDomain:
        """Return what the solver is fitted for."""
        counts = step_counts(self.steps)
        return FitDomain(
            span=self.span,
            dt_min=self.width / counts[-1],
            dt_max=self.width / counts[0],
            directions=self.plan.signs,
            shapes=tuple(tuple(part.shape[1:]) for part in parts_of(y0)),
            is_tuple=isinstance(y0, tuple),
            dtype=str(StateLayout.of(y0).join(y0).dtype).removeprefix("torch."),
        )


@dataclass(frozen=True)
class HypersolverProblem(Problem):
    """The checked arguments of a hypersolver's fit; ``tableau`` is its base."""

    tableau: Tableau

    @classmethod
    def of_base(
        cls, func: VectorField, t_span: object, *, base: str, alpha: float | None, **given: Any
    ) -> Self:
        """Return the problem, checked as by `Problem.of`, which takes the other arguments."""
        return cls.of(func, t_span, tableau=_registry.find_tableau(base, alpha), **given)

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


FUNC = "func(t, y)"
POINTS_OF: dict[str, Sequence[str]] = {
    "y0": ("",),
    FUNC: [f", {share:.0%} of t_span passed" for share in SHARES],
}
"""Entries of a signature that are fingerprints, and how each of their points is called."""


def signs_of_field(probes: Sequence[Tensor]) -> dict[str, Any]:
    """Return what tells starts and a field from others: of flat starts and `check_field`."""
    dtype = probes[0].dtype
    return {"y0": fingerprint(probes[:1], dtype), FUNC: fingerprint(probes[1:], dtype)}


def signs_of_net(net: nn.Module) -> dict[str, list[Any]]:
    """Return what a checkpoint's weights are held against: shapes and dtypes."""
    return {
        name: [*value.shape, str(value.dtype)]
        for name, value in net.state_dict().items()
        if isinstance(value, Tensor)
    }


def check_same_call(signatures: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes, given by their signatures in the order of ranks, that differ."""
    for rank, other in enumerate(signatures[1:], 1):
        difference = _difference(other, signatures[0], "in process 0")
        if difference:
            raise OptionError(
                problem=f"process {rank} of this fit makes another call than process 0: "
                f"{difference}.",
                expected="the same arguments in every process, y0 among them: fit shares it out "
                "itself.",
                fix="torch.manual_seed(0)   # before y0 is drawn; and no DistributedSampler",
            )


def check_same_fit(
    found: Mapping[str, Any], wanted: Mapping[str, Any], path: str, fix: str
) -> None:
    """Refuse the checkpoint at ``path`` if its signature is that of another fit."""
    difference = _difference(found, wanted)
    if difference:
        raise OptionError(
            problem=f"the checkpoint {path!r} belongs to another fit: {difference}.",
            expected="the same call as the one that was interrupted.",
            fix=fix,
        )


def check_same_field(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Refuse what was fitted to another field, if it was looked at from the same starts.

    Both are what `signs_of_field` returned; ``found`` is None where it was not kept.
    """
    if found is None or _difference(found, {"y0": wanted["y0"]}):
        return
    difference = _difference(found, {FUNC: wanted[FUNC]})
    if difference:
        raise OptionError(
            problem=f"the checkpoint belongs to another field: {difference}.",
            expected="the func that it was fitted to.",
            fix="a new fit that begins with its net: HyperSolverModule(func, ..., hypernet=net)",
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any], here: str = "here") -> str:
    """Return in which way the first entry of ``wanted`` differs that does; "" if none does."""
    for name, own in wanted.items():
        other = found.get(name)
        if name in POINTS_OF:
            position = differing(other, own)
            if position is not None:
                return f"{name} has other values there than {here}{POINTS_OF[name][position]}"
        elif not _agree(other, own):
            return f"{name} is {shown(other)} there and {shown(own)} {here}"
    return ""


def _agree(first: Any, second: Any) -> bool:
    """Return whether plain values are the same; nan is the same as nan, 1 as 1.0."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_agree, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_agree(first[k], second[k]) for k in second)
    kinds = {type(first), type(second)}
    if kinds <= {int, float}:
        return bool(first == second) or (first != first and second != second)  # noqa: PLR0124
    return len(kinds) == 1 and not isinstance(first, Tensor) and bool(first == second)
