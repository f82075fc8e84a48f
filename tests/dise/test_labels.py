"""Labels: every sample solved alone, whatever the others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import MLPField, spiral
from torchdiffeq_hyper.dise import Candidate, ClassificationCost, Dise, Labels, RegressionCost
from torchdiffeq_hyper.errors import (
    CoupledSamplesError,
    NoisyFieldError,
    OptionError,
    StateShapeError,
)

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
Y0 = torch.linspace(-3.0, 3.0, 12, dtype=torch.float64).reshape(6, 2)
ANY = RegressionCost(lambda y, index: y.abs().amax(1), 100.0, 0.5, 1e4)


def _calls(candidate: Candidate, func: Any, y0: Tensor, t: Tensor) -> list[int]:
    """Return the calls of func for each sample alone, through torchdiffeq."""
    counts = []
    for i in range(len(y0)):
        calls = 0

        def counted(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return func(t, y)

        candidate.solve(counted, y0[i : i + 1], t, rtol=1e-7, atol=1e-9)
        counts.append(calls)
    return counts


def _labels(func: Any, y0: Any, cost: Any = ANY, candidates: Any = None, t: Tensor = T) -> Labels:
    return Dise(candidates or [Candidate("dopri5")]).oracle(func, y0, t, cost=cost).labels


CANDIDATES = [
    Candidate("euler", steps=3),
    Candidate(tdh.HyperSolver("heun", lambda step: step.y, steps=4)),
    Candidate("dopri5", rtol=1e-5, atol=1e-5),
    Candidate("dopri5", rtol=1e-5, atol=1e-5, options={"max_step": 0.1}),
    Candidate("dopri5", rtol=1e-5, atol=1e-5, options={"norm": lambda y: y.abs().max()}),
    Candidate("dopri5_per_sample", rtol=1e-4, atol=1e-4),
    Candidate("bosh3", rtol=1e-3, atol=1e-3),
    Candidate("implicit_adams", steps=30, rtol=1e-3, atol=1e-3),
]


@pytest.mark.parametrize("flip", [False, True], ids=["forward", "reverse"])
def test_calls_are_those_of_each_sample_alone(*, flip: bool) -> None:
    t = T.flip(0) if flip else T
    candidates = [c for c in CANDIDATES if c.method != "dopri5_per_sample"]
    nfe = _labels(spiral, Y0, candidates=candidates, t=t).nfe
    for column, candidate in zip(nfe.T.tolist(), candidates, strict=True):
        assert column == _calls(candidate, spiral, Y0, t), candidate


def test_calls_by_per_sample_steps_are_those_of_dopri5_alone() -> None:
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    candidates = [Candidate("dopri5_per_sample", **tolerances), Candidate("dopri5", **tolerances)]
    nfe = _labels(spiral, Y0, candidates=candidates).nfe
    assert torch.equal(nfe[:, 0], nfe[:, 1])


def test_a_func_that_cannot_be_vectorised_is_solved_sample_by_sample() -> None:
    def branching(t: Tensor, y: Tensor) -> Tensor:
        return -y if float(t) > 0.5 else spiral(t, y)

    candidate = Candidate("dopri5", rtol=1e-5, atol=1e-5)
    nfe = _labels(branching, Y0, candidates=[candidate]).nfe
    assert nfe[:, 0].tolist() == _calls(candidate, branching, Y0, T)


def test_a_stiff_neighbour_changes_no_sample() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[:, 1] * y[:, 0] + torch.sin(t), 0 * y[:, 1]], dim=1)

    easy = torch.tensor([[1.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    stiff = torch.tensor([[1.0, 200.0]], dtype=torch.float64)
    alone, with_stiff = (_labels(func, y0) for y0 in (easy, torch.cat([easy, stiff])))
    assert torch.equal(with_stiff.nfe[:2], alone.nfe)
    assert with_stiff.nfe[2] > 2 * alone.nfe.max()


def test_samples_that_a_candidate_cannot_solve_are_wrong_not_an_error() -> None:
    y0 = torch.tensor([[0.5], [3.0]], dtype=torch.float64)  # y' = y^2 blows up at 1/y0
    cost = RegressionCost(lambda y, index: torch.zeros(len(index)), 1.0, 0.5, 1e5)
    net = tdh.HyperSolver("euler", lambda step: step.y**40, steps=20)
    for candidate in (Candidate("dopri5"), Candidate("dopri5_per_sample"), Candidate(net)):
        labels = _labels(lambda t, y: y**2, y0, cost, [candidate])
        assert labels.is_right[:, 0].tolist() == [True, False]


def test_answers_that_are_not_finite_are_never_right() -> None:
    y0 = torch.tensor([[1.0], [1e308]], dtype=torch.float64)
    cost = RegressionCost(lambda y, index: torch.zeros(len(index)), 1.0, 0.5, 1e5)
    labels = _labels(lambda t, y: 9 * y, y0, cost, [Candidate("euler", steps=2)])
    assert labels.is_right[:, 0].tolist() == [True, False]


def test_half_precision_is_labelled() -> None:
    y0 = Y0.to(torch.bfloat16)
    labels = _labels(
        spiral, y0, candidates=[Candidate("rk4", steps=2), Candidate("dopri5", rtol=1e-2)]
    )
    assert labels.nfe[:, 0].tolist() == [8] * 6


def test_tuple_states_are_labelled() -> None:
    def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return spiral(t, state[0]), torch.cos(t) * state[0].sum(1) - state[1]

    y0 = (Y0, torch.ones(6, dtype=torch.float64))
    ends: list[Any] = []

    def predict(y: tuple[Tensor, Tensor]) -> Tensor:
        ends.append([tuple(part.shape) for part in y])
        return y[0]

    cost = ClassificationCost(predict, torch.zeros(6).long(), 0.3, 1e4)
    labels = _labels(pair, y0, cost, [Candidate("rk4", steps=2), Candidate("dopri5")])
    assert labels.nfe.shape == (6, 2)
    assert ends == [[(6, 2), (6,)]] * 2


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.norm(y) * torch.cos(t)


def test_func_comes_back_as_found_and_is_labelled_in_evaluation_mode() -> None:
    func, head = _Normed().train(), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double()
    before = {name: tensor.clone() for name, tensor in func.state_dict().items()}
    cost = ClassificationCost(head, torch.zeros(6).long(), 0.3, 1e4)
    first, second = (_labels(func, Y0, cost) for _ in range(2))
    assert torch.equal(first.is_right, second.is_right), "dropout was off"
    assert func.training
    assert head.training
    assert all(p.requires_grad and p.grad is None for p in func.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in func.state_dict().items())


def test_a_batch_norm_in_training_mode_hidden_in_a_closure_is_refused() -> None:
    net = _Normed().train()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -net(t, y)

    with pytest.raises(CoupledSamplesError, match=r"func.eval\(\)"):
        _labels(func, Y0)


def test_samples_coupled_in_any_other_way_are_refused() -> None:
    with pytest.raises(CoupledSamplesError, match="another derivative in the batch than alone"):
        _labels(lambda t, y: y - y.mean(0, keepdim=True), Y0)


def test_fresh_noise_at_each_call_is_refused() -> None:
    with pytest.raises(NoisyFieldError, match=r"(?s)same answer.*tdh\.Conditioned"):
        _labels(lambda t, y: y + torch.randn_like(y), Y0)


def test_stored_noise_is_refused_with_the_remedy_and_works_with_it() -> None:
    noise = Y0**2
    with pytest.raises(StateShapeError, match=r"tdh\.Conditioned"):
        _labels(lambda t, y: y * noise, Y0)
    field = tdh.dise.Conditioned(lambda t, y, noise: -y * noise, noise)
    nfe = _labels(field, Y0).nfe
    assert len(nfe.unique()) > 2


def test_labels_of_another_length_are_refused_before_any_solve() -> None:
    cost = ClassificationCost(lambda y: y, torch.zeros(5).long(), 0.3, 1e4)
    with pytest.raises(StateShapeError, match="5 labels and 6 samples"):
        _labels(None, Y0, cost)


def test_func_gets_its_time_in_the_states_dtype() -> None:
    net = nn.Linear(3, 2)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return net(torch.cat([y, t * torch.ones(len(y), 1, dtype=t.dtype)], dim=1))

    candidates = [Candidate("rk4"), Candidate("dopri5", rtol=1e-3, atol=1e-3)]
    assert T.dtype == torch.float64
    assert _labels(func, Y0.float(), candidates=candidates).nfe.shape == (6, 2)


def test_methods_that_couple_samples_are_solved_sample_by_sample() -> None:
    # The implicit method iterates until all samples have converged.
    candidate = Candidate("implicit_adams", steps=10, rtol=1e-4, atol=1e-4)
    y0 = torch.tensor([[0.01, 0.0], [3.0, 1.0], [0.0, 0.02], [5.0, -5.0]]).double()
    alone = _calls(candidate, _bent, y0, T)
    assert len(set(alone)) > 1, "samples that all take the same calls prove nothing"
    assert _labels(_bent, y0, candidates=[candidate]).nfe[:, 0].tolist() == alone


def _bent(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(t) * torch.sin(y) - 0.1 * y * y.abs()


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(OptionError, match="y0 has 0 samples"):
        _labels(spiral, Y0[:0])


def test_the_oracle_dispatches() -> None:
    net = MLPField()
    reference = odeint(net, Y0, T)[-1]
    cost = RegressionCost(lambda y, i: (y - reference[i]).abs().amax(1), 1e-2, 0.5, 1e4)
    dise = Dise([Candidate("euler", steps=2), Candidate("rk4", steps=4)])
    oracle = dise.oracle(net, Y0, T, cost=cost)
    assert oracle.accuracy == 1.0
    assert 2 <= oracle.mean_nfe <= 16
    assert sum(oracle.shares.values()) == pytest.approx(1.0)
    y = dise.dispatch(net, Y0, T, oracle.selection)
    assert bool(((y[-1] - reference).abs().amax(1) <= 1e-2).all())
    assert "| oracle " in str(oracle)
