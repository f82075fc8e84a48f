"""A phase whose held-out error has stopped falling anneals and ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.fitting._checkpoint import Store
from torchdiffeq_hyper.hypernets import Linear

Y0 = torch.randn(60, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=800, patience=4)


def fit(config: tdh.FitConfig = CONFIG, **arguments: Any) -> tdh.HyperSolver:
    """Fit a linear net, which is soon as good as it can be."""
    torch.manual_seed(0)
    return tdh.fit(
        damped_wave,
        Y0,
        (0.0, 1.0),
        base="euler",
        steps=3,
        hypernet=Linear(2).double(),
        objective="residual",
        config=config,
        progress=False,
        **arguments,
    )


@pytest.fixture(scope="module")
def cooled_down() -> tdh.FitReport:
    report = fit().report
    assert report is not None
    return report


def test_a_fit_that_gains_nothing_more_ends_early(cooled_down: tdh.FitReport) -> None:
    whole = fit(replace(CONFIG, patience=1000)).report
    assert whole is not None
    assert (cooled_down.stopped, whole.stopped) == ("patience", "iterations")
    assert cooled_down.iterations < 0.7 * whole.iterations
    assert cooled_down.validation < 1.02 * whole.validation


def test_the_rate_is_annealed_before_the_end(cooled_down: tdh.FitReport) -> None:
    errors = [point.validation for point in cooled_down.losses]
    best = min(range(len(errors)), key=errors.__getitem__)
    assert best > len(errors) / 2


def test_the_cooldown_takes_a_quarter_of_the_iterations_done(cooled_down: tdh.FitReport) -> None:
    stalled = [
        after.iteration
        for i, after in enumerate(cooled_down.losses)
        if i >= 4
        and min(p.validation for p in cooled_down.losses[: i - 3])
        < min(p.validation for p in cooled_down.losses[i - 3 : i + 1])
    ]
    assert cooled_down.iterations == -(-stalled[0] * 5 // 4)


def test_a_fit_interrupted_in_its_cooldown_ends_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cooled_down: tdh.FitReport
) -> None:
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    write = Store.write

    def interrupt(self: Store, state: Any) -> None:
        write(self, state)
        if state.training is not None and state.training.cooldown_end is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    report = fit(config).report
    assert report is not None
    assert report.losses == cooled_down.losses
    assert report.stopped == "patience"
