"""Methods from plugins: the installed sample, direct registration, broken entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, convergence_order, damped_wave, spiral, spiral_solution
from torchdiffeq_hyper import errors
from torchdiffeq_hyper.methods import Register, WholeSolve, _registry
from torchdiffeq_hyper.methods._registry import PROJECT


class PlainEuler(FixedGridODESolver):  # type: ignore[misc]
    """The smallest torchdiffeq solver."""

    order = 1

    def _step_func(self, func: Any, t0: Any, dt: Any, t1: Any, y0: Any) -> Any:
        f0 = func(t0, y0)
        return dt * f0, f0


class Plugin:
    """Registers `PlainEuler` under every one of its names."""

    def __init__(self, *names: str, **declared: Any) -> None:
        self.names = names
        self.declared = declared or {"order": 1, "calls_per_step": 1}

    @tdh.hookimpl
    def register_solvers(self, register: Register) -> None:
        """Register them."""
        for name in self.names:
            register(name, PlainEuler, **self.declared)


class BreakingPlugin:
    """Registers one method, then breaks."""

    @tdh.hookimpl
    def register_solvers(self, register: Register) -> None:
        """Break half-way."""
        register("half-way", PlainEuler, order=1, calls_per_step=1)
        msg = "boom"
        raise RuntimeError(msg)


@contextmanager
def registered(plugin: object, name: str) -> Iterator[None]:
    tdh.register_plugin(plugin, name=name)
    try:
        yield
    finally:
        tdh.unregister_plugin(name)


def _is_known(name: str) -> bool:
    return name in _registry.methods() or name in SOLVERS


def test_sample_plugin_owns_its_methods() -> None:
    methods = [m.name for m in _registry.methods().values() if m.owner == "sample"]
    assert methods == ["hyperkutta3", "ssprk3"]
    assert all(name in SOLVERS for name in methods)


@pytest.mark.parametrize(
    ("method", "options"), [("hyperkutta3", {"hypernet": zero}), ("ssprk3", {})]
)
def test_sample_methods_are_of_third_order_through_plain_odeint(
    method: str, options: dict[str, Any]
) -> None:
    y0 = torch.tensor([0.6, -0.2], dtype=torch.float64)
    exact = spiral_solution(torch.tensor([1.5], dtype=torch.float64), y0)[0]
    sizes, errs = [0.1, 0.05, 0.025], []
    for size in sizes:
        func, t = Counted(spiral), torch.tensor([0.0, 1.5], dtype=torch.float64)
        y = odeint(func, y0, t, method=method, options={**options, "step_size": size})
        errs.append(float((y[-1] - exact).norm()))
        assert func.calls == 3 * round(1.5 / size)
    assert convergence_order(sizes, errs) == pytest.approx(3, abs=0.2)


def test_base_from_a_plugin_makes_a_hypersolver() -> None:
    solver = tdh.HyperSolver("kutta3", lambda step: step.f0, steps=4)
    assert solver.method == "hyperkutta3"
    y0, t = torch.randn(3, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    with tdh.using(solver):
        hosted = odeint(damped_wave, y0, t, method="hyperkutta3")
    torch.testing.assert_close(solver.solve(damped_wave, y0, t), hosted, rtol=1e-13, atol=1e-13)


def test_registered_plugin_works_through_odeint_until_it_is_unregistered() -> None:
    y0, t = torch.randn(3), torch.linspace(0, 1, 5)
    with registered(Plugin("plain"), "mine"):
        assert _registry.find("plain").owner == "mine"
        assert torch.equal(
            odeint(damped_wave, y0, t, method="plain"), odeint(damped_wave, y0, t, method="euler")
        )
    assert not _is_known("plain")


@pytest.mark.parametrize(
    ("name", "owner"),
    [("hypereuler", PROJECT), ("ssprk3", "sample"), ("dopri5", "torchdiffeq")],
)
def test_duplicate_name_raises_naming_both_owners_and_adds_nothing(name: str, owner: str) -> None:
    before = SOLVERS[name]
    with pytest.raises(errors.DuplicateMethodError, match=f"of mine .* of {owner}") as caught:
        tdh.register_plugin(Plugin("new-name", name), name="mine")
    assert isinstance(caught.value, ValueError)
    assert not _is_known("new-name")
    assert SOLVERS[name] is before
    with registered(Plugin("new-name"), "mine"):  # the name is free again
        assert _is_known("new-name")


def test_name_published_by_hand_cannot_be_taken_by_a_plugin() -> None:
    tdh.register_method("published", tdh.HyperSolver("euler", zero))
    try:
        with pytest.raises(errors.DuplicateMethodError, match=r"of mine .* of register_method"):
            tdh.register_plugin(Plugin("published"), name="mine")
    finally:
        tdh.unregister_method("published")


def test_direct_call_raises_what_the_plugin_raises_and_adds_nothing() -> None:
    with pytest.raises(RuntimeError, match="boom"):
        tdh.register_plugin(BreakingPlugin(), name="breaking")
    assert not _is_known("half-way")
    with pytest.raises(errors.OptionError, match="no plugin is called 'breaking'"):
        tdh.unregister_plugin("breaking")


def _misspelt_hook(register: Register) -> None:
    """Nobody calls it."""


def _misspelt_argument(add: Register) -> None:
    """Cannot be called."""


def _plugin_with(**functions: Any) -> object:
    marked = {name: staticmethod(tdh.hookimpl(f)) for name, f in functions.items()}
    return type("Odd", (), marked)


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        (object(), "implements no hook"),
        (_plugin_with(register_solver=_misspelt_hook), "register_solver"),
        (_plugin_with(register_solvers=_misspelt_argument), "add"),
        (Plugin("plain", order=1), "declares order=1, calls_per_step=None"),
        (Plugin("plain", order=0, calls_per_step=1), "order=0"),
        (Plugin(""), "name is ''"),
    ],
)
def test_plugin_that_cannot_be_used_is_refused(plugin: object, problem: str) -> None:
    with pytest.raises(errors.OptionError, match=problem):
        tdh.register_plugin(plugin, name="odd")
    assert not _is_known("plain")


def test_plugin_name_cannot_be_used_twice() -> None:
    with registered(Plugin("plain"), "mine"):
        with pytest.raises(errors.OptionError, match="mine"):
            tdh.register_plugin(Plugin("other"), name="mine")
        assert _is_known("plain")
        assert not _is_known("other")


class _EntryPoint:
    """An installed plugin, as importlib.metadata presents it."""

    def __init__(self, name: str, plugin: object) -> None:
        self.name = name
        self.value = f"{name}.methods"
        self._plugin = plugin

    def load(self) -> object:
        """Return the plugin, or raise what its import raises."""
        if isinstance(self._plugin, Exception):
            raise self._plugin
        return self._plugin


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (ImportError("no module"), "no module"),
        (BreakingPlugin(), "boom"),
        (Plugin("half-way", "hypereuler"), "hypereuler"),
        (object(), "implements no hook"),
    ],
)
def test_entry_point_that_breaks_is_skipped_with_one_warning(
    plugin: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = [_EntryPoint("bad", plugin), _EntryPoint("good", Plugin("good-euler"))]
    monkeypatch.setattr(metadata, "entry_points", lambda group: installed)
    with pytest.warns(errors.PluginWarning, match=r"'bad' .*skipped") as caught:
        _registry.load_plugins()
    try:
        assert len(caught) == 1
        assert reason in str(caught[0].message)
        assert not _is_known("half-way")
        assert _registry.find("good-euler").owner == "good"
        assert "good-euler" in SOLVERS
    finally:
        tdh.unregister_plugin("good")


def _install_plugin(folder: Path, name: str, source: str) -> None:
    """Lay out a distribution with one module and its entry point, as pip does."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{PROJECT}]\n{name} = {name}\n")


_REGISTERS = """
from torchdiffeq._impl.fixed_grid import Euler
from torchdiffeq_hyper import hookimpl

@hookimpl
def register_solvers(register):
    for name in {names}:
        register(name, Euler, order=1, calls_per_step=1)
"""


def _run_python(script: str, path: Path) -> Any:
    env_setup = f"import sys; sys.path.insert(0, {str(path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", env_setup + script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_broken_installed_plugins_never_break_the_import(tmp_path: Path) -> None:
    _install_plugin(tmp_path, "breaks", "raise RuntimeError('boom')")
    _install_plugin(tmp_path, "clashes", _REGISTERS.format(names=["first", "dopri5"]))
    _install_plugin(tmp_path, "works", _REGISTERS.format(names=["works-euler"]))
    script = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torchdiffeq_hyper as tdh
    from torchdiffeq_hyper.methods import _registry
told = [str(w.message) for w in caught if issubclass(w.category, tdh.errors.PluginWarning)]
print(json.dumps({"told": told, "owners": {m.name: m.owner for m in _registry.methods().values()}}))
"""
    result = _run_python(script, tmp_path)
    assert len(result["told"]) == 2
    assert any("'breaks'" in text and "boom" in text for text in result["told"])
    assert any("'clashes'" in text and "dopri5" in text for text in result["told"])
    assert result["owners"]["works-euler"] == "works"
    assert "first" not in result["owners"]
    assert "hypereuler" in result["owners"]


class _Pretender:
    """No solver, though it names a base."""

    base, method = "euler", "hypereuler"


@pytest.mark.parametrize("name", [None, "", 5])
def test_a_published_name_is_a_string(name: Any) -> None:
    with pytest.raises(errors.OptionError, match="a method's name is"):
        tdh.register_method(name, tdh.HyperSolver("euler", zero, steps=4))
    assert name not in SOLVERS


def test_what_only_looks_like_a_solver_is_not_published() -> None:
    with pytest.raises(errors.StateTypeError, match="solver is a _Pretender"):
        tdh.register_method("pretender", _Pretender())


def test_a_solver_whose_base_is_gone_says_so() -> None:
    from torchdiffeq_hyper.tableaus import second_order

    class Ralston:
        @tdh.hookimpl
        def register_solvers(self, register: Register) -> None:
            tableau = replace(second_order(2 / 3), name="ralston", alpha=None)
            register("hyperralston", tableau)

    tdh.register_plugin(Ralston(), name="ralston-plugin")
    solver = tdh.HyperSolver("ralston", zero, steps=4)
    tdh.unregister_plugin("ralston-plugin")
    with pytest.raises(errors.OptionError, match="base is 'ralston'"):
        tdh.register_method("gone", solver)


def test_wholes_of_one_class_are_told_by_the_method_they_name() -> None:
    class Part:
        def __init__(self, method: str) -> None:
            self.method = method

        def solve(self, func: Any, y0: Any, t: Any, *, rtol: Any, atol: Any) -> Any:
            return torch.stack([y0, y0])

    class Two:
        @tdh.hookimpl
        def register_solvers(self, register: Register) -> None:
            for name, order in (("one", 1), ("two", 2)):
                whole = WholeSolve(Part, name, f"Part({name!r})")
                register(name, whole, order=order, calls_per_step=1, follows_grid=False)

    tdh.register_plugin(Two(), name="two-wholes")
    try:
        found = _registry.method_for(Part("two"))
        assert found is not None
        assert (found.name, found.option, found.order) == ("two", "two", 2)
    finally:
        tdh.unregister_plugin("two-wholes")


def test_a_plugin_is_told_of_the_signature_it_calls() -> None:
    class Positional:
        @tdh.hookimpl
        def register_solvers(self, register: Any) -> None:
            register("positional", object, 2)

    with pytest.raises(TypeError, match=r"register\(\) takes 2 positional arguments"):
        tdh.register_plugin(Positional(), name="positional")


def test_import_changes_no_name_of_torchdiffeq_and_uninstall_leaves_it_as_found(
    tmp_path: Path,
) -> None:
    script = """
import json
from torchdiffeq._impl.odeint import SOLVERS
found = list(SOLVERS.items())

def same(a, b):
    return len(a) == len(b) and all(m == n and p is q for (m, p), (n, q) in zip(a, b))

import torchdiffeq_hyper as tdh
result = {"import kept": same(found, list(SOLVERS.items())[:len(found)])}
added = list(SOLVERS)[len(found):]
tdh.install()
result["install twice"] = list(SOLVERS)[len(found):] == added
tdh.uninstall()
result["uninstall"] = same(found, list(SOLVERS.items()))
tdh.uninstall()
result["uninstall twice"] = same(found, list(SOLVERS.items()))
tdh.install()
result["again"] = list(SOLVERS) == [name for name, _ in found] + added
result["added"] = added
print(json.dumps(result))
"""
    result = _run_python(script, tmp_path)
    assert {"hypereuler", "ssprk3"} <= set(result.pop("added"))
    assert result == dict.fromkeys(result, True)


def test_plugin_registered_while_uninstalled_reaches_the_host_on_install() -> None:
    tdh.uninstall()
    try:
        with registered(Plugin("plain"), "mine"):
            assert "plain" not in SOLVERS
            tdh.install()
            assert SOLVERS["plain"] is PlainEuler
    finally:
        tdh.install()
    assert "plain" not in SOLVERS
