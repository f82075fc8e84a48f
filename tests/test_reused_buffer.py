"""A func that answers in one buffer (``out=``) is solved as one that answers in fresh memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_event

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, coupled, coupled_start, damped_wave
from torchdiffeq_hyper._fields._answers import share_memory
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.regularizers import local_error_penalty
from torchdiffeq_hyper.solvers.bespoke import _rollout

LEARNED = [m.name for m in _registry.methods().values() if m.corrects_base]
GRIDS = {"forward": torch.linspace(0.2, 1.4, 7), "reverse": torch.linspace(1.4, 0.2, 7)}


class Buffered:
    """`damped_wave`, answered in as many buffers as ``rotation`` says, one after the other.

    Args:
        rotation: number of buffers.
        fresh: answers in fresh memory before the first buffer is used.
    """

    def __init__(self, rotation: int = 1, fresh: int = 0) -> None:
        self.rotation = rotation
        self.fresh = fresh
        self.calls = 0
        self._buffers: dict[Any, Tensor] = {}

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        k = damped_wave(t, y)
        if self.calls <= self.fresh or k.requires_grad:  # autograd refuses ``out=``
            return k
        key = (self.calls % self.rotation, k.shape, k.dtype)
        return self._buffers.setdefault(key, torch.empty_like(k)).copy_(k)


def using_all_stages(step: tdh.StepInput) -> Tensor:
    assert isinstance(step.y, Tensor)
    total = torch.zeros_like(step.y)
    for weight, k in enumerate(step.stages, start=1):
        assert isinstance(k, Tensor)
        total = total + 0.1 * weight * k
    return total


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("direction", GRIDS)
@pytest.mark.parametrize("method", LEARNED)
def test_every_learned_method_gives_its_numbers_for_fresh_memory(
    method: str, direction: str, grad: bool
) -> None:
    tableau = _registry.find(method).tableau
    assert tableau is not None
    solver = tdh.HyperSolver(tableau.name, using_all_stages)
    y0, t = torch.randn(3, 2), GRIDS[direction]
    with torch.set_grad_enabled(grad):
        expected = solver.solve(damped_wave, y0, t)
        for buffered in (Buffered(), Buffered(rotation=2), Buffered(fresh=1), Buffered(fresh=5)):
            assert torch.equal(solver.solve(buffered, y0, t), expected)
            options = {"solver": solver}
            got = odeint(buffered, y0, t, method=method, options=options)
            assert torch.equal(got, odeint(damped_wave, y0, t, method=method, options=options))


@pytest.mark.parametrize("base", ["heun", "rk4"])
def test_only_the_first_step_is_done_again(base: str) -> None:
    solver = tdh.HyperSolver(base, zero, steps=10)
    func = Buffered()
    solver.solve(func, torch.ones(2), torch.tensor([0.0, 1.0]))
    assert func.calls == 11 * solver.tableau.calls


def test_a_derivative_that_is_one_constant_tensor_gives_its_numbers() -> None:
    slope = torch.tensor([1.0, 2.0])
    solver = tdh.HyperSolver("rk4", zero, steps=4)
    y = solver.solve(lambda t, y: slope, torch.zeros(2), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(y[-1], slope)
    assert torch.equal(slope, torch.tensor([1.0, 2.0]))


def test_interpolation_keeps_the_derivative_at_the_step_start() -> None:
    y0, t = torch.randn(3, 2), torch.tensor([0.0, 0.35, 1.0])
    options = {"hypernet": zero, "step_size": 0.1, "interp": "cubic"}
    for method in LEARNED:
        got = odeint(Buffered(), y0, t, method=method, options=dict(options))
        assert torch.equal(got, odeint(damped_wave, y0, t, method=method, options=dict(options)))


def test_events_are_found_where_they_are_for_fresh_memory() -> None:
    def event(t: Tensor, y: Tensor) -> Tensor:
        return y[0] - 0.6

    def found(func: Any) -> Any:
        options = {"hypernet": using_all_stages, "step_size": 0.05, "interp": "cubic"}
        t0 = torch.tensor(0.0)
        return odeint_event(
            func, torch.ones(2), t0, event_fn=event, method="hyperheun", options=options
        )

    for got, expected in zip(found(Buffered()), found(damped_wave), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("fresh", [0, 1, 3])
@pytest.mark.parametrize("rotation", [1, 2, 3])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", ["small", "large"])
def test_bespoke_solvers_of_all_sizes_give_one_answer(
    size: str, grad: bool, rotation: int, fresh: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setattr(_rollout, "CHUNK", 4)
    solver, t = tdh.BespokeSolver.classical("rk4", 8), torch.linspace(0, 1, 3)
    y0 = torch.randn(5, 2)
    with torch.set_grad_enabled(grad):
        got = solver.solve(Buffered(rotation, fresh), y0, t)
        assert torch.equal(got, solver.solve(damped_wave, y0, t))


def test_a_thawed_bespoke_solver_is_solved_right() -> None:
    solver = tdh.BespokeSolver.classical("heun3", 6).requires_grad_()
    y0, t = torch.randn(5, 2), torch.tensor([0.0, 1.0])
    assert torch.equal(solver.solve(Buffered(), y0, t), solver.solve(damped_wave, y0, t))


@pytest.mark.parametrize("time", ["loop", "vector"])
def test_steps_of_each_sample_give_the_numbers_for_fresh_memory(time: str) -> None:
    def column(func: Any) -> Any:
        return lambda t, y: func(t.reshape(-1, *[1] * (y.dim() - 1)), y)

    y0, t = torch.randn(4, 2), torch.tensor([0.0, 0.4, 1.0])
    call: dict[str, Any] = {"method": "dopri5_per_sample", "options": {"time": time}}
    got = odeint(column(Buffered()), y0, t, **call)
    assert torch.equal(got, odeint(column(damped_wave), y0, t, **call))


def test_groups_of_dise_give_the_numbers_for_fresh_memory() -> None:
    candidates = [
        tdh.Candidate("rk4", steps=4),
        tdh.Candidate("heun3", steps=4),
        tdh.Candidate("dopri5", rtol=1e-5, atol=1e-6),
        tdh.Candidate("dopri5_per_sample", rtol=1e-5, atol=1e-6, options={"time": "loop"}),
        tdh.Candidate(tdh.HyperSolver("rk4", using_all_stages, steps=4)),
    ]
    dise = tdh.Dise(candidates, selector=torch.nn.Identity())
    y0, t, selection = torch.randn(10, 2), torch.tensor([0.0, 1.0]), torch.arange(10) % 5
    got = dise.dispatch(Buffered(), y0, t, selection)
    assert torch.equal(got, dise.dispatch(damped_wave, y0, t, selection))


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
def test_torchdyn_gives_the_numbers_for_fresh_memory() -> None:
    numerics = pytest.importorskip("torchdyn.numerics")
    y0 = torch.randn(4, 2)
    for solver in (
        tdh.HyperSolver("rk4", using_all_stages, steps=4),
        tdh.BespokeSolver.classical("rk4", 8),
    ):
        for t in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])):
            _, got = numerics.odeint(Buffered(), y0, t, solver)
            _, expected = numerics.odeint(damped_wave, y0, t, solver)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", ["heun", "bns"])
def test_a_fit_is_the_same_for_fresh_memory(base: str, dtype: torch.dtype) -> None:
    y0 = torch.randn(64, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    fitted = [
        tdh.fit(
            func,
            y0,
            (0.0, 1.0),
            base=base,
            steps=3,
            config=tdh.FitConfig(iterations=4),
            progress=False,
        )
        for func in (Buffered(), damped_wave)
    ]
    for one, other in zip(*(solver.state_dict().values() for solver in fitted), strict=True):
        assert torch.equal(one, other)


def test_the_reference_of_an_evaluation_is_the_one_for_fresh_memory() -> None:
    y0 = torch.randn(8, 2)
    rows = [
        tdh.evaluate(func, y0, (0.0, 1.0), ["euler"], steps=[4], progress=False).rows[0]
        for func in (Buffered(), damped_wave)
    ]
    assert rows[0].relative_l2 == rows[1].relative_l2


def test_a_step_taken_again_gives_its_error_for_fresh_memory() -> None:
    func = Buffered(fresh=1000)
    with tdh.record(seed=0) as rec, torch.no_grad():
        odeint(func, torch.ones(3), torch.tensor([0.0, 1.0]), method="dopri5")
    with torch.no_grad():
        expected = local_error_penalty(rec.solves[-1])
        func.fresh = 0
        assert torch.equal(local_error_penalty(rec.solves[-1]), expected)


def test_what_autograd_records_is_neither_compared_nor_called_again() -> None:
    func = Counted(damped_wave)
    y0 = torch.ones(2, requires_grad=True)
    tdh.HyperSolver("rk4", zero, steps=3).solve(func, y0, torch.tensor([0.0, 1.0]))
    assert func.calls == 12
    k = (y0 * 2).detach().requires_grad_()
    assert not share_memory((k, k))


def test_a_recorded_derivative_that_is_changed_in_place_is_solved_right() -> None:
    class Kept:
        buffer: Tensor | None = None

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            self.buffer = torch.empty_like(y) if self.buffer is None else self.buffer.detach()
            return self.buffer.copy_(damped_wave(t, y))

    solver, t = tdh.HyperSolver("rk4", zero, steps=3), torch.tensor([0.0, 1.0])
    y0 = torch.ones(2, requires_grad=True)
    got, expected = solver.solve(Kept(), y0, t), solver.solve(damped_wave, y0, t)
    assert torch.equal(got, expected)
    (gradient,) = torch.autograd.grad(got[-1].sum(), y0)
    assert torch.equal(gradient, *torch.autograd.grad(expected[-1].sum(), y0))


def test_parts_of_a_tuple_may_share_a_buffer() -> None:
    buffers: dict[Any, Tensor] = {}

    def buffered(t: Tensor, state: Any) -> Any:
        answer = coupled(t, state)
        return tuple(
            buffers.setdefault((i, k.shape), torch.empty_like(k)).copy_(k)
            for i, k in enumerate(answer)
        )

    y0, t = coupled_start(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for solver in (
        tdh.HyperSolver("rk4", zero, steps=3),
        tdh.BespokeSolver.classical("rk4", 8),
    ):
        for got, expected in zip(
            solver.solve(buffered, y0, t), solver.solve(coupled, y0, t), strict=True
        ):
            assert torch.equal(got, expected)


def test_memory_that_cannot_be_looked_at_counts_as_its_own() -> None:
    def alone(y: Tensor) -> Tensor:
        assert not share_memory((y, y))
        return y

    torch.func.vmap(alone)(torch.ones(2, 3))
    assert not share_memory((torch.empty(0), torch.empty(0)))
