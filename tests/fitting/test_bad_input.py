"""What cannot be fitted is refused, with the reason and a way out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.errors import (
    FitDivergedError,
    NoiseFloorError,
    NoisyFieldError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
)

Y0 = torch.randn(40, 2, generator=torch.Generator().manual_seed(6))
QUICK = tdh.FitConfig(iterations=8, pretrain_iterations=2, swap_every=2)


def fit(func: Any = damped_wave, y0: Any = Y0, span: Any = (0.0, 1.0), **more: Any) -> Any:
    given = {"base": "euler", "steps": 3, "config": QUICK, "progress": False, **more}
    return tdh.fit(func, y0, span, **given)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"base": "eulre"}, 'base="euler"'),
        ({"base": None}, "base is None"),
        ({"base": ["euler"]}, r"base is \['euler'\]"),
        ({"base": "bnss"}, r'"rk4".*"bns"(?s:.*)base="bns"'),
        ({"objective": "residuals"}, 'objective="residual"'),
        ({"objective": None}, "objective is None"),
        ({"direction": "backward"}, '"forward", "reverse", "both"'),
        ({"alpha": 0.5}, "alpha"),
        ({"base": "alpha", "alpha": 0.0}, "alpha is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": None}, "steps is None"),
        ({"steps": (8, 4)}, r"steps is \(8, 4\)"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"span": (0.0, 0.0)}, "t_span"),
        ({"span": (0.0, math.inf)}, "t_span"),
        ({"span": (0.0, math.nan)}, "t_span"),
        ({"span": (0.0, 0.5, 1.0)}, "t_span"),
        ({"span": torch.linspace(0, 1, 3)}, "t_span"),
        ({"span": 1.0}, "t_span"),
        ({"span": "ab"}, "t_span"),
        ({"config": tdh.FitConfig(method="dopri55")}, "dopri55"),
        ({"y0": Y0[:1]}, "1 sample"),
        ({"y0": Y0[:0]}, "empty"),
    ],
)
def test_impossible_options_are_refused(argument: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        fit(**argument)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"func": 3}, "func is a int"),
        ({"hypernet": lambda step: step.y}, "no parameters to fit"),
        ({"hypernet": nn.Identity()}, "no parameter that requires"),
        ({"hypernet": tdh.ConcatHypernet(nn.Linear(5, 2)).requires_grad_(False)}, "requires_grad_"),
        ({"hypernet": tdh.ConcatHypernet(nn.Linear(5, 2).to("meta"))}, "meta"),
        ({"y0": torch.ones(4, 2, dtype=torch.int64)}, "int64"),
        ({"y0": torch.ones(4, 2, dtype=torch.complex64)}, "complex64"),
        ({"y0": None}, "NoneType"),
    ],
)
def test_arguments_of_another_kind_are_refused(argument: dict[str, Any], text: str) -> None:
    with pytest.raises(StateTypeError, match=text):
        fit(**argument)


def test_times_may_come_as_a_tensor() -> None:
    assert fit(span=torch.tensor([0.0, 1.0], requires_grad=True)).domain.span == (0.0, 1.0)


@pytest.mark.parametrize("wrong", [lambda y: y[:1], lambda y: y[:, :1], lambda y: y.sum()])
def test_a_func_of_another_shape_is_refused(wrong: Any) -> None:
    with pytest.raises(StateShapeError, match="func returned shape"):
        fit(lambda t, y: wrong(y))


def test_a_net_of_another_shape_is_refused() -> None:
    with pytest.raises(StateShapeError, match="the hypernet returned shape"):
        fit(hypernet=tdh.ConcatHypernet(nn.Linear(5, 3)))


@pytest.mark.parametrize(
    "noisy",
    [
        lambda t, y: -y + torch.randn_like(y),
        lambda t, y: -y + 0.01 * torch.randn_like(y),
        lambda t, y: torch.cos(t) + y * torch.randn_like(y),
    ],
)
@pytest.mark.parametrize("y0", [Y0, torch.zeros_like(Y0)])
def test_a_noisy_func_is_refused_with_the_remedy(noisy: Any, y0: Tensor) -> None:
    with pytest.raises(NoisyFieldError, match="draw the noise once"):
        fit(noisy, y0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_noise_is_seen_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(NoisyFieldError):
        fit(lambda t, y: -y + 0.3 * torch.randn_like(y), Y0.to(dtype))


def test_dropout_left_on_in_a_closure_is_noise() -> None:
    dropout = nn.Dropout(0.3)
    with pytest.raises(NoisyFieldError):
        fit(lambda t, y: dropout(y) - torch.sin(t))


def test_noise_drawn_once_is_no_noise() -> None:
    noise = torch.randn(2)
    assert fit(lambda t, y: noise - y + torch.sin(t)).report is not None


@pytest.mark.parametrize("base", ["midpoint", "rk4"])
def test_float32_residuals_below_the_noise_are_refused(base: str) -> None:
    steps = {"midpoint": 400, "rk4": 10}[base]
    with pytest.raises(NoiseFloorError, match="already exact to this dtype") as caught:
        fit(lambda t, y: torch.sin(t) - y, base=base, steps=steps)
    assert "float32" in str(caught.value)
    assert "fewer steps" in str(caught.value)


def test_the_same_residuals_stand_above_the_noise_in_float64() -> None:
    report = fit(lambda t, y: torch.sin(t) - y, Y0.double(), base="rk4", steps=10).report
    assert report.noise_floor < 0.1 * report.base_delta["0.5"]


def test_a_base_without_any_error_is_refused() -> None:
    with pytest.raises(NoiseFloorError):
        fit(lambda t, y: torch.ones_like(y), Y0.double(), base="euler")


def test_tolerances_too_loose_for_the_base_are_refused() -> None:
    config = tdh.FitConfig(rtol=0.3, atol=0.3, method="bosh3")
    with pytest.raises(NoiseFloorError, match="bosh3 at rtol 0.3"):
        fit(lambda t, y: 8 * torch.sin(8 * t) - y, Y0.double(), base="rk4", steps=4, config=config)


def test_a_fixed_step_reference_is_judged_by_its_own_error() -> None:
    with pytest.raises(NoiseFloorError):
        fit(y0=Y0.double(), config=tdh.FitConfig(method="euler", iterations=8))
    fitted = fit(y0=Y0.double(), config=tdh.FitConfig(method="rk4", iterations=8))
    assert fitted.report.noise_floor > 0


def test_a_solution_that_blows_up_is_named() -> None:
    with pytest.raises(NonFiniteError, match="reference solution"):
        fit(lambda t, y: y**2 + 1, Y0 + 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_answers_and_starts_are_named(value: float) -> None:
    with pytest.raises(NonFiniteError, match="func returned inf or nan at t = 0"):
        fit(lambda t, y: y * value)
    y0 = Y0.clone()
    y0[3] = value
    with pytest.raises(NonFiniteError, match="y0 holds"):
        fit(y0=y0)


class Explosive(nn.Module):
    """A net whose output turns non-finite at its n-th training call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls = 0
        self.at = at

    def forward(self, step: tdh.StepInput) -> Tensor:
        self.calls += self.training
        assert isinstance(step.y, Tensor)
        return step.y * self.weight + (math.inf if self.calls > self.at else 0.0)


@pytest.mark.parametrize("objective", ["residual", "trajectory"])
def test_a_fit_that_turns_non_finite_names_the_iteration(objective: str) -> None:
    net = Explosive(at=3 * 5)  # three steps an iteration
    with pytest.raises(FitDivergedError, match="non-finite at iteration 5") as caught:
        fit(hypernet=net, objective=objective)
    assert objective in str(caught.value)
    assert "FitConfig(lr=0.001)" in str(caught.value)
    assert torch.equal(net.weight, torch.zeros(2))
    assert net.weight.requires_grad


def test_a_gradient_that_turns_non_finite_is_found() -> None:
    class Cusp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, step: tdh.StepInput) -> Tensor:
            return self.weight.sqrt() * step.y

    with pytest.raises(FitDivergedError, match="the gradient turned non-finite at iteration 0"):
        fit(hypernet=Cusp())


def test_the_last_good_checkpoint_is_kept(tmp_path: Any) -> None:
    path = tmp_path / "fit.pt"
    config = tdh.FitConfig(iterations=8, checkpoint=path)
    with pytest.raises(FitDivergedError):
        fit(hypernet=Explosive(at=3 * 5), objective="trajectory", config=config)
    assert torch.load(path, weights_only=True)["state"]["iteration"] == 5
