"""`HyperSolver.solve` as one graph, without reading values, in constant memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchdiffeq_hyper as tdh
from stubs import MLPField, coupled, coupled_start
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.tableaus import Edge, StageCall, Tableau

PLUGIN = "hyperralston3"
METHODS = [m.name for m in _registry.methods().values() if m.corrects_base and m.follows_grid]


def _ralston3(
    call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    k1 = call(t0, y, Edge.START)
    k2 = call(t0 + dt / 2, y + dt * k1 / 2)
    k3 = call(t0 + dt * 0.75, y + dt * k2 * 0.75)
    return dt * (2 * k1 + 3 * k2 + 4 * k3) / 9, (k1, k2, k3)


class Ralston3:
    """A third party's plugin."""

    @tdh.hookimpl
    def register_solvers(self, register: Any) -> None:
        register(PLUGIN, Tableau("ralston3", order=3, calls=3, increment=_ralston3))


@pytest.fixture(autouse=True)
def _ready() -> Iterator[None]:
    torch.compiler.reset()
    tdh.register_plugin(Ralston3(), "ralston")
    yield
    tdh.unregister_plugin("ralston")


class Gain(nn.Module):
    """A correction that uses everything a step gives, for tensors and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, step: tdh.StepInput) -> Any:
        if isinstance(step.y, Tensor):
            return self._of(step, step.y, step.stages[-1], step.y0)
        parts = zip(step.y, step.stages[-1], step.y0, strict=True)
        return tuple(self._of(step, *each) for each in parts)

    def _of(self, step: tdh.StepInput, y: Any, k: Any, y0: Any) -> Tensor:
        out: Tensor = self.gain * (y * step.t + k + step.dt * y0)
        return out


def _solver(method: str, kind: str) -> tuple[tdh.HyperSolver, Any, Any]:
    tableau = _registry.find(method).tableau
    assert tableau is not None
    # Fitted on tensors (batch, 3): of the tuple, the first part alone is corrected.
    domain = tdh.FitDomain((0.0, 1.0), 0.1, 1.0, (1, -1), ((3,),), is_tuple=False, dtype="float32")
    solver = tdh.HyperSolver(
        tableau.name, Gain(), steps=2, domain=domain if kind == "part" else None
    )
    if kind == "tensor":
        return solver, MLPField(dtype=torch.float32), torch.randn(3, 2)
    return solver, coupled, coupled_start(dtype=torch.float32)


def _leaves(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    ("kind", "n_points"), [("tensor", 2), ("tensor", 4), ("tuple", 2), ("part", 2)]
)
@pytest.mark.parametrize("method", [*METHODS, PLUGIN])
def test_one_graph_serves_both_directions(method: str, kind: str, n_points: int) -> None:
    solver, func, y0 = _solver(method, kind)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(solver.solve, fullgraph=True, backend=backend)
    with torch.no_grad():
        for span in [(0.2, 1.0), (1.0, 0.2)]:
            t = torch.linspace(*span, n_points)
            got, expected = compiled(func, y0, t), solver.solve(func, y0, t)
            torch.testing.assert_close(_leaves(got), _leaves(expected))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_compiled_solve_has_the_gradients_of_the_eager_one(kind: str) -> None:
    solver, func, y0 = _solver("hyperheun", kind)
    compiled = torch.compile(solver.solve, fullgraph=True, backend="aot_eager")
    start = tuple(part.requires_grad_() for part in _leaves(y0))
    t = torch.tensor([1.0, 0.2], requires_grad=True)
    wanted = [*start, t, solver.hypernet.gain]
    gradients = []
    for solve in (compiled, solver.solve):
        solution = solve(func, start if kind == "tuple" else start[0], t)
        loss = torch.stack([part[-1].square().sum() for part in _leaves(solution)]).sum()
        gradients.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_solver_compiles_in_place_as_modules_do() -> None:
    solver, func, y0 = _solver("hypereuler", "tensor")
    t = torch.tensor([0.0, 1.0])
    expected = solver.solve(func, y0, t)
    solver.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(solver(func, y0, t), expected)


# The compiler's own imports warn (torch 2.13).
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_of_a_solve_gives_the_eager_numbers() -> None:
    solver, func, y0 = _solver("hyperheun", "tensor")
    solver.cuda(), func.cuda()
    compiled = torch.compile(solver.solve, fullgraph=True, mode="reduce-overhead")
    y0, t = y0.cuda(), torch.tensor([0.0, 1.0], device="cuda")
    with torch.no_grad():
        for _ in range(3):  # the first calls record
            got = compiled(func, y0, t).clone()
        torch.testing.assert_close(got, solver.solve(func, y0, t))


class Watch(TorchDispatchMode):
    """Counts reads of values, and the most tensors of a state's size alive at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._alive: list[weakref.ref[Tensor]] = []
        self.peak = 0
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads.append(str(func))
        new = [weakref.ref(leaf) for leaf in _leaves(out) if leaf.numel() >= self._size]
        self._alive = [ref for ref in self._alive + new if ref() is not None]
        self.peak = max(self.peak, len(self._alive))
        return out


def _watched(method: str, steps: int, func: Any) -> Watch:
    solver = tdh.HyperSolver(_registry.find(method).tableau.name, Gain(), steps=steps)
    y0, t = torch.randn(50, 2), torch.tensor([0.0, 1.0])
    with torch.no_grad(), Watch(y0.numel()) as watch:
        solver.solve(func, y0, t)
    return watch


@pytest.mark.parametrize("method", [*METHODS, PLUGIN])
def test_memory_of_inference_does_not_grow_with_the_steps(method: str) -> None:
    func = MLPField(dtype=torch.float32)
    few, many = _watched(method, 2, func), _watched(method, 40, func)
    assert few.peak == many.peak > 0
    kept: list[Tensor] = []  # what a solver that keeps its states would look like

    def keeping(t: Tensor, y: Tensor) -> Tensor:
        kept.append(y)
        return func(t, y)

    assert _watched(method, 40, keeping).peak > many.peak


@pytest.mark.parametrize("method", [*METHODS, PLUGIN])
def test_values_are_read_once_a_solve_not_once_a_step(method: str) -> None:
    func = MLPField(dtype=torch.float32)
    assert len(_watched(method, 40, func).reads) == len(_watched(method, 1, func).reads) <= 1
    reading = _watched(method, 5, lambda t, y: func(t, y) * float(t))
    assert len(reading.reads) > 5


def test_solve_runs_where_there_are_no_values_to_read() -> None:
    solver, func, y0 = _solver("hyperrk4", "tensor")
    solver.to("meta"), func.to("meta")
    domain = tdh.FitDomain((0.0, 1.0), 0.1, 0.1, (1,), ((2,),), is_tuple=False, dtype="float32")
    solver.domain = domain
    solution = solver.solve(func, y0.to("meta"), torch.tensor([0.0, 1.0], device="meta"))
    assert solution.shape == (2, 3, 2)


def test_inference_mode_gives_the_same_numbers_without_bookkeeping() -> None:
    solver, func, y0 = _solver("hyperheun", "tensor")
    t = torch.tensor([0.0, 1.0])
    expected = solver.solve(func, y0, t)
    assert expected.requires_grad
    with torch.no_grad():
        assert solver.solve(func, y0, t).grad_fn is None
    with torch.inference_mode():
        got = solver.solve(func, y0, t)
    assert got.is_inference()
    assert torch.equal(got, expected)
