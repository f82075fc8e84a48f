"""A host's model stands for its vector field: any host adds its own through one hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import MLPField
from torchdiffeq_hyper._fields import _wrappers
from torchdiffeq_hyper._fields._wrappers import ModelField
from torchdiffeq_hyper._state import State

T = torch.tensor([0.0, 1.0])
CONFIG = tdh.FitConfig(iterations=4, pretrain_iterations=2)


class Model(nn.Module):
    """A model of some host: called with a state, not as a vector field."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLPField(dim=2, width=8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return odeint(self.inner, x, T)[-1]


class Inside(ModelField):
    """What the host's adapter says of it."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def field(self) -> Any:
        return self.model.inner

    def check_shareable(self, n_processes: int) -> None:
        pass

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        self.model.calls += 1
        return self.model.inner(t, y)

    def given(self, y0: State) -> Inside:
        return self

    @contextmanager
    def as_found(self) -> Iterator[None]:
        before = self.model.calls
        yield
        self.model.calls = before


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(_wrappers, "_hosts", list(_wrappers._hosts))
    _wrappers.add_models(lambda func: Inside(func) if isinstance(func, Model) else None)
    torch.manual_seed(0)
    return Model()


def starts() -> Tensor:
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_model_is_fitted_as_its_field_and_left_as_found(model: Model) -> None:
    given = {"base": "heun", "steps": 4, "config": CONFIG, "progress": False}
    through, direct = (tdh.fit(f, starts(), (0.0, 1.0), **given) for f in (model, model.inner))
    for a, b in zip(through.parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b)
    assert model.calls == 0


def test_a_solver_attached_to_a_model_serves_its_field(model: Model) -> None:
    solver = tdh.attach(model, tdh.HyperSolver("heun", zero, steps=3))
    y = odeint(model.inner, starts(), T, method="hyperheun")
    assert torch.equal(
        y, odeint(model.inner, starts(), T, method="hyperheun", options={"solver": solver})
    )
    tdh.detach(model.inner)


def test_a_model_is_evaluated_as_its_field(model: Model) -> None:
    through, direct = (
        tdh.evaluate(f, starts(), (0.0, 1.0), ["euler"], steps=[3], progress=False, repeats=1)
        for f in (model, model.inner)
    )
    assert through.rows[0].relative_l2 == direct.rows[0].relative_l2
    assert model.calls == 0


def test_a_class_that_no_host_knows_is_refused_as_a_field() -> None:
    with pytest.raises(tdh.errors.StateTypeError, match="cannot be called as func"):
        tdh.fit(Model(), starts(), (0.0, 1.0), base="heun", steps=4, config=CONFIG)
