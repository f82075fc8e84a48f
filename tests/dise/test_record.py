"""What a record knows of dispatched solves, and of samples that step on their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

import torchdiffeq_hyper as tdh
from stubs import MLPField, spiral
from torchdiffeq_hyper._fields._independence import is_probing
from torchdiffeq_hyper.dise import Candidate, Dise
from torchdiffeq_hyper.hosts.torchdiffeq._recording import record
from torchdiffeq_hyper.recording import AdjointGradientError
from torchdiffeq_hyper.solvers._per_sample import PerSampleDopri5

T = torch.tensor([0.0, 0.4, 2.0], dtype=torch.float64)
Y0 = torch.linspace(-2.0, 2.0, 10, dtype=torch.float64).reshape(5, 2)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}


def _dealt(y0: Tensor) -> Tensor:
    choice = torch.arange(len(y0)) % 3
    return -torch.nn.functional.one_hot(choice, 3).double()


def test_a_dispatched_solve_is_recorded_with_choices_and_calls_by_sample() -> None:
    candidates = [
        Candidate("rk4", steps=2),
        Candidate("dopri5"),
        Candidate("dopri5_per_sample"),
    ]
    dise = Dise(candidates, _dealt)
    plain = odeint(spiral, Y0, T, method="dise", options={"dise": dise}, **TOLERANCES)
    with record() as rec:
        y = odeint(spiral, Y0, T, method="dise", options={"dise": dise}, **TOLERANCES)
    assert torch.equal(y, plain)
    solve = rec.solves[-1]
    groups = {part.method: part for part in rec.solves[:-1]}
    assert solve.method == "dise"
    assert solve.selection is not None
    assert solve.selection.tolist() == [0, 1, 2, 0, 1]
    assert solve.nfe == sum(part.nfe for part in groups.values())
    nfe = solve.sample_nfe.tolist()
    assert nfe[0] == nfe[3] == 16
    assert nfe[1] == nfe[4] == groups["dopri5"].nfe
    assert nfe[2] == groups["dopri5_per_sample"].sample_nfe[0]


@pytest.mark.parametrize("time", ["vmap", "loop"])
def test_calls_of_a_conditioned_field_are_counted_in_every_group(time: str) -> None:
    func = tdh.Conditioned(lambda t, y, rate: -rate * y, torch.linspace(1, 2, 5)[:, None])
    candidates = [Candidate("rk4"), Candidate("dopri5_per_sample", options={"time": time})]
    dise = Dise(candidates, lambda y0: _dealt(y0)[:, :2])
    with record() as rec:
        odeint(func, Y0, T, method="dise", options={"dise": dise}, **TOLERANCES)
    solve = rec.solves[-1]
    assert solve.nfe == sum(part.nfe for part in rec.solves[:-1])


@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["forward", "reverse"])
def test_steps_of_samples_on_their_own_are_those_of_each_sample_alone(t: Tensor) -> None:
    with record() as rec:
        odeint(spiral, Y0, t, method="dopri5_per_sample", **TOLERANCES)
        for i in range(5):
            odeint(spiral, Y0[i : i + 1], t, **TOLERANCES)
    together, *alone = rec.solves
    assert together.sample_nfe.tolist() == [solve.nfe for solve in alone]
    assert together.n_accepted == sum(solve.n_accepted for solve in alone)
    assert together.n_rejected == sum(solve.n_rejected for solve in alone)
    for i, solve in enumerate(alone):
        n = len(solve.steps.dt)
        for name in ("t0", "dt", "ratio"):
            column = getattr(together.steps, name)[:, i]
            assert column[n:].isnan().all()
            torch.testing.assert_close(
                column[:n], getattr(solve.steps, name), rtol=1e-8, atol=1e-12
            )
        torch.testing.assert_close(
            together.steps.error[:n, i], solve.steps.error[:, 0], rtol=1e-6, atol=1e-14
        )
        accepted = together.steps.is_accepted[:, i]
        assert torch.equal(accepted[:n], solve.steps.is_accepted)
        assert not accepted[n:].any()


def test_the_error_penalty_and_its_gradient_are_the_sum_over_samples_alone() -> None:
    values, gradients = [], []
    for starts, method in (
        ([Y0], "dopri5_per_sample"),
        ([Y0[i : i + 1] for i in range(5)], "dopri5"),
    ):
        field = MLPField()
        with record() as rec:
            for start in starts:
                odeint(field, start, T, method=method, **TOLERANCES)
        penalty = rec.error_penalty()
        penalty.backward()
        values.append(penalty.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in field.parameters()]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=0)
    # The host differentiates through its choice of the first step; here it is a constant.
    difference = (gradients[0] - gradients[1]).norm()
    assert difference < 0.05 * gradients[1].norm()


def test_under_the_adjoint_the_penalty_says_why_it_has_no_gradient() -> None:
    field = MLPField()
    with record() as rec:
        odeint_adjoint(field, Y0, T, method="dopri5_per_sample", **TOLERANCES)
    penalty = rec.error_penalty()
    assert penalty > 0
    with pytest.raises(AdjointGradientError):
        penalty.backward()


@pytest.mark.parametrize("method", ["dopri5", "euler", "dopri5_per_sample"])
def test_a_solve_without_a_host_inside_func_leaves_the_outer_record_alone(method: str) -> None:
    dise = Dise([Candidate("rk4"), Candidate("euler")], lambda y0: _dealt(y0)[:, :2])
    inner = PerSampleDopri5(time="loop")
    span = torch.tensor([0.0, 0.1], dtype=torch.float64)
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.extend([] if is_probing() else [len(y)])
        return -dise.solve(spiral, y, span)[-1] - inner.solve(spiral, y, span, **TOLERANCES)[-1]

    options = {"time": "loop"} if method == "dopri5_per_sample" else None
    with record() as rec:
        odeint(func, Y0, T, method=method, options=options, **TOLERANCES)
    solve = rec.solves[-1]
    assert solve.method == method
    assert solve.nfe == len(calls)
    assert int(solve.sample_nfe.sum()) == sum(calls)
    assert solve.selection is None


def test_a_dise_inside_the_func_of_the_same_dise_leaves_the_outer_record_alone() -> None:
    dise = Dise([Candidate("rk4"), Candidate("euler")], lambda y0: _dealt(y0)[:, :2])

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -dise.dispatch(spiral, y, T[:2], torch.zeros(len(y)).long())[-1] + torch.cat(
            [dise.solve(spiral, one, T[:2])[-1] for one in y.split(1)]
        )

    with record() as rec:
        odeint(func, Y0[:2], T, method="dise", options={"dise": dise})
    assert rec.solves[-1].nfe == 8 + 2
    assert rec.solves[-1].sample_nfe.tolist() == [8, 2]
