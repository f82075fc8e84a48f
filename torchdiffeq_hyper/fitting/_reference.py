"""Reference solutions at tight tolerances, and the residuals measured along them."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._state import is_half
from torchdiffeq_hyper.errors import NonFiniteError, OptionError, explain
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._field import Field, check_start, state_dtype, wide_dtype
from torchdiffeq_hyper.fitting._routes import Route
from torchdiffeq_hyper.fitting._units import Units
from torchdiffeq_hyper.tableaus import Tableau

STEP_TIMES_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "tsit5")
"""Methods that can be told where to step. Left alone they interpolate at the times asked for, an
error of its own that the small divisor dt^(p+1) of residuals would blow up."""
BROKEN_DOWN = ("underflow in dt", "non-finite values in state", "max_num_steps exceeded")
"""What the host's assertions say where an adaptive method cannot go on."""
ENOUGH_FOR_FLOAT32 = 1e-4
"""Relative tolerance from which on float32 adds nothing to the error of a solution."""


@dataclass(frozen=True)
class Tolerances:
    """What reference solutions are computed with.

    Attributes:
        method: torchdiffeq's name of the method.
        rtol: relative tolerance.
        atol: absolute tolerance, in units of the states' size.
    """

    method: str
    rtol: float
    atol: float

    @classmethod
    def of(cls, config: FitConfig, dtype: torch.dtype, units: Units) -> Tolerances:
        """Return the configured tolerances, or those that suit a dtype.

        Tighter ones than func's own rounding would make the method chase noise.
        """
        rtol = config.rtol
        if rtol is None:
            rtol = 1e-3 if is_half(dtype) else 1e-9 if dtype == torch.float64 else 1e-6
        atol = rtol if config.atol is None else config.atol / units.state
        return cls(config.method, rtol, atol)

    def __str__(self) -> str:
        """Return the text for messages."""
        return f"{self.method} at rtol {self.rtol:.3g}, atol {self.atol:.3g} of the states' size"

    def loosened(self, rtol: float) -> Tolerances:
        """Return the same with a relative tolerance of ``rtol``."""
        return self.tightened(self.rtol / rtol)

    def tightened(self, factor: float) -> Tolerances:
        """Return the same, ``factor`` times tighter."""
        return replace(self, rtol=self.rtol / factor, atol=self.atol / factor)


@torch.no_grad()
def solve_reference(field: Field, y0: Tensor, times: Tensor, tolerances: Tolerances) -> Tensor:
    """Return the solution at ``times``, held in float64 where the device has it.

    Args:
        field: the vector field.
        y0: flat state at ``times[0]``, in true units.
        times: (m,) float64 times, monotonic, in true units.
        tolerances: method and tolerances.

    Returns:
        (m, *y0.shape) states, in the field's units.
    """
    check_start(y0)
    wide = wide_dtype(y0.device)
    t = field.units.times(times).to(device=y0.device, dtype=wide)
    if tolerances.rtol >= ENOUGH_FOR_FLOAT32:
        wide = state_dtype(field.dtype)
    options = {"step_t": t} if tolerances.method in STEP_TIMES_METHODS else None
    with _explained(tolerances.method):
        solution: Tensor = contextvars.Context().run(
            odeint,
            field,
            y0.to(wide) / field.units.state,
            t,
            rtol=tolerances.rtol,
            atol=tolerances.atol,
            method=tolerances.method,
            options=options,
        )
    _check_finite(solution, times)
    return solution


@contextmanager
def _explained(method: str) -> Iterator[None]:
    """Explain the host's own errors."""
    try:
        yield
    except AssertionError as error:
        if not str(error).startswith(BROKEN_DOWN):  # func's own
            raise
        raise NonFiniteError(
            explain(
                f"the reference solution broke down: {error}.",
                f"a solution that {method} can follow over the whole span.",
                "a shorter t_span, or looser tolerances: FitConfig(rtol=1e-4)",
            )
        ) from error
    except ValueError as error:
        if "Invalid method" not in str(error):
            raise
        raise OptionError(
            explain(
                f"method is {method!r}: {error}",
                "a method of torchdiffeq that controls its error.",
                'FitConfig(method="dopri5")',
            )
        ) from error


def _check_finite(solution: Tensor, times: Tensor) -> None:
    finite = torch.isfinite(solution).flatten(1).all(1)
    if not bool(finite.all()):
        first = int(finite.int().argmin())
        raise NonFiniteError(
            explain(
                f"the reference solution holds inf or nan from t = {float(times[first]):.6g} on.",
                "a finite solution over the whole span.",
                "a shorter t_span, or starts that stay finite",
            )
        )


@dataclass(frozen=True)
class Samples:
    """The steps of one route along a reference solution, ready for fitting.

    All are in the dtype in which a solver steps the state; states are flat. All but the
    residuals are in true units: they are what a hypernet is given.

    Attributes:
        times: (n + 1,) times.
        dt: (n,) signed step sizes.
        y: (n + 1, ...) the solution.
        stages: for each stage of the base, (n, ...) its derivatives; empty without a base.
        residual: (n, ...) the residuals R_n, in units of `Units.residual`; (0, ...) without a base.
    """

    times: Tensor
    dt: Tensor
    y: Tensor
    stages: tuple[Tensor, ...]
    residual: Tensor


def states_along(field: Field, route: Route, solution: Tensor) -> Samples:
    """Return the states of a reference solution on a route, without residuals.

    The solution is (m, ...), in the field's units; ``route.points`` are those on the route.
    """
    narrow = state_dtype(field.dtype)
    y = (solution[route.points.to(solution.device)] * field.units.state).to(narrow)
    # The step sizes must be those that a solve in the state's dtype takes.
    times = route.times.to(y.device, narrow)
    return Samples(times, times.diff(), y, stages=(), residual=y[:0])


@torch.no_grad()
def measure_residuals(field: Field, tableau: Tableau, route: Route, solution: Tensor) -> Samples:
    r"""Return the states of a reference solution on a route, with a base's residuals.

    .. math:: R_n = (y(t_{n+1}) - y(t_n) - dt\,\psi(t_n, y(t_n))) / dt^{p+1}

    Costs s calls of func a step. The differences are formed in the solution's own dtype
    (float64 where the device has it): they are differences of nearly equal numbers.
    """
    narrow, units = state_dtype(field.dtype), field.units
    y = solution[route.points.to(solution.device)]
    times = units.times(route.times).to(y)
    residuals, stages = [], []
    for n, dt in enumerate(times.diff().unbind()):
        dy, k = tableau.increment(field, times[n], dt, times[n + 1], y[n])
        residuals.append(((y[n + 1] - y[n] - dy) / dt ** (tableau.order + 1)).to(narrow))
        stages.append(tuple((stage * (units.state / units.time)).to(narrow) for stage in k))
    return replace(
        states_along(field, route, solution),
        stages=tuple(torch.stack(stage) for stage in zip(*stages, strict=True)),
        residual=torch.stack(residuals),
    )
