"""`HyperSolver` without a host: grids, precision, compilation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, MLPField, coupled, coupled_start, damped_wave

BASES = ["euler", "midpoint", "heun", "alpha", "rk4"]
HALVES = [torch.float16, torch.bfloat16]


class Gain(nn.Module):
    """A correction that uses everything a step gives, for tensors and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, step: tdh.StepInput) -> Any:
        if isinstance(step.y, Tensor):
            return self.gain * (step.y * step.t + step.stages[-1] + step.dt * step.y0)  # type: ignore[operator]
        return tuple(self.gain * part for part in step.y)


@pytest.mark.parametrize("base", BASES)
def test_solver_knows_its_method_order_and_cost(base: str) -> None:
    solver = tdh.HyperSolver(base, zero, steps=3)
    func, t = Counted(damped_wave), torch.tensor([0.0, 1.0])
    solver.solve(func, torch.ones(2), t)
    assert func.calls == 3 * solver.tableau.calls
    got = odeint(damped_wave, torch.ones(2), t, method=solver.method, options={"solver": solver})
    assert torch.equal(got, solver.solve(damped_wave, torch.ones(2), t))


def test_two_points_take_equal_steps_whatever_the_span_and_more_points_are_the_grid() -> None:
    solver = tdh.HyperSolver("euler", zero, steps=4)
    for times, expected in [
        ([0.0, 1.0], [0.0, 0.25, 0.5, 0.75]),
        ([2.0, 1.0], [2.0, 1.75, 1.5, 1.25]),
        ([0.0, 3.0, 5.0], [0.0, 3.0]),
    ]:
        for solve in (
            lambda f, t: solver.solve(f, torch.ones(2), t),
            lambda f, t: odeint(
                f, torch.ones(2), t, method="hypereuler", options={"solver": solver}
            ),
        ):
            func = Counted(damped_wave)
            assert len(solve(func, torch.tensor(times))) == len(times)
            assert func.times == pytest.approx(expected)


def test_grid_options_come_before_the_solvers_own_steps() -> None:
    solver, func = tdh.HyperSolver("euler", zero, steps=4), Counted(damped_wave)
    options = {"solver": solver, "step_size": 0.5}
    odeint(func, torch.ones(2), torch.tensor([0.0, 1.0]), method="hypereuler", options=options)
    assert func.times == [0.0, 0.5]


def test_bare_hypernet_follows_the_host() -> None:
    func, t = Counted(damped_wave), torch.tensor([0.0, 1.0])
    odeint(func, torch.ones(2), t, method="hypereuler", options={"hypernet": zero})
    assert func.times == [0.0]


def test_range_of_steps_takes_the_most_accurate() -> None:
    solver, func = tdh.HyperSolver("euler", zero, steps=(2, 5)), Counted(damped_wave)
    solver.solve(func, torch.ones(2), torch.tensor([0.0, 1.0]))
    assert func.calls == 5


def test_ends_of_the_grid_are_exact() -> None:
    seen: list[tuple[float, float]] = []

    def net(step: tdh.StepInput) -> Tensor:
        seen.append((float(step.t), float(step.dt)))
        assert isinstance(step.y, Tensor)
        return torch.zeros_like(step.y)

    t = torch.tensor([0.1, 0.8])
    tdh.HyperSolver("euler", net, steps=7).solve(damped_wave, torch.ones(1), t)
    assert seen[0][0] == float(t[0])
    assert sum(dt for _, dt in seen) == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_hosted", [True, False])
def test_half_precision_is_integrated_in_float32(dtype: torch.dtype, is_hosted: bool) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def net(step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        seen.append((step.y.dtype, step.dt.dtype))
        return torch.zeros_like(step.y)

    def decay(t: Tensor, y: Tensor) -> Tensor:
        assert y.dtype == t.dtype == dtype
        return -y

    y0, t = torch.ones(1, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)
    solver = tdh.HyperSolver("rk4", net, steps=40)
    if is_hosted:
        y = odeint(decay, y0, t, method="hyperrk4", options={"solver": solver})
    else:
        y = solver.solve(decay, y0, t)
    assert isinstance(y, Tensor)
    assert y.dtype == dtype
    assert y[-1].item() == pytest.approx(0.36788, rel=2 * torch.finfo(dtype).eps)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_autocast_keeps_the_state_in_float32() -> None:
    field = nn.Linear(2, 2)
    y0, t = torch.ones(3, 2), torch.linspace(0, 1, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        options = {"hypernet": zero}
        y = odeint(lambda t, y: field(y) * t, y0, t, method="hyperheun", options=options)
        z = tdh.HyperSolver("heun", zero).solve(lambda t, y: field(y) * t, y0, t)
    assert y.dtype == torch.float32
    assert torch.equal(y, z)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[0.2, 1.0], [1.0, 0.2], [0.0, 0.3, 1.0]])
@pytest.mark.parametrize("base", BASES)
def test_solve_compiles_to_one_graph(base: str, times: list[float]) -> None:
    torch.compiler.reset()
    solver = tdh.HyperSolver(base, Gain(), steps=3)
    field, t = MLPField(dtype=torch.float32), torch.tensor(times)
    compiled = torch.compile(solver.solve, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y0 = torch.randn(3, 2)
        torch.testing.assert_close(compiled(field, y0, t), solver.solve(field, y0, t))


def test_tuple_solve_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    solver, t = tdh.HyperSolver("heun", Gain(), steps=2), torch.tensor([1.0, 0.2])
    compiled = torch.compile(solver.solve, fullgraph=True, backend="aot_eager")
    y0 = coupled_start(dtype=torch.float32)
    with torch.no_grad():
        got, expected = compiled(coupled, y0, t), solver.solve(coupled, y0, t)
    for part, like in zip(got, expected, strict=True):
        torch.testing.assert_close(part, like)


def test_solve_works_under_vmap() -> None:
    solver, t = tdh.HyperSolver("heun", Gain(), steps=3), torch.tensor([0.0, 1.0])
    y0 = torch.randn(5, 2)
    with torch.no_grad():
        each = torch.func.vmap(lambda y: solver.solve(damped_wave, y, t))(y0)
        torch.testing.assert_close(each.transpose(0, 1), solver.solve(damped_wave, y0, t))


def test_solver_copies_and_pickles() -> None:
    solver, t = tdh.HyperSolver("alpha", Gain(), steps=3, alpha=0.7), torch.tensor([0.0, 1.0])
    expected = solver.solve(damped_wave, torch.ones(2), t)
    for other in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert torch.equal(other.solve(damped_wave, torch.ones(2), t), expected)
        assert (other.base, other.alpha, other.steps) == ("alpha", 0.7, 3)


def test_forward_is_solve() -> None:
    solver, t = tdh.HyperSolver("heun", zero, steps=3), torch.tensor([0.0, 1.0])
    got = solver(damped_wave, torch.ones(2), t)
    assert torch.equal(got, solver.solve(damped_wave, torch.ones(2), t))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_empty_states_give_the_empty_solution(shape: tuple[int, ...]) -> None:
    y = tdh.HyperSolver("rk4", zero).solve(damped_wave, torch.empty(shape), torch.linspace(0, 1, 4))
    assert isinstance(y, Tensor)
    assert y.shape == (4, *shape)


def test_one_time_point_gives_the_start() -> None:
    y0 = coupled_start()
    y = tdh.HyperSolver("rk4", zero, steps=3).solve(coupled, y0, torch.tensor([0.4]))
    assert all(torch.equal(part[0], start) for part, start in zip(y, y0, strict=True))


@pytest.mark.parametrize("start", [0.4, -3.0])
def test_one_time_point_gives_the_start_of_a_fitted_solver_through_the_host(start: float) -> None:
    domain = tdh.FitDomain((0.0, 1.0), 0.1, 0.5, (1,), ((2,),), is_tuple=False, dtype="float32")
    solver = tdh.HyperSolver("euler", zero, steps=3, domain=domain)
    y0, t = torch.ones(3, 2), torch.tensor([start])
    for options in ({}, {"interp": "cubic"}):
        y = odeint(damped_wave, y0, t, method="hypereuler", options={"solver": solver, **options})
        assert torch.equal(y, y0[None])
