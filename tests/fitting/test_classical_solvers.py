"""The classical solvers that a fitted one is compared with are what their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from stubs import Counted, convergence_order, coupled, coupled_start, spiral, spiral_solution
from torchdiffeq_hyper.fitting._break_even import FIXED, dopri5

Y0 = torch.tensor([[1.0, 0.5], [-0.3, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize("span", [(0.2, 1.4), (1.4, 0.2)])
@pytest.mark.parametrize("name", FIXED)
def test_each_converges_at_its_order(name: str, span: tuple[float, float]) -> None:
    t = torch.tensor(span, dtype=torch.float64)
    exact = spiral_solution(t, Y0, span[0])[-1]
    counts = [16, 32, 64]
    errors = []
    for n in counts:
        y = FIXED[name].with_steps(name, n).run(spiral, Y0, t)
        assert isinstance(y, Tensor)
        errors.append(float((y[-1] - exact).norm()))
    order = convergence_order([1 / n for n in counts], errors)
    # Adams-Bashforth 3 starts with steps of order 2: locally as small as its own global error.
    assert order == pytest.approx(FIXED[name].order, abs=0.3)


@pytest.mark.parametrize("name", FIXED)
def test_calls_are_those_declared(name: str) -> None:
    func = Counted(spiral)
    FIXED[name].with_steps(name, 5).run(func, Y0, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert func.calls == 5 * FIXED[name].each + FIXED[name].start


def test_adams_bashforth_2_is_written_out() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    h, times = 0.25, [0.0, 0.25, 0.5, 0.75, 1.0]
    f = [spiral(t[:1].squeeze(), Y0)]
    y = Y0 + h * spiral(torch.tensor(h / 2), Y0 + h / 2 * f[0])
    for n in (1, 2, 3):
        f.append(spiral(torch.tensor(times[n], dtype=torch.float64), y))
        y = y + h * (1.5 * f[n] - 0.5 * f[n - 1])
    found = FIXED["Adams-Bashforth 2"].with_steps("", 4).run(spiral, Y0, t)
    torch.testing.assert_close(found[-1], y, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", FIXED)
def test_tuples_and_one_step_are_solved(name: str) -> None:
    y0, t = coupled_start(), torch.tensor([0.0, 0.5], dtype=torch.float64)
    exact = odeint(coupled, y0, t, rtol=1e-10, atol=1e-10)
    for steps, digits in ((1, 0.5), (40, 2e-2)):
        found: Any = FIXED[name].with_steps(name, steps).run(coupled, y0, t)
        for part, expected in zip(found, exact, strict=True):
            torch.testing.assert_close(part[-1], expected[-1], rtol=digits, atol=digits)


def test_tolerances_are_in_units_of_the_state() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    small, large = Counted(spiral), Counted(spiral)
    dopri5(1e-4, 1e-9).run(small, 1e-9 * Y0, t)
    dopri5(1e-4, 1e9).run(large, 1e9 * Y0, t)
    assert small.calls == large.calls
