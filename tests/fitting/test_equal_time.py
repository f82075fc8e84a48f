"""Gains are stated against the best classical solver at equal time; calls of func are the time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from stubs import MLPField, damped_wave
from torchdiffeq_hyper.fitting import _break_even
from torchdiffeq_hyper.fitting import _report as report_module
from torchdiffeq_hyper.fitting._batches import Batches
from torchdiffeq_hyper.fitting._break_even import FIXED
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._data import Batch, Data, References
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._errors import end_errors, errors_along
from torchdiffeq_hyper.fitting._field import Units
from torchdiffeq_hyper.fitting._reference import Plan, Tolerances
from torchdiffeq_hyper.solvers._fit_report import ClassicalAlternative, ErrorSummary, FitReport
from torchdiffeq_hyper.tableaus import EULER

Y0 = torch.randn(90, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
SPAN = (0.0, 2.0)


class Clock:
    """Time that passes by one second a call of func."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(_break_even, "time", self)
        monkeypatch.setattr(_break_even, "MOST_SECONDS", 1e9)

    def perf_counter(self) -> float:
        return self.now

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        self.now += 1.0
        return damped_wave(t, y)


def held_out(func: Any = damped_wave, y0: Any = Y0) -> Batch:
    config = tdh.FitConfig(rtol=1e-10, validation=0.5, batch_size=64)
    data = Data(
        References(
            func,
            Plan.of(SPAN, 4, "forward"),
            Tolerances("dopri5", 1e-10, 1e-10),
            Units(0.0, 2.0),
            EULER,
        ),
        Batches(y0, config),
        Budget(math.inf),
        ProcessGroup(),
    )
    return data.held_out


def best(run: Any, func: Any, calls: int, y0: Any = Y0) -> ClassicalAlternative:
    found = _break_even.best_classical(run, func, held_out(y0=y0), calls=calls)
    assert found is not None
    return found


def errors_of(name: str, steps: int) -> ErrorSummary:
    run = FIXED[name].with_steps(name, steps).run
    return ErrorSummary.of(end_errors(run, damped_wave, held_out()))


def slow(calls: int, clock: Clock) -> Any:
    """Return a solver of one call of func a step that takes some more time."""

    def run(func: Any, y0: Any, t: Any) -> Any:
        clock.now += calls - 4
        return FIXED["euler"].with_steps("euler", 4).run(func, y0, t)

    return run


def test_the_best_is_that_of_all_methods_in_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = best(slow(12, clock), clock.field, 4)
    steps = {name: (12 - method.start) // method.each for name, method in FIXED.items()}
    in_time = {name: errors_of(name, steps[name]) for name in FIXED}
    name = min(in_time, key=lambda each: in_time[each].mean)
    assert found.solver.startswith(name)
    assert found.errors.mean == pytest.approx(in_time[name].mean, rel=1e-9)
    assert found.best_p95 == pytest.approx(min(each.p95 for each in in_time.values()), rel=1e-9)
    assert found.own_seconds == 12.0
    assert found.seconds <= 12.0


def test_as_many_calls_are_allowed_as_the_fitted_solver_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)

    def fast(func: Any, y0: Any, t: Any) -> Any:
        before = clock.now
        solution = FIXED["rk4"].with_steps("rk4", 2).run(func, y0, t)
        clock.now = before + 1.0  # eight calls in the time of one
        return solution

    found = best(fast, clock.field, 8)
    assert found.errors.mean <= errors_of("rk4", 2).mean


def test_the_same_samples_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(_break_even, "MOST_SECONDS", 1.0)  # no time: the fewest samples
    found = best(slow(12, clock), clock.field, 4)
    assert found.errors.samples == found.own_errors.samples == _break_even.FEWEST


def test_a_sample_that_blows_up_does_not_hide_the_others() -> None:
    def run(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        if bool((y0[:, 0] > 2).any()):
            message = "inf"
            raise ArithmeticError(message)
        return FIXED["rk4"].with_steps("rk4", 20).run(func, y0, t)  # type: ignore[return-value]

    batch = held_out()
    blown = batch.start(0)[:, 0] > 2  # type: ignore[index]
    errors = end_errors(run, damped_wave, batch)
    assert 0 < int(blown.sum()) < len(errors)
    assert torch.equal(torch.isinf(errors), blown)
    assert float(errors[~blown].max()) < 1e-3
    assert errors_along(run, damped_wave, batch).shape == (4, len(errors))


def test_a_summary_counts_by_rank() -> None:
    errors = torch.arange(1.0, 101.0)[torch.randperm(100)]
    assert ErrorSummary.of(errors) == ErrorSummary(50.5, 50.0, 95.0, 100.0, 100)
    broken = ErrorSummary.of(torch.tensor([1.0, math.inf, 2.0]))
    assert (broken.mean, broken.median, broken.worst) == (math.inf, 2.0, math.inf)


def fit(func: Any = damped_wave, y0: Any = Y0, **arguments: Any) -> FitReport:
    config = tdh.FitConfig(iterations=40)
    given = {"base": "heun", "steps": 4, "config": config, "progress": False, **arguments}
    report = tdh.fit(func, y0, SPAN, **given).report
    assert report is not None
    return report


@pytest.mark.parametrize("base", ["euler", "heun", "rk4", "bns"])
def test_reports_state_errors_relative_and_along_the_span(base: str) -> None:
    report = fit(MLPField(), base=base)
    assert report.errors is not None
    assert report.base_errors is not None
    assert report.along is not None
    assert report.worst_time is not None
    assert report.rival is not None
    assert report.errors.median <= report.errors.p95 <= report.errors.worst
    assert 0.0 < report.worst_time[0] <= 2.0
    assert report.worst_time[1] >= report.along.mean
    text = str(report)
    for number in (report.errors.p95, report.errors.worst, report.worst_time[1]):
        assert f"{number:.3g}" in text
    assert "along the span" in text
    assert report.rival.solver in text


def test_relative_errors_do_not_depend_on_the_size_of_a_sample() -> None:
    def linear(t: Tensor, y: Tensor) -> Tensor:
        return -y * (1 + t)

    sizes = torch.logspace(-0.5, 0.5, 90, dtype=torch.float64).unsqueeze(1)
    report = fit(linear, sizes * torch.ones(90, 2, dtype=torch.float64), base="euler")
    assert report.base_errors is not None
    assert report.base_errors.worst == pytest.approx(report.base_errors.median, rel=1e-6)


@pytest.mark.parametrize("base", ["euler", "heun", "rk4", "bns"])
def test_what_is_worse_than_its_start_is_not_returned(
    monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    module = "_bespoke" if base == "bns" else "_hypersolver"
    monkeypatch.setattr(f"torchdiffeq_hyper.fitting.{module}.is_worse", lambda *a: True)
    config = tdh.FitConfig(iterations=20)
    solver = tdh.fit(damped_wave, Y0, SPAN, base=base, steps=4, config=config, progress=False)
    report = solver.report
    assert report is not None
    assert any("worse than" in note for note in report.notes)
    assert report.errors == report.base_errors
    assert report.validation == pytest.approx(report.base_validation, rel=1e-6)


class Wild(torch.nn.Module):
    """A net of one's own that is far off, and hardly learns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(50.0, dtype=torch.float64))

    def forward(self, step: tdh.StepInput) -> Any:
        return self.size * torch.ones_like(step.y)


@pytest.mark.parametrize("base", ["euler", "rk4", "bns"])
def test_a_net_that_is_worse_than_none_is_put_back(base: str, tmp_path: Any) -> None:
    net = Wild()
    config = tdh.FitConfig(iterations=3, lr=1e-6, checkpoint=tmp_path / "fit.pt")
    given: dict[str, Any] = {"base": base, "steps": 4, "config": config, "progress": False}
    solver = tdh.fit(damped_wave, Y0, SPAN, hypernet=net, **given)
    assert solver.hypernet is not net
    assert float(net.size.detach()) == 50.0
    assert net.size.requires_grad
    report = solver.report
    assert report is not None
    assert report.errors is not None
    assert report.base_errors is not None
    assert report.errors.mean <= report.base_errors.mean
    assert report.errors.p95 <= report.base_errors.p95
    assert any("worse than" in note for note in report.notes)
    solver.save(tmp_path / "base.safetensors")
    again = tdh.fit(damped_wave, Y0, SPAN, hypernet=net, **given)  # the finished fit
    t = torch.tensor(SPAN, dtype=torch.float64)
    for other in (again, tdh.HyperSolver.load(tmp_path / "base.safetensors")):
        expected = solver.solve(damped_wave, Y0, t)
        torch.testing.assert_close(other.solve(damped_wave, Y0, t), expected)


@pytest.mark.parametrize("measurement", ["best_classical", "measure_break_even", "errors_along"])
@pytest.mark.parametrize("base", ["heun", "bns"])
def test_no_measurement_that_fails_loses_the_fit(
    monkeypatch: pytest.MonkeyPatch, measurement: str, base: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        message = "underflow in dt 0.0"
        raise AssertionError(message)

    monkeypatch.setattr(report_module, measurement, fails)
    config = tdh.FitConfig(iterations=200, pretrain_iterations=200, patience=500)
    report = fit(base=base, config=config)
    assert any("AssertionError: underflow in dt" in note for note in report.notes)
    assert report.validation < report.base_validation
    assert report.break_even is not None or report.no_break_even


def noted(errors: ErrorSummary, **others: Any) -> str:
    given = {"base_errors": None, "classical": None, "name": "heun", **others}
    return "\n".join(report_module._notes(errors, *given.values()))


def summary(mean: float, *, p95: float | None = None, worst: float | None = None) -> ErrorSummary:
    return ErrorSummary(mean, mean, p95 or 2 * mean, worst or 3 * mean, 50)


def best_of(mean: float, p95: float, own: ErrorSummary) -> ClassicalAlternative:
    return ClassicalAlternative("rk4 with 3 steps", summary(mean), own, p95, 1.0, 1.0)


def test_channels_too_small_to_count_are_named() -> None:
    sizes = torch.tensor([1.0, 1e-6], dtype=torch.float64)

    def unlike(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y / sizes) * sizes

    report = fit(unlike, Y0 * sizes)
    assert any("hardly count" in note for note in report.notes)
    assert not any("hardly count" in note for note in fit().notes)


def test_few_held_out_samples_are_named() -> None:
    assert any("too few to tell a tail" in note for note in fit(y0=Y0[:30]).notes)


def test_notes_say_what_errors_mean() -> None:
    assert noted(summary(0.01)) == ""
    assert "unusable" in noted(summary(0.4))
    assert "unusable" in noted(summary(math.inf))
    assert "heavy tail" in noted(summary(0.01, worst=0.5))
    assert "no clear gain over heun" in noted(summary(0.01), base_errors=summary(0.011))
    assert noted(summary(0.01), base_errors=summary(0.1)) == ""


def test_notes_say_when_a_classical_solver_is_as_good() -> None:
    own = summary(0.01)
    assert "a classical solver wins: rk4 with 3 steps" in noted(
        own, classical=best_of(0.009, 0.1, own)
    )
    assert "no clear gain over rk4" in noted(own, classical=best_of(0.011, 0.1, own))
    assert "95th percentile" in noted(own, classical=best_of(0.1, 0.02, own))
    assert noted(own, classical=best_of(0.1, 0.2, own)) == ""
