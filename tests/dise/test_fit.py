"""Fitting a selector: what it learns, reports and warns of, and what it leaves alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from torchdiffeq_hyper.dise import (
    Candidate,
    ClassificationCost,
    Dise,
    Labels,
    RegressionCost,
    SelectorConfig,
    selectors,
)
from torchdiffeq_hyper.dise._report import one_candidate
from torchdiffeq_hyper.errors import (
    FitDivergedError,
    NonFiniteError,
    OneCandidateWarning,
    OptionError,
    StateShapeError,
    StateTypeError,
)

T = torch.tensor([0.0, 1.0])
QUICK = SelectorConfig(iterations=200, lr=1e-2)


def whirl(t: Tensor, y: Tensor) -> Tensor:
    """Turn the faster, the farther out: far samples need many steps."""
    quarter_turn = torch.stack([-y[:, 1], y[:, 0]], dim=1)
    return (1 + torch.sin(t)) * y.norm(dim=1, keepdim=True) * quarter_turn


def _starts(batch: int = 240, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(batch, 2, generator=generator)


Y0 = _starts()
END = odeint(whirl, Y0, T, rtol=1e-6, atol=1e-6)[-1]


def _error(y: Tensor, index: Tensor) -> Tensor:
    """Return 1 where the end is near enough, else 2: then a cost is a number of calls."""
    return 1.0 + ((y - END[index]).norm(dim=1) > 0.1)


COST = RegressionCost(_error, threshold=1.0, alpha=0.5, penalty=200.0)


def _candidates() -> list[Candidate]:
    return [Candidate("rk4", steps=1), Candidate("rk4", steps=3), Candidate("dopri5", rtol=1e-3)]


def _fitted(**more: Any) -> Dise:
    arguments = {"cost": COST, "config": QUICK, "progress": False, **more}
    return Dise(_candidates(), arguments.pop("selector", None)).fit(whirl, Y0, T, **arguments)


@pytest.fixture(scope="module")
def fitted() -> Dise:
    with torch.random.fork_rng():
        return _fitted()


def test_a_fitted_selector_is_near_the_oracle_and_better_than_any_candidate(fitted: Dise) -> None:
    report = fitted.report
    assert report is not None
    assert report.nfe.shape == report.costs.shape == (240, 3)
    assert len(report.held_out) == 48
    assert report.accuracy >= 0.9
    assert 0 <= report.regret < -report.regret_to_single
    assert report.regret_to_single < 0
    assert sum(report.shares.values()) == pytest.approx(1.0)
    assert max(report.shares.values()) < 0.8
    text = str(report)
    for name in ("| selector ", "| oracle ", "rk4, 3 steps", "regret", report.best_single):
        assert name in text


def test_unseen_samples_go_the_right_way_through_odeint(fitted: Dise) -> None:
    y0 = _starts(100, seed=1)
    y = odeint(whirl, y0, T, method="dise", options={"dise": fitted})
    error = (y[-1] - odeint(whirl, y0, T, rtol=1e-6, atol=1e-6)[-1]).norm(dim=1)
    assert float((error <= 0.1).float().mean()) >= 0.9
    far = fitted.select(y0) == 2
    assert y0[far].norm(dim=1).mean() > 1.3 * y0[~far].norm(dim=1).mean()


def test_predictions_come_in_the_unit_of_the_costs(fitted: Dise) -> None:
    assert fitted.report is not None
    held = fitted.report.held_out
    predicted, costs = fitted.predicted_costs(Y0)[held], fitted.report.costs[held]
    residual = (predicted - costs).square().mean()
    assert residual < 0.5 * (costs - costs.mean()).square().mean()
    assert torch.equal(predicted.argmin(1), fitted.select(Y0)[held])
    assert torch.equal(fitted.selector(Y0).argmin(1), fitted.select(Y0))


def test_the_best_state_on_held_out_samples_is_kept(fitted: Dise) -> None:
    assert fitted.report is not None
    held, unit = fitted.report.held_out, fitted.unit
    targets = (fitted.report.costs[held] - unit.shift) / unit.scale
    loss = float((fitted.selector(Y0[held]) - targets).square().mean())
    assert loss == pytest.approx(min(point[2] for point in fitted.report.losses), rel=1e-5)


def test_a_fit_is_repeatable_and_touches_no_global_random_state() -> None:
    before = torch.get_rng_state()
    first, second = (_fitted(config=SelectorConfig(iterations=100, lr=1e-2)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.predicted_costs(Y0), second.predicted_costs(Y0))
    other = _fitted(config=SelectorConfig(iterations=100, lr=1e-2, seed=1))
    assert not torch.equal(first.predicted_costs(Y0), other.predicted_costs(Y0))


def test_the_selector_ends_frozen_and_stays_in_evaluation_mode(fitted: Dise) -> None:
    dise = copy.deepcopy(fitted)
    assert not any(p.requires_grad for p in dise.selector.parameters())
    dise.train()
    assert not any(module.training for module in dise.selector.modules())


class _Image(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) * torch.roll(y, 1, -1) - y


def test_image_states_get_a_residual_convolutional_selector() -> None:
    y0 = torch.randn(24, 3, 6, 6)
    reference = odeint(_Image(), y0, T)[-1]
    cost = RegressionCost(
        lambda y, i: (y - reference[i]).flatten(1).abs().amax(1), 2e-3, 0.5, 100.0
    )
    dise = Dise([Candidate("rk4", steps=2), Candidate("rk4", steps=6)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OneCandidateWarning)
        dise.fit(_Image(), y0, T, cost=cost, config=SelectorConfig(iterations=20), progress=False)
    assert isinstance(dise.selector, selectors.ResidualConv)
    assert dise.select(y0).shape == (24,)


def test_a_module_of_ones_own_is_fitted_in_place() -> None:
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    dise = _fitted(selector=net)
    assert dise.selector is net
    assert dise.report is not None
    assert dise.report.losses[-1][2] < 0.8


def test_labels_can_be_used_again(fitted: Dise) -> None:
    assert fitted.report is not None
    labels = fitted.report.labels
    again = Dise(_candidates()).fit(
        None, Y0, T, cost=COST, labels=labels, config=QUICK, progress=False
    )  # type: ignore[arg-type]
    assert torch.equal(again.predicted_costs(Y0), fitted.predicted_costs(Y0))
    with pytest.raises(OptionError, match="labels are of 240 samples and 3 candidates"):
        Dise(_candidates()[:2]).fit(whirl, Y0, T, cost=COST, labels=labels, progress=False)


def test_a_middling_candidate_for_all_may_be_moved_either_way() -> None:
    right = torch.tensor([[True, True, True], [False, False, True], [False, True, True]])
    nfe = torch.tensor([[4, 8, 40]]).expand(3, 3)
    labels = Labels(("cheap", "middling", "dear"), nfe, right, torch.ones(3, 3))
    text = one_candidate(labels, 1, 0.3, 1e3)
    assert "'middling'" in text
    assert "penalty M down from 1000 (towards the largest NFE, 40)" in text
    assert "penalty M up (penalty=10000)" in text


class _Constant(nn.Module):
    """A selector that does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = nn.Parameter(torch.zeros(2))

    def forward(self, y0: Tensor) -> Tensor:
        return self.costs.expand(len(y0), 2)


def test_a_selector_that_takes_one_candidate_for_all_says_which_way_to_move() -> None:
    coin = torch.rand(240, generator=torch.Generator().manual_seed(0)) < 0.5

    def predict(y: Tensor) -> Tensor:
        wrong = ((y - END).norm(dim=1) > 0.1) & coin
        return torch.stack([(~wrong).float(), wrong.float()], dim=1)

    def fit(predict: Any, alpha: float, penalty: float) -> str:
        cost = ClassificationCost(predict, torch.zeros(240).long(), alpha, penalty)
        dise = Dise([Candidate("euler", steps=1), Candidate("rk4", steps=12)], _Constant())
        with pytest.warns(OneCandidateWarning) as caught:
            dise.fit(whirl, Y0, T, cost=cost, config=QUICK, progress=False)
        return str(caught[0].message)

    dear = fit(predict, 0.5, 1e5)
    assert "rk4, 12 steps" in dear
    assert "penalty M down" in dear
    assert "M up" not in dear
    cheap = fit(predict, 0.2, 50.0)
    assert "euler, 1 step" in cheap
    assert "penalty M up" in cheap
    assert "M down" not in cheap
    same = fit(lambda y: torch.eye(2)[torch.zeros(len(y)).long()], 0.3, 1e3)
    assert "nothing to select" in same


def test_suggest_sweeps_alpha_and_m_and_leaves_the_dise_as_it_is() -> None:
    dise = Dise(_candidates())
    curve = dise.suggest(
        whirl, Y0, T, cost=COST, alphas=[0.1, 1.0], penalties=[110.0, 1e4], config=QUICK,
        progress=False,
    )  # fmt: skip
    assert dise.selector is None
    assert {(p.alpha, p.penalty) for p in curve.points} == {
        (0.1, 110.0), (0.1, 1e4), (1.0, 110.0), (1.0, 1e4)
    }  # fmt: skip
    nfe = [point.mean_nfe for point in curve.points]
    assert nfe == sorted(nfe)
    by_setting = {(p.alpha, p.penalty): p for p in curve.points}
    assert by_setting[1.0, 1e4].mean_nfe > by_setting[0.1, 110.0].mean_nfe
    assert by_setting[1.0, 1e4].accuracy >= by_setting[0.1, 110.0].accuracy
    assert [name for name, _, _ in curve.singles] == list(curve.labels.names)
    assert curve.oracle[1] >= max(right for _, _, right in curve.singles)
    assert "| alpha 1, M 10000 " in str(curve)
    refitted = dise.fit(whirl, Y0, T, cost=COST, labels=curve.labels, config=QUICK, progress=False)
    assert refitted.report is not None
    assert refitted.report.label_seconds < refitted.report.seconds


def test_suggest_takes_penalties_from_the_dearest_right_answer() -> None:
    cost = ClassificationCost(lambda y: y, (END[:, 1] > END[:, 0]).long(), 0.3, 1e3)
    dise = Dise([Candidate("rk4", steps=1), Candidate("rk4", steps=8)])
    curve = dise.suggest(
        whirl, Y0, T, cost=cost, alphas=[0.3], config=SelectorConfig(iterations=5), progress=False
    )
    assert {p.penalty for p in curve.points} == {1.5 * 32, 10 * 32, 100 * 32}


# Bad input.


@pytest.mark.parametrize("batch", [0, 1])
def test_too_few_samples_are_refused(batch: int) -> None:
    with pytest.raises(OptionError, match=rf"y0 has {batch} sample"):
        Dise(_candidates()).fit(whirl, Y0[:batch], T, cost=COST, progress=False)
    with pytest.raises(OptionError, match=rf"y0 has {batch} sample"):
        Dise(_candidates()).suggest(whirl, Y0[:batch], T, cost=COST, progress=False)


def test_a_penalty_smaller_than_the_largest_number_of_calls_is_refused() -> None:
    cost = ClassificationCost(lambda y: y, torch.zeros(240).long(), 0.3, 20.0)
    with pytest.raises(OptionError, match="penalty M is 20"):
        Dise(_candidates()).fit(whirl, Y0, T, cost=cost, progress=False)


def test_labels_of_another_length_are_refused() -> None:
    cost = ClassificationCost(lambda y: y, torch.zeros(99).long(), 0.3, 1e3)
    with pytest.raises(StateShapeError, match="99 labels and 240 samples"):
        Dise(_candidates()).fit(whirl, Y0, T, cost=cost, progress=False)


def test_a_selector_with_a_wrong_number_of_outputs_is_refused_and_left_as_it_was() -> None:
    net = nn.Linear(2, 4)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(StateShapeError, match=r"\(1, 4\)(?s:.*)3 outputs"):
        _fitted(selector=net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_selector_that_turns_non_finite_is_refused() -> None:
    with pytest.raises((NonFiniteError, FitDivergedError)):
        _fitted(selector=nn.Linear(2, 3), config=SelectorConfig(iterations=50, lr=1e30))


def test_a_function_cannot_be_fitted() -> None:
    with pytest.raises(StateTypeError, match="nothing to fit"):
        _fitted(selector=lambda y0: y0)


def test_a_parameterless_module_is_refused_before_anything_is_solved() -> None:
    def unreachable(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError

    dise = Dise([Candidate("euler"), Candidate("rk4")], nn.Identity())
    for method in (dise.fit, dise.suggest):
        with pytest.raises(StateTypeError, match="nothing to fit"):
            method(unreachable, Y0, T, cost=COST, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"batch_size": 0},
        {"validation": 1.0},
        {"validation": 0},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(OptionError, match=f"{name} is"):
        SelectorConfig(**settings)
