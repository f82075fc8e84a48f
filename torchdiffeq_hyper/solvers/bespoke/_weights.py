r"""The coefficients of a bespoke solver: weights of the n derivatives, and knots between the ends.

A method's weights w are lower triangular; its times :math:`c_i = \sum_j w_{ij}` never
decrease, from 0 on, and the last one is 1. `consistent` maps any matrix to such weights: it is
used, and differentiated, while the parameter may change.

The states that the stages are taken at need not lie on the solution. But the solution at any
time is close to a combination of the derivatives: the n + 1 equidistant knots of a cubic Hermite
have values and slopes

.. math:: y(s_i) \approx y_0 + T \sum_j v_{ij} k_j, \qquad y'(s_i) \approx \sum_j d_{ij} k_j
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from torchdiffeq_hyper._state import is_differentiated, is_finite, is_traced
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, closest

Knots: TypeAlias = tuple[Tensor, Tensor]
"""Values (n - 1, n) at the inner knots, and slopes (n + 1, n) at all."""
_Pair: TypeAlias = tuple[Tensor, Tensor]

SLACK = 1e-6
"""By which sums of weights may miss: those of float32 do."""
DEGREE = 3
"""Degree of the polynomials in time that stand in for fitted knots."""
NEAR = 1e-6
"""Share of the span within which two times are one."""


def stage_times(weights: Tensor) -> Tensor:
    """Return the share of the span passed at each call of func, (n,), the first one 0."""
    return torch.cat([weights.new_zeros(1), weights[:-1].sum(1)])


def check_matrix(name: str, matrix: Tensor, fix: str, shape: tuple[int, int] | None = None) -> None:
    """Refuse what is no finite floating-point matrix of a shape; None: square."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        problem = f"{name} is {got}."
        raise StateTypeError(problem, "a floating-point tensor.", fix)
    is_square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not is_square if shape is None else matrix.shape != shape:
        problem = f"{name} has shape {tuple(matrix.shape)}."
        expected = "(n, n), n at least 1." if shape is None else f"{shape}, one column a weight."
        raise StateShapeError(problem, expected, fix)
    if not is_finite(matrix):
        problem = f"{name} has entries that are not finite."
        raise OptionError(problem, "finite numbers.", fix)


def check_weights(weights: Tensor) -> Tensor:
    """Return a copy of the weights of a bespoke solver, if they are those of a method."""
    fix = 'tdh.BespokeSolver.classical("rk4", 8)'
    check_matrix("weights", weights, fix)
    weights = weights.detach().clone()
    if weights.is_meta:
        return weights
    if bool(weights.triu(1).any()):
        expected = "zeros there: a state is made of the derivatives known before it."
        problem = "weights has entries above its diagonal."
        raise OptionError(problem, expected, fix)
    times = torch.cat([stage_times(weights), weights[-1:].sum(1)])
    is_rising = bool((times.diff() >= -SLACK).all())
    if not is_rising or abs(float(times[-1]) - 1) > SLACK:
        problem = f"the rows of weights add up to {[round(t, 6) for t in times[1:].tolist()]}."
        raise OptionError(problem, "times that never decrease, from 0 on, the last one 1.", fix)
    return weights


def _is_consistent(weights: Tensor) -> Tensor:
    """Return whether a matrix is a method's weights but for the rounding of its sums, 0-d."""
    sums = weights.sum(1)
    missed = (weights.triu(1), _passed(sums).clamp(max=0), sums[-1:] - 1)
    violation = torch.stack([part.abs().amax() for part in missed]).amax()
    return violation <= max(SLACK, len(weights) * torch.finfo(weights.dtype).eps)


def is_method(weights: Tensor) -> bool:
    """Return whether a matrix holds a method's weights; True where values cannot be seen."""
    try:
        return weights.is_meta or bool(_is_consistent(weights))
    except RuntimeError:  # fake tensors
        return True


def consistent(weights: Tensor) -> Tensor:
    r"""Return the weights of a method for any finite matrix (n, n), differentiable in it.

    What lies above the diagonal is dropped. The time from one call to the next is the
    absolute value of what the row sums say, over the sum of all of these (equal times where
    all are 0). Each row is then shifted by one number to have its time as its sum.
    """
    lower = weights.tril()
    passed = _passed(sums := lower.sum(1))
    # Not clamped: a time that became negative could then never grow again.
    passed = torch.where(passed < 0, -passed, passed)
    total = passed.sum()
    is_moving = total > 0
    shares = passed / torch.where(is_moving, total, 1)
    times = torch.where(is_moving, shares, 1 / len(weights)).cumsum(0)
    counts = torch.arange(1, len(weights) + 1, dtype=weights.dtype, device=weights.device)
    return (lower + ((times - sums) / counts)[:, None]).tril()


def _passed(sums: Tensor) -> Tensor:
    """Return the share of the span that passes before each row's end."""
    return torch.cat([sums[:1], sums.diff()])


def selected(weights: Tensor) -> Tensor:
    """Return a method's weights as they are, any other matrix made `consistent`.

    Decided without looking at values: for compiled solves.
    """
    return torch.where(_is_consistent(weights), weights, consistent(weights))


class WeightCache:
    """The weights in use of a parameter, cached as long as its values are the same.

    ``is_fixed`` says that the parameter was never seen to require a gradient: a compiled solve,
    which cannot see versions, may then use it as it is.
    """

    is_fixed = True
    # Parameter, its version and the weights in use: in one tuple, as threads see all or none.
    _cached: tuple[Tensor, int, Tensor] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """Return the weights in use: the parameter itself where it is a method's."""
        self.watch(parameter)
        is_compiling = torch.compiler.is_compiling()
        if is_differentiated(parameter) or (is_compiling and parameter.requires_grad):
            return consistent(parameter)
        if is_compiling:
            return parameter if self.is_fixed else selected(parameter)
        if is_traced(parameter) or parameter.is_inference():  # no look at values; no version
            return selected(parameter)
        cached = self._cached
        version = parameter._version  # noqa: SLF001 - of the values, counted by autograd
        if cached is not None and cached[0] is parameter and cached[1] == version:
            return cached[2]
        # Whatever the mode, what is cached is to serve in all of them.
        with torch.inference_mode(mode=False), torch.no_grad():
            weights = parameter if is_method(parameter) else consistent(parameter)
        self._cached = (parameter, version, weights)
        return weights

    def watch(self, parameter: Tensor) -> None:
        """Note whether an optimizer may change a parameter from now on."""
        if parameter.requires_grad:
            self.is_fixed = False

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle as one that keeps nothing yet."""
        return {"is_fixed": self.is_fixed}


# The rows of the stages after the first, then the row of the step's end.
_ROWS: dict[str, tuple[tuple[float, ...], ...]] = {
    "euler": ((1.0,),),
    "midpoint": ((1 / 2,), (0.0, 1.0)),
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "heun3": ((1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4)),
    "rk4": ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
_BY_CALLS = {1: "euler", 2: "midpoint", 3: "heun3"}


def classical(method: str, calls: int) -> Tensor:
    """Return the weights (calls, calls), float64, of `BespokeSolver.classical`."""
    if method not in _ROWS or len(_ROWS[method]) > calls:
        raise OptionError(
            problem=f"{method!r} in {calls} calls of func is none of the classical methods.",
            expected="one of " + ", ".join(f'"{name}"' for name in _ROWS) + ", with enough calls.",
            fix=f'classical("{closest(method, list(_ROWS))}", {max(4, calls)})',
        )
    steps = [_ROWS[method]] * (calls // len(_ROWS[method]))
    if left := calls % len(_ROWS[method]):
        steps.append(_ROWS[_BY_CALLS[left]])
    weights = torch.zeros(calls, calls, dtype=torch.float64)
    first = 0
    for rows in steps:
        size = len(rows) / calls
        for i, row in enumerate(rows, first):
            weights[i, :first] = weights[first - 1, :first]  # the steps before
            weights[i, first : i + 1] = size * torch.tensor(row, dtype=torch.float64)
        first += len(rows)
    return weights


def compositions(calls: int) -> dict[str, Tensor]:
    """Return the weights of all classical methods with that many calls of func, by name."""
    names = [name for name, rows in _ROWS.items() if len(rows) <= calls]
    return {name: classical(name, calls) for name in names}


def _polynomial_knots(weights: Tensor) -> Knots:
    """Return the knots of a low polynomial in time through the derivatives."""
    n, times = len(weights), stage_times(weights)
    degree = min(DEGREE, len(times.unique()) - 1)
    powers = torch.arange(degree + 1, dtype=times.dtype, device=times.device)
    solve = torch.linalg.pinv(times[:, None] ** powers)
    knots = torch.linspace(0, 1, n + 1, dtype=times.dtype, device=times.device)[:, None]
    values = knots ** (powers + 1) / (powers + 1) @ solve
    return values[1:-1].clone(), knots**powers @ solve


def default_knots(weights: Tensor) -> Knots:
    """Return knots without a fit: those of a composition's steps, else of a polynomial."""
    starts = [] if weights.is_meta else step_starts(weights)
    return _composed_knots(weights, starts) if len(starts) > 1 else _polynomial_knots(weights)


def step_starts(weights: Tensor) -> list[int]:
    """Return the calls of func that begin a step: all later ones start from their state.

    Call m does if all later rows begin as row m - 1 does. Steps that take no time are left out.
    """
    times, starts = stage_times(weights).tolist(), [0]
    for m in range(1, len(weights)):
        is_start = bool((weights[m:, :m] == weights[m - 1, :m]).all())
        if is_start and times[starts[-1]] + NEAR < times[m] < 1 - NEAR:
            starts.append(m)
    return starts


def _composed_knots(weights: Tensor, starts: list[int]) -> Knots:
    """Return knots on the cubic Hermite through the ends of steps, which begin at ``starts``.

    So what is read off has the order of the steps, up to 4. The derivative at the start of a
    step is its first stage, at the end of the span that of `_slope_at_end`.
    """
    n = len(weights)
    first = torch.tensor(starts, device=weights.device)
    values = torch.cat([torch.zeros_like(weights[:1]), weights[first[1:] - 1], weights[-1:]])
    slopes = torch.eye(n, dtype=weights.dtype, device=weights.device)[first]
    times = torch.cat([stage_times(weights)[first], weights.new_ones(1)])
    last = _slope_at_end(times[-3:], values[-3:], slopes[-2:])
    slopes = torch.cat([slopes, last[None]])
    knots = torch.linspace(0, 1, n + 1, dtype=weights.dtype, device=weights.device)
    left = (torch.searchsorted(times, knots, right=True) - 1).clamp(0, len(starts) - 1)
    size = times.diff()[left][:, None]
    x = (knots - times[left])[:, None] / size
    y0, y1, f0, f1 = values[left], values[left + 1], slopes[left], slopes[left + 1]
    of_values, of_slopes = hermite(x, (y0, y1), (f0, f1))
    slope = 6 * x * (1 - x) * (y1 - y0) / size + (1 - x) * (1 - 3 * x) * f0
    return (of_values + size * of_slopes)[1:-1].clone(), slope - x * (2 - 3 * x) * f1


def hermite(x: Tensor, values: _Pair, slopes: _Pair) -> tuple[Tensor, Tensor]:
    """Return the two terms of the cubic with these values and slopes at 0 and 1.

    In this form all but the last value are exactly 0 at x = 1.
    """
    return (
        (1 - x) ** 2 * (1 + 2 * x) * values[0] + x**2 * (3 - 2 * x) * values[1],
        (1 - x) ** 2 * x * slopes[0] - x**2 * (1 - x) * slopes[1],
    )


def _slope_at_end(times: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the derivative at the last of three times, of the quartic through all but that one.

    Values are (3, n), slopes (2, n).
    """
    size = times[-1] - times[-2]
    x = ((times - times[-2]) / size)[:, None]
    powers = torch.arange(5, dtype=times.dtype, device=times.device)
    slope = powers * x ** (powers - 1).clamp(min=0)
    system = torch.cat([x**powers, slope[:2]])
    rows: Tensor = torch.linalg.solve(system.t(), slope[2])
    return rows[:3] @ values / size + rows[3:] @ slopes


def knots_of(weights: Tensor, given: Knots | None) -> Knots:
    """Return the knots of a bespoke solver: those given, checked, or the default ones."""
    if given is None:
        return default_knots(weights)
    n = len(weights)
    fix = "tdh.BespokeSolver(weights)   # knots from a cubic in time"
    for name, knot, rows in zip(("values", "slopes"), given, (n - 1, n + 1), strict=True):
        check_matrix(f"the knots' {name}", knot, fix, (rows, n))
    return given
