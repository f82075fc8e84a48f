"""What a fit reports is what it did, measured on samples it has not fitted on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from stubs import Counted, damped_wave
from torchdiffeq_hyper.fitting._batches import Batches
from torchdiffeq_hyper.fitting._objectives import no_correction

Y0 = torch.randn(80, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=160, pretrain_iterations=40, swap_every=5)


def fit(func: Any = damped_wave, y0: Any = Y0, **arguments: Any) -> tdh.HyperSolver:
    given = {"base": "heun", "steps": 4, "config": CONFIG, "progress": False, **arguments}
    return tdh.fit(func, y0, (0.0, 2.0), **given)


@pytest.fixture(scope="module")
def solver() -> tdh.HyperSolver:
    return fit()


def held_out_error(solver: tdh.HyperSolver, hypernet: Any) -> float:
    """Return the mean relative error over held-out samples and steps, from a 1e-10 solve."""
    from torchdiffeq import odeint

    held_out = Batches(Y0, CONFIG).held_out.y0
    assert isinstance(held_out, Tensor)
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    exact = odeint(damped_wave, held_out, t, rtol=1e-10, atol=1e-10)
    rolled = tdh.HyperSolver(solver.base, hypernet).solve(damped_wave, held_out, t)
    sizes = exact.norm(dim=-1)
    sizes = sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))
    return float(((rolled - exact).norm(dim=-1) / sizes)[1:].mean())


def test_validation_is_the_error_on_held_out_samples(solver: tdh.HyperSolver) -> None:
    assert solver.report is not None
    fitted = held_out_error(solver, solver.hypernet)
    assert solver.report.validation == pytest.approx(fitted, rel=1e-5)
    base = held_out_error(solver, no_correction)
    assert solver.report.base_validation == pytest.approx(base, rel=1e-5)


def test_the_best_state_is_kept(solver: tdh.HyperSolver) -> None:
    assert solver.report is not None
    best = min(point.validation for point in solver.report.losses)
    assert solver.report.validation == best


def test_delta_shrinks_at_every_quantile(solver: tdh.HyperSolver) -> None:
    report = solver.report
    assert report is not None
    assert list(report.delta) == ["0.5", "0.9", "0.99", "max"]
    for quantile, value in report.delta.items():
        assert value < report.base_delta[quantile] / 2
    assert list(report.delta.values()) == sorted(report.delta.values())


def test_base_delta_holds_the_size_of_the_residuals() -> None:
    # y' = t has y(t+dt) - y(t) - dt * t = dt^2 / 2: R = 1/2 in each of two components.
    report = fit(lambda t, y: t.expand_as(y), base="euler", config=tdh.FitConfig(iterations=40))
    assert report.report is not None
    for value in report.report.base_delta.values():
        assert value == pytest.approx(math.sqrt(0.5), rel=1e-6)


def test_the_history_has_a_point_a_validation(solver: tdh.HyperSolver) -> None:
    report = solver.report
    assert report is not None
    assert [p.iteration for p in report.losses if p.phase == "residual"] == list(range(1, 41))
    assert [p.iteration for p in report.losses if p.phase == "trajectory"] == list(
        range(43, 161, 3)
    )
    assert report.iterations == 160
    assert report.stopped == "iterations"
    assert report.losses[-1].train < report.losses[0].train


def test_the_cost_of_the_references_is_counted() -> None:
    func = Counted(damped_wave)
    report = fit(func, objective="residual", config=tdh.FitConfig(iterations=2)).report
    assert report is not None
    assert 0 < report.reference_nfe < func.calls
    assert 0 < report.reference_seconds < report.seconds


def test_the_noise_floor_is_far_below_the_residuals(solver: tdh.HyperSolver) -> None:
    assert solver.report is not None
    assert 0 < solver.report.noise_floor < 1e-3 * solver.report.base_delta["0.5"]


def test_reports_survive_json(solver: tdh.HyperSolver) -> None:
    assert solver.report is not None
    again = tdh.FitReport.from_dict(json.loads(json.dumps(solver.report.to_dict())))
    assert again == solver.report


def test_the_domain_is_what_was_fitted(solver: tdh.HyperSolver) -> None:
    assert solver.domain == tdh.FitDomain((0.0, 2.0), 0.5, 0.5, (1,), ((2,),), False, "float64")
    assert solver.steps == 4


def test_an_unstable_base_is_fitted_without_roll_outs_only() -> None:
    def stiff(t: Tensor, y: Tensor) -> Tensor:
        return -1e3 * (y - torch.sin(t)) ** 3

    report = fit(stiff, y0=Y0 * 3, steps=8, objective="residual").report
    assert report is not None
    assert report.validation < report.base_validation
    with pytest.raises(tdh.HyperError, match="so does the base alone"):
        fit(stiff, y0=Y0 * 3, steps=8, objective="trajectory")
