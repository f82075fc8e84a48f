"""A solver object is given to torchdyn's models, and is no part of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.numerics import HyperEuler

import torchdiffeq_hyper as tdh
from torchdyn_stubs import Field, SmallNet, times

T = times(0.0, 1.0)


def hyper(seed: int = 0) -> tdh.HyperSolver:
    torch.manual_seed(seed)
    return tdh.HyperSolver("heun", SmallNet(), steps=2)


def bespoke() -> tdh.BespokeSolver:
    return tdh.BespokeSolver.classical("rk4", 8)


def dise() -> tdh.Dise:
    candidates = [tdh.Candidate("euler", steps=1), tdh.Candidate("rk4", steps=1)]
    return tdh.Dise(candidates, tdh.dise.selectors.MLP(2, 2).double())


MAKE = pytest.mark.parametrize("make", [hyper, bespoke, dise])


@pytest.fixture
def y0() -> Tensor:
    return torch.randn(3, 2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    yield
    tdh.install()


@MAKE
@pytest.mark.parametrize("kind", [NeuralODE, ODEProblem])
def test_solver_object_is_no_part_of_the_model(make: Any, kind: Any, y0: Tensor) -> None:
    func, solver = Field(), make()
    node = kind(func, solver=solver, atol=1e-3, rtol=1e-3)
    assert node.solver is node.solver_adjoint is solver
    assert set(node.state_dict()) == set(kind(func, solver="dopri5").state_dict())
    assert {id(p) for p in node.parameters()} == {id(p) for p in func.parameters()}
    assert not [name for name, _ in node.named_modules() if "solver" in name]
    assert node(y0, T)[1].shape == (2, 3, 2)


@MAKE
def test_checkpoints_load_strictly_into_models_with_other_solvers(make: Any) -> None:
    models = [NeuralODE(Field(), solver=s) for s in (make(), "dopri5", "hyperheun", hyper(1))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in models:
            for target in models:
                target.load_state_dict(source.state_dict())


def test_solver_given_later_is_no_part_of_the_model_either() -> None:
    node = NeuralODE(Field(), solver="dopri5")
    own, keys = node.solver, set(node.state_dict())
    node.solver = node.solver_adjoint = solver = hyper()
    assert node.solver is solver
    assert set(node.state_dict()) == keys
    assert "solver" not in dict(node.named_children())
    node.solver = own  # a module of torchdyn's
    assert node.solver is own is dict(node.named_children())["solver"]


def test_own_attributes_that_hold_a_solver_are_what_torch_makes_of_them() -> None:
    class Model(NeuralODE):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(Field(), solver=hyper())
            self.second = hyper()

    assert {key.split(".")[0] for key in Model().state_dict()} == {"vf", "second"}


@pytest.mark.parametrize("make", [hyper, bespoke])
def test_solver_follows_the_model_to_dtypes_and_devices(make: Any, y0: Tensor) -> None:
    solver = make()
    node = nn.ModuleDict({"inner": NeuralODE(Field(), solver=solver)})
    node.float()
    assert {p.dtype for p in solver.parameters()} == {torch.float32}
    assert node["inner"](y0.float(), T.float())[1].dtype == torch.float32
    node.to("meta")
    assert {p.device.type for p in solver.parameters()} == {"meta"}


def test_training_and_freezing_the_model_leave_the_solver_alone() -> None:
    solver = hyper().eval()
    node = NeuralODE(Field(), solver=solver)
    node.train()
    node.requires_grad_(requires_grad=False)
    node.zero_grad()
    assert not solver.training
    assert all(p.requires_grad for p in solver.parameters())


def test_whole_models_are_saved_with_their_solver(y0: Tensor) -> None:
    node, buffer = NeuralODE(Field(), solver=hyper()), io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded.solver, tdh.HyperSolver)
    assert not [key for key in loaded.state_dict() if "solver" in key]
    assert torch.equal(loaded(y0, T)[1], node(y0, T)[1])


def test_other_unknown_keys_are_refused_as_before() -> None:
    node = NeuralODE(Field(), solver=hyper())
    with pytest.raises(RuntimeError, match="solver_of_mine"):
        node.load_state_dict({**node.state_dict(), "solver_of_mine.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        node.load_state_dict({})


def test_solvers_of_torchdyns_own_stay_part_of_the_model() -> None:
    node = NeuralODE(Field(), solver=HyperEuler(nn.Linear(2, 2)))
    assert [key for key in node.state_dict() if key.startswith("solver.hypernet")]
    node.load_state_dict(node.state_dict())


def test_uninstall_leaves_torchdyns_classes_as_found(y0: Tensor) -> None:
    names = ("__setattr__", "_apply")
    node = NeuralODE(Field(), solver=hyper())
    wanted = node(y0, T)[1]
    tdh.uninstall()
    for kind in (ODEProblem, NeuralODE):
        assert not [name for name in names if name in vars(kind)]
    tdh.install()
    assert [name for name in names if name in vars(ODEProblem)] == list(names)
    assert torch.equal(node(y0, T)[1], wanted)
