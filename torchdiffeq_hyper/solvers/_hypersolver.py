r"""A hypersolver: a Runge-Kutta base plus dt^(p+1) times a small net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._files import damage_reported
from torchdiffeq_hyper._rules import Maybe, Real, Text, Value
from torchdiffeq_hyper._state import (
    Hypernet,
    State,
    StateLayout,
    VectorField,
    is_finite,
    stepped_dtype,
)
from torchdiffeq_hyper.errors import check_callable
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers import _grid, _stepping
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._fit_report import FitReport
from torchdiffeq_hyper.solvers._grid import STEPS, Steps
from torchdiffeq_hyper.solvers._solver import NET, Solver, file_rules
from torchdiffeq_hyper.tableaus import Tableau


def _are_steps(steps: Any) -> bool:
    if not isinstance(steps, list):
        return STEPS.holds(steps)
    return len(steps) == 2 and all(map(STEPS.holds, steps)) and steps[0] <= steps[1]


class HyperSolver(Solver, kind="hypersolver", loads_all=True):
    r"""An explicit Runge-Kutta base of order p with a learned correction.

    .. math:: y_{n+1} = y_n + dt\,\psi(t_n, y_n) + dt^{p+1} g(dt, t_n, y_n, k_1..k_s)

    with :math:`dt\,\psi` the base's increment and k_1..k_s its stages: equation 4 of Poli et
    al., "Hypersolvers: Toward Fast Continuous-Depth Models", NeurIPS 2020,
    https://arxiv.org/abs/2007.09601. A step costs s calls of func, as the base does, and one
    of g, which reuses the stages. The local error is O(delta dt^(p+1)) where g approximates
    the base's residual within delta (theorem 1 there).

    Args:
        base: "euler" (p = 1), "midpoint", "heun", "alpha" (2) or "rk4" (4).
        hypernet: g, called with a `StepInput`, returning a correction like ``step.y``.
        steps: equal steps to take between two time points; a (low, high) range takes
            ``high``; None takes one step between consecutive points, as the host.
        alpha: parameter of the base "alpha" (default 0.5, the midpoint method).
        domain: what the solver was fitted for (`fit` fills it in).
        report: what the fit measured (`fit` fills it in).

    Attributes:
        tableau: the base method.
        hypernet: g.
        steps: as given.
        domain: as given.
        report: as given.

    Raises:
        OptionError: unknown base, ``alpha`` out of place, or impossible ``steps``.
        StateTypeError: ``hypernet`` is not callable.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> solver = tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)
        >>> y = solver.solve(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> y[-1]
        tensor([0.3685])
    """

    hypernet: Hypernet
    _file_rules = file_rules(
        base=Text(100),
        alpha=Maybe(Real(1e-6, 1e6)),
        steps=Maybe(Value(_are_steps, f"{STEPS.expected}, or [low, high] of two such")),
        hypernet=NET,
    )

    def __init__(
        self,
        base: str,
        hypernet: Hypernet,
        steps: Steps = None,
        *,
        alpha: float | None = None,
        domain: FitDomain | None = None,
        report: FitReport | None = None,
    ) -> None:
        tableau = _registry.find_tableau(base, alpha)
        expected = "a callable g(step) -> correction like step.y."
        check_callable("hypernet", hypernet, "hypernet=tdh.ConcatHypernet(net)", expected)
        super().__init__(hypernet, _grid.check_steps(steps), domain, report)
        self.tableau: Tableau = tableau

    @property
    def base(self) -> str:
        """Name of the base method."""
        return self.tableau.name

    @property
    def alpha(self) -> float | None:
        """Parameter of the base "alpha", None for the others."""
        return self.tableau.alpha

    @property
    def method(self) -> str:
        """The method string this solver answers to, e.g. "hypereuler"."""
        return _registry.method_of(self.base).name

    @property
    def label(self) -> str:
        """What tables call the solver, e.g. "hyper2 (alpha 0.667)"."""
        return self.method + ("" if self.alpha is None else f" (alpha {self.alpha:.3g})")

    def solve(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Solve dy/dt = func(t, y) from ``y0`` without a host: see `Solver.solve`.

        With two points in ``t`` it takes ``steps`` equal steps, with more it takes one step
        between consecutive points. A step costs the base's calls of func and one of g; without
        gradients, two points keep no state between.

        Example:
            >>> import torch, torchdiffeq_hyper as tdh
            >>> solver = tdh.HyperSolver("heun", lambda step: -step.y / 6, steps=4)
            >>> solver.solve(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0])).shape
            torch.Size([2, 2])
        """
        layout = StateLayout.of(y0)
        flat = layout.join(y0)
        dtype = flat.dtype
        grid = _grid.equal_steps(_grid.check_times(t, flat), self.n_steps)
        n_points = len(t)
        if flat.numel() == 0 or len(grid) == 1:
            return layout.split(flat.unsqueeze(0).expand(n_points, *flat.shape).clone())
        flat = flat.to(stepped_dtype(dtype))
        call = _stepping.stage_call(func, layout, dtype)
        correction = self._correction(self.tableau.order, func, y0, layout, flat)
        step = _stepping.Step(self.tableau, call, correction)
        sizes = _grid.step_sizes(grid, are_equal=n_points == 2)
        readable = f'torchdiffeq.odeint(func, y0, t, method="{self.method}", '
        readable += 'options={"solver": solver, {options}})'
        self.warn_outside_fit(sizes, readable=readable if n_points > 2 else None)
        states = _stepping.integrate(step, grid, sizes, flat, ends_only=n_points == 2)
        if not is_finite(states[-1]):
            _stepping.raise_non_finite(step, zip(grid[:-1], grid[1:], strict=True), flat, dtype)
        return layout.split(_stepping.cast_back(torch.stack(states), dtype))

    @classmethod
    def _arguments(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str
    ) -> dict[str, Any]:
        with damage_reported(path):
            _registry.find_tableau(settings["base"], settings["alpha"])
        steps = settings["steps"]
        steps = tuple(steps) if isinstance(steps, list) else steps
        return {"base": settings["base"], "alpha": settings["alpha"], "steps": steps}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the tableau's closures."""
        state = self.__dict__.copy()
        state["tableau"] = (self.base, self.alpha)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the tableau again by its name."""
        base, alpha = state.pop("tableau")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.tableau = _registry.find_tableau(base, alpha)
