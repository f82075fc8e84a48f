"""The time grids a fit uses: one route a direction and number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError, closest, explain
from torchdiffeq_hyper.solvers._grid import Steps, check_steps, equal_steps

DIRECTIONS = ("forward", "reverse", "both")
MOST_STEP_COUNTS = 4


@dataclass(frozen=True)
class Route:
    """One way through the span: equal steps in one direction.

    Attributes:
        times: (n + 1,) float64 times in the order they are visited.
        points: for each of them, its position in the reference solution.
    """

    times: Tensor
    points: Tensor

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return len(self.times) - 1


@dataclass(frozen=True)
class Plan:
    """The times at which reference solutions are wanted, and the routes through them.

    Attributes:
        times: (m,) float64 times in the order of the span, all distinct.
        routes: the routes; their ``points`` index ``times``.
    """

    times: Tensor
    routes: tuple[Route, ...]

    @classmethod
    def of(cls, span: tuple[float, float], steps: Steps, direction: str) -> Plan:
        """Return the plan for a span, steps and "forward", "reverse" or "both"."""
        check_choice("direction", direction, DIRECTIONS)
        ends = torch.tensor(span, dtype=torch.float64)
        equal = [equal_steps(ends, n) for n in step_counts(steps)]
        times = torch.cat(equal).unique()
        if span[1] < span[0]:
            times = times.flip(0)
        order = times.sort().indices
        routes = []
        for visited in equal:
            points = order[torch.searchsorted(times[order], visited)]
            if direction != "reverse":
                routes.append(Route(visited, points))
            if direction != "forward":
                routes.append(Route(visited.flip(0), points.flip(0)))
        return cls(times, tuple(routes))

    @property
    def signs(self) -> tuple[int, ...]:
        """Signs of dt that occur, 1 first."""
        signs = {1 if route.times[1] > route.times[0] else -1 for route in self.routes}
        return tuple(sorted(signs, reverse=True))


def step_counts(steps: Steps) -> list[int]:
    """Return the step counts to fit: the number given, or a few out of the range.

    They are spread evenly in the logarithm, since errors go by ratios of dt, and hold
    both ends.

    Example:
        >>> step_counts(10), step_counts((4, 16)), step_counts((2, 3))
        ([10], [4, 6, 10, 16], [2, 3])
    """
    checked = check_steps(steps)
    if checked is None:
        raise OptionError(
            explain(
                "steps is None.",
                "an int of at least 1, or a range (low, high) of such.",
                "steps=10   # or steps=(4, 16)",
            )
        )
    low, high = checked if isinstance(checked, tuple) else (checked, checked)
    if high - low < MOST_STEP_COUNTS:
        return list(range(low, high + 1))
    ratio = (high / low) ** (1 / (MOST_STEP_COUNTS - 1))
    inner = {round(low * ratio**i) for i in range(1, MOST_STEP_COUNTS - 1)}
    return sorted({low, high, *inner})


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
            explain(
                f"t_span is {t_span!r}.",
                "two distinct finite times, the first of them y0's.",
                "t_span=(0.0, 1.0)",
            )
        )
    return start, end


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise `OptionError`."""
    if value not in choices:
        raise OptionError(
            explain(
                f"{name} is {value!r}.",
                "one of " + ", ".join(f'"{choice}"' for choice in choices) + ".",
                f'{name}="{closest(value, choices)}"',
            )
        )
    return value
