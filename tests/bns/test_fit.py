"""Fitting the weights: how much is gained, what is kept, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import MLPField, spiral, spiral_solution
from torchdiffeq_hyper import hypernets
from torchdiffeq_hyper._state import StateLayout
from torchdiffeq_hyper.errors import FileFormatError, FitDivergedError, NoiseFloorError, OptionError
from torchdiffeq_hyper.fitting import _break_even, _data
from torchdiffeq_hyper.fitting._checkpoint import Store
from torchdiffeq_hyper.fitting._chunks import RollOut
from torchdiffeq_hyper.fitting._levenberg_marquardt import (
    damped_step,
    gap_rows,
    packed,
    unpacked,
)
from torchdiffeq_hyper.solvers.bespoke import compositions

SPAN = torch.tensor([0.0, 2.0], dtype=torch.float64)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """A driven pendulum, (..., 2): nonlinear in the state and in time."""
    return torch.stack([y[..., 1], -3 * torch.sin(y[..., 0]) + torch.cos(2 * t)], dim=-1)


def starts(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 3 - 1.5).to(dtype)


def fit(func: Callable[..., Any] = pendulum, y0: Any = None, **arguments: Any) -> tdh.BespokeSolver:
    arguments = {"steps": 6, "config": tdh.FitConfig(iterations=12), **arguments}
    y0 = starts(128, 0) if y0 is None else y0
    span = arguments.pop("t_span", (0.0, 2.0))
    solver = tdh.fit(func, y0, span, base="bns", progress=False, **arguments)
    assert isinstance(solver, tdh.BespokeSolver)
    return solver


@pytest.fixture(scope="module")
def fitted() -> tdh.BespokeSolver:
    return fit(config=tdh.FitConfig(iterations=40))


def error(solver: tdh.HyperSolver, y0: Tensor, t: Tensor = SPAN) -> float:
    exact = odeint(pendulum, y0.double(), t, rtol=1e-9, atol=1e-9)[-1]
    return float((solver.solve(pendulum, y0, t.to(y0))[-1] - exact).norm(dim=1).mean())


def test_a_fit_beats_every_classical_method_of_as_many_calls_tenfold(
    fitted: tdh.BespokeSolver,
) -> None:
    unseen = starts(64, 1)
    classical = [error(tdh.BespokeSolver(w), unseen) for w in compositions(6).values()]
    assert error(fitted, unseen) < min(classical) / 10


def test_fitted_weights_add_up_to_times_in_order(fitted: tdh.BespokeSolver) -> None:
    times = torch.cat([fitted.times, fitted.weights[-1:].sum(1)])
    assert float(times[0]) == 0
    assert float(times[-1]) == pytest.approx(1, abs=1e-12)
    assert bool((times.diff() >= -1e-8).all())
    slope = torch.tensor([1.0, -2.0], dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=torch.float64)
    found = fitted.solve(lambda t, y: slope.expand_as(y), starts(3, 0), t)
    expected = starts(3, 0) + t[:, None, None] * slope
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_what_is_between_the_ends_is_read_off_nearly_as_well(fitted: tdh.BespokeSolver) -> None:
    t, unseen = torch.linspace(0, 2, 13, dtype=torch.float64), starts(64, 1)
    exact = odeint(pendulum, unseen, t, rtol=1e-9, atol=1e-9)
    off = (fitted.solve(pendulum, unseen, t) - exact).norm(dim=2).mean(1)
    assert float(off[-1]) == pytest.approx(error(fitted, unseen))
    assert float(off.max()) < 2 * float(off[-1])


def test_the_report_says_what_was_gained(fitted: tdh.BespokeSolver) -> None:
    report, domain = fitted.report, fitted.domain
    assert report is not None
    assert domain is not None
    assert report.validation < report.base_validation / 10
    assert report.delta["0.5"] < report.base_delta["0.5"] / 10
    assert report.losses[-1].phase == "trajectory"
    assert "best classical start" in report.notes[0]
    assert (domain.span, domain.dt_max, domain.directions) == ((0.0, 2.0), 2.0, (1,))
    assert not any(p.requires_grad for p in fitted.parameters())
    assert tdh.FitReport.from_dict(report.to_dict()) == report


def test_a_fit_of_one_iteration_is_no_worse_than_its_start() -> None:
    for seed in range(3):
        report = fit(y0=starts(16, seed), config=tdh.FitConfig(iterations=1)).report
        assert report is not None
        assert report.validation <= report.base_validation


def test_fits_are_repeatable_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, second = fit(), fit()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.get_buffer("knot_values"), second.get_buffer("knot_values"))


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.0)])
def test_reverse_is_a_fit_of_its_own(span: tuple[float, float]) -> None:
    y0 = starts(128, 0)
    if span[0] > 0:
        y0 = odeint(pendulum, y0, SPAN, rtol=1e-9, atol=1e-9)[-1]
    solver = fit(y0=y0, t_span=span, direction="reverse", config=tdh.FitConfig(iterations=25))
    assert solver.span == (span[1], span[0])
    t = torch.tensor([span[1], span[0]], dtype=torch.float64)
    ends = odeint(pendulum, y0[:16], t.flip(0), rtol=1e-9, atol=1e-9)[-1]
    classical = min(error(tdh.BespokeSolver(w), ends, t) for w in compositions(6).values())
    assert error(solver, ends, t) < classical / 5
    with pytest.raises(OptionError, match="fitted from"):
        solver.solve(pendulum, y0, t.flip(0))


def test_tuple_states_whose_samples_depend_on_each_other_are_fitted_whole() -> None:
    generator = torch.Generator().manual_seed(0)

    def func(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, z = state
        return torch.sin(3 * t) * x.mean(0) - x * z.unsqueeze(1), 100 * torch.cos(z / 100)

    x = torch.rand(48, 3, generator=generator, dtype=torch.float64)
    z = 100 * torch.rand(48, generator=generator, dtype=torch.float64) / 50
    report = fit(func, (x, z), t_span=(0.0, 1.0)).report
    assert report is not None
    assert report.validation < report.base_validation / 5


def test_samples_that_come_to_depend_on_each_other_are_fitted_whole() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        mean = y.mean(0, keepdim=True)
        return torch.sin(2 * y) / 2 + torch.sin(t) * (3 * torch.tanh(2 * mean + 1) - y)

    y0 = starts(800, 0).reshape(100, 16)
    report = fit(func, y0, steps=4).report
    assert report is not None
    assert report.validation < report.base_validation / 2


def test_the_report_says_when_the_fit_has_paid_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_break_even, "LEAST_SECONDS", 600.0)
    report = fit(config=tdh.FitConfig(iterations=25, max_seconds=1e6)).report
    assert report is not None
    paid = report.break_even
    assert paid is not None
    assert report.errors is not None
    assert paid.error == pytest.approx(report.errors.mean, rel=1e-6)
    assert str(paid) in str(report)
    trial = fit().report
    assert trial is not None
    assert trial.break_even is None
    assert "are a trial" in trial.no_break_even


def test_too_few_samples_for_the_weights_are_noted() -> None:
    for count, texts in ((12, ["210 or more"]), (256, [])):
        report = fit(y0=starts(count, 0), config=tdh.FitConfig(iterations=2)).report
        assert report is not None
        found = [note for note in report.notes if "starts unlike them" in note]
        assert len(found) == len(texts)
        assert all(text in note for text, note in zip(texts, found, strict=True))


def test_batches_of_an_iterable_are_fitted() -> None:
    def batches() -> Iterator[list[Tensor]]:
        for seed in range(4):
            yield [starts(24, seed)]

    report = fit(y0=batches()).report
    assert report is not None
    assert report.validation < report.base_validation / 5


def test_a_field_that_autograd_cannot_see_into_is_fitted() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(np.cos(3 * float(t)) - np.sin(y.detach().numpy()) * 2)

    report = fit(func).report
    assert report is not None
    assert report.validation < report.base_validation / 10


def test_float32_is_fitted_to_float32(fitted: tdh.BespokeSolver) -> None:
    solver = fit(y0=starts(128, 0, torch.float32))
    unseen = starts(64, 1, torch.float32)
    classical = min(error(tdh.BespokeSolver(w), unseen) for w in compositions(6).values())
    assert error(solver, unseen) < classical / 5


def test_images_are_fitted_in_chunks() -> None:
    torch.manual_seed(0)
    field = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
    for parameter in field.parameters():
        parameter.data *= 3
    solver = fit(lambda t, y: field(y) * torch.cos(t), torch.randn(64, 3, 6, 6), steps=4)
    assert solver.report is not None
    assert solver.report.validation < solver.report.base_validation / 2


def test_a_correction_on_top_is_fitted_after_the_weights() -> None:
    net = hypernets.MLP(2, inputs=("y", "stages"), n_stages=3).double()
    config = tdh.FitConfig(iterations=300, lr=3e-3)
    solver = fit(steps=3, hypernet=net, config=config, y0=starts(256, 0))
    plain = fit(steps=3, config=config, y0=starts(256, 0))
    assert solver.hypernet is net
    assert not any(p.requires_grad for p in net.parameters())
    unseen = starts(64, 1)
    assert error(solver, unseen) < 0.8 * error(plain, unseen)
    t = torch.linspace(0, 2, 7, dtype=torch.float64)
    found = solver.solve(pendulum, unseen, t)
    torch.testing.assert_close(found[-1], solver.solve(pendulum, unseen, SPAN)[-1])


def test_an_interrupted_fit_goes_on_to_bitwise_the_same_weights(tmp_path: Path) -> None:
    config = tdh.FitConfig(iterations=6, checkpoint=tmp_path / "whole.pt")
    whole = fit(config=config)
    calls = 0

    def failing(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 700:
            raise KeyboardInterrupt
        return pendulum(t, y)

    config = tdh.FitConfig(iterations=6, checkpoint=tmp_path / "cut.pt")
    with pytest.raises(KeyboardInterrupt):
        fit(failing, config=config)
    resumed = fit(config=config)
    assert torch.equal(whole.weights, resumed.weights)
    assert torch.equal(fit(config=config).weights, whole.weights)
    with pytest.raises(OptionError, match="another fit"):
        fit(config=config, steps=5)


def test_saved_solvers_come_back(fitted: tdh.BespokeSolver, tmp_path: Path) -> None:
    path = tmp_path / "bns.safetensors"
    fitted.save(path)
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    for kind in (tdh.Solver, tdh.HyperSolver, tdh.BespokeSolver):
        loaded = kind.load(path)
        assert type(loaded) is tdh.BespokeSolver
        assert (loaded.domain, loaded.report) == (fitted.domain, fitted.report)
        expected = fitted.solve(pendulum, starts(4, 0), t)
        assert torch.equal(loaded.solve(pendulum, starts(4, 0), t), expected)
    with pytest.raises(tdh.errors.BaseMismatchError, match="without a hypernet"):
        tdh.HyperSolver.load(path, nn.Linear(1, 1))
    tdh.HyperSolver("euler", hypernets.MLP(2), steps=2).save(path)
    with pytest.raises(FileFormatError, match="'hypersolver'"):
        tdh.BespokeSolver.load(path)
    assert tdh.HyperSolver.load(path).method == "hypereuler"


def test_saved_corrections_come_back(tmp_path: Path) -> None:
    net = hypernets.MLP(2, inputs=("y", "f0")).double()
    nn.init.ones_(next(reversed(list(net.parameters()))))
    solver = tdh.BespokeSolver(compositions(3)["heun3"], hypernet=net)
    solver.save(tmp_path / "bns.safetensors")
    loaded = tdh.HyperSolver.load(tmp_path / "bns.safetensors")
    expected = solver.solve(spiral, starts(4, 0), SPAN).detach()
    assert torch.equal(loaded.solve(spiral, starts(4, 0), SPAN), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": (4, 8)}, "one number of calls"),
        ({"steps": None}, "one number of calls"),
        ({"steps": 0}, "int of at least 1"),
        ({"alpha": 0.5}, "alpha"),
        ({"direction": "both"}, "serve one way"),
        ({"objective": "residual"}, "no steps"),
        ({"objective": "fast"}, "objective"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        fit(**arguments)


def test_a_field_that_is_solved_exactly_is_refused() -> None:
    with pytest.raises(NoiseFloorError, match="already exact"):
        fit(lambda t, y: torch.ones_like(y))


def test_a_reference_too_loose_for_small_states_is_told_from_exactness() -> None:
    # An absolute tolerance that is given is in the units of the state; the default is not.
    def small(t: Tensor, y: Tensor) -> Tensor:
        return 1e-4 * pendulum(t, y / 1e-4)

    y0 = 1e-4 * starts(128, 0, torch.float32)
    with pytest.raises(NoiseFloorError, match=r"too loose.*\n.*\n.*atol"):
        fit(small, y0, steps=12, config=tdh.FitConfig(iterations=12, atol=1e-6))
    report = fit(small, y0, steps=12, config=tdh.FitConfig(iterations=12)).report
    assert report is not None
    assert report.validation < report.base_validation / 2


def test_a_field_that_every_start_blows_up_on_is_refused() -> None:
    with pytest.raises(FitDivergedError, match="more calls"):
        fit(lambda t, y: -1e3 * y**3, starts(16, 0) * 2)


def test_func_and_hypernet_come_back_as_found_from_a_failed_fit() -> None:
    field, net = MLPField(), hypernets.MLP(2).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    field.train()

    def broken(t: Tensor, y: Tensor) -> Tensor:
        return field(t, y) if float(t) < 1.5 else field(t, y).sum()

    with pytest.raises(tdh.errors.StateShapeError):
        fit(broken, hypernet=net)
    assert field.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_sensitivities_equal_those_of_autograd() -> None:
    n, y0 = 4, starts(3, 0)
    weights = compositions(n)["rk4"] + 0.01 * torch.rand(n, n, dtype=torch.float64).tril()
    task = RollOut(pendulum, StateLayout(None), 0.5, -1.5, y0)
    expected = torch.autograd.functional.jacobian(
        lambda vector: task.end(unpacked(vector, n))[0], packed(weights)
    )
    end, found = task.end_and_sensitivities(weights)
    torch.testing.assert_close(end, task.end(weights)[0])
    torch.testing.assert_close(found, expected.permute(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_sensitivities_of_a_tuple_see_parts_of_unlike_sizes() -> None:
    def func(t: Tensor, flat: Tensor) -> Tensor:
        x, z = flat[:4], flat[4:]
        return torch.cat([torch.sin(x * t) * z / 1e4, 1e4 * torch.cos(x)])

    y0 = torch.cat([torch.rand(4), 1e4 * torch.rand(4)]).double()
    weights = compositions(4)["rk4"]
    task = RollOut(func, StateLayout(((4,), (4,))), 0.0, 1.0, y0)
    expected = torch.autograd.functional.jacobian(
        lambda vector: task.end(unpacked(vector, 4))[0], packed(weights)
    )
    found = task.end_and_sensitivities(weights)[1]
    torch.testing.assert_close(found.t(), expected, rtol=1e-4, atol=1e-4)


def test_steps_stop_at_the_bounds_of_the_times() -> None:
    n, vector = 3, packed(compositions(3)["heun3"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        root = torch.randn(9, 6, generator=generator, dtype=torch.float64)
        gradient = 10 * torch.randn(6, generator=generator, dtype=torch.float64)
        new = damped_step(root.t() @ root, gradient, vector, 1e-3)
        assert new is not None
        gaps = gap_rows(n) @ new
        assert float(gaps.min()) > -1e-8
        assert float(gaps.sum()) == pytest.approx(1)


def test_a_spiral_is_followed_over_a_long_way() -> None:
    y0 = torch.randn(128, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = fit(spiral, y0, steps=8, t_span=(0.0, 3.0), config=tdh.FitConfig(iterations=40))
    t = torch.tensor([0.0, 3.0], dtype=torch.float64)
    found = solver.solve(spiral, starts(8, 3), t)[-1]
    torch.testing.assert_close(found, spiral_solution(t, starts(8, 3))[-1], rtol=0, atol=1e-2)


def test_too_few_calls_for_the_field_are_noted() -> None:
    y0 = torch.linspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
    solver = tdh.fit(
        lambda t, y: 30 * torch.cos(30 * t) * torch.ones_like(y) + 30 * y.sin() ** 3,
        y0,
        (0.0, 1.0),
        base="bns",
        steps=1,
        config=tdh.FitConfig(iterations=3),
        progress=False,
    )
    assert solver.report is not None
    assert any("unusable as it is" in note for note in solver.report.notes)


@pytest.mark.parametrize("has_net", [False, True])
def test_every_save_of_a_descent_is_a_place_to_go_on_from(
    has_net: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit_two_calls(checkpoint: Path | None) -> tdh.BespokeSolver:
        torch.manual_seed(0)
        net = hypernets.MLP(2, inputs=("y",), hidden=(4,)).double() if has_net else None
        iterations = 4 if has_net else 16  # enough to look at more samples
        config = tdh.FitConfig(iterations=iterations, checkpoint=checkpoint)
        return fit(y0=starts(24, 0), steps=2, hypernet=net, config=config)

    straight, write = fit_two_calls(None), Store.write

    def write_and_stop(self: Store, state: Any) -> None:
        write(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", write_and_stop)
    interruptions = 0
    while True:
        try:
            solver = fit_two_calls(tmp_path / "fit.pt")
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions == 1 + (8 if has_net else 16) + 1
    for name, value in straight.state_dict().items():
        assert torch.equal(value, solver.state_dict()[name]), name


def test_no_residuals_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, samples = _data.measure_residuals, []
    monkeypatch.setattr(
        _data, "measure_residuals", lambda *args: samples.append(measured(*args)) or samples[-1]
    )
    assert fit().report is not None
    assert samples
    assert not any(len(each.residual) or each.stages for each in samples)
