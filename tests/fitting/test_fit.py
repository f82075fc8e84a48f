"""A fit reduces the error on starts it has not seen, whatever the base, state and grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import Counted, MLPField, damped_wave
from torchdiffeq_hyper.fitting import _report
from torchdiffeq_hyper.fitting._objectives import no_correction
from torchdiffeq_hyper.methods._registry import methods

BASES = [method.tableau.name for method in methods().values() if method.corrects_base]
CONFIG = tdh.FitConfig(iterations=160, pretrain_iterations=40, swap_every=5)


def starts(count: int = 96, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def unseen() -> Tensor:
    return starts(50, seed=2)


def swirl(t: Tensor, y: Tensor) -> Tensor:
    """Linear with a clock: y' = A y + sin(2 t)."""
    a = torch.tensor([[-0.5, 2.0], [-2.0, -0.5]], dtype=y.dtype)
    return y @ a.T + torch.sin(2 * t)


def fit(func: Any = swirl, y0: Any = None, span: Any = (0.0, 1.0), **arguments: Any) -> Any:
    given = {"base": "euler", "steps": 5, "config": CONFIG, "progress": False, **arguments}
    return tdh.fit(func, starts() if y0 is None else y0, span, **given)


def gain(solver: Any, func: Any, y0: Any, span: tuple[float, float], steps: int) -> float:
    """Return how many times smaller than the base's the error at the end of the span is."""
    t = torch.linspace(*span, steps + 1, dtype=torch.float64)
    exact = odeint(func, y0, t, rtol=1e-9, atol=1e-9)
    base = tdh.HyperSolver(solver.base, no_correction, alpha=solver.alpha)

    def error(solution: Any) -> float:
        pairs = zip(solution, exact, strict=True) if isinstance(y0, tuple) else [(solution, exact)]
        return sum(float((a[-1] - b[-1]).norm()) for a, b in pairs)

    with torch.no_grad():
        return error(base.solve(func, y0, t)) / error(solver.solve(func, y0, t))


@pytest.mark.parametrize("base", BASES)
def test_a_fit_reduces_the_error_of_every_base(base: str) -> None:
    solver = fit(base=base)
    assert solver.base == base
    assert gain(solver, swirl, unseen(), (0.0, 1.0), 5) > 8


@pytest.mark.parametrize("objective", ["combined", "residual", "trajectory"])
def test_every_objective_reduces_the_error(objective: str) -> None:
    solver = fit(objective=objective, base="heun")
    assert gain(solver, swirl, unseen(), (0.0, 1.0), 5) > 5
    phases = [point.phase for point in solver.report.losses]
    expected = {"residual", "trajectory"} if objective == "combined" else {objective}
    assert set(phases) == expected
    assert phases == sorted(phases)


def test_a_nonlinear_learned_field_is_fitted() -> None:
    func = MLPField(width=32)
    solver = fit(func, base="heun")
    assert gain(solver, func, unseen(), (0.0, 1.0), 5) > 4


@pytest.mark.parametrize("base", ["euler", "heun"])
def test_reverse_fits_the_way_back_from_the_ends(base: str) -> None:
    solver = fit(base=base, direction="reverse")
    ends = odeint(swirl, unseen(), torch.tensor([0.0, 1.0]).double(), rtol=1e-9, atol=1e-9)[-1]
    assert gain(solver, swirl, ends, (1.0, 0.0), 5) > 8
    assert solver.domain.directions == (-1,)
    assert solver.domain.span == (0.0, 1.0)


@pytest.mark.parametrize("base", ["euler", "heun"])
def test_both_fits_one_net_for_the_two_ways(base: str) -> None:
    solver = fit(base=base, direction="both", config=tdh.FitConfig(iterations=300))
    ends = odeint(swirl, unseen(), torch.tensor([0.0, 1.0]).double(), rtol=1e-9, atol=1e-9)[-1]
    assert gain(solver, swirl, unseen(), (0.0, 1.0), 5) > 5
    assert gain(solver, swirl, ends, (1.0, 0.0), 5) > 5
    assert solver.domain.directions == (1, -1)


def test_spans_may_decrease() -> None:
    solver = fit(span=(1.0, 0.0))
    assert gain(solver, swirl, unseen(), (1.0, 0.0), 5) > 8
    assert solver.domain.directions == (-1,)


def test_a_range_of_steps_is_fitted_by_one_net() -> None:
    solver = fit(steps=(3, 9), config=tdh.FitConfig(iterations=300))
    for steps in (3, 5, 7, 9):
        assert gain(solver, swirl, unseen(), (0.0, 1.0), steps) > 5
    assert solver.steps == (3, 9)
    assert solver.domain.dt_min == pytest.approx(1 / 9)
    assert solver.domain.dt_max == pytest.approx(1 / 3)


def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A state and a log-density-like scalar that follows it."""
    x, z = state
    return swirl(t, x) * torch.cos(z).unsqueeze(-1), torch.tanh(x.sum(-1)) - t * z


def test_tuple_states_are_fitted_whole() -> None:
    solver = fit(pair, (starts(), starts()[:, 0]), base="heun")
    fresh = (unseen(), unseen()[:, 0])
    assert gain(solver, pair, fresh, (0.0, 1.0), 5) > 4
    assert solver.domain.is_tuple
    assert solver.domain.shapes == ((2,), ())


def loader() -> Any:
    return DataLoader(TensorDataset(starts()), batch_size=32)


def generator() -> Iterator[Tensor]:
    yield from starts().split(32)


def batches() -> Any:
    return [list(part) for part in zip(starts().split(32), strict=True)]


@pytest.mark.parametrize("source", [loader, generator, batches])
def test_iterables_of_batches_are_fitted(source: Any) -> None:
    solver = fit(y0=source())
    assert gain(solver, swirl, unseen(), (0.0, 1.0), 5) > 8
    assert not solver.domain.is_tuple


def test_the_fitted_solver_serves_odeint_by_its_method_name() -> None:
    solver = fit(base="heun")
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with tdh.using(solver), torch.no_grad():
        through_host = odeint(swirl, unseen(), t, method=solver.method)
        torch.testing.assert_close(through_host, solver.solve(swirl, unseen(), t))


def test_float32_data_give_a_float32_solver() -> None:
    solver = fit(y0=starts().float())
    assert {p.dtype for p in solver.parameters()} == {torch.float32}
    assert solver.domain.dtype == "float32"


def test_bfloat16_states_are_fitted_in_float32() -> None:
    solver = fit(damped_wave, starts().bfloat16(), steps=4)
    assert {p.dtype for p in solver.parameters()} == {torch.float32}
    assert solver.report.validation < solver.report.base_validation / 2


def test_the_solver_comes_frozen_in_evaluation_mode() -> None:
    solver = fit()
    assert not solver.training
    assert not any(p.requires_grad for p in solver.parameters())
    assert all(p.grad is None for p in solver.parameters())
    solver.requires_grad_()
    assert all(p.requires_grad for p in solver.parameters())


def test_a_net_of_ones_own_is_trained_in_place() -> None:
    net = tdh.ConcatHypernet(nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 2)).double())
    frozen = net.net[0].bias
    frozen.requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    solver = fit(hypernet=net)
    assert solver.hypernet is net
    assert torch.equal(frozen, before[1])
    assert not torch.equal(net.net[0].weight, before[0])
    assert gain(solver, swirl, unseen(), (0.0, 1.0), 5) > 3


def test_a_fitted_net_is_fitted_on_from_where_it_is() -> None:
    first = fit()
    net = first.hypernet.requires_grad_()
    scale = net.net.output_scale.clone()
    again = fit(span=(0.0, 1.2), hypernet=net, config=tdh.FitConfig(iterations=2, lr=1e-9))
    assert torch.equal(net.net.output_scale, scale)
    assert again.report.validation < again.report.base_validation / 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fits_work_where_gradients_are_off(context: Any) -> None:
    with context():
        solver = fit(y0=starts() + 0)
    assert solver.report.validation < solver.report.base_validation / 5


def test_same_seed_gives_the_same_bits() -> None:
    first, again = fit(), fit()
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.report.losses == again.report.losses


def test_other_seeds_give_other_nets() -> None:
    other = fit(config=tdh.FitConfig(iterations=160, pretrain_iterations=40, swap_every=5, seed=9))
    weights = [torch.cat([p.flatten() for p in s.parameters()]) for s in (fit(), other)]
    assert not torch.equal(*weights)


def test_an_overridden_method_does_not_serve_the_references() -> None:
    plain = fit()
    coarse = tdh.HyperSolver("euler", no_correction, steps=1)
    with tdh.override("dopri5", coarse):
        inside = fit()
    assert inside.report.losses == plain.report.losses


def test_the_residual_phase_does_not_call_func(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report, "best_classical", lambda *a, **k: None)  # as many as end in time
    calls = []
    for iterations in (40, 80):  # as many validations, one batch
        func = Counted(swirl)
        config = tdh.FitConfig(iterations=iterations, pretrain_iterations=80)
        fit(func, objective="residual", config=config)
        calls.append(func.calls)
    assert calls[0] == calls[1]


def test_each_batch_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report, "best_classical", lambda *a, **k: None)  # as many as end in time
    calls = []
    for iterations in (40, 80):
        func = Counted(swirl)
        config = tdh.FitConfig(iterations=iterations, pretrain_iterations=0, swap_every=2)
        fit(func, objective="residual", config=config)
        calls.append(func.calls)
    assert calls[0] == calls[1]


def test_without_improvement_the_result_is_the_base() -> None:
    config = tdh.FitConfig(iterations=30, lr=30.0, patience=2)
    solver = fit(config=config, base="heun")
    assert solver.report.stopped == "patience"
    assert solver.report.validation == solver.report.base_validation
    assert "no better than the base" in solver.report.notes[0]
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    base = tdh.HyperSolver("heun", no_correction, steps=5)
    assert torch.equal(solver.solve(swirl, unseen(), t), base.solve(swirl, unseen(), t))


def test_progress_is_shown_unless_it_is_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    fit(progress=False)
    assert capsys.readouterr().err == ""
    fit(progress=True)
    shown = capsys.readouterr().err
    assert "fit hypereuler" in shown
    assert "160/160" in shown
    assert "held-out error" in shown
