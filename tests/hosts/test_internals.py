"""Only hosts/ names what torchdiffeq and torchdyn keep inside; the rest runs without a host."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import torchdiffeq_hyper

PACKAGE = Path(torchdiffeq_hyper.__file__).parent
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "hosts"
)
TORCHDIFFEQ = {
    *("_impl", "SOLVERS", "base_func", "rk_state", "valid_callbacks"),
    *("_PerturbFunc", "_ReverseFunc", "_TupleFunc", "_TupleInputOnlyFunc", "Perturb"),
    *("augmented_dynamics", "OdeintAdjointMethod", "integrate_until_event", "_check_inputs"),
    *("FixedGridODESolver", "RKAdaptiveStepsizeODESolver", "Dopri5Solver", "_step_func"),
    *("_adaptive_step", "_advance", "_advance_until_event", "_before_integrate"),
    *("callback_step", "callback_accept_step", "callback_reject_step", "_rms_norm", "_mixed_norm"),
}
TORCHDYN = {
    *("vf", "vf_params", "defunc", "DEFunc", "DEFuncBase", "ODEProblem", "NeuralODE"),
    *("sensalg", "sensitivity", "solver_adjoint", "integral_loss", "SOLVER_DICT"),
    *("str_to_solver", "stepping_class", "sync_device_dtype", "_fixed_odeint", "_adaptive_odeint"),
    *("_gather_odefunc_adjoint", "_gather_odefunc_interp_adjoint", "adjoint_dynamics"),
    *("trace_estimator", "noise_dist", "_control", "x_spline", "horder_forward", "problems"),
}
INSIDE = TORCHDIFFEQ | TORCHDYN


def _named(tree: ast.AST) -> set[str]:
    """Return the names that a module imports or takes as an attribute, also by `getattr`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            if not module.startswith("torchdiffeq_hyper."):
                found |= {part for alias in node.names for part in alias.name.split(".")}
                found |= set(module.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if node.value.isidentifier() else set()
    return found


def _own(tree: ast.AST) -> set[str]:
    """Return the attributes that a module's own classes have: what it sets on ``self``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_outside_hosts_names_an_attribute_of_a_hosts_internals(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not INSIDE & (_named(tree) - _own(tree))


def test_the_hosts_do_name_them() -> None:
    trees = [ast.parse(path.read_text()) for path in (PACKAGE / "hosts").rglob("*.py")]
    named = set().union(*map(_named, trees))
    assert {"_impl", "SOLVERS", "base_func", "vf", "DEFunc", "SOLVER_DICT", "_control"} <= named


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_asks_for_the_kind_of_a_method(path: Path) -> None:
    kinds = {"SteppingMethod", "WholeMethod", "ReadyMethod"}
    if path != PACKAGE / "methods" / "_method.py":  # what plugins register is told apart once
        kinds |= {"Tableau", "WholeSolve"}
    asked = [
        ast.unparse(node.args[1])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "issubclass"}
    ]
    assert not kinds & {word for text in asked for word in re.findall(r"\w+", text)}
