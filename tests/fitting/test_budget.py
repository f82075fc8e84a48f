"""A fit ends in time with its schedule complete; the clock here is the test's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.fitting import _budget as budget_module
from torchdiffeq_hyper.fitting._budget import FIRST_PHASE, LAST_PHASE, Budget

Y0 = torch.randn(60, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Clock:
    """Time that passes only when somebody looks, or says so."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 0.0
        self.tick = tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget_module, "time", clock)
    return clock


def fit(**arguments: Any) -> tdh.HyperSolver:
    given = {"base": "euler", "steps": 4, "progress": False, **arguments}
    return tdh.fit(damped_wave, Y0, (0.0, 1.0), **given)


def run_phase(clock: Clock, seconds: list[float], wanted: int) -> list[int]:
    """Return what is planned after each iteration, given how long each takes."""
    pace = Budget(100.0).start_phase(wanted, LAST_PHASE)
    planned, history = wanted, []
    for done, each in enumerate(seconds, start=1):
        clock.now += each
        planned = pace.plan(done, planned)
        history.append(planned)
    return history


def test_nothing_changes_while_all_iterations_end_in_time(clock: Clock) -> None:
    assert set(run_phase(clock, [0.1] * 300, 900)) == {900}


def test_fewer_are_planned_when_they_would_not_end_in_time(clock: Clock) -> None:
    assert run_phase(clock, [1.0] * 40, 900)[-1] == 97  # the last phase may take 97 seconds


def test_a_slow_first_iteration_does_not_count(clock: Clock) -> None:
    assert set(run_phase(clock, [30.0] + [0.1] * 100, 500)) == {500}


def test_the_plan_recovers_with_the_machine(clock: Clock) -> None:
    history = run_phase(clock, [1.0] * 9 + [0.1] * 500, 600)
    assert min(history) < 120
    assert history[-1] > 500


def test_a_first_phase_leaves_time_for_the_next(clock: Clock) -> None:
    budget = Budget(100.0)
    pace = budget.start_phase(900, FIRST_PHASE)
    clock.now = 39.0
    assert not pace.is_over()
    clock.now = 41.0
    assert pace.is_over()
    assert not budget.is_over()


def test_time_used_before_an_interruption_counts(clock: Clock) -> None:
    budget = Budget(100.0)
    budget.resume(70.0)
    clock.now = 20.0
    assert budget.seconds == pytest.approx(90.0)


def test_a_fit_short_of_time_ends_annealed_and_says_why(clock: Clock) -> None:
    clock.tick = 0.05
    config = tdh.FitConfig(iterations=100_000, max_seconds=60.0)
    report = fit(config=config).report
    assert report is not None
    assert report.stopped == "max_seconds"
    assert 0 < report.iterations < 3000
    assert {point.phase for point in report.losses} == {"residual", "trajectory"}
    assert report.seconds < 60.0
    assert report.validation < report.base_validation / 3


def test_without_an_iteration_the_result_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module.Pace, "is_over", lambda self: True)
    report = fit().report
    assert report is not None
    assert report.iterations == 0
    assert report.stopped == "max_seconds"
    assert report.validation == report.base_validation
    assert "larger max_seconds" in report.notes[0]


def test_references_may_take_a_share_of_the_time(clock: Clock) -> None:
    assert Budget(100.0).affordable_batches(2.0) == 15
    assert Budget(100.0).affordable_batches(2.0, spent=20.0) == 5
    assert Budget(100.0).affordable_batches(200.0) == 1


def test_a_fit_cut_short_goes_on_when_it_has_more_time(clock: Clock, tmp_path: Path) -> None:
    clock.tick = 0.02
    config = tdh.FitConfig(iterations=400, max_seconds=20.0, checkpoint=tmp_path / "fit.pt")
    first = fit(config=config).report
    longer = fit(config=replace(config, max_seconds=2000.0)).report
    assert first is not None
    assert longer is not None
    assert first.stopped == "max_seconds"
    assert longer.stopped == "iterations"
    assert longer.losses[: len(first.losses)] == first.losses
    assert longer.validation <= first.validation
