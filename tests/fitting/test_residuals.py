"""Residuals are those of [H] eq. 5, formed where differences keep their digits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stubs import Counted, damped_wave, spiral, spiral_solution
from torchdiffeq_hyper.fitting._batches import Starts
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import References, Samples, measure_residuals
from torchdiffeq_hyper.fitting._field import Field, Units
from torchdiffeq_hyper.fitting._reference import Plan, Tolerances, solve_reference, step_counts
from torchdiffeq_hyper.methods._registry import find_tableau

Y0 = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.1]], dtype=torch.float64)


def lagging(t: Tensor, y: Tensor) -> Tensor:
    """Linear: y' = sin(t) - y."""
    return torch.sin(t) - y


def lagging_solution(t: float, y: Tensor, t0: float) -> Tensor:
    """Return the exact solution of `lagging` at t through y at t0."""
    forced = (math.sin(t) - math.cos(t)) / 2
    return forced + (y - (math.sin(t0) - math.cos(t0)) / 2) * math.exp(t0 - t)


def psi(base: str, t: float, y: Tensor, dt: float) -> Tensor:
    """Return the base's update for `lagging`, written out."""
    k1 = math.sin(t) - y
    if base == "euler":
        return k1
    if base == "midpoint":
        return math.sin(t + dt / 2) - (y + dt / 2 * k1)
    if base == "heun":
        return (k1 + math.sin(t + dt) - (y + dt * k1)) / 2
    k2 = math.sin(t + dt / 3) - (y + dt / 3 * k1)
    k3 = math.sin(t + 2 * dt / 3) - (y + dt * (k2 - k1 / 3))
    k4 = math.sin(t + dt) - (y + dt * (k1 - k2 + k3))
    return (k1 + 3 * k2 + 3 * k3 + k4) / 8


def measured(  # noqa: PLR0917
    func: Any,
    y0: Tensor,
    span: tuple[float, float],
    base: str,
    steps: int,
    direction: str = "forward",
) -> list[Samples]:
    """Return the residuals of a base along a tight solution, in true units."""
    plan, units = Plan.of(span, steps, direction), Units(span[0], abs(span[1] - span[0]), 0.7)
    field, tableau = Field(func, Starts(y0), Budget(1e9), units), find_tableau(base)
    tolerances = Tolerances.of(FitConfig(), y0.dtype, units)
    solution = solve_reference(field, y0, plan.times, tolerances)
    found = [measure_residuals(field, tableau, grid, solution) for grid in plan.grids]
    unit = units.residual(tableau.order)
    return [replace(samples, residual=unit * samples.residual) for samples in found]


@pytest.mark.parametrize("base", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("span", [(0.3, 1.5), (1.5, 0.3)])
def test_residuals_equal_the_written_out_formula(
    base: str, direction: str, span: tuple[float, float]
) -> None:
    (samples,) = measured(lagging, Y0, span, base, 4, direction)
    start, end = span if direction == "forward" else span[::-1]
    dt, order = (end - start) / 4, find_tableau(base).order
    for n in range(4):
        t = start + n * dt
        y = lagging_solution(t, Y0, span[0])
        y_next = lagging_solution(t + dt, Y0, span[0])
        expected = (y_next - y - dt * psi(base, t, y, dt)) / dt ** (order + 1)
        torch.testing.assert_close(samples.residual[n], expected, rtol=1e-4, atol=1e-5)
        assert float(samples.dt[n]) == pytest.approx(dt)
        assert float(samples.times[n]) == pytest.approx(t)
        torch.testing.assert_close(samples.y[n], y, rtol=1e-7, atol=1e-8)


def test_both_directions_pass_the_same_states() -> None:
    forward, reverse = measured(spiral, Y0, (0.0, 1.0), "heun", 5, "both")
    assert torch.equal(forward.y, reverse.y.flip(0))
    assert (forward.dt > 0).all()
    assert (reverse.dt < 0).all()


def test_references_are_had_without_residuals_at_no_further_call() -> None:
    def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return lagging(t, state[0]), lagging(t, state[1])

    starts, plan = Starts((Y0, Y0[:, 0])), Plan.of((0.0, 1.0), 4, "both")
    tolerances, euler = Tolerances("dopri5", 1e-6, 1e-6), find_tableau("euler")
    both = [References(pair, plan, tolerances, Units(), base) for base in (None, euler)]
    alone, full = (references.solve(starts, Budget(1e9)) for references in both)
    assert both[1].calls - both[0].calls == 8  # four steps, both ways
    some = [batch.some(torch.tensor([2, 0])).grids for batch in (alone, full)]
    for part, whole in zip(*some, strict=True):
        assert torch.equal(part.y, whole.y)
        assert torch.equal(part.dt, whole.dt)
        assert not part.stages
        assert not part.residual.numel()
    assert alone.nbytes < full.nbytes


def test_float32_residuals_are_formed_from_float64_states() -> None:
    y0 = Y0.float()
    (samples,) = measured(lagging, y0, (0.0, 1.0), "midpoint", 50)
    (exact,) = measured(lagging, y0.double(), (0.0, 1.0), "midpoint", 50)
    assert samples.residual.dtype == torch.float32
    error = (samples.residual - exact.residual).abs().max()
    # States rounded to float32 would show an error of 6e-8 / 0.02^3 = 7e-3.
    assert float(error) < 7e-4


def test_func_is_called_in_the_dtype_of_the_data() -> None:
    seen = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.add((t.dtype, y.dtype, t.dim()))
        return damped_wave(t, y)

    measured(func, Y0.float(), (0.0, 1.0), "rk4", 3)
    assert seen == {(torch.float32, torch.float32, 0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_residuals_are_kept_in_float32(dtype: torch.dtype) -> None:
    (samples,) = measured(lagging, Y0.to(dtype), (0.0, 1.0), "euler", 4)
    assert samples.residual.dtype == samples.y.dtype == samples.times.dtype == torch.float32


def test_stages_are_the_derivatives_at_the_stage_times() -> None:
    (samples,) = measured(lagging, Y0, (0.0, 1.0), "heun", 4)
    for n in range(4):
        t, dt, y = samples.times[n], samples.dt[n], samples.y[n]
        k1 = lagging(t, y)
        torch.testing.assert_close(samples.stages[0][n], k1)
        torch.testing.assert_close(samples.stages[1][n], lagging(t + dt, y + dt * k1))


def test_measuring_costs_the_stages_only() -> None:
    func = Counted(lagging)
    plan = Plan.of((0.0, 1.0), 6, "forward")
    field = Field(func, Starts(Y0), Budget(1e9))
    solution = spiral_solution(plan.times, Y0)
    measure_residuals(field, find_tableau("rk4"), plan.grids[0], solution)
    assert func.calls == 6 * 4
    assert field.calls == 6 * 4


def test_references_step_on_the_points_instead_of_interpolating() -> None:
    plan = Plan.of((0.0, 1.0), 7, "forward")
    func = Counted(spiral)
    field = Field(func, Starts(Y0), Budget(1e9))
    solve_reference(field, Y0, plan.times, Tolerances("dopri5", 1e-4, 1e-4))
    visited = torch.tensor(func.times, dtype=torch.float64)
    for t in plan.times[:-1]:
        assert float((visited - t).abs().min()) < 1e-12


def test_references_are_as_accurate_as_asked() -> None:
    plan = Plan.of((0.0, 2.0), (3, 9), "forward")
    field = Field(spiral, Starts(Y0), Budget(1e9))
    tolerances = Tolerances.of(FitConfig(), torch.float64, field.units)
    solution = solve_reference(field, Y0, plan.times, tolerances)
    torch.testing.assert_close(solution, spiral_solution(plan.times, Y0), rtol=1e-7, atol=1e-8)


def test_one_reference_serves_all_step_counts() -> None:
    plan = Plan.of((0.0, 1.0), (4, 16), "forward")
    assert [grid.n_steps for grid in plan.grids] == [4, 6, 10, 16]
    for grid in plan.grids:
        assert torch.equal(plan.times[grid.points], grid.times)
    assert len(plan.times.unique()) == len(plan.times)


def test_decreasing_spans_are_visited_in_their_order() -> None:
    plan = Plan.of((1.0, 0.0), (2, 3), "both")
    assert plan.times[0] == 1.0
    assert (plan.times.diff() < 0).all()
    assert plan.signs == (1, -1)
    for grid in plan.grids:
        assert torch.equal(plan.times[grid.points], grid.times)


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(1, [1]), ((1, 1), [1]), ((2, 5), [2, 3, 4, 5]), ((1, 100), [1, 5, 22, 100])],
)
def test_ranges_are_fitted_at_few_counts_with_both_ends(
    steps: int | tuple[int, int], counts: list[int]
) -> None:
    assert step_counts(steps) == counts


@pytest.mark.parametrize("time", [1e-9, 1e3])
@pytest.mark.parametrize("size", [1e-12, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_do_not_depend_on_units(time: float, size: float, dtype: torch.dtype) -> None:
    def scaled(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t / time, y / size) * (size / time)

    (plain,) = measured_in(Units(0.0, 1.0, 1.0), damped_wave, Y0.to(dtype))
    (found,) = measured_in(Units(0.0, time, size), scaled, (Y0 * size).to(dtype))
    digits = 1e-3 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(found.residual, plain.residual, rtol=digits, atol=digits)
    torch.testing.assert_close(found.y / size, plain.y)
    torch.testing.assert_close(found.stages[1] / size * time, plain.stages[1])


def measured_in(units: Units, func: Any, y0: Tensor) -> list[Samples]:
    """Return the residuals of rk4 with two steps over one unit of time, as they are."""
    plan = Plan.of((0.0, units.time), 2, "forward")
    field = Field(func, Starts(y0), Budget(1e9), units)
    tolerances = Tolerances.of(FitConfig(), torch.float64, units)
    solution = solve_reference(field, y0, plan.times, tolerances)
    return [measure_residuals(field, find_tableau("rk4"), r, solution) for r in plan.grids]


def test_the_size_of_states_that_start_at_zero_comes_from_func() -> None:
    zero, k = torch.zeros(4, 2), torch.full((4, 2), 3.0)
    assert Units.of((0.0, 10.0), zero, k).state == pytest.approx(0.3)
    assert Units.of((0.0, 10.0), 1e20 * k, k).state == pytest.approx(3e20)
    assert Units.of((0.0, 10.0), zero, zero).state == 1.0
    assert Units.of((5.0, 2.0), k, k) == Units(5.0, 3.0, pytest.approx(3.0))
