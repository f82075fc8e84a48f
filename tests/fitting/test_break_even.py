"""The report says what a prediction saves, and against which classical solver."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, MLPField, coupled, damped_wave
from torchdiffeq_hyper.fitting import _break_even
from torchdiffeq_hyper.fitting._batches import Batches
from torchdiffeq_hyper.fitting._break_even import FIXED
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._data import Batch, Data, References
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._errors import end_errors
from torchdiffeq_hyper.fitting._field import Units
from torchdiffeq_hyper.fitting._reference import Plan, Tolerances
from torchdiffeq_hyper.solvers._fit_report import BreakEven
from torchdiffeq_hyper.tableaus import EULER

Y0 = torch.randn(90, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=200, patience=40)
SPAN = (0.0, 2.0)


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_break_even, "LEAST_SECONDS", 60.0)


def fit(func: Any = damped_wave, y0: Any = Y0, **arguments: Any) -> tdh.FitReport:
    given = {"base": "euler", "steps": 4, "config": CONFIG, "progress": False, **arguments}
    report = tdh.fit(func, y0, SPAN, **given).report
    assert report is not None
    return report


def held_out(func: Any = damped_wave, y0: Any = Y0) -> Batch:
    config = tdh.FitConfig(rtol=1e-10)
    data = Data(
        References(
            func,
            Plan.of(SPAN, 4, "forward"),
            Tolerances.of(config, torch.float64, Units(0.0, 2.0)),
            Units(0.0, 2.0),
            EULER,
        ),
        Batches(y0, config),
        Budget(math.inf),
        ProcessGroup(),
    )
    return data.held_out


def measured(
    solve: Callable[..., Any], func: Any = damped_wave, calls: int = 8, seconds_left: float = 1e3
) -> BreakEven | str:
    budget: Any = SimpleNamespace(seconds=50.0, max_seconds=50.0 + seconds_left)
    return _break_even.measure(solve, func, held_out(), calls=calls, budget=budget)


def host(method: str, steps: int) -> Callable[..., Tensor]:
    return FIXED[method].with_steps(method, steps).run  # type: ignore[return-value]


def timed(monkeypatch: pytest.MonkeyPatch, own: float, other: float) -> None:
    """Have our solve and every other take a given time."""
    monkeypatch.setattr(
        _break_even, "median_seconds", lambda runs, *a, **k: [own, *[other] * (len(runs) - 1)]
    )


def test_predictions_are_fit_seconds_over_seconds_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 0.010, 0.035)
    found = measured(host("rk4", 3), calls=12)
    assert isinstance(found, BreakEven)
    assert found.predictions == pytest.approx(50.0 / 0.025)
    assert (found.seconds, found.alternative_seconds) == (0.010, 0.035)
    assert found.samples == len(held_out().start(0)) == 14
    assert str(found).startswith("the fit pays after 2,000 predictions")


@pytest.mark.parametrize("other", [0.010, 0.004])
def test_where_nothing_is_saved_there_are_no_predictions(
    monkeypatch: pytest.MonkeyPatch, other: float
) -> None:
    timed(monkeypatch, 0.010, other)
    found = measured(host("rk4", 3), calls=12)
    assert isinstance(found, BreakEven)
    assert found.predictions is None
    assert str(found).startswith("the fit does not pay: nothing is saved")


@pytest.mark.parametrize(("method", "steps"), [("rk4", 2), ("rk4", 3), ("rk4", 7), ("midpoint", 3)])
def test_a_classical_solver_is_matched_by_one_that_takes_no_more_steps(
    monkeypatch: pytest.MonkeyPatch, method: str, steps: int
) -> None:
    raced: list[str] = []
    race = _break_even._race

    def spy(ours: Any, classical: Any, *rest: Any) -> Any:
        raced.extend(solve.label for solve in classical)
        return race(ours, classical, *rest)

    monkeypatch.setattr(_break_even, "_race", spy)
    calls = steps * FIXED[method].each
    assert isinstance(measured(host(method, steps), calls=calls), BreakEven)
    split = [label.split(" with ") for label in raced if "step" in label]
    fewest = {name: int(steps.split()[0]) for name, steps in split}
    assert min(n * FIXED[name].each for name, n in fewest.items()) <= calls
    if method in fewest:
        assert fewest[method] <= steps


def test_the_alternative_is_no_less_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = held_out()
    exact = batch.grids[0].y[-1]
    t = torch.tensor(SPAN, dtype=torch.float64)
    y0 = batch.start(0)[: _break_even.MOST_SAMPLES]
    raced: list[Any] = []
    monkeypatch.setattr(_break_even, "_race", lambda ours, found, *rest: raced.extend(found))
    sizes = held_out().some(torch.arange(len(y0))).end_sizes()

    def error_of(y: Tensor) -> Tensor:
        return ((y - exact[: len(y0)]).norm(dim=1) / sizes).mean()

    target = error_of(odeint(damped_wave, y0, t, method="rk4")[-1])
    measured(lambda func, y0, t: odeint(func, y0, t, method="rk4"), calls=4)
    assert {solve.label.split(" with ")[0] for solve in raced} & set(FIXED)
    assert "dopri5" in raced[-1].label
    for solve in raced:
        assert error_of(solve.run(damped_wave, y0, t)[-1]) <= target, solve.label


def test_the_error_is_the_mean_relative_error_at_the_end() -> None:
    found = measured(host("midpoint", 4))
    assert isinstance(found, BreakEven)
    y0 = held_out().start(0)
    t = torch.tensor(SPAN, dtype=torch.float64)
    exact = odeint(damped_wave, y0, t, rtol=1e-10, atol=1e-10)[-1]
    own = host("midpoint", 4)(damped_wave, y0, t)[-1]
    sizes = exact.norm(dim=1)
    sizes = sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))
    assert found.error == pytest.approx(float(((own - exact).norm(dim=1) / sizes).mean()), rel=1e-6)


def test_without_time_nothing_is_measured() -> None:
    func = Counted(damped_wave)
    found = measured(host("rk4", 3), func, calls=12, seconds_left=-1.0)
    assert isinstance(found, str)
    assert "no time" in found
    assert func.calls == 0


def test_a_solver_that_blows_up_has_no_alternative() -> None:
    found = measured(lambda func, y0, t: torch.full((2, *y0.shape), math.nan))
    assert isinstance(found, str)
    assert "blows up" in found


def test_a_fit_reports_it_and_its_text_shows_it() -> None:
    report = fit(MLPField())
    assert report.break_even is not None
    assert report.break_even.samples == 14
    assert report.break_even.seconds > 0
    assert str(report.break_even) in str(report)


def test_trials_are_not_measured() -> None:
    report = fit(config=tdh.FitConfig(iterations=40))
    assert report.break_even is None
    assert "no break-even: 40 iterations are a trial" in str(report)


def test_half_precision_is_not_measured() -> None:
    config = tdh.FitConfig(iterations=200, pretrain_iterations=200)
    report = fit(y0=Y0.to(torch.bfloat16), steps=1, config=config)
    assert report.break_even is None
    assert "half precision" in report.no_break_even


@pytest.mark.parametrize("direction", ["reverse", "both"])
def test_tuples_ranges_and_reverse_time_are_measured(direction: str) -> None:
    def field(t: Tensor, state: Any) -> Any:
        x, z, _ = coupled(t, (*state, torch.tensor(0.5, dtype=torch.float64)))
        return x, z

    torch.manual_seed(0)
    y0 = (torch.randn(40, 3).double(), torch.randn(40).double())
    config = tdh.FitConfig(iterations=200, patience=40)
    report = fit(field, y0, steps=(2, 4), direction=direction, config=config)
    assert report.break_even is not None


def test_scopes_do_not_answer_for_the_classical_solver() -> None:
    plain = tdh.HyperSolver("euler", zero, steps=1)
    with tdh.override("rk4", plain), tdh.override("dopri5", plain):
        found = measured(host("rk4", 3), calls=12)
    assert isinstance(found, BreakEven)
    assert "euler with 1 " not in found.alternative
    assert found.error < 1e-2


def test_reports_survive_json_and_older_ones_still_load() -> None:
    report = fit(MLPField())
    data = json.loads(json.dumps(report.to_dict()))
    assert tdh.FitReport.from_dict(data) == report
    new = ("break_even", "notes", "no_break_even", "errors", "base_errors", "along", "rival")
    for name in (*new, "worst_time"):
        del data[name]
    older = tdh.FitReport.from_dict(data)
    assert older.break_even is older.errors is older.rival is None
    assert older.notes == ()
    assert "held-out error" in str(older)


def test_an_alternative_is_no_less_accurate_on_all_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_break_even, "SEARCH", math.inf)  # sought on a few
    batch = held_out()
    easy = batch.start(0)[: _break_even.MOST_SAMPLES]  # type: ignore[index]

    def better_on_the_others(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        steps = 4 if torch.equal(y0, easy) else 12
        return FIXED["rk4"].with_steps("rk4", steps).run(func, y0, t)  # type: ignore[return-value]

    found = measured(better_on_the_others, calls=16)
    if isinstance(found, BreakEven):
        own = end_errors(better_on_the_others, damped_wave, batch).mean()
        assert found.error == pytest.approx(float(own))
        name, _, rest = found.alternative.partition(" with ")
        run = FIXED[name].with_steps(name, int(rest.split()[0])).run
        assert end_errors(run, damped_wave, batch).mean() <= own
    else:
        assert "no classical solver is as accurate" in found


def test_a_solver_that_breaks_down_is_no_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dopri5 = _break_even.dopri5

    def broken(tolerance: float, size: float) -> Any:
        def run(func: Any, y0: Any, t: Any) -> Any:
            if len(y0) > _break_even.MOST_SAMPLES:
                message = "underflow in dt 0.0"
                raise AssertionError(message)
            return dopri5(tolerance, size).run(func, y0, t)

        return _break_even.Solve("broken", run)

    monkeypatch.setattr(_break_even, "dopri5", broken)
    found = measured(host("rk4", 3), calls=12)
    assert isinstance(found, BreakEven)
    assert found.alternative != "broken"
