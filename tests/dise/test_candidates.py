"""Candidates: settings that mean something, and only those."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import spiral
from torchdiffeq_hyper.dise import Candidate, Dise
from torchdiffeq_hyper.errors import OptionError, StateTypeError, UnknownMethodError
from torchdiffeq_hyper.methods import _registry

SOLVER = tdh.HyperSolver("euler", zero, steps=5)
KNOWN = [*_registry.host_methods(), *_registry.methods()]


@pytest.mark.parametrize("method", [name for name in KNOWN if name != "dise"])
def test_every_method_can_be_a_candidate(method: str) -> None:
    candidate = Candidate(method)
    assert candidate.method == candidate.label == method
    entry = _registry.methods().get(method)
    hosts = _registry.host_methods()
    assert candidate.follows_grid == (entry.follows_grid if entry else hosts[method])


@pytest.mark.parametrize(
    ("name", "nearest"), [("doprri5", "dopri5"), ("eulr", "euler"), ("hyperuler", "hypereuler")]
)
def test_an_unknown_method_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(UnknownMethodError, match=rf'no method is called.*(?s:.*)"{nearest}"\)'):
        Candidate(name)


@pytest.mark.parametrize(
    ("method", "settings", "text"),
    [
        ("euler", {"steps": 0}, "steps is 0"),
        ("euler", {"steps": 2.0}, "steps is 2.0"),
        ("euler", {"steps": True}, "steps is True"),
        ("euler", {"steps": (2, 4)}, r"steps is \(2, 4\)"),
        ("dopri5", {"steps": 4}, "chooses its own steps"),
        ("dopri5_per_sample", {"steps": 4}, "chooses its own steps"),
        ("euler", {"steps": 4, "options": {"step_size": 0.1}}, "step_size"),
        ("dopri5", {"rtol": -1.0}, "rtol is -1.0"),
        ("dopri5", {"atol": float("nan")}, "atol is nan"),
        ("dopri5", {"atol": "1e-3"}, "atol is '1e-3'"),
        ("rk4", {"rtol": 1e-3}, "no error estimate"),
        (SOLVER, {"atol": 1e-3}, "no error estimate"),
    ],
)
def test_meaningless_settings_are_refused(method: Any, settings: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Candidate(method, **settings)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(StateTypeError, match="method is a function"):
        Candidate(spiral)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot be a candidate"):
        Candidate("dise")


def test_no_candidates_and_duplicates_and_other_things_are_refused() -> None:
    with pytest.raises(OptionError, match="no candidates"):
        Dise([])
    with pytest.raises(OptionError, match="candidates 1 and 2 are the same"):
        Dise([Candidate("rk4"), Candidate("euler", steps=2), Candidate("euler", steps=2)])
    with pytest.raises(OptionError, match="candidates 0 and 1 are the same"):
        Dise([Candidate(SOLVER), Candidate(SOLVER)])
    with pytest.raises(OptionError, match="candidates 0 and 1 are the same"):
        Dise([Candidate("euler"), Candidate("euler", steps=1)])
    for wrong in (["euler"], "euler", Candidate("euler"), None):
        with pytest.raises(StateTypeError, match=r"list of tdh\.Candidate"):
            Dise(wrong)  # type: ignore[arg-type]
    with pytest.raises(StateTypeError, match="selector is a int"):
        Dise([Candidate("euler")], selector=3)  # type: ignore[arg-type]


def test_candidates_that_differ_in_anything_are_not_the_same() -> None:
    other = tdh.HyperSolver("euler", zero, steps=5)
    different = [
        Candidate("euler"),
        Candidate("euler", steps=2),
        Candidate("euler", options={"step_size": 0.1}),
        Candidate("euler", options={"perturb": True}),
        Candidate(SOLVER),
        Candidate(other),
        Candidate(SOLVER, steps=3),
        Candidate("dopri5"),
        Candidate("dopri5", rtol=1e-3),
        Candidate("dopri5", atol=1e-3),
        Candidate("dopri5", options={"safety": 0.8}),
        Candidate("dopri5", options={"safety": 0.9}),
        Candidate("dopri5", options={"step_t": torch.tensor([0.5])}),
        Candidate("dopri5", options={"step_t": torch.tensor([0.6])}),
    ]
    assert len(Dise(different).candidates) == len(different)


def test_labels_say_what_is_set() -> None:
    assert Candidate("rk4", steps=1).label == "rk4, 1 step"
    assert Candidate(SOLVER, steps=2).label == "hypereuler, 2 steps"
    assert Candidate("dopri5", rtol=1e-3, atol=1e-4).label == "dopri5, rtol 0.001, atol 0.0001"
    assert Candidate("dopri5", options={"safety": 0.8}).label == "dopri5, safety 0.8"


def test_a_hypersolver_takes_its_own_steps_unless_told_otherwise() -> None:
    y0, t = torch.ones(2, 2), torch.tensor([0.0, 1.0])
    own, told = (
        candidate.solve(spiral, y0, t, rtol=0, atol=0)
        for candidate in (Candidate(SOLVER), Candidate(SOLVER, steps=5))
    )
    assert torch.equal(own, SOLVER.solve(spiral, y0, t))
    assert torch.equal(told, own)
    fine = Candidate(SOLVER, steps=50).solve(spiral, y0, t, rtol=0, atol=0)
    exact = odeint(spiral, y0, t)
    assert (fine - exact).abs().max() < (own - exact).abs().max() / 5


def test_copies_of_a_dise_move_and_copy_the_hypersolvers_with_it() -> None:
    dise = Dise([Candidate(tdh.HyperSolver("euler", tdh.hypernets.MLP(channels=2), steps=5))])
    twin = copy.deepcopy(dise).double()
    assert twin.candidates[0].solver is twin.solvers[0]
    assert {p.dtype for p in twin.candidates[0].solver.parameters()} == {torch.float64}
    assert {p.dtype for p in dise.parameters()} == {torch.float32}


@pytest.mark.parametrize(("method", "option"), [("dopri5", "max_stepp"), ("rk4", "step_sise")])
def test_options_that_the_host_does_not_know_are_refused(method: str, option: str) -> None:
    dise = Dise([Candidate(method, options={option: 0.1})], lambda y0: y0[:, :1])
    y0, t = torch.ones(2, 2), torch.tensor([0.0, 1.0])
    with pytest.raises(OptionError, match=option):
        dise.solve(spiral, y0, t)
    cost = tdh.RegressionCost(lambda y, i: y.norm(dim=1), 1.0, 0.5, 1e4)
    with pytest.raises(OptionError, match=option):
        dise.oracle(spiral, y0, t, cost=cost)


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_of_parts_are_refused_for_a_state_without_parts(name: str) -> None:
    dise = Dise([Candidate("dopri5")], lambda y0: y0[:, :1])
    y0, t = torch.ones(2, 2), torch.tensor([0.0, 1.0])
    with pytest.raises(OptionError, match="2 entries"):
        dise.solve(spiral, y0, t, **{name: (1e-3, 1e-4)})
    with pytest.raises(OptionError, match=r"3 entries(?s:.*)one a part: 2"):
        Dise([Candidate("dopri5")], lambda y0: y0[0][:, :1]).solve(
            lambda t, y: y, (y0, y0), t, **{name: (1e-3,) * 3}
        )


def test_a_dise_shows_its_candidates() -> None:
    dise = Dise([Candidate("euler", steps=2), Candidate("rk4", steps=1)])
    assert all(repr(candidate) in repr(dise) for candidate in dise.candidates)
