"""`HyperSolver.export`: a solve as a file that needs no package of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import torchdiffeq_hyper as tdh
from stubs import MLPField, coupled, coupled_start

T = torch.tensor([0.0, 1.0])
FOREIGN = """
import sys
sys.modules["torchdiffeq_hyper"] = sys.modules["torchdiffeq"] = None  # importing them raises
import torch
folder = sys.argv[1]
solve = torch.export.load(folder + "/solve.pt2").module()
y0, t, expected = torch.load(folder + "/example.pt")
torch.testing.assert_close(solve(y0, t), expected)
torch.testing.assert_close(solve(y0[:1], t), expected[:, :1])
assert not any(name.startswith("torchdiffeq") and sys.modules[name] for name in sys.modules)
"""


def _solver(base: str = "heun", channels: int = 2, **options: Any) -> tdh.HyperSolver:
    hypernet = tdh.hypernets.MLP(channels, (8,), inputs=("y", "f0", "dt", "t"))
    for parameter in hypernet.parameters():
        nn.init.normal_(parameter, std=0.5)
    return tdh.HyperSolver(base, hypernet, steps=3, **options)


def _export(folder: Path, solver: tdh.HyperSolver, func: Any, y0: Any, t: Tensor = T) -> Any:
    solver.export(folder / "solve.pt2", func, y0, t)
    return torch.export.load(folder / "solve.pt2").module()


def _assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(tree_leaves(got), tree_leaves(expected))


def test_exported_solve_runs_without_this_package(tmp_path: Path) -> None:
    solver, func, y0 = _solver(), MLPField(dtype=torch.float32), torch.randn(5, 2)
    solver.export(tmp_path / "solve.pt2", func, torch.randn(3, 2), T)
    with torch.no_grad():
        torch.save((y0, T, solver.solve(func, y0, T)), tmp_path / "example.pt")
    command = [sys.executable, "-c", FOREIGN, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_exported_solve_takes_any_batch_both_directions_and_other_times(
    batch: int, tmp_path: Path
) -> None:
    solver, func = _solver("alpha", alpha=1.0), MLPField(dtype=torch.float32)
    solve = _export(tmp_path, solver, func, torch.zeros(batch, 2))
    for size, t in [(1, T), (2, T.flip(0)), (9, T * 0.5)]:
        y0 = torch.randn(size, 2)
        _assert_same(solve(y0, t), solver.solve(func, y0, t))


def test_exported_solve_keeps_the_points_between(tmp_path: Path) -> None:
    solver, func = _solver(), MLPField(dtype=torch.float32)
    solve = _export(tmp_path, solver, func, torch.zeros(3, 2), torch.linspace(0, 1, 4))
    y0, t = torch.randn(6, 2), torch.tensor([1.0, 0.7, 0.5, 0.1])
    _assert_same(solve(y0, t), solver.solve(func, y0, t))


def test_buffers_of_a_bespoke_solver_are_no_views_which_torch_export_warns_about() -> None:
    solver = tdh.BespokeSolver.classical("rk4", 8)
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in solver.buffers())


@pytest.mark.parametrize("is_tuple_fitted", [True, False])
def test_exported_solve_takes_tuples(is_tuple_fitted: bool, tmp_path: Path) -> None:
    domain = tdh.FitDomain((0.0, 1.0), 0.1, 1.0, (1,), ((3,),), is_tuple=False, dtype="float32")
    solver = _solver("euler", 5) if is_tuple_fitted else _solver("euler", 3, domain=domain)
    solve = _export(tmp_path, solver, coupled, coupled_start(4, torch.float32))
    y0 = coupled_start(7, torch.float32)
    _assert_same(solve(y0, T), solver.solve(coupled, y0, T))


def test_plain_functions_closures_and_methods_are_exported_with_their_weights(
    tmp_path: Path,
) -> None:
    solver, field, y0 = _solver(), MLPField(dtype=torch.float32), torch.randn(3, 2)
    for func in (lambda t, y: field(t, y) * t, field.forward):
        solve = _export(tmp_path, solver, func, y0)
        _assert_same(solve(y0, T), solver.solve(func, y0, T))


def test_export_leaves_mode_gradients_and_values_as_found(tmp_path: Path) -> None:
    solver, func, y0 = _solver().train(), MLPField(dtype=torch.float32).eval(), torch.randn(3, 2)
    before = {name: value.clone() for name, value in solver.state_dict().items()}
    _export(tmp_path, solver, func, y0)
    assert solver.training
    assert not func.training
    assert all(p.grad is None and p.requires_grad for p in func.parameters())
    assert all(torch.equal(value, before[name]) for name, value in solver.state_dict().items())


def _branching(t: Tensor, y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def _one_batch(t: Tensor, y: Tensor) -> Tensor:
    return -y + torch.ones(4, 2)


@pytest.mark.parametrize(
    ("func", "text"), [(_branching, "torch.where"), (_one_batch, "dynamic_batch=False")]
)
def test_func_that_does_not_export_is_named_and_the_old_file_stays(
    func: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "solve.pt2"
    path.write_bytes(b"old")
    with pytest.raises(tdh.errors.ExportError, match=text):
        _solver().export(path, func, torch.randn(4, 2), T)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["solve.pt2"]


def test_func_for_one_batch_size_exports_when_told(tmp_path: Path) -> None:
    solver, y0, path = _solver(), torch.randn(4, 2), tmp_path / "solve.pt2"
    solver.export(path, _one_batch, y0, T, dynamic_batch=False)
    _assert_same(torch.export.load(path).module()(y0, T), solver.solve(_one_batch, y0, T))


def test_bad_example_raises_what_solve_raises(tmp_path: Path) -> None:
    func = MLPField(dtype=torch.float32)
    with pytest.raises(tdh.errors.StateShapeError, match="t has shape"):
        _solver().export(tmp_path / "solve.pt2", func, torch.randn(4, 2), torch.tensor(1.0))
    with pytest.raises(tdh.errors.StateShapeError, match="func returned shape"):
        _solver().export(tmp_path / "solve.pt2", lambda t, y: y[:1], torch.randn(4, 2), T)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_a_write_error(tmp_path: Path) -> None:
    func = MLPField(dtype=torch.float32)
    with pytest.raises(tdh.errors.FileWriteError, match="cannot be written"):
        _solver().export(tmp_path / "no" / "solve.pt2", func, torch.randn(4, 2), T)


class LogDensity(nn.Module):
    """A field of (x, log-density), its divergence taken in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.field = MLPField(dtype=torch.float32)
        self.way = way

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        if self.way == "grad":
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                v = self.field(t, x)
                rows = [torch.autograd.grad(v[:, i].sum(), x, create_graph=True) for i in (0, 1)]
            return v.detach(), -sum(row[0][:, i] for i, row in enumerate(rows)).detach()
        e = torch.ones_like(x)
        if self.way == "vjp":
            v, pull = torch.func.vjp(lambda x: self.field(t, x), x)
            return v, -(pull(e)[0] * e).sum(1)
        v, change = torch.func.jvp(lambda x: self.field(t, x), (x,), (e,))
        return v, -(change * e).sum(1)


def _tuple_solver() -> tdh.HyperSolver:
    return tdh.HyperSolver("heun", lambda step: tuple(0 * part for part in step.y), steps=2)


@pytest.mark.parametrize("batch", [2, 5])  # 2: that of the channels, too
@pytest.mark.parametrize("way", ["grad", "vjp"])
def test_func_that_differentiates_is_exported_for_any_batch(
    way: str, batch: int, tmp_path: Path
) -> None:
    solver, func = _tuple_solver(), LogDensity(way)
    solve = _export(tmp_path, solver, func, (torch.zeros(batch, 2), torch.zeros(batch)))
    y0 = torch.randn(7, 2), torch.randn(7)
    _assert_same(solve(y0, T), solver.solve(func, y0, T))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_advice_for_forward_derivatives_holds(tmp_path: Path) -> None:
    solver, func, path = _tuple_solver(), LogDensity("jvp"), tmp_path / "solve.pt2"
    y0 = torch.randn(4, 2), torch.randn(4)
    with pytest.raises(tdh.errors.ExportError, match=r"dynamic_batch=False"):
        solver.export(path, func, y0, T)
    solver.export(path, func, y0, T, dynamic_batch=False)
    _assert_same(torch.export.load(path).module()(y0, T), solver.solve(func, y0, T))
