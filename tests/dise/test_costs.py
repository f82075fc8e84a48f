"""Costs are those of the two formulas, and refuse what does not belong to the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchdiffeq_hyper.dise import ClassificationCost, Labels, Oracle, RegressionCost
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError

INDEX = torch.arange(3)
LOGITS = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
SOLUTION = torch.stack([torch.zeros_like(LOGITS), LOGITS])


def _labels(nfe: list[list[int]], right: list[list[bool]], weight: Any = 1.0) -> Labels:
    calls = torch.tensor(nfe)
    weights = torch.full(calls.shape, weight) if isinstance(weight, float) else weight
    names = tuple(f"candidate {i}" for i in range(calls.shape[1]))
    return Labels(names, calls, torch.tensor(right), weights)


def test_classification_judges_the_final_state() -> None:
    cost = ClassificationCost(lambda y: y, torch.tensor([0, 0, 0]), 0.3, 1000.0)
    verdict = cost.judge(SOLUTION, INDEX)
    assert verdict.is_right.tolist() == [True, False, True]
    assert verdict.weight.tolist() == [1.0, 1.0, 1.0]


def test_classification_costs_are_calls_or_the_penalty_to_the_power_alpha() -> None:
    labels = _labels([[4, 30], [4, 60]], [[True, True], [False, True]])
    expected = torch.tensor([[4.0, 30.0], [1000.0, 60.0]], dtype=torch.float64) ** 0.3
    torch.testing.assert_close(labels.costs(0.3, 1000.0), expected)


def test_regression_costs_are_calls_times_the_error_to_the_power_alpha() -> None:
    target = torch.tensor([[2.0, 1.0], [0.0, 0.5], [0.0, 0.0]])
    cost = RegressionCost(lambda y, i: (y - target[i]).abs().amax(1), 0.5, 0.5, 100.0)
    verdict = cost.judge(SOLUTION, INDEX)
    assert verdict.is_right.tolist() == [True, True, False]
    labels = Labels(
        ("one",), torch.full((3, 1), 8), verdict.is_right[:, None], verdict.weight[:, None]
    )
    expected = torch.tensor([[0.0], [4.0], [100.0]], dtype=torch.float64) ** 0.5
    torch.testing.assert_close(labels.costs(0.5, 100.0), expected)


def test_an_error_is_given_the_final_state_where_there_are_as_many_times_as_samples() -> None:
    solution = torch.cat([SOLUTION, 2 * LOGITS[None]])
    cost = RegressionCost(lambda y, i: y[..., 0], 10.0, 0.5, 100.0)
    assert cost.judge(solution, INDEX).weight.tolist() == [4.0, 0.0, 6.0]


@pytest.mark.parametrize("n_times", [1, 2, 3, 4])
def test_both_kinds_of_error_are_understood_whatever_the_number_of_times(n_times: int) -> None:
    solution = torch.randn(n_times, 3, 2)
    target = torch.randn(3, 2)
    expected = (solution[-1] - target).norm(dim=1)
    for error in (
        lambda y, i: (y - target[i]).flatten(1).norm(dim=1),
        lambda y, i: (y[-1] - target[i]).flatten(1).norm(dim=1),
    ):
        # Given the final state, y[-1] would be one sample: all times must come first.
        cost = RegressionCost(error, 100.0, 0.5, 1e4)
        torch.testing.assert_close(cost.judge(solution, INDEX).weight, expected)


def test_where_an_error_looks_is_the_end_or_all_times() -> None:
    with pytest.raises(OptionError, match="at is 'start'"):
        RegressionCost(lambda y, i: y, 1.0, 0.5, 100.0, at="start")  # type: ignore[arg-type]


def test_an_error_over_all_times_sees_all_times() -> None:
    shapes: list[Any] = []

    def error(y: Tensor, index: Tensor) -> Tensor:
        shapes.append((tuple(y.shape), index.tolist()))
        return y.abs().amax(dim=(0, 2))

    RegressionCost(error, 1.0, 0.5, 100.0, at="all").judge(SOLUTION, INDEX)
    assert shapes == [((2, 3, 2), [0, 1, 2])]


def test_an_error_that_is_nan_is_not_right() -> None:
    cost = RegressionCost(lambda y, i: y[:, 0] * torch.nan, 1.0, 0.5, 100.0)
    assert not cost.judge(SOLUTION, INDEX).is_right.any()


@pytest.mark.parametrize("alpha", [0.0, -0.3, float("nan"), float("inf"), "0.3", True])
def test_alpha_must_be_above_zero(alpha: Any) -> None:
    with pytest.raises(OptionError, match="alpha is"):
        ClassificationCost(lambda y: y, torch.zeros(3).long(), alpha, 1000.0)
    with pytest.raises(OptionError, match="alpha is"):
        RegressionCost(lambda y, i: y, 0.1, alpha, 1000.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), None])
def test_penalty_and_threshold_must_be_above_zero(value: Any) -> None:
    with pytest.raises(OptionError, match="penalty is"):
        ClassificationCost(lambda y: y, torch.zeros(3).long(), 0.3, value)
    with pytest.raises(OptionError, match="threshold is"):
        RegressionCost(lambda y, i: y, value, 0.3, 1000.0)


def test_a_penalty_below_the_largest_number_of_calls_is_refused() -> None:
    labels = _labels([[4, 30], [4, 60]], [[True, True], [False, True]])
    with pytest.raises(OptionError, match=r"penalty M is 50(?s:.*)candidate 1(?s:.*)60"):
        labels.costs(0.3, 50.0)
    assert labels.costs(0.3, 60.0).shape == (2, 2)


def test_labels_of_another_length_or_kind_are_refused() -> None:
    cost = ClassificationCost(lambda y: y, torch.zeros(4).long(), 0.3, 1000.0)
    with pytest.raises(StateShapeError, match="4 labels and 3 samples"):
        cost.check(3)
    with pytest.raises(StateTypeError, match="float32"):
        ClassificationCost(lambda y: y, torch.zeros(4), 0.3, 1000.0)
    with pytest.raises(StateTypeError, match=r"labels are \[0, 1\]"):
        ClassificationCost(lambda y: y, [0, 1], 0.3, 1000.0)  # type: ignore[arg-type]
    with pytest.raises(StateShapeError, match=r"\(4, 2\)"):
        ClassificationCost(lambda y: y, torch.zeros(4, 2).long(), 0.3, 1000.0)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(StateTypeError, match="predict is a Tensor"):
        ClassificationCost(LOGITS, torch.zeros(3).long(), 0.3, 1000.0)  # type: ignore[arg-type]
    with pytest.raises(StateTypeError, match="error is a float"):
        RegressionCost(0.1, 0.1, 0.3, 1000.0)  # type: ignore[arg-type]


def test_logits_and_errors_of_a_wrong_shape_are_refused() -> None:
    cost = ClassificationCost(lambda y: y[:, 0], torch.zeros(3).long(), 0.3, 1000.0)
    with pytest.raises(StateShapeError, match=r"logits of shape \(batch, classes\)"):
        cost.judge(SOLUTION, INDEX)
    with pytest.raises(StateShapeError, match=r"Gamma of shape \(batch,\)"):
        RegressionCost(lambda y, i: y.mean(), 0.1, 0.3, 1000.0).judge(SOLUTION, INDEX)
    with pytest.raises(OptionError, match="error returned -"):
        RegressionCost(lambda y, i: -y[:, 0], 0.1, 0.3, 1000.0).judge(SOLUTION, INDEX)


def test_fewer_than_two_classes_and_labels_of_other_classes_are_refused() -> None:
    one = ClassificationCost(lambda y: y[:, :1], torch.zeros(3).long(), 0.3, 1000.0)
    with pytest.raises(StateShapeError, match=r"\(3, 1\)"):
        one.judge(SOLUTION, INDEX)
    for wrong in (-1, 2):
        cost = ClassificationCost(lambda y: y, torch.tensor([0, 1, wrong]), 0.3, 1000.0)
        with pytest.raises(OptionError, match="knows 2 classes"):
            cost.judge(SOLUTION, INDEX)


@pytest.mark.parametrize("at", ["end", "all"])
def test_an_error_that_fails_fails_with_its_own_error(at: Any) -> None:
    def broken(y: Tensor, index: Tensor) -> Tensor:
        raise ValueError({2: "end", 3: "all"}[y.dim()])

    with pytest.raises(ValueError, match=at):
        RegressionCost(broken, 0.1, 0.3, 1000.0, at=at).judge(SOLUTION, INDEX)


def test_the_oracle_takes_the_fewest_calls_among_right_answers() -> None:
    labels = _labels(
        [[4, 30, 10], [4, 60, 10], [4, 20, 10], [9, 8, 10]],
        [[True, True, True], [False, True, False], [False, True, True], [False, False, False]],
    )
    choice = labels.oracle()
    assert choice.tolist() == [0, 1, 2, 1]
    oracle = Oracle(labels, choice)
    assert oracle.mean_nfe == (4 + 60 + 10 + 8) / 4
    assert oracle.accuracy == 0.75
    assert oracle.shares == {"candidate 0": 0.25, "candidate 1": 0.5, "candidate 2": 0.25}
