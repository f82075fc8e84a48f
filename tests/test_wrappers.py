"""Which wrappers a look-up goes through: those known by type to change nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from torchdiffeq_hyper._fields import _wrappers
from torchdiffeq_hyper.solvers._binding import Times, find_bound

T = torch.tensor([0.0, 1.0])


class Field(nn.Module):
    def forward(self, t: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        return -y

    def other(self, t: Tensor, y: Tensor) -> Tensor:
        return y


class Plain:
    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


def find(func: Any) -> Any:
    return find_bound(func, "hypereuler", Times(T, is_negated=False))


@pytest.fixture
def field() -> Field:
    return Field()


@pytest.fixture
def solver(field: Field) -> tdh.HyperSolver:
    return tdh.attach(field, tdh.HyperSolver("euler", zero, steps=3))


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_partials_without_arguments_are_looked_through(
    field: Field, solver: tdh.HyperSolver
) -> None:
    assert find(functools.partial(field)) is solver
    assert find(functools.partial(functools.partial(field.forward))) is solver


@pytest.mark.parametrize("changed", [((), {"mu": 10.0}), ((T[0],), {})])
def test_partials_with_arguments_are_other_fields(
    field: Field, solver: tdh.HyperSolver, changed: Any
) -> None:
    positional, named = changed
    other = functools.partial(field, *positional, **named)
    assert find(other) is None
    mine = tdh.attach(other, tdh.HyperSolver("euler", zero, steps=5))
    assert find(other) is mine
    assert find(field) is solver


def test_parallel_modules_are_looked_through(
    field: Field, solver: tdh.HyperSolver, process_group: None
) -> None:
    weighted = nn.Sequential(nn.Linear(2, 2))
    mine = tdh.attach(weighted, tdh.HyperSolver("euler", zero, steps=5))
    assert find(nn.DataParallel(field)) is solver
    assert find(nn.parallel.DistributedDataParallel(weighted)) is mine
    assert find(nn.DataParallel(nn.DataParallel(field)).forward) is solver


def test_compiled_fields_are_looked_through(field: Field, solver: tdh.HyperSolver) -> None:
    plain = Plain()
    others = {name: tdh.HyperSolver("euler", zero, steps=5) for name in ("plain", "other")}
    tdh.attach(plain, others["plain"])
    tdh.attach(field.other, others["other"])
    assert find(torch.compile(field, backend="eager")) is solver
    assert find(torch.compile(field.forward, backend="eager")) is solver
    assert find(torch.compile(field.other, backend="eager")) is others["other"]
    assert find(torch.compile(plain, backend="eager")) is others["plain"]
    assert find(nn.DataParallel(torch.compile(field, backend="eager"))) is solver

    def function(t: Tensor, y: Tensor) -> Tensor:
        return -y

    mine = tdh.attach(function, tdh.HyperSolver("euler", zero, steps=5))
    compiled = torch.compile(function, backend="eager")
    assert find(compiled) is mine

    @functools.wraps(compiled)
    def twice(t: Tensor, y: Tensor) -> Tensor:
        return 2 * compiled(t, y)

    assert find(twice) is None


def test_modules_compiled_in_place_keep_their_solver(field: Field, solver: tdh.HyperSolver) -> None:
    field.compile(backend="eager")
    assert find(field) is solver


def test_conditioned_fields_are_looked_through(field: Field, solver: tdh.HyperSolver) -> None:
    for inputs in (torch.ones(3, 1), torch.zeros(3, 1)):
        conditioned = tdh.Conditioned(field, inputs)
        y = odeint(conditioned, torch.ones(3, 1), T, method="hypereuler")
        assert torch.equal(y, solver.solve(conditioned, torch.ones(3, 1), T))
        assert find(conditioned.restrict(torch.tensor([1]))) is solver
    mine = tdh.attach(conditioned, tdh.HyperSolver("euler", zero, steps=5))
    assert find(conditioned) is mine
    assert find(field) is solver
    assert find(tdh.Conditioned(field.other, torch.ones(3, 1))) is None


NAMES = ("base_func", "_orig_mod", "_torchdynamo_orig_callable", "module", "vf", "func", "_func")


class Holder(nn.Module):
    """A user's module that calls what it holds, and returns something else."""

    def __init__(self, name: str, field: Any) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, field)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = -5 * getattr(self, self.name)(t, y)
        return out

    def odeint(self) -> None:
        """As torchdyn's problems have."""


class PlainHolder:
    def __init__(self, name: str, field: Any) -> None:
        setattr(self, name, field)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


@pytest.mark.parametrize("holder", [Holder, PlainHolder])
@pytest.mark.parametrize("name", NAMES)
def test_attributes_of_a_users_class_are_not_looked_at(
    field: Field, solver: tdh.HyperSolver, holder: Any, name: str
) -> None:
    assert find(holder(name, field)) is None
    mine = tdh.attach(holder(name, field), tdh.HyperSolver("euler", zero, steps=5))
    assert find(field) is solver
    assert mine is not solver


def test_user_functions_with_such_attributes_are_not_looked_through(
    field: Field, solver: tdh.HyperSolver
) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return 3 * field(t, y)

    for name in (*NAMES, "__wrapped__"):
        setattr(func, name, field)
    assert find(func) is None


def test_subclasses_that_change_the_call_are_not_looked_through(
    field: Field, solver: tdh.HyperSolver
) -> None:
    class Scaled(nn.DataParallel):  # type: ignore[type-arg]
        def forward(self, *inputs: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*inputs, **kwargs)

    class Named(nn.DataParallel):  # type: ignore[type-arg]
        """Changes nothing."""

    class Doubled(tdh.Conditioned):
        def forward(self, t: Tensor, y: Any) -> Any:
            return 2 * super().forward(t, y)

    assert find(Scaled(field)) is None
    assert find(Named(field)) is solver
    assert find(Doubled(field, torch.ones(3, 1))) is None
    patched = nn.DataParallel(field)
    patched.forward = lambda *inputs, **kwargs: 0  # type: ignore[method-assign]
    assert find(patched) is None


def test_averaged_models_are_other_fields(field: Field, solver: tdh.HyperSolver) -> None:
    assert find(AveragedModel(field)) is None


def test_wrappers_in_a_circle_end(field: Field) -> None:
    class Circle:
        inner: Any = None

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

    _wrappers.look_through(Circle, "inner", "missing")
    try:
        circle = Circle()
        circle.inner = circle
        assert find(circle) is None
        circle.inner = functools.partial(Circle())
        mine = tdh.attach(circle.inner.func, tdh.HyperSolver("euler", zero, steps=5))
        assert find(circle) is mine
    finally:
        del _wrappers._attributes[Circle]


def test_outermost_attachment_wins(field: Field, solver: tdh.HyperSolver) -> None:
    outer = nn.DataParallel(field)
    mine = tdh.attach(outer, tdh.HyperSolver("euler", zero, steps=5))
    assert find(outer) is mine
    assert find(field) is solver


def test_wrappers_of_this_package_find_what_is_attached_inside(
    field: Field, solver: tdh.HyperSolver
) -> None:
    y0 = torch.ones(4, 2)
    table = tdh.evaluate(field, y0, (0.0, 1.0), ["hypereuler"], steps=[2], progress=False)
    assert table.rows[-1].is_learned
    energy = tdh.regularizers.EnergyField(field, kinetic=True, jacobian=False)
    assert find(energy) is solver
    conditioned = tdh.Conditioned(field, torch.ones(4, 1))
    mine = tdh.attach(conditioned, tdh.HyperSolver("euler", zero, steps=5))
    from torchdiffeq_hyper.evaluation._measure import Counted

    for index in (None, torch.tensor([0, 2])):
        assert find(Counted(conditioned, index)) is mine
        assert find(Counted(field, index)) is solver
