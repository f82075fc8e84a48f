"""Imports in either order, their cost, and life without torchdyn; each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

SOLVES = """
import torch
from torchdyn.numerics import odeint
t = torch.tensor([0.0, 1.0])
solver = tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)
with tdh.using(solver):
    for given in ("hypereuler", solver):
        y = odeint(lambda t, y: -y, torch.ones(1), t, given)[1][-1]
        assert abs(float(y) - 0.3685) < 1e-4, y
"""
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchdyn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def _run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:torchdiffeq_hyper", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchdyn_may_be_imported_first() -> None:
    _run("import torchdyn.numerics; import torchdiffeq_hyper as tdh" + SOLVES)


def test_import_brings_neither_torchdyn_nor_lightning_and_serves_torchdyn_later() -> None:
    script = """
import inspect, sys, warnings, torchdiffeq_hyper as tdh
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torchdyn", "pytorch_lightning", "lightning", "torchcde", "torchsde"}
solver = tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)
tdh.register_method("alf", solver)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from torchdyn.numerics.solvers.ode import SOLVER_DICT, AsynchronousLeapfrog
assert not {name for name in sys.modules if "lightning" in name}
# A name of torchdyn's is left alone, and said so once.
text, = {str(w.message) for w in caught if w.category is tdh.errors.PluginWarning}
assert "already a method of torchdyn" in text, text
assert SOLVER_DICT["alf"] is AsynchronousLeapfrog
tdh.register_method("other", solver)
assert "other" in SOLVER_DICT
tdh.unregister_method("alf")
assert SOLVER_DICT["alf"] is AsynchronousLeapfrog
from importlib.machinery import SourceFileLoader
loop = sys.modules["torchdyn.numerics.odeint"]
assert type(loop.__loader__) is SourceFileLoader and "exec_module" not in vars(loop.__loader__)
assert "def odeint_mshooting" in inspect.getsource(loop)
"""
    _run(script + SOLVES)


def test_uninstall_before_the_import_leaves_torchdyn_alone() -> None:
    script = """
import sys, torchdiffeq_hyper as tdh
tdh.register_method("alf", tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10))
tdh.uninstall()
from torchdyn.numerics.solvers.ode import SOLVER_DICT
own = dict(SOLVER_DICT)
assert "hypereuler" not in SOLVER_DICT
assert not hasattr(sys.modules["torchdyn.numerics.odeint"]._fixed_odeint, "__wrapped__")
try:
    tdh.install()
except tdh.errors.DuplicateMethodError as error:
    assert "already a method of torchdyn" in str(error)
else:
    raise AssertionError
tdh.install()
assert "hypereuler" in SOLVER_DICT and own.items() <= SOLVER_DICT.items()
"""
    _run(script + SOLVES)


def test_without_torchdyn_nothing_but_its_import_fails() -> None:
    script = """
import torchdiffeq_hyper as tdh
tdh.uninstall()
tdh.install()
try:
    import torchdyn
except ModuleNotFoundError as error:
    assert type(error) is ModuleNotFoundError
else:
    raise AssertionError
"""
    _run(ABSENT + script)
