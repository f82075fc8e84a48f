"""Orders of convergence of every registered method that follows a time grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import leading_term, zero
from stubs import convergence_order, spiral, spiral_solution
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.tableaus import second_order

GRID = [m.name for m in _registry.methods().values() if m.follows_grid]
LEARNED = [m.name for m in _registry.methods().values() if m.follows_grid and m.corrects_base]
SPANS = {"forward": (0.3, 1.8), "reverse": (1.8, 0.3)}
STEPS = (8, 16, 32, 64)


def _slope(method: str, span: tuple[float, float], options: dict[str, Any]) -> float:
    y0 = torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=torch.float64)
    exact = spiral_solution(torch.tensor([span[1]], dtype=torch.float64), y0, span[0])[-1]
    errors = []
    for n in STEPS:
        t = torch.linspace(*span, n + 1, dtype=torch.float64)
        y = odeint(spiral, y0, t, method=method, options=dict(options))[-1]
        errors.append(float((y - exact).norm()))
    return convergence_order([1 / n for n in STEPS], errors)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("method", GRID)
def test_method_without_correction_has_the_declared_order(method: str, span: str) -> None:
    entry = _registry.find(method)
    options = {"hypernet": zero} if entry.corrects_base else {}
    assert _slope(method, SPANS[span], options) == pytest.approx(entry.order, abs=0.2)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("method", LEARNED)
def test_exact_leading_term_raises_the_order_by_one(method: str, span: str) -> None:
    tableau = _registry.find(method).tableau
    assert tableau is not None
    slope = _slope(method, SPANS[span], {"hypernet": leading_term(tableau)})
    assert slope == pytest.approx(tableau.order + 1, abs=0.2)


@pytest.mark.parametrize("alpha", [0.4, 2 / 3, 0.9])
def test_every_alpha_has_order_two_and_three_with_its_leading_term(alpha: float) -> None:
    options = {"alpha": alpha, "hypernet": zero}
    assert _slope("hyper2", SPANS["forward"], options) == pytest.approx(2, abs=0.2)
    options["hypernet"] = leading_term(second_order(alpha))
    assert _slope("hyper2", SPANS["reverse"], options) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("method", LEARNED)
def test_solve_gives_the_numbers_of_the_host(method: str, span: str) -> None:
    tableau = _registry.find(method).tableau
    assert tableau is not None
    solver = tdh.HyperSolver(tableau.name, leading_term(tableau), steps=6)
    y0 = torch.randn(3, 2, dtype=torch.float64)
    start, end = SPANS[span]
    for t in (torch.tensor([start, end]).double(), torch.linspace(start, end, 5).double()):
        hosted = odeint(spiral, y0, t, method=method, options={"solver": solver})
        torch.testing.assert_close(solver.solve(spiral, y0, t), hosted, rtol=1e-13, atol=1e-13)


def test_hypernet_sees_the_true_problem_in_reverse_time() -> None:
    seen: list[tdh.StepInput] = []

    def g(step: tdh.StepInput) -> torch.Tensor:
        seen.append(step)
        assert isinstance(step.y, torch.Tensor)
        return torch.zeros_like(step.y)

    y0, t = torch.randn(2, 2, dtype=torch.float64), torch.tensor([1.0, 0.6, 0.1]).double()
    odeint(spiral, y0, t, method="hyperheun", options={"hypernet": g})
    assert [float(step.t) for step in seen] == t[:-1].tolist()
    assert [float(step.dt) for step in seen] == pytest.approx([-0.4, -0.5])
    for step in seen:
        assert isinstance(step.y, torch.Tensor)
        assert step.f0 is step.stages[0]
        torch.testing.assert_close(step.f0, spiral(step.t, step.y))
        torch.testing.assert_close(
            step.stages[1], spiral(step.t + step.dt, step.y + step.dt * step.stages[0])
        )
        assert torch.equal(step.y0, y0)  # type: ignore[arg-type]
        assert step.t.shape == step.dt.shape == ()
