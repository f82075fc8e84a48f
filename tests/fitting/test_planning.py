"""A fit keeps its time by doing less, and always returns something; func moves the clock here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.fitting import _break_even, _budget, _data
from torchdiffeq_hyper.fitting._batches import Starts
from torchdiffeq_hyper.fitting._budget import CallCost
from torchdiffeq_hyper.hypernets import MLP
from torchdiffeq_hyper.solvers.bespoke import classical

Y0 = torch.randn(400, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Clock:
    """Time that passes while func is called, and only then."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def field(self, each: float, per_sample: float = 0.0) -> Any:
        def func(t: Tensor, y: Tensor) -> Tensor:
            self.now += each + per_sample * len(y)
            return damped_wave(t, y)

        return func


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (_break_even, _budget, _data):
        monkeypatch.setattr(module, "time", clock)
    return clock


def fit(func: Any, seconds: float, **arguments: Any) -> tdh.HyperSolver:
    config = tdh.FitConfig(max_seconds=seconds, iterations=60)
    given = {"base": "euler", "steps": 4, "config": config, "progress": False, **arguments}
    return tdh.fit(func, Y0, (0.0, 1.0), **given)


def report_of(solver: tdh.HyperSolver) -> tdh.FitReport:
    assert solver.report is not None
    return solver.report


def test_what_a_call_costs_is_measured(clock: Clock) -> None:
    cost = CallCost.measure(clock.field(0.5, 0.01), Starts(Y0), (0.0, 1.0))
    assert cost.of(0) == pytest.approx(0.5)
    assert cost.of(1000) == pytest.approx(10.5)
    assert cost.samples_in(1.0, 400) == 50
    assert 9 <= cost.samples_in(0.1, 400) <= 10  # they cost a fifth of the call without any
    assert CallCost(0.004, 1e-6).samples_in(0.0035, 38) == 38
    assert cost.samples_in(99.0, 400) == 400


@pytest.mark.parametrize("base", ["euler", "heun", "rk4", "bns"])
def test_nothing_is_cut_where_there_is_time(clock: Clock, base: str) -> None:
    report = report_of(fit(clock.field(1e-6), 1e3, base=base))
    assert not any("cut" in note for note in report.notes)
    assert report.stopped in {"iterations", "patience"}


@pytest.mark.parametrize("base", ["euler", "heun", "rk4", "bns"])
@pytest.mark.parametrize(
    ("each", "per_sample"), [(2e-3, 0.0), (0.0, 1e-4), (1e-2, 1e-5), (0.0, 1e-3)]
)
def test_references_take_their_share_of_the_time(
    clock: Clock, base: str, each: float, per_sample: float
) -> None:
    report = report_of(fit(clock.field(each, per_sample), 20.0, base=base))
    assert 0 < report.reference_seconds < 0.4 * 20.0
    assert report.iterations > 0
    assert clock.now < 20.0 + 10.0


@pytest.mark.parametrize("base", ["euler", "heun", "rk4", "bns"])
def test_what_was_cut_is_said(clock: Clock, base: str) -> None:
    report = report_of(fit(clock.field(0.0, 1e-3), 20.0, base=base))
    (note,) = [note for note in report.notes if "cut to fit" in note]
    assert "max_seconds = 20" in note
    assert "held-out samples" in note
    assert report.errors is not None
    assert f"{report.errors.samples} of 60" in note


@pytest.mark.parametrize("base", ["euler", "heun", "rk4"])
@pytest.mark.parametrize("each", [0.5, 100.0])
def test_without_time_for_references_the_base_is_returned(
    clock: Clock, base: str, each: float, tmp_path: Path
) -> None:
    solver = fit(clock.field(each), 3.0, base=base)
    report = report_of(solver)
    assert report.iterations == 0
    assert report.stopped == "max_seconds"
    assert "without a correction" in report.notes[0]
    assert "no break-even" in str(report)
    plain = tdh.HyperSolver(base, lambda step: torch.zeros_like(step.y), steps=4)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = plain.solve(damped_wave, Y0, t)
    assert torch.equal(solver.solve(damped_wave, Y0, t), expected)
    solver.save(tmp_path / "base.safetensors")
    again = tdh.HyperSolver.load(tmp_path / "base.safetensors")
    assert torch.equal(again.solve(damped_wave, Y0, t), expected)


@pytest.mark.parametrize(("steps", "method"), [(1, "euler"), (2, "midpoint"), (8, "rk4")])
def test_without_time_a_classical_method_is_returned(
    clock: Clock, steps: int, method: str, tmp_path: Path
) -> None:
    solver = fit(clock.field(1.0), 3.0, base="bns", steps=steps)
    assert isinstance(solver, tdh.BespokeSolver)
    assert torch.equal(solver.weights, classical(method, steps).to(solver.weights))
    assert solver.domain is not None
    assert f"this is {method}" in report_of(solver).notes[0]
    solver.save(tmp_path / "start.safetensors")
    tdh.HyperSolver.load(tmp_path / "start.safetensors")


def test_without_time_a_given_net_is_left_alone(clock: Clock) -> None:
    net = MLP(channels=2)
    torch.nn.init.normal_(net.net.layers[-1].weight)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    solver = fit(clock.field(1.0), 3.0, hypernet=net)
    assert solver.hypernet is not net
    assert net.time_unit == 1.0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("base", ["heun", "bns"])
def test_a_fit_that_goes_on_without_time_returns_its_best(
    clock: Clock, base: str, tmp_path: Path
) -> None:
    each = 2e-3 if base == "heun" else 2e-2
    config = tdh.FitConfig(max_seconds=20.0, iterations=10_000, checkpoint=tmp_path / "fit.pt")
    first = report_of(fit(clock.field(each), 20.0, base=base, config=config))
    assert first.stopped == "max_seconds"
    less = replace(config, max_seconds=5.0)
    again = report_of(fit(clock.field(each), 5.0, base=base, config=less))
    assert 0 < again.iterations == first.iterations
    assert "best of the run before" in again.notes[0]
    more = replace(config, max_seconds=80.0)
    assert report_of(fit(clock.field(each), 80.0, base=base, config=more)).iterations > (
        first.iterations
    )


def test_a_slow_solution_is_tried_again_with_less(clock: Clock) -> None:
    calls = 0

    def slows_down(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # Fast where costs are measured, slow in the first solutions of more samples.
        clock.now += 1.0 if len(y) > 8 and calls > 60 else 1e-4
        return damped_wave(t, y)

    report = report_of(fit(slows_down, 100.0))
    assert any("took too long" in note for note in report.notes)
    assert report.iterations > 0
