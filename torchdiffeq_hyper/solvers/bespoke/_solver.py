"""A bespoke non-stationary solver: one explicit method over the whole span, all learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import checked
from torchdiffeq_hyper._rules import FLOATS, Choice, Maybe, Record, TensorOf
from torchdiffeq_hyper._state import (
    Hypernet,
    State,
    StateLayout,
    VectorField,
    is_differentiated,
    is_finite,
    stepped_dtype,
    time_dtype,
)
from torchdiffeq_hyper.solvers._domain import FitDomain, Match
from torchdiffeq_hyper.solvers._fit_report import FitReport
from torchdiffeq_hyper.solvers._grid import STEPS, check_times
from torchdiffeq_hyper.solvers._solver import NET, Solver, file_rules
from torchdiffeq_hyper.solvers._stepping import Correction, cast_back, stage_call
from torchdiffeq_hyper.solvers.bespoke import _rollout, _weights
from torchdiffeq_hyper.tableaus import StageCall

BNS = "bns"
ORDER = 1  # what weights that add up to the time passed guarantee, whatever they are


class BespokeSolver(Solver, kind=BNS):
    r"""n calls of func over a fixed span, each sum and each time learned; method "bns".

    .. math::
        k_i = f(t_0 + c_i T, x_i), \qquad x_{i+1} = y_0 + T \sum_{j \le i} w_{ij} k_j,
        \qquad c_{i+1} = \sum_{j \le i} w_{ij}

    from x_0 = y_0 to the solution x_n at the end of the span T: a non-stationary solver of
    Shaul et al., "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow
    Models", 2024, https://arxiv.org/abs/2403.01329. Constant derivatives are integrated exactly;
    times never decrease, the last one is 1. With a hypernet g the end is
    x_n + T^2 g(T, t_0, x_n, k_0..k_{n-1}). A solve costs n calls of func (``solver.steps``),
    whatever the span, and one of g.

    It starts where it was fitted to start and ends at most where it was fitted to end. Points
    between are read off by cubic Hermite from fitted combinations of the n derivatives, at no
    further call. `fit` with base="bns" makes one.

    Args:
        weights: (n, n) lower triangular, floating; see `BespokeSolver.classical`. Kept frozen;
            ``solver.requires_grad_()`` thaws them.
        hypernet: a correction at the end of the span, None for none.
        knots: what is read off between the ends: values (n - 1, n) at the inner of n + 1
            equidistant times and slopes (n + 1, n) at all. None takes the ends of the steps
            of classical weights, else a cubic in time through the derivatives.
        domain: what the solver was fitted for; without it any span will do.
        report: what the fit measured.

    Raises:
        StateTypeError: weights or knots are not floating-point tensors.
        StateShapeError: the weights are not square, or the knots do not match.
        OptionError: not finite or lower triangular, or the times decrease or leave the span.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> solver = tdh.BespokeSolver.classical("rk4", 8)
        >>> solver.solve(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))[-1]
        tensor([0.3682])
    """

    base = method = BNS
    follows_grid = False
    steps: int
    _file_rules = file_rules(base=Choice(BNS), alpha=Choice(None), steps=STEPS, hypernet=Maybe(NET))
    _net_prefix = "hypernet."

    def __init__(
        self,
        weights: Tensor,
        *,
        hypernet: Hypernet | None = None,
        knots: _weights.Knots | None = None,
        domain: FitDomain | None = None,
        report: FitReport | None = None,
    ) -> None:
        checked = _weights.check_weights(weights)
        super().__init__(hypernet, len(checked), domain, report)
        # Not registered as usual: torch takes the name of a property for taken.
        self._parameters["weights"] = nn.Parameter(checked, requires_grad=False)
        values, slopes = _weights.knots_of(checked, knots)
        self.register_buffer("knot_values", values)
        self.register_buffer("knot_slopes", slopes)
        self._schedules = _rollout.ScheduleCache()
        self._in_use = _weights.WeightCache()

    @classmethod
    def classical(cls, method: str, calls: int) -> BespokeSolver:
        """Return the solver that is as many equal steps of a classical method as it has calls.

        Each step is as long as the calls it has, and a shorter method takes those that are left:
        10 calls are two steps of rk4 over two fifths of the span each and one of midpoint.

        Args:
            method: "euler", "midpoint", "heun", "heun3" or "rk4", torchdiffeq's variants.
            calls: calls of func over the span.

        Raises:
            OptionError: the method is unknown, or has more stages than there are calls.

        Example:
            >>> import torchdiffeq_hyper as tdh
            >>> tdh.BespokeSolver.classical("rk4", 10).steps
            10
        """
        return cls(_weights.classical(method, calls))

    @property
    def _parameter(self) -> Tensor:
        parameter = self._parameters.get("weights")
        return self.__dict__["_plain_weights"] if parameter is None else parameter

    @property
    def weights(self) -> Tensor:
        """The weights in use, (n, n): those of a method, whatever values an optimizer gave.

        A differentiable function of the one parameter of that name in ``solver.parameters()``.
        """
        return self._in_use.of(self._parameter)

    @weights.setter
    def weights(self, value: Tensor) -> None:
        # Where torch puts a plain tensor in the parameter's place: the replicas of DataParallel.
        self.__dict__["_plain_weights"] = value

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        """Write weights (n, n) of any dtype and device into the parameter; no knot changes."""
        self._parameter.copy_(weights)

    @property
    def span(self) -> tuple[float, float] | None:
        """Where a solve starts, and ends at most; None where any span will do."""
        if self.domain is None:
            return None
        first, last = self.domain.span
        is_along = (last > first) == (self.domain.directions[0] > 0)
        return (first, last) if is_along else (last, first)

    def match(self, direction: int, start: float | None = None, end: float | None = None) -> Match:
        """Return how well the solver suits a solve: not at all outside of its span."""
        found, span = super().match(direction, start, end), self.span
        if found == Match.OUTSIDE:
            return Match.NONE
        if span is None or start is None:
            return found
        # Times may come in half precision; `solve`, which knows, looks closer.
        slack = _rollout.slack_of(span, torch.bfloat16) * abs(span[1] - span[0])
        last = span[0] if end is None else end
        is_inside = min(span) - slack <= last <= max(span) + slack
        return found if abs(start - span[0]) <= slack and is_inside else Match.NONE

    @property
    def times(self) -> Tensor:
        """The share of the span passed at each call of func, (n,)."""
        return _weights.stage_times(self.weights)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows besides the net."""
        return f"steps={self.steps}, span={self.span}"

    def solve(
        self, func: VectorField, y0: State, t: Tensor, *, rtol: Any = None, atol: Any = None
    ) -> State:
        """Solve dy/dt = func(t, y) over the fitted span, without a host: see `Solver.solve`.

        Costs n calls of func, wherever the points of ``t`` lie, and one of g; keeps n
        derivatives. Gradients flow to every point of ``t``: the first costs one more call where
        the span is fitted, and second derivatives by it alone are not those of the solution. A
        compiled or exported solve cannot raise: where ``t`` leaves the span, it gives nan.
        ``rtol`` and ``atol`` are ignored: there is no error estimate.

        Example:
            >>> import torch, torchdiffeq_hyper as tdh
            >>> solver = tdh.BespokeSolver.classical("heun3", 6)
            >>> solver.solve(lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 5)).shape
            torch.Size([5, 2])
        """
        layout = StateLayout.of(y0)
        flat = layout.join(y0)
        t, given, dtype = check_times(t, flat), t, flat.dtype
        ends_at_end = _rollout.is_whole_span(given, self.span, self.steps)
        if flat.numel() == 0 or len(t) == 1:
            return layout.split(flat.unsqueeze(0).expand(len(t), *flat.shape).clone())
        flat = flat.to(stepped_dtype(dtype))
        start, end = self.span or (t[0], t[-1])
        call, first = stage_call(func, layout, dtype), flat
        if self.span is not None and not ends_at_end and is_differentiated(t):
            flat = _differentiable_start(call, t, self.span[0], flat)
        calls = self._schedule(start, end, flat)
        x, stages = _rollout.roll_out(call, calls, flat)
        added = None
        if self.hypernet is not None:
            correction = self._correction(ORDER, func, y0, layout, flat)
            added = _added_at_end(correction, x, tuple(stages), start, end)
        if ends_at_end:
            y = (x if added is None else x + added).unsqueeze(0)
        else:
            knots = self.get_buffer("knot_values"), self.get_buffer("knot_slopes")
            matrices = [matrix.to(flat.device) for matrix in (self.weights, *knots)]
            known = flat, stages
            y = _rollout.dense_output(t, self.span, given.dtype, matrices, known, added=added)
        if not is_finite(y[-1]):
            _rollout.raise_non_finite(call, calls, first, dtype)
        return layout.split(cast_back(torch.cat([first.unsqueeze(0), y]), dtype))

    def describe(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the JSON-ready settings that a file holds."""
        tensors, settings = super().describe()
        knots = {name: self.get_buffer(name) for name in ("knot_values", "knot_slopes")}
        return {"weights": self.weights.detach(), **knots, **tensors}, settings

    @classmethod
    def _arguments(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str
    ) -> dict[str, Any]:
        n = settings["steps"]
        dtype = tensors["weights"].dtype if "weights" in tensors else torch.float32
        dtypes = (dtype,) if dtype in FLOATS else FLOATS
        rows = {"weights": n, "knot_values": n - 1, "knot_slopes": n + 1}
        rules = {name: TensorOf(dtypes, (m, n), is_finite=True) for name, m in rows.items()}
        own = checked(Record(rules), tensors, f"a solver in {path!r}")
        return {"weights": own["weights"], "knots": (own["knot_values"], own["knot_slopes"])}

    def _schedule(self, start: Any, end: Any, y: Tensor) -> _rollout.Schedule:
        """Return what the calls of a solve need: kept from the last one where nothing changed."""
        weights = self.weights
        if not _rollout.is_plain() or self.span is None or weights.is_inference():
            return _rollout.schedule(weights.to(y.device), start, end, y.dtype)
        return self._schedules.of(weights, self.span, y)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load as any module; weights may come from the middle of a training."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "weights" in state_dict and not _weights.is_method(self._parameter.detach()):
            self._in_use.is_fixed = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as any module, once it is noted whether the weights may change."""
        self._in_use.watch(self._parameter)  # for the copy, which may be averaged or loaded
        return self.__dict__.copy()


def _differentiable_start(call: StageCall, t: Tensor, start: float, y: Tensor) -> Tensor:
    """Return the state at the fitted start s: y - (t_0 - s) f(s, y), for the derivative by t_0.

    The weights stay those of the span: t_0 - s is 0 to rounding.
    """
    t_dtype = time_dtype(y.dtype)
    time = torch.full((), start, dtype=t.dtype, device=t.device)
    return y - (t[0] - time).to(t_dtype) * call(time.to(t_dtype), y)


def _added_at_end(
    correction: Correction, x: Tensor, stages: tuple[Tensor, ...], start: Any, end: Any
) -> Tensor:
    """Return what a hypernet adds to the flat state at the end of the span."""
    # The difference before the cast: far from zero the ends are rounded to a part of the span.
    t_dtype = time_dtype(x.dtype)
    t0, dt = (torch.as_tensor(s, dtype=t_dtype, device=x.device) for s in (start, end - start))
    out = correction.evaluate(t0, dt, x, stages)
    if x.device.type == "cpu":
        correction.look_at(dt, x)
    return correction.add(torch.zeros_like(x), out, correction.factors(dt, x.dtype))
