"""The same numbers through torchdyn as through torchdiffeq, and the same orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics import odeint
from torchdyn.numerics.solvers.hyper import HyperMidpoint

import torchdiffeq_hyper as tdh
from exact import leading_term, zero
from stubs import Counted, convergence_order, spiral, spiral_solution
from torchdiffeq_hyper.errors import HostWarning, NonFiniteError, OutsideFitWarning
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.tableaus import Tableau
from torchdyn_stubs import Field, SmallNet, Spiral, times

pytestmark = pytest.mark.filterwarnings("ignore:torchdyn returns the times")

LEARNED = [m.name for m in _registry.methods().values() if m.corrects_base]
SPANS = {
    "forward": times(0.2, 1.1),
    "reverse": times(1.1, 0.2),
    "forward grid": times(0.2, 0.5, 0.7, 1.1),
    "reverse grid": times(1.1, 0.9, 0.4, 0.2),
}


def _tableau(method: str) -> Tableau:
    tableau = _registry.find(method).tableau
    assert tableau is not None
    return tableau


def _solver(method: str, steps: int | None = 4) -> tdh.HyperSolver:
    return tdh.HyperSolver(_tableau(method).name, SmallNet().requires_grad_(False), steps=steps)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("method", LEARNED)
def test_string_and_object_give_the_numbers_of_torchdiffeq(method: str, span: str) -> None:
    solver, func, t = _solver(method), Spiral(), SPANS[span]
    y0 = torch.randn(3, 2, dtype=torch.float64)
    wanted = torchdiffeq.odeint(func, y0, t, method=method, options={"solver": solver})
    by_object = odeint(func, y0, t, solver)[1]
    with tdh.using(solver):
        by_string = odeint(func, y0, t, method)[1]
    torch.testing.assert_close(by_object, wanted, rtol=0, atol=1e-10)
    assert torch.equal(by_string, by_object)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
def test_every_sensitivity_gives_the_numbers_of_torchdiffeq(sensitivity: str, span: str) -> None:
    solver, func, t = _solver("hyperheun"), Spiral(), SPANS[span]
    y0 = torch.randn(3, 2, dtype=torch.float64)
    wanted = torchdiffeq.odeint(func, y0, t, method="hyperheun", options={"solver": solver})
    tdh.attach(func, solver)
    for given in (solver, "hyperheun"):
        node = NeuralODE(func, solver=given, sensitivity=sensitivity)
        with torch.no_grad():
            torch.testing.assert_close(node(y0, t)[1], wanted, rtol=0, atol=1e-10)
            torch.testing.assert_close(node.trajectory(y0, t), wanted, rtol=0, atol=1e-10)


def _slope(tableau: Tableau, span: tuple[float, float], g: Any) -> float:
    y0 = torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=torch.float64)
    exact = spiral_solution(times(span[1]), y0, span[0])[-1]
    numbers, errors = (8, 16, 32, 64), []
    for n in numbers:
        solver = tdh.HyperSolver(tableau.name, g, steps=n)
        errors.append(float((odeint(spiral, y0, times(*span), solver)[1][-1] - exact).norm()))
    return convergence_order([1 / n for n in numbers], errors)


@pytest.mark.parametrize("span", [(0.3, 1.8), (1.8, 0.3)])
@pytest.mark.parametrize("method", LEARNED)
def test_order_is_p_without_correction_and_one_more_with_the_exact_one(
    method: str, span: tuple[float, float]
) -> None:
    tableau = _tableau(method)
    assert _slope(tableau, span, zero) == pytest.approx(tableau.order, abs=0.2)
    assert _slope(tableau, span, leading_term(tableau)) == pytest.approx(tableau.order + 1, abs=0.2)


class _HostsLayout(nn.Module):
    """An exact correction the way torchdyn's own hypersolvers call theirs: g(t, x)."""

    def __init__(self, g: Any, dt: float) -> None:
        super().__init__()
        self.g, self.dt = g, torch.tensor(dt, dtype=torch.float64)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        f0 = spiral(t, x)
        out: Tensor = self.g(tdh.StepInput(self.dt, t, x, f0, (f0,), x))
        return out


def test_reverse_time_gains_from_the_correction_by_which_the_hosts_own_loses() -> None:
    y0 = torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=torch.float64)
    t, tableau = torch.linspace(1.8, 0.3, 13, dtype=torch.float64), _tableau("hypermidpoint")
    exact = spiral_solution(t[-1:], y0, float(t[0]))[-1]
    g = leading_term(tableau)

    def error(solver: Any) -> float:
        return float((odeint(spiral, y0, t, solver)[1][-1] - exact).norm())

    plain = error("midpoint")
    assert error(HyperMidpoint(_HostsLayout(g, 0.125), torch.float64)) > plain
    assert error(tdh.HyperSolver("midpoint", g)) < plain / 5


def test_hypernet_sees_the_true_problem_in_reverse_time() -> None:
    seen: list[tdh.StepInput] = []

    def g(step: tdh.StepInput) -> Tensor:
        seen.append(step)
        assert isinstance(step.y, Tensor)
        return torch.zeros_like(step.y)

    y0, t = torch.randn(2, 2, dtype=torch.float64), times(1.0, 0.6, 0.1)
    NeuralODE(Spiral(), solver=tdh.HyperSolver("heun", g)).trajectory(y0, t)
    assert [float(step.t) for step in seen] == t[:-1].tolist()
    assert [float(step.dt) for step in seen] == pytest.approx([-0.4, -0.5])
    for step in seen:
        assert isinstance(step.y, Tensor)
        torch.testing.assert_close(step.f0, spiral(step.t, step.y))
        assert step.t.shape == step.dt.shape == ()
        assert step.y0 is seen[0].y


@pytest.mark.parametrize("t", [torch.linspace(0, 1, 6), torch.linspace(1, 0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", ["euler", "midpoint"])
def test_zero_correction_reproduces_torchdyns_own_method_bitwise(
    base: str, dtype: torch.dtype, t: Tensor
) -> None:
    y0, t = torch.randn(5, 2, dtype=dtype), t.to(dtype)
    own = odeint(spiral, y0, t, base)[1]
    assert torch.equal(odeint(spiral, y0, t, tdh.HyperSolver(base, zero))[1], own)


def test_two_points_take_the_fitted_steps_and_more_points_are_the_grid() -> None:
    func, solver = Counted(spiral), tdh.HyperSolver("euler", zero, steps=5)
    y0 = torch.randn(3, 2, dtype=torch.float64)
    odeint(func, y0, times(0.0, 1.0), solver)
    assert func.times == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    func.times.clear()
    odeint(func, y0, times(1.0, 0.5, 0.2), solver)
    assert func.times == pytest.approx([1.0, 0.5])


def test_step_solves_one_interval_in_the_fitted_steps() -> None:
    solver, y0 = _solver("hyperheun"), torch.randn(3, 2, dtype=torch.float64)
    t0, t1 = times(0.2, 0.7)
    derivative, y1, error = solver.step(Spiral(), y0, t0, t1 - t0)  # type: ignore[operator]
    assert derivative is error is None
    torch.testing.assert_close(y1, solver.solve(spiral, y0, times(0.2, 0.7))[-1])


def test_half_precision_states_are_stepped_in_float32() -> None:
    solver = tdh.HyperSolver("heun", zero, steps=200)
    y0, t = torch.randn(3, 2), torch.tensor([0.0, 1.0])
    precise = odeint(spiral, y0, t, solver)[1]
    half = odeint(spiral, y0.bfloat16(), t, solver)[1]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), precise, rtol=0.02, atol=0.02)


def test_solve_that_leaves_the_finite_range_names_step_and_time() -> None:
    def g(step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        return step.y / (step.t - 0.5).clamp(max=0)

    t = torch.linspace(1, 0, 5, dtype=torch.float64)
    solver = tdh.HyperSolver("euler", g)
    with pytest.raises(NonFiniteError, match=r"at step 0, t = 1, dt = -0\.25"):
        odeint(spiral, torch.ones(1, 2, dtype=torch.float64), t, solver)


def test_use_outside_the_fitted_direction_is_warned_about_once() -> None:
    solver = _solver("hyperheun")
    solver.domain = tdh.FitDomain((0.0, 1.0), 0.1, 0.5, (1,), ((2,),), False, "float64")
    y0 = torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(OutsideFitWarning, match="dt = -0.225"):
        odeint(spiral, y0, SPANS["reverse"], solver)
    odeint(spiral, y0, SPANS["reverse"], solver)


@pytest.mark.filterwarnings("default:torchdyn returns the times")
def test_negated_times_of_reverse_solves_are_named_once_a_solver() -> None:
    solver, y0 = _solver("hyperheun"), torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(HostWarning, match="returns the times of a reverse-time solve negated"):
        t_eval, _ = odeint(spiral, y0, SPANS["reverse"], solver)
    assert torch.equal(t_eval, -SPANS["reverse"])
    assert torch.equal(odeint(spiral, y0, SPANS["reverse"], "euler")[0], t_eval)


def test_fitted_solver_moves_between_the_hosts_unmodified() -> None:
    func = Field().requires_grad_(False)
    y0 = torch.randn(16, 2, dtype=torch.float64)
    config = tdh.FitConfig(iterations=20, pretrain_iterations=5)
    solver = tdh.fit(func, y0, (0.0, 1.0), base="heun", steps=2, config=config, progress=False)
    t = times(0.0, 1.0)
    wanted = torchdiffeq.odeint(func, y0, t, method="hyperheun", options={"solver": solver})
    torch.testing.assert_close(NeuralODE(func, solver=solver)(y0, t)[1], wanted, rtol=0, atol=1e-10)
