"""The report says what a prediction saves, and against which classical solver."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, MLPField, coupled, damped_wave
from torchdiffeq_hyper._report import BreakEven
from torchdiffeq_hyper.fitting import break_even
from torchdiffeq_hyper.fitting.batches import Batches
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.data import Batch, Data
from torchdiffeq_hyper.fitting.distributed import Team
from torchdiffeq_hyper.fitting.reference import Tolerances
from torchdiffeq_hyper.fitting.routes import Plan
from torchdiffeq_hyper.tableaus import EULER

Y0 = torch.randn(90, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=200, patience=40)
SPAN = (0.0, 2.0)


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "LEAST_SECONDS", 60.0)


def fit(func: Any = damped_wave, y0: Any = Y0, **arguments: Any) -> tdh.FitReport:
    given = {"base": "euler", "steps": 4, "config": CONFIG, "progress": False, **arguments}
    report = tdh.fit(func, y0, SPAN, **given).report
    assert report is not None
    return report


def held_out(func: Any = damped_wave, y0: Any = Y0) -> Batch:
    config = tdh.FitConfig(rtol=1e-10)
    data = Data(
        func,
        Batches(y0, config),
        tableau=EULER,
        plan=Plan.of(SPAN, 4, "forward"),
        tolerances=Tolerances.of(config, torch.float64),
        budget=Budget(math.inf),
        team=Team(),
    )
    return data.held_out


def measured(
    solve: Callable[..., Any], func: Any = damped_wave, calls: int = 8, **arguments: Any
) -> BreakEven | None:
    given = {"fit_seconds": 50.0, "seconds_left": 1e3, **arguments}
    return break_even.measure(solve, func, held_out(), calls=calls, **given)


def host(method: str, steps: int) -> Callable[..., Tensor]:
    return break_even.fixed(method, steps).run  # type: ignore[return-value]


def timed(monkeypatch: pytest.MonkeyPatch, own: float, other: float) -> None:
    """Have our solve and every other take a given time."""
    monkeypatch.setattr(
        break_even, "median_seconds", lambda runs, *a, **k: [own, *[other] * (len(runs) - 1)]
    )


def test_predictions_are_fit_seconds_over_seconds_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 0.010, 0.035)
    found = measured(host("rk4", 3), calls=12)
    assert found is not None
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
    assert found is not None
    assert found.predictions is None
    assert str(found).startswith("nothing is saved: ")


@pytest.mark.parametrize(("method", "steps"), [("rk4", 2), ("rk4", 3), ("rk4", 7), ("midpoint", 3)])
def test_a_classical_solver_is_matched_by_one_that_takes_no_more_steps(
    monkeypatch: pytest.MonkeyPatch, method: str, steps: int
) -> None:
    raced: list[str] = []
    race = break_even._race

    def spy(ours: Any, rivals: Any, *rest: Any) -> Any:
        raced.extend(rival.label for rival in rivals)
        return race(ours, rivals, *rest)

    monkeypatch.setattr(break_even, "_race", spy)
    calls = steps * break_even.FIXED[method][0]
    assert measured(host(method, steps), calls=calls) is not None
    fewest = {label.split()[0]: int(label.split()[2]) for label in raced if "step" in label}
    assert min(n * break_even.FIXED[name][0] for name, n in fewest.items()) <= calls
    if method in fewest:
        assert fewest[method] <= steps


def test_the_alternative_is_no_less_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = held_out()
    exact = batch.routes[0].y[-1]
    t = torch.tensor(SPAN, dtype=torch.float64)
    y0 = batch.start(0)[: break_even.MOST_SAMPLES]
    raced: list[Any] = []
    monkeypatch.setattr(break_even, "_race", lambda ours, rivals, *rest: raced.extend(rivals))
    target = (odeint(damped_wave, y0, t, method="rk4")[-1] - exact[: len(y0)]).norm(dim=1).mean()
    measured(lambda func, y0, t: odeint(func, y0, t, method="rk4"), calls=4)
    assert {rival.label.split()[0] for rival in raced} & set(break_even.FIXED)
    assert "dopri5" in raced[-1].label
    for rival in raced:
        error = (rival.run(damped_wave, y0, t)[-1] - exact[: len(y0)]).norm(dim=1).mean()
        assert error <= target, rival.label


def test_the_error_is_the_mean_l2_error_at_the_end() -> None:
    found = measured(host("midpoint", 4))
    assert found is not None
    y0 = held_out().start(0)
    t = torch.tensor(SPAN, dtype=torch.float64)
    exact = odeint(damped_wave, y0, t, rtol=1e-10, atol=1e-10)[-1]
    own = host("midpoint", 4)(damped_wave, y0, t)[-1]
    assert found.error == pytest.approx(float((own - exact).norm(dim=1).mean()), rel=1e-6)


def test_without_time_nothing_is_measured() -> None:
    func = Counted(damped_wave)
    assert measured(host("rk4", 3), func, calls=12, seconds_left=-1.0) is None
    assert func.calls == 0


def test_a_solver_that_blows_up_has_no_alternative() -> None:
    assert measured(lambda func, y0, t: torch.full((2, *y0.shape), math.nan)) is None


def test_a_fit_reports_it_and_its_text_shows_it() -> None:
    report = fit(MLPField())
    assert report.break_even is not None
    assert report.break_even.samples == 14
    assert report.break_even.seconds > 0
    assert str(report.break_even) in str(report)


def test_trials_are_not_measured() -> None:
    assert fit(config=tdh.FitConfig(iterations=40)).break_even is None


def test_half_precision_is_not_measured() -> None:
    config = tdh.FitConfig(iterations=200, pretrain_iterations=200)
    assert fit(y0=Y0.to(torch.bfloat16), steps=1, config=config).break_even is None


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
    assert found is not None
    assert "euler with 1 " not in found.alternative
    assert found.error < 1e-2


def test_reports_survive_json_and_older_ones_still_load() -> None:
    report = fit(MLPField())
    data = json.loads(json.dumps(report.to_dict()))
    assert tdh.FitReport.from_dict(data) == report
    del data["break_even"], data["notes"]
    older = tdh.FitReport.from_dict(data)
    assert older.break_even is None
    assert older.notes == ()
