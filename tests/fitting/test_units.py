"""A change of units changes nothing but units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import FileFormatError
from torchdiffeq_hyper.hypernets import MLP, from_architecture
from torchdiffeq_hyper.hypernets import ready as ready_net
from torchdiffeq_hyper.tableaus import RK4

Y0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=30, pretrain_iterations=10, swap_every=5)
BASES = {"euler": 4, "heun": 2, "rk4": 2, "bns": 4}


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """Return the derivatives of a driven pendulum."""
    return torch.stack([y[:, 1], -2 * torch.sin(y[:, 0]) + torch.cos(3 * t)], dim=1)


def solved(
    base: str, time: float, size: float, dtype: torch.dtype = torch.float64, **arguments: Any
) -> tuple[Tensor, tdh.FitReport]:
    """Return the solution of a solver fitted in some units, in units of 1, and its report."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return pendulum(t / time, y / size) * (size / time)

    given = {"steps": BASES[base], "config": CONFIG, "progress": False, **arguments}
    y0 = (size * Y0).to(dtype)
    solver = tdh.fit(func, y0, (0.0, time), base=base, **given)
    t = torch.tensor([0.0, time], dtype=dtype)
    if arguments.get("direction") == "reverse":
        t = t.flip(0)
    assert solver.report is not None
    return solver.solve(func, y0, t)[-1] / size, solver.report


@pytest.mark.parametrize(("time", "size"), [(1e-9, 1e9), (1e9, 1e-9), (1e3, 1e3), (1e-3, 1e-9)])
@pytest.mark.parametrize("base", BASES)
def test_a_fit_in_other_units_is_the_same_to_rounding(base: str, time: float, size: float) -> None:
    plain, report = solved(base, 1.0, 1.0)
    found, other = solved(base, time, size)
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-7)
    assert other.validation == pytest.approx(report.validation, rel=1e-5)
    unit = size  # residuals are in the state's unit over powers of time's
    order = 1 if base in {"bns", "euler"} else 2 if base == "heun" else 4
    for _ in range(order + 1):
        unit /= time
    assert other.delta["max"] == pytest.approx(unit * report.delta["max"], rel=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_float32_holds_large_and_small_units(base: str) -> None:
    plain, _ = solved(base, 1.0, 1.0, torch.float32)
    for time, size in ((1e-9, 1e9), (1e9, 1e-9), (1.0, 1e20), (1.0, 1e-20)):
        found, _ = solved(base, time, size, torch.float32)
        torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-3)


def test_reverse_time_and_spans_that_fall_have_units_too() -> None:
    plain, _ = solved("heun", 1.0, 1.0, direction="reverse")
    found, _ = solved("heun", 1e9, 1e-6, direction="reverse")
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-7)


def test_a_fitted_solver_survives_saving_in_its_units(tmp_path: Any) -> None:
    time, size = 1e-9, 1e9

    def func(t: Tensor, y: Tensor) -> Tensor:
        return pendulum(t / time, y / size) * (size / time)

    y0, t = (size * Y0).float(), torch.tensor([0.0, time])
    solver = tdh.fit(func, y0, (0.0, time), base="rk4", steps=2, config=CONFIG, progress=False)
    solver.save(tmp_path / "fast.safetensors")
    again = tdh.HyperSolver.load(tmp_path / "fast.safetensors")
    assert torch.equal(again.solve(func, y0, t), solver.solve(func, y0, t))


@pytest.mark.parametrize("unit", [1.0, 2.5, 1e-3])
def test_a_ready_net_answers_in_true_units_whatever_its_own(unit: float) -> None:
    net = MLP(channels=2, inputs=("y", "stages"), n_stages=4)
    torch.nn.init.normal_(net.net.layers[-1].weight)
    y = torch.randn(3, 2)
    step = tdh.StepInput(torch.tensor(0.5), torch.tensor(0.0), y, y, (y, y, y, y), y)
    plain = net(step)
    net.measure_time_in(unit, RK4.order)
    torch.testing.assert_close(net(step), plain / unit**5)
    torch.testing.assert_close(net.scaled(step), plain)
    again = from_architecture(net.architecture)
    assert again.time_unit == unit
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(step), net(step))


def test_a_solve_does_not_depend_on_the_time_unit_of_its_net() -> None:
    y0, t = Y0.float(), torch.tensor([0.0, 2.0])
    net = ready_net(y0, RK4, time_unit=2.0)
    torch.nn.init.normal_(net.net.layers[-1].weight)
    function = net.forward  # which answers in true units
    plain = tdh.HyperSolver("rk4", function, steps=4).solve(pendulum, y0, t)
    found = tdh.HyperSolver("rk4", net, steps=4).solve(pendulum, y0, t)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def fitted_over(span: float, base: str = "euler", **arguments: Any) -> tdh.HyperSolver:
    given = {"steps": 3, "config": CONFIG, "progress": False, **arguments}
    return tdh.fit(lambda t, y: pendulum(t, y) / span, Y0, (0.0, span), base=base, **given)


@pytest.mark.parametrize("span", [1e-9, 0.5, 1.0, 10.0])
def test_the_time_unit_goes_with_the_weights(span: float, tmp_path: Any) -> None:
    solver = fitted_over(span, hypernet=MLP(channels=2).double())
    t = torch.tensor([0.0, span], dtype=torch.float64)
    expected = solver.solve(lambda t, y: -y / span, Y0, t)
    other = tdh.HyperSolver("euler", MLP(channels=2).double(), steps=3)
    other.load_state_dict(solver.state_dict())
    assert torch.equal(other.solve(lambda t, y: -y / span, Y0, t), expected)
    solver.save(tmp_path / "fast.safetensors")
    net = MLP(channels=2).double()
    for loaded in (
        tdh.HyperSolver.load(tmp_path / "fast.safetensors"),
        tdh.HyperSolver.load(tmp_path / "fast.safetensors", hypernet=net),
    ):
        assert torch.equal(loaded.solve(lambda t, y: -y / span, Y0, t), expected)
    assert net.time_unit == span


def test_weights_of_before_time_units_are_those_of_unit_1() -> None:
    net, plain = MLP(channels=2), MLP(channels=2)
    net.measure_time_in(5.0, 2)
    net.load_state_dict(plain.state_dict())
    assert net.time_unit == 1.0
    assert "time_unit" not in plain.state_dict()


def test_a_damaged_time_unit_is_refused(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    solver = fitted_over(10.0)
    path = tmp_path / "fast.safetensors"
    solver.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    assert found["time_unit"].tolist() == [10.0, 1.0]
    damaged: list[list[float] | None]
    damaged = [[-1.0, 1.0], [float("nan"), 1.0], [1.0], [0.0, 1.0], [9.0, 1.0], [10.0, 2.0], None]
    for unit in damaged:
        tensors = {name: tensor for name, tensor in found.items() if name != "time_unit"}
        if unit is not None:
            tensors["time_unit"] = torch.tensor(unit, dtype=torch.float64)
        save_file(tensors, tmp_path / "damaged.safetensors", metadata)
        with pytest.raises(FileFormatError, match="time_unit"):
            tdh.HyperSolver.load(tmp_path / "damaged.safetensors")


def test_a_net_fitted_on_for_another_base_answers_for_that_one() -> None:
    net = MLP(channels=2).double()
    fitted_over(10.0, hypernet=net)
    net.requires_grad_()
    solver = fitted_over(10.0, "heun", hypernet=net)
    assert solver.hypernet is net
    t = torch.tensor([0.0, 10.0], dtype=torch.float64)
    plain = tdh.HyperSolver("heun", net.forward, steps=3)
    expected = plain.solve(lambda t, y: -y / 10, Y0, t)
    torch.testing.assert_close(solver.solve(lambda t, y: -y / 10, Y0, t), expected)


def test_a_net_that_is_not_used_keeps_its_unit() -> None:
    net = MLP(channels=2).double()
    solver = fitted_over(10.0, hypernet=net, config=tdh.FitConfig(max_seconds=1e-6))
    assert solver.hypernet is not net
    assert net.time_unit == 1.0
    assert all(parameter.requires_grad for parameter in net.parameters())
