"""How a call through torchdyn finds its fitted part; names that come and go."""

from __future__ import annotations

import importlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core import problems as host_problems
from torchdyn.numerics import odeint
from torchdyn.numerics.solvers.ode import SOLVER_DICT

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import damped_wave, spiral
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    DuplicateMethodError,
    HostWarning,
    MissingExtraError,
    MissingHypernetError,
    OptionError,
    StateTypeError,
)
from torchdiffeq_hyper.hosts import _host
from torchdiffeq_hyper.hosts.torchdyn import _methods
from torchdiffeq_hyper.methods import WholeSolve, _registry
from torchdiffeq_hyper.tableaus import EULER
from torchdyn_stubs import Spiral, times

T = times(0.0, 1.0)
PATCHED = [
    (sys.modules["torchdyn.numerics.odeint"], "_fixed_odeint"),
    (sys.modules["torchdyn.numerics.odeint"], "_adaptive_odeint"),
    (sys.modules["torchdyn.numerics.sensitivity"], "_gather_odefunc_adjoint"),
    (sys.modules["torchdyn.numerics.sensitivity"], "_gather_odefunc_interp_adjoint"),
    (host_problems, "_gather_odefunc_adjoint"),
    (host_problems, "_gather_odefunc_interp_adjoint"),
]


@pytest.fixture
def y0() -> Tensor:
    return torch.randn(3, 2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    yield
    tdh.install()


def _solver(steps: int, base: str = "euler") -> tdh.HyperSolver:
    return tdh.HyperSolver(base, zero, steps=steps)


def _taken(func: Any, y0: Tensor, solver: Any) -> int:
    """Return how many steps of Euler's method a call took."""
    found = odeint(func, y0, T, solver)[1][-1]
    for steps in range(1, 10):
        if torch.allclose(_solver(steps).solve(spiral, y0, T)[-1], found, rtol=0, atol=1e-12):  # type: ignore[arg-type]
            return steps
    raise AssertionError


def test_first_match_wins_in_torchdyn_too(y0: Tensor) -> None:
    func = Spiral()
    tdh.register_method("fast", _solver(2))
    try:
        assert _taken(func, y0, "fast") == 2
        with tdh.using(_solver(3)):
            assert _taken(func, y0, "hypereuler") == 3
            tdh.attach(func, _solver(4))
            assert _taken(func, y0, "hypereuler") == 4
            assert _taken(func, y0, _solver(5)) == 5
    finally:
        tdh.unregister_method("fast")
    assert "fast" not in SOLVER_DICT


def test_field_is_found_through_torchdyns_wrappers(y0: Tensor) -> None:
    net = nn.Sequential(nn.Linear(2, 2)).double()

    def function(t: Tensor, x: Tensor, args: Any) -> Tensor:
        return spiral(t, x)

    solver = _solver(3)
    for func in (net, function, Spiral()):
        node = NeuralODE(func, solver="hypereuler")
        tdh.attach(func, solver)
        found = node(y0, T)[1]
        tdh.detach(func)
        assert torch.equal(found, NeuralODE(func, solver=solver)(y0, T)[1])
        with pytest.raises(MissingHypernetError):
            node(y0, T)


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
@pytest.mark.parametrize("target", ["node", "node.vf", "bound method"])
def test_solver_can_be_attached_to_the_model_itself(y0: Tensor, target: str) -> None:
    func = Spiral()
    node = NeuralODE(func, solver="hypereuler")
    attach_to = {"node": node, "node.vf": node.vf, "bound method": func.forward}[target]
    tdh.attach(attach_to, _solver(3))
    for t in (T, T.flip(0)):
        assert torch.equal(node(y0, t)[1], NeuralODE(func, solver=_solver(3))(y0, t)[1])
    tdh.detach(attach_to)
    with pytest.raises(MissingHypernetError):
        node(y0, T)


def test_nothing_fitted_is_answered_with_the_ways_out(y0: Tensor) -> None:
    with pytest.raises(MissingHypernetError) as caught:
        odeint(spiral, y0, T, "hyperheun")
    for way in ("NeuralODE(vf, solver=solver)", "tdh.attach", "tdh.using", "tdh.register_method"):
        assert way in str(caught.value)
    with pytest.raises(MissingHypernetError, match="tdh.Dise"):
        odeint(spiral, y0, T, "dise")


class _Impostor:
    """Claims to serve a method."""

    def __init__(self, method: str) -> None:
        self.method = method


def test_parts_of_another_kind_or_base_are_refused(y0: Tensor) -> None:
    with tdh.using(_Impostor("hypereuler")), pytest.raises(StateTypeError, match="_Impostor"):
        odeint(spiral, y0, T, "hypereuler")
    with tdh.using(_Impostor("dise")), pytest.raises(StateTypeError, match="a Dise"):
        odeint(spiral, y0, T, "dise")

    class Renamed(tdh.HyperSolver):
        method = "hyperheun"

    with tdh.using(Renamed("euler", zero)), pytest.raises(BaseMismatchError, match='"euler"'):
        odeint(spiral, y0, T, "hyperheun")


def test_every_tableau_and_whole_problem_method_of_the_registry_is_there() -> None:
    methods = _registry.methods().values()
    wanted = {m.name for m in methods if m.corrects_base or m.kind is not None}
    assert wanted <= SOLVER_DICT.keys()


class _Plugin:
    @tdh.hookimpl
    def register_solvers(self, register: Any) -> None:
        import dataclasses

        register("hyperother", dataclasses.replace(EULER, name="other"))
        register("classy", dict, order=1, calls_per_step=1)


def test_methods_of_third_parties_come_and_go(y0: Tensor) -> None:
    tdh.register_plugin(_Plugin(), name="third party")
    try:
        solver = tdh.HyperSolver("other", zero, steps=4)
        wanted = _solver(4).solve(spiral, y0, T)
        assert torch.equal(odeint(spiral, y0, T, solver)[1], wanted)  # type: ignore[arg-type]
        with tdh.using(solver):
            assert torch.equal(odeint(spiral, y0, T, "hyperother")[1], wanted)  # type: ignore[arg-type]
        assert "classy" not in SOLVER_DICT
    finally:
        tdh.unregister_plugin("third party")
    assert "hyperother" not in SOLVER_DICT
    with pytest.raises(OptionError):
        odeint(spiral, y0, T, solver)


def test_uninstall_leaves_torchdyn_as_found_and_install_puts_back(y0: Tensor) -> None:
    names = list(SOLVER_DICT)
    ours = [getattr(module, name) for module, name in PATCHED]
    solver = _solver(3)
    for _ in range(2):
        tdh.uninstall()
        tdh.uninstall()
        assert not SOLVER_DICT.keys() & _registry.methods().keys()
        assert not any(isinstance(finder, _methods.ImportHook) for finder in sys.meta_path)
        for (module, name), wrapper in zip(PATCHED, ours, strict=True):
            own = getattr(module, name)
            assert own.__module__.startswith("torchdyn.")
            assert own is wrapper.__wrapped__
            assert own.__code__.co_filename == module.__file__ or module is host_problems
        assert not hasattr(solver, "sync_device_dtype")
        with pytest.raises(KeyError):
            odeint(spiral, y0, T, "hypereuler")
        tdh.install()
        tdh.install()
        assert list(SOLVER_DICT) == names
        assert sum(isinstance(finder, _methods.ImportHook) for finder in sys.meta_path) == 1
        assert _taken(spiral, y0, solver) == 3
        ours = [getattr(module, name) for module, name in PATCHED]


def test_models_made_before_an_uninstall_still_solve(y0: Tensor) -> None:
    node = NeuralODE(Spiral(), solver="hypereuler")
    with tdh.using(_solver(3)):
        wanted = node(y0, T)[1]
        tdh.uninstall()
        torch.testing.assert_close(node(y0, T)[1], wanted)


def test_names_of_torchdyn_are_not_taken() -> None:
    own = SOLVER_DICT["alf"]
    with pytest.raises(DuplicateMethodError, match="already a method of torchdyn"):
        tdh.register_method("alf", _solver(2))
    assert SOLVER_DICT["alf"] is own
    assert "alf" not in _registry.methods()
    from torchdiffeq._impl.odeint import SOLVERS

    assert "alf" not in SOLVERS


def test_torchdyn_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tdh.install("torchdyn")
    with pytest.raises(OptionError, match='"torchdyn" or None'):
        tdh.install("torchdin")

    def fail(name: str) -> None:
        message = f"No module named {name!r}"
        raise ModuleNotFoundError(message)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingExtraError, match=r'pip install "torchdiffeq_hyper\[torchdyn\]"'):
        tdh.install("torchdyn")


OWN = [name for name in SOLVER_DICT if name not in _registry.methods()]
TRAINABLE = ("euler", "midpoint", "rk4", "dopri5", "tsit5")


def _everything(y0: Tensor) -> tuple[list[Tensor], list[str]]:
    """Return what torchdyn's own methods answer and warn of, wherever we stand in the way."""
    results: list[Tensor] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in OWN:
            for t in (times(0.0, 0.4, 1.0), times(1.0, 0.3)):
                results += odeint(damped_wave, y0, t, name, atol=1e-5)
        results += odeint(spiral, y0, times(0.0, 0.5, 1.0), "euler", save_at=times(0.5))
        for name, sensitivity in itertools.product(TRAINABLE, ["adjoint", "interpolated_adjoint"]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
            node = NeuralODE(net, solver=name, sensitivity=sensitivity)
            node(y0, times(0.0, 0.4, 1.0))[1][-1].sum().backward()
            results += [p.grad for p in net.parameters() if p.grad is not None]
    return results, [f"{w.category.__name__}: {w.message}" for w in caught]


def test_torchdyns_own_methods_answer_bitwise_and_warn_as_without_us(y0: Tensor) -> None:
    with_us, our_warnings = _everything(y0)
    tdh.uninstall()
    without_us, their_warnings = _everything(y0)
    assert all(torch.equal(a, b) for a, b in zip(with_us, without_us, strict=True))
    assert our_warnings == their_warnings != []


class _Whole:
    """Solves nothing."""

    method = "whole"

    def solve(self, func: Any, y0: Tensor, t: Tensor, *, rtol: float, atol: float) -> Tensor:
        return y0.expand(len(t), *y0.shape) * rtol


class _WholePlugin:
    @tdh.hookimpl
    def register_solvers(self, register: Any) -> None:
        whole = WholeSolve(_Whole, "whole", "Whole()")
        register("whole", whole, order=1, calls_per_step=1, follows_grid=False)


def test_whole_problem_methods_of_third_parties_come_and_go(y0: Tensor) -> None:
    tdh.register_plugin(_WholePlugin(), name="third party")
    try:
        with tdh.using(_Whole()):
            for solver in ("whole", _Whole()):
                assert torch.equal(odeint(spiral, y0, T, solver)[1][-1], y0 * 1e-3)
    finally:
        tdh.unregister_plugin("third party")
    with pytest.raises(OptionError, match="a _Whole, which serves no registered method"):
        odeint(spiral, y0, T, _Whole())


def test_defects_are_named_once_where_parts_are_made_for_each_call(
    y0: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "_warned", WeakKeyDictionary())
    solver = NeuralODE(Spiral(), solver="dopri5_per_sample")
    with pytest.warns(HostWarning, match="negated"):
        solver(y0, T.flip(0))
    solver(y0, T.flip(0))
