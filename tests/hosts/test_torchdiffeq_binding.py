"""How a call finds its fitted part, and who else sees it."""

from __future__ import annotations

import contextvars
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import MLPField, damped_wave
from torchdiffeq_hyper.errors import (
    DuplicateMethodError,
    OptionError,
    StateTypeError,
    UnknownMethodError,
)

Y0 = torch.ones(2, dtype=torch.float64)
T = torch.tensor([0.0, 1.0], dtype=torch.float64)


def _constant(value: float, base: str = "euler", steps: int = 1) -> tdh.HyperSolver:
    """A solver whose correction is a constant, so that its mark shows in the result."""
    return tdh.HyperSolver(base, lambda step: torch.full_like(step.y, value), steps=steps)  # type: ignore[arg-type]


def _mark(func: Any = damped_wave, method: str = "hypereuler", **call: Any) -> float:
    """Return the constant that was used."""
    corrected = odeint(func, Y0, T, method=method, **call)
    plain = odeint(func, Y0, T, method="euler")
    return round(float((corrected - plain)[-1, 0]), 6)


def test_first_match_wins_option_attached_scope_published() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    tdh.register_method("marked", _constant(4.0))
    try:
        assert _mark(func, "marked") == 4.0
        with tdh.using(_constant(3.0)):
            assert _mark(func) == 3.0
            tdh.attach(func, _constant(2.0))
            assert _mark(func) == 2.0
            assert _mark(func, options={"solver": _constant(1.0)}) == 1.0
            hypernet = _constant(0.5).hypernet
            assert _mark(func, options={"hypernet": hypernet}) == 0.5
            assert _mark(func, "marked", options={"solver": _constant(1.0)}) == 1.0
            tdh.detach(func)
            assert _mark(func) == 3.0
    finally:
        tdh.unregister_method("marked")
    with pytest.raises(tdh.MissingHypernetError, match=r"tdh\.fit"):
        _mark(func)


def test_attach_holds_one_solver_a_method_string() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    tdh.attach(func, _constant(1.0))
    tdh.attach(func, _constant(2.0, "heun"))
    tdh.attach(func, _constant(3.0))
    assert _mark(func) == 3.0
    odeint(func, Y0, T, method="hyperheun")
    tdh.detach(func, "hypereuler")
    odeint(func, Y0, T, method="hyperheun")
    with pytest.raises(tdh.MissingHypernetError):
        _mark(func)
    with pytest.raises(OptionError, match="hypereuler"):
        tdh.detach(func, "hypereuler")
    tdh.detach(func)
    with pytest.raises(OptionError, match="not attached"):
        tdh.detach(func)


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)


class _Slotted:
    __slots__ = ()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)


class _Model(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)


@pytest.mark.parametrize("make", [_Unhashable, _Slotted, _Model])
def test_any_callable_can_be_attached(make: Any) -> None:
    func = make()
    tdh.attach(func, _constant(2.0))
    assert _mark(func) == 2.0
    tdh.detach(func)


def test_equal_objects_do_not_share_an_attachment() -> None:
    first, second = _Unhashable(), _Unhashable()
    tdh.attach(first, _constant(2.0))
    with pytest.raises(tdh.MissingHypernetError):
        _mark(second)
    tdh.detach(first)


def test_scopes_nest_and_the_innermost_of_a_method_wins() -> None:
    with tdh.using(_constant(1.0)):
        with tdh.using(_constant(9.0, "heun")):
            assert _mark() == 1.0
            with tdh.using(_constant(2.0)):
                assert _mark() == 2.0
            assert _mark() == 1.0
        with pytest.raises(tdh.MissingHypernetError):
            odeint(damped_wave, Y0, T, method="hyperheun")


def test_scope_closes_on_an_error() -> None:
    with pytest.raises(ZeroDivisionError), tdh.using(_constant(1.0)):
        1 / 0  # noqa: B018
    with pytest.raises(tdh.MissingHypernetError):
        _mark()


def _in_thread(task: Any) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(task())
        except Exception as error:  # noqa: BLE001 - handed to the main thread
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_scopes_do_not_leak_into_threads_but_reach_copied_contexts() -> None:
    with tdh.using(_constant(1.0)):
        assert isinstance(_in_thread(_mark), tdh.MissingHypernetError)
        context = contextvars.copy_context()
        assert _in_thread(lambda: context.run(_mark)) == 1.0


def test_threads_with_scopes_of_their_own_do_not_mix() -> None:
    barrier, marks = threading.Barrier(4), {}

    def work(value: int) -> None:
        with tdh.using(_constant(float(value))):
            for _ in range(5):
                barrier.wait()
                marks.setdefault(value, set()).add(_mark())

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert marks == {value: {float(value)} for value in range(1, 5)}


def test_published_name_takes_the_fitted_steps() -> None:
    calls = []
    solver = tdh.HyperSolver("heun", lambda step: calls.append(1) or step.y * 0, steps=7)  # type: ignore[func-returns-value, operator]
    tdh.register_method("seven", solver)
    odeint(damped_wave, Y0, T, method="seven")
    assert len(calls) == 7
    with pytest.raises(DuplicateMethodError, match=r"register_method.*register_method"):
        tdh.register_method("seven", solver)
    tdh.unregister_method("seven")
    assert "seven" not in SOLVERS
    with pytest.raises(UnknownMethodError, match="not a published name"):
        tdh.unregister_method("seven")


@pytest.mark.parametrize(("name", "owner"), [("dopri5", "torchdiffeq"), ("hyper2", "hyper")])
def test_publishing_a_taken_name_names_both_owners(name: str, owner: str) -> None:
    before = SOLVERS[name]
    with pytest.raises(DuplicateMethodError, match=f"register_method.*{owner}"):
        tdh.register_method(name, _constant(1.0))
    with pytest.raises(UnknownMethodError):
        tdh.unregister_method(name)
    assert SOLVERS[name] is before


def test_published_names_train_through_the_adjoint() -> None:
    func = MLPField()
    tdh.register_method("trained", tdh.HyperSolver("rk4", zero, steps=5))
    t = torch.tensor([0.0, 1.0]).double()
    y = odeint_adjoint(func, torch.ones(3, 2).double(), t, method="trained")
    y[-1].sum().backward()
    tdh.unregister_method("trained")
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in func.parameters())


def test_override_serves_an_existing_name_and_gives_it_back() -> None:
    original, order = SOLVERS["dopri5"], list(SOLVERS)
    with tdh.override("dopri5", _constant(1.0)):
        assert _mark(method="dopri5") == 1.0
        with tdh.override("dopri5", _constant(2.0)), tdh.override("rk4", _constant(3.0)):
            assert _mark(method="dopri5") == 2.0
            assert _mark(method="rk4") == 3.0
        assert _mark(method="dopri5") == 1.0
        assert _mark(method="dopri5", options={"first_step": 0.1, "max_num_steps": 9}) == 1.0
        with pytest.raises(OptionError, match="first_stp"):
            _mark(method="dopri5", options={"first_stp": 0.1})
    assert SOLVERS["dopri5"] is original
    assert list(SOLVERS) == order


def test_override_in_one_thread_leaves_the_others_alone() -> None:
    plain = odeint(damped_wave, Y0, T, method="dopri5")
    with tdh.override("dopri5", _constant(1.0)):
        assert torch.equal(_in_thread(lambda: odeint(damped_wave, Y0, T, method="dopri5")), plain)
        context = contextvars.copy_context()
        assert _in_thread(lambda: context.run(_mark, method="dopri5")) == 1.0


def test_override_raises_no_warning_for_the_overridden_methods_callbacks() -> None:
    class Logged(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return damped_wave(t, y)

        def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            """Valid for dopri5."""

    with tdh.override("dopri5", _constant(1.0)):
        odeint(Logged(), Y0, T, method="dopri5")


@pytest.mark.parametrize("is_open", [True, False])
def test_overridden_names_run_the_hosts_dopri5_backward(is_open: bool) -> None:
    func, t = MLPField(), torch.tensor([0.0, 1.0]).double()
    solver = tdh.HyperSolver("rk4", zero, steps=20)

    def gradients(*, override: bool) -> Tensor:
        func.zero_grad()
        y0 = torch.ones(3, 2).double()
        if not override:
            odeint_adjoint(func, y0, t, method="dopri5")[-1].sum().backward()
        elif is_open:
            with tdh.override("dopri5", solver):
                odeint_adjoint(func, y0, t, method="dopri5")[-1].sum().backward()
        else:
            with tdh.override("dopri5", solver):
                y = odeint_adjoint(func, y0, t, method="dopri5")
            y[-1].sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in func.parameters()])  # type: ignore[union-attr]

    assert torch.allclose(gradients(override=True), gradients(override=False), rtol=1e-5)


def test_override_of_an_unknown_name_is_refused() -> None:
    with (
        pytest.raises(UnknownMethodError, match="dopri5"),
        tdh.override("dopri55", _constant(1.0)),
    ):
        pass


@pytest.mark.parametrize("bind", [tdh.using, lambda s: tdh.attach(damped_wave, s)])
def test_binding_a_bare_hypernet_is_refused(bind: Any) -> None:
    with pytest.raises(StateTypeError, match=r"tdh\.HyperSolver"), bind(nn.Linear(2, 2)):
        pass
    with pytest.raises(StateTypeError, match="HyperSolver"):
        tdh.register_method("bare", nn.Linear(2, 2))  # type: ignore[arg-type]
    assert "bare" not in SOLVERS


def test_uninstall_leaves_the_host_as_it_was_and_install_comes_back() -> None:
    ours = [name for name in SOLVERS if name.startswith("hyper")]
    classes = dict(SOLVERS)
    tdh.uninstall()
    assert not any(name.startswith("hyper") for name in SOLVERS)
    assert all(SOLVERS[name] is classes[name] for name in SOLVERS)
    tdh.install()
    tdh.install()
    assert {name for name in SOLVERS if name.startswith("hyper")} == set(ours)
    assert _mark(options={"solver": _constant(1.0)}) == 1.0


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("method", ["euler", "rk4", "bosh3"])
def test_any_overridden_name_runs_dopri5_backward_and_is_given_back(
    method: str, is_open: bool
) -> None:
    func, t = MLPField(), torch.tensor([0.0, 1.0]).double()
    original = SOLVERS[method]
    solver = tdh.HyperSolver("rk4", zero, steps=20)
    y0 = torch.ones(3, 2).double().requires_grad_()
    (expected,) = torch.autograd.grad(odeint(func, y0, t)[-1].sum(), y0)
    with tdh.override(method, solver):
        y = odeint_adjoint(func, y0, t, method=method)
        if is_open:
            y[-1].sum().backward()
    if not is_open:
        y[-1].sum().backward()
    assert y0.grad is not None
    assert torch.allclose(y0.grad, expected, rtol=1e-5)
    del y
    gc.collect()
    assert SOLVERS[method] is original


def test_override_leaves_an_option_that_means_something_else_to_the_method() -> None:
    with tdh.override("scipy_solver", _constant(1.0)):
        assert _mark(method="scipy_solver", options={"solver": "RK45"}) == 1.0


def test_solver_option_that_is_none_of_ours_is_refused_even_if_falsy() -> None:
    with tdh.using(_constant(1.0)), pytest.raises(StateTypeError, match="HyperSolver"):
        _mark(options={"solver": 0})


def test_late_clash_in_a_plugin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @tdh.hookimpl
        def register_solvers(self, register: Any) -> None:
            register("late", SOLVERS["euler"], order=1, calls_per_step=1)

    monkeypatch.setitem(SOLVERS, "late", lambda **call: None)
    with pytest.raises(DuplicateMethodError, match="late"):
        tdh.register_plugin(Plugin(), name="late-plugin")
    tdh.register_method("fine", _constant(1.0))
    tdh.unregister_method("fine")
    monkeypatch.undo()
    tdh.register_plugin(Plugin(), name="late-plugin")
    tdh.unregister_plugin("late-plugin")
    assert "late" not in SOLVERS
