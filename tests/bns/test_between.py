"""What is read off between the ends, and how its error is measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from stubs import convergence_order, damped_wave, spiral, spiral_solution
from torchdiffeq_hyper.solvers.bespoke import classical, compositions
from torchdiffeq_hyper.solvers.bespoke._weights import default_knots, step_starts

STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}
ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}
T = torch.linspace(0, 2, 37, dtype=torch.float64)


def start() -> Tensor:
    return torch.linspace(-1, 1.5, 10, dtype=torch.float64).reshape(5, 2)


def worst(solver: tdh.BespokeSolver, t: Tensor = T) -> float:
    found = solver.solve(spiral, start(), t)
    return float((found - spiral_solution(t, start(), float(t[0]))).norm(dim=(1, 2)).max())


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize("method", STAGES)
def test_classical_solvers_converge_between_the_ends_in_the_order_of_their_step(
    method: str, is_reverse: bool
) -> None:
    t, counts = T.flip(0) if is_reverse else T, [8, 16, 32, 64]
    errors = [worst(tdh.BespokeSolver.classical(method, n * STAGES[method]), t) for n in counts]
    order = convergence_order([1 / n for n in counts], errors)
    assert order == pytest.approx(ORDER[method], abs=0.3)


@pytest.mark.parametrize("calls", [22, 42, 83])
def test_steps_that_do_not_come_out_even_lie_near_the_solution_too(calls: int) -> None:
    solver = tdh.BespokeSolver.classical("rk4", calls)
    found = solver.solve(spiral, start(), T)
    errors = (found - spiral_solution(T, start())).norm(dim=(1, 2))
    assert float(errors.max()) < 3 * float(errors[-1]) + 60 * calls**-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", STAGES)
def test_a_classical_solver_passes_through_the_ends_of_its_steps(
    method: str, dtype: torch.dtype
) -> None:
    n_steps = 5
    t = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
    solver = tdh.BespokeSolver(classical(method, n_steps * STAGES[method]).to(dtype))
    found = solver.solve(damped_wave, start(), t)
    for i in range(1, n_steps + 1):
        one = tdh.BespokeSolver.classical(method, i * STAGES[method])
        expected = one.solve(damped_wave, start(), t[[0, i]])[-1]
        tolerance = 50 * torch.finfo(dtype).eps
        torch.testing.assert_close(found[i], expected, rtol=tolerance, atol=tolerance)


def test_cubics_in_time_are_read_off_exactly_by_methods_that_integrate_them() -> None:
    found = tdh.BespokeSolver.classical("rk4", 12).solve(
        lambda t, y: (3 * t**2 - 2 * t) * torch.ones_like(y), start(), T
    )
    expected = start() + (T**3 - T**2)[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_steps_of_a_composition_are_found_and_no_others() -> None:
    assert step_starts(classical("rk4", 10)) == [0, 4, 8]
    assert step_starts(classical("heun", 6)) == [0, 2, 4]
    assert step_starts(classical("euler", 3)) == [0, 1, 2]
    assert step_starts(classical("rk4", 4)) == [0]
    assert step_starts(torch.ones(1, 1)) == [0]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(7, 7, generator=generator, dtype=torch.float64).tril()
    assert step_starts(weights / weights.sum(1, keepdim=True)) == [0]


def test_steps_of_unequal_length_are_read_off_alike() -> None:
    halves = [classical("rk4", 32), classical("rk4", 32)]
    weights = torch.zeros(64, 64, dtype=torch.float64)
    weights[:32, :32], weights[32:, 32:] = 0.3 * halves[0], 0.7 * halves[1]
    weights[32:, :32] = weights[31, :32]
    assert worst(tdh.BespokeSolver(weights)) < 2e-3


def test_steps_that_take_no_time_do_no_harm() -> None:
    weights = torch.zeros(9, 9, dtype=torch.float64)
    weights[:4, :4], weights[5:, 5:] = classical("rk4", 4) / 2, classical("rk4", 4) / 2
    weights[4:, :4] = weights[3, :4]  # the fifth call's own weight is 0
    found = tdh.BespokeSolver(weights).solve(spiral, start(), T)
    expected = tdh.BespokeSolver.classical("rk4", 8).solve(spiral, start(), T)
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-12, atol=1e-12)
    assert worst(tdh.BespokeSolver(weights)) < 2 * worst(tdh.BespokeSolver.classical("rk4", 8))


@pytest.mark.parametrize("calls", [1, 2, 4, 9])
def test_constant_derivatives_are_read_off_exactly_from_every_composition(calls: int) -> None:
    for weights in compositions(calls).values():
        values, slopes = default_knots(weights)
        assert (values.shape, slopes.shape) == ((calls - 1, calls), (calls + 1, calls))
        inner = torch.linspace(0, 1, calls + 1, dtype=torch.float64)[1:-1]
        torch.testing.assert_close(values.sum(1), inner)
        torch.testing.assert_close(slopes.sum(1), torch.ones(calls + 1, dtype=torch.float64))
