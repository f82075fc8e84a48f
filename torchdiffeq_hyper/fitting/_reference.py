"""The time grids of a fit, and its reference solutions on them at tight tolerances."""

from __future__ import annotations

import contextvars
import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper._state import is_half, stepped_dtype, wide_dtype
from torchdiffeq_hyper.errors import NonFiniteError, OptionError, closest, is_breakdown
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._field import Field, Units
from torchdiffeq_hyper.solvers._grid import Steps, check_steps, equal_steps
from torchdiffeq_hyper.solvers._stepping import check_start

DIRECTIONS = ("forward", "reverse", "both")
MOST_STEP_COUNTS = 4


@dataclass(frozen=True)
class TimeGrid:
    """One way through the span: equal steps in one direction."""

    times: Tensor  # (n + 1,) float64, in the order they are visited
    points: Tensor  # the position of each in the reference solution

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return len(self.times) - 1


@dataclass(frozen=True)
class Plan:
    """The times at which reference solutions are wanted, and the grids through them."""

    times: Tensor  # (m,) float64, in the order of the span, all distinct
    grids: tuple[TimeGrid, ...]  # their ``points`` index ``times``

    @classmethod
    def of(cls, span: tuple[float, float], steps: Steps | list[int], direction: str) -> Plan:
        """Return the plan for a span, steps or a list of their numbers, and a direction."""
        check_choice("direction", direction, DIRECTIONS)
        counts = steps if isinstance(steps, list) else step_counts(steps)
        ends = torch.tensor(span, dtype=torch.float64)
        equal = [equal_steps(ends, n) for n in counts]
        times = torch.cat(equal).unique()
        is_falling = span[1] < span[0]
        grids = []
        for visited in equal:
            points = torch.searchsorted(times, visited)
            points = len(times) - 1 - points if is_falling else points
            if direction != "reverse":
                grids.append(TimeGrid(visited, points))
            if direction != "forward":
                grids.append(TimeGrid(visited.flip(0), points.flip(0)))
        return cls(times.flip(0) if is_falling else times, tuple(grids))

    @property
    def signs(self) -> tuple[int, ...]:
        """Signs of dt that occur, 1 first."""
        signs = {1 if grid.times[1] > grid.times[0] else -1 for grid in self.grids}
        return tuple(sorted(signs, reverse=True))


def step_counts(steps: Steps) -> list[int]:
    """Return the step counts to fit: the number given, or a few out of the range.

    Both ends, and between them an even spread in the logarithm: errors go by ratios of dt.

    >>> step_counts(10), step_counts((4, 16)), step_counts((2, 3))
    ([10], [4, 6, 10, 16], [2, 3])
    """
    checked = check_steps(steps)
    if checked is None:
        raise OptionError(
            problem="steps is None.",
            expected="an int of at least 1, or a range (low, high) of such.",
            fix="steps=10   # or steps=(4, 16)",
        )
    low, high = checked if isinstance(checked, tuple) else (checked, checked)
    if high - low < MOST_STEP_COUNTS:
        return list(range(low, high + 1))
    ratio = (high / low) ** (1 / (MOST_STEP_COUNTS - 1))
    inner = {round(low * ratio**i) for i in range(1, MOST_STEP_COUNTS - 1)}
    return sorted({low, high, *inner})


def counts_around(n: int) -> list[int]:
    """Return numbers of steps around one, that itself included.

    >>> counts_around(10), counts_around(2)
    ([7, 8, 10, 12, 14], [1, 2, 3])
    """
    return sorted({max(1, round(n * ratio)) for ratio in (0.7, 0.84, 1.0, 1.2, 1.4)})


def check_span(t_span: object) -> tuple[float, float]:
    """Return the span as two floats; refuse what is not two distinct finite numbers."""
    try:
        times = t_span.tolist() if isinstance(t_span, Tensor) else t_span
        start, end = (float(t) for t in times)  # type: ignore[attr-defined]
        usable = math.isfinite(start) and math.isfinite(end) and start != end
    except (TypeError, ValueError, RuntimeError):
        usable = False
    if not usable:
        raise OptionError(
            problem=f"t_span is {t_span!r}.",
            expected="two distinct finite times, the first of them y0's.",
            fix="t_span=(0.0, 1.0)",
        )
    return start, end


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise `OptionError`."""
    if value not in choices:
        raise OptionError(
            problem=f"{name} is {value!r}.",
            expected="one of " + ", ".join(f'"{choice}"' for choice in choices) + ".",
            fix=f'{name}="{closest(value, choices)}"',
        )
    return value


STEP_TIMES_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "tsit5")
"""Methods that can be told where to step. Left alone they interpolate at the times asked for, an
error of its own that the small divisor dt^(p+1) of residuals would blow up."""
ENOUGH_FOR_FLOAT32 = 1e-4
"""Relative tolerance from which on float32 adds nothing to the error of a solution."""


@dataclass(frozen=True)
class Tolerances:
    """The host's method of reference solutions; ``atol`` is in units of the states' size."""

    method: str
    rtol: float
    atol: float

    @classmethod
    def of(cls, config: FitConfig, dtype: torch.dtype, units: Units) -> Tolerances:
        """Return the configured tolerances, or those that suit a dtype."""
        rtol = config.rtol
        if rtol is None:  # tighter ones than func's own rounding would follow noise
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
    """Return the solution (m, *y0.shape) at ``times``, in the field's units.

    The flat ``y0`` at ``times[0]`` and the (m,) float64 times are in true units.
    """
    check_start(y0)
    wide = wide_dtype(y0.device)
    t = field.units.times(times).to(y0.device, wide)
    if tolerances.rtol >= ENOUGH_FOR_FLOAT32:
        wide = stepped_dtype(field.dtype)
    options = {"step_t": t} if tolerances.method in STEP_TIMES_METHODS else None
    start, given = y0.to(wide) / field.units.state, asdict(tolerances)
    try:
        solution: Tensor = contextvars.Context().run(
            odeint, field, start, t, options=options, **given
        )
    except AssertionError as error:
        if not is_breakdown(error):  # func's own
            raise
        raise NonFiniteError(
            problem=f"the reference solution broke down: {error}.",
            expected=f"a solution that {tolerances.method} can follow over the whole span.",
            fix="a shorter t_span, or looser tolerances: FitConfig(rtol=1e-4)",
        ) from error
    except ValueError as error:
        if "Invalid method" not in str(error):
            raise
        raise OptionError(
            problem=f"method is {tolerances.method!r}: {error}",
            expected="a method of torchdiffeq that controls its error.",
            fix='FitConfig(method="dopri5")',
        ) from error
    finite = torch.isfinite(solution).flatten(1).all(1)
    if not bool(finite.all()):
        first = float(times[int(finite.int().argmin())])
        raise NonFiniteError(
            problem=f"the reference solution holds inf or nan from t = {first:.6g} on.",
            expected="a finite solution over the whole span.",
            fix="a shorter t_span, or starts that stay finite",
        )
    return solution
