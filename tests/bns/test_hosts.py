"""Method "bns" through torchdiffeq, Dise, evaluate and the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint, odeint_event

import torchdiffeq_hyper as tdh
from stubs import Counted, MLPField, coupled, coupled_start, damped_wave
from torchdiffeq_hyper.__main__ import main
from torchdiffeq_hyper.errors import (
    AdjointWarning,
    BaseMismatchError,
    MissingHypernetError,
    OptionError,
    StateTypeError,
)
from torchdiffeq_hyper.solvers.bespoke import classical

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def start(batch: int = 6) -> Tensor:
    return torch.linspace(-1, 1.5, 2 * batch, dtype=torch.float64).reshape(batch, 2)


def fitted(directions: tuple[int, ...] = (1,), *, is_tuple: bool = False) -> tdh.BespokeSolver:
    shapes = ((3,), (), ()) if is_tuple else ((2,),)
    domain = tdh.FitDomain((0.0, 1.0), 1.0, 1.0, directions, shapes, is_tuple, "float64")
    return tdh.BespokeSolver(classical("rk4", 8), domain=domain)


def test_every_binding_gives_the_numbers_of_solve() -> None:
    solver = fitted()
    expected = solver.solve(damped_wave, start(), T)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    assert torch.equal(odeint(func, start(), T, method="bns", options={"solver": solver}), expected)
    with tdh.using(solver):
        assert torch.equal(odeint(func, start(), T, method="bns"), expected)
    with tdh.override("dopri5", solver):
        assert torch.equal(odeint(func, start(), T, rtol=1e-3), expected)
        with_options = odeint(func, start(), T, method="dopri5", options={"first_step": 0.1})
        assert torch.equal(with_options, expected)
    tdh.register_method("wave-fast", solver)
    try:
        assert torch.equal(odeint(func, start(), T, method="wave-fast"), expected)
    finally:
        tdh.unregister_method("wave-fast")
    tdh.attach(func, solver)
    assert torch.equal(odeint(func, start(), T, method="bns"), expected)
    tdh.detach(func)
    with pytest.raises(MissingHypernetError, match=r'base="bns"'):
        odeint(func, start(), T, method="bns")


def test_reverse_time_and_tuples_reach_the_solver_as_they_are() -> None:
    solver = fitted((-1,), is_tuple=True)
    expected = solver.solve(coupled, coupled_start(), T.flip(0))
    options = {"solver": solver}
    found = odeint(coupled, coupled_start(), T.flip(0), method="bns", options=options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    with pytest.raises(OptionError, match="fitted from 1 to 0"):
        odeint(coupled, coupled_start(), T, method="bns", options=options)


@pytest.mark.parametrize("option", ["step_size", "grid_constructor", "hypernet", "perturb"])
def test_options_that_would_change_its_steps_are_refused(option: str) -> None:
    options = {"solver": fitted(), option: 0.1}
    with pytest.raises(OptionError, match=f'no option "{option}"'):
        odeint(damped_wave, start(), T, method="bns", options=options)


def test_events_are_refused() -> None:
    with pytest.raises(OptionError, match="events"):
        odeint_event(
            damped_wave,
            start(),
            T[0],
            event_fn=lambda t, y: y.sum(),
            method="bns",
            options={"solver": fitted()},
        )


def test_times_outside_the_span_are_refused() -> None:
    for t in (T + 0.5, 2 * T):
        with pytest.raises(OptionError, match="fitted from 0 to 1"):
            odeint(damped_wave, start(), t, method="bns", options={"solver": fitted()})


def test_solvers_of_other_methods_are_refused() -> None:
    euler = tdh.HyperSolver("euler", lambda step: step.y, steps=2)
    with pytest.raises(StateTypeError, match="BespokeSolver"):
        odeint(damped_wave, start(), T, method="bns", options={"solver": euler})
    with pytest.raises(BaseMismatchError, match='method="bns"'):
        odeint(damped_wave, start(), T, method="hypereuler", options={"solver": fitted()})


def test_adjoint_gradients_are_those_of_dopri5_around_the_solution() -> None:
    field, solver = MLPField(), fitted()
    y0 = start().requires_grad_()
    gradients = []
    for method, options in (("bns", {"solver": solver}), ("dopri5", None)):
        y = odeint_adjoint(field, y0, T, method=method, options=options, rtol=1e-8, atol=1e-8)
        loss = (y[1:] ** 2).sum()
        gradients.append(torch.autograd.grad(loss, [y0, *field.parameters()]))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.02)


def test_adjoint_warns_once_when_the_solver_wants_gradients() -> None:
    field, solver = MLPField(), fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint_adjoint(field, start(), T, method="bns", options={"solver": solver})
        solver.requires_grad_()
        with pytest.warns(AdjointWarning, match=r"no gradient.*solver\.requires_grad_"):
            odeint_adjoint(field, start(), T, method="bns", options={"solver": solver})
        odeint_adjoint(field, start(), T, method="bns", options={"solver": solver})


def test_gradients_through_odeint_are_those_of_the_roll_out() -> None:
    field, solver = MLPField(), fitted()
    y0 = start().requires_grad_()
    ends = [
        odeint(field, y0, T, method="bns", options={"solver": solver})[-1],
        solver.solve(field, y0, T[[0, -1]])[-1],
    ]
    first, second = (torch.autograd.grad((y**2).sum(), list(field.parameters())) for y in ends)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_dise_sends_samples_to_it(tmp_path: Path) -> None:
    solver = fitted()
    dise = tdh.Dise(
        [tdh.Candidate("euler", steps=1), tdh.Candidate(solver)],
        selector=tdh.dise.selectors.MLP(2, 2),
    )
    t = T[[0, -1]]
    odeint(damped_wave, start(), t, method="dise", options={"dise": dise})
    dise.save(tmp_path / "dise.safetensors")
    (_, loaded) = tdh.Dise.load(tmp_path / "dise.safetensors").candidates
    assert isinstance(loaded.solver, tdh.BespokeSolver)
    found = loaded.solve(damped_wave, start(), t, rtol=1e-3, atol=1e-3)
    assert torch.equal(found, solver.solve(damped_wave, start(), t))


def test_records_count_its_calls_alone_and_in_a_dise() -> None:
    solver, t = fitted(), T[[0, -1]]

    class BySign(torch.nn.Module):
        def forward(self, y0: Tensor) -> Tensor:
            return torch.stack([y0[:, 0], -y0[:, 0]], dim=1)

    dise = tdh.Dise([tdh.Candidate("euler", steps=1), tdh.Candidate(solver)], selector=BySign())
    with tdh.record() as rec:
        odeint(damped_wave, start(), t, method="bns", options={"solver": solver})
        alone = rec.solves[-1]
        odeint(damped_wave, start(), t, method="dise", options={"dise": dise})
    assert (alone.method, alone.nfe, alone.sample_nfe.tolist()) == ("bns", 8, [8] * 6)
    dispatched = rec.solves[-1]
    assert dispatched.nfe == 9
    assert dispatched.sample_nfe.tolist() == torch.where(start()[:, 0] > 0, 8, 1).tolist()


def test_settings_of_other_methods_mean_nothing_to_a_candidate() -> None:
    for settings in ({"steps": 2}, {"rtol": 1e-3}):
        with pytest.raises(OptionError, match=r"tdh\.Candidate\(solver\)"):
            tdh.Candidate(fitted(), **settings)  # type: ignore[arg-type]


def test_evaluate_gives_it_one_row() -> None:
    solver = fitted()
    func = Counted(damped_wave)
    table = tdh.evaluate(
        func,
        start(),
        (0.0, 1.0),
        ["euler", "dopri5", solver],
        steps=[2, 4],
        tolerances=[1e-2, 1e-3],
        repeats=1,
        progress=False,
    )
    rows = [row for row in table.rows if row.method == "bns"]
    assert [(row.steps, row.nfe, row.is_learned, row.setting) for row in rows] == [
        (8, 8, True, "8")
    ]
    assert rows[0].relative_l2 < 2e-3
    with tdh.using(solver):
        table = tdh.evaluate(
            func, start(), (0.0, 1.0), ["bns"], tolerances=[1e-2, 1e-3], repeats=1, progress=False
        )
    assert [(row.nfe, row.is_learned, row.setting) for row in table.rows] == [(8, True, "own")]
    assert "bns" in table.to_markdown()


def test_the_command_line_looks_into_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bns.safetensors"
    fitted().save(path)
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "bns" in text
    assert "t from 0 to 1, forward" in text


def test_solvers_of_other_numbers_of_calls_share_a_label_in_the_table() -> None:
    solvers = [tdh.BespokeSolver.classical("euler", n) for n in (4, 8, 8)]
    table = tdh.evaluate(damped_wave, start(), (0.0, 1.0), solvers, repeats=1, progress=False)
    assert [row.method for row in table.rows] == ["bns", "bns", "bns #2"]
