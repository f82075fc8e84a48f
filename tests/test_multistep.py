"""Hypersolvers with a memory: what a step is given of earlier ones, and the matrices for it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import MLPField, damped_wave, spiral, spiral_solution
from torchdiffeq_hyper import StepInput
from torchdiffeq_hyper.errors import OptionError, StateShapeError
from torchdiffeq_hyper.hypernets import Multistep
from torchdiffeq_hyper.methods import _registry

UNEVEN = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.5, 0.62, 0.9], dtype=torch.float64)
T = UNEVEN[[0, -1]]
BASES = ("euler", "midpoint", "heun", "rk4")
HOST = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}


def net(base: str, channels: int = 2, *, filled: bool = True, **own: Any) -> Multistep:
    """Return a net for a base, with random matrices and scales."""
    torch.manual_seed(0)
    tableau = _registry.find_tableau(base, None)
    g = Multistep(channels, n_stages=tableau.calls, order=tableau.order, **own).double()
    if filled:
        nn.init.normal_(g.weight, std=0.05)
        g.feature_scale.uniform_(0.5, 2)
        g.output_scale.uniform_(0.5, 2)
    return g.requires_grad_(requires_grad=False)


def start(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """The same net without its form for whole grids."""

    def __init__(self, inner: Multistep) -> None:
        super().__init__()
        self.inner = inner
        self.history = inner.history

    def forward(self, step: StepInput) -> Any:
        return self.inner(step)


class Watching(nn.Module):
    """Returns nothing to add; keeps what it was given."""

    def __init__(self, history: int) -> None:
        super().__init__()
        self.history = history
        self.seen: list[StepInput] = []

    def forward(self, step: StepInput) -> Tensor:
        self.seen.append(step)
        return torch.zeros_like(step.y)


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize("through_host", [False, True])
def test_steps_are_given_the_derivatives_of_the_steps_before(
    is_reverse: bool, through_host: bool
) -> None:
    g, t = Watching(2), UNEVEN.flip(0) if is_reverse else UNEVEN
    solver = tdh.HyperSolver("heun", g, steps=3)
    if through_host:
        odeint(spiral, start(3, 2), t, method="hyperheun", options={"solver": solver})
    else:
        solver.solve(spiral, start(3, 2), t)
    assert [len(step.history) for step in g.seen] == [0, 1, 2, 2, 2, 2]
    for n, step in enumerate(g.seen):
        assert torch.equal(step.f0, spiral(step.t, step.y))
        for k, (f, dt) in enumerate(step.history):
            before = g.seen[n - 1 - k]
            assert torch.equal(f, before.f0)
            assert torch.equal(dt, before.dt)
            assert (dt < 0) == is_reverse


def test_nets_that_ask_for_no_history_get_none() -> None:
    g = Watching(0)
    tdh.HyperSolver("euler", g, steps=4).solve(spiral, start(3, 2), UNEVEN)
    assert all(step.history == () for step in g.seen)
    g.history = ["a", "log"]  # type: ignore[assignment]
    tdh.HyperSolver("euler", g, steps=4).solve(spiral, start(3, 2), UNEVEN)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("is_tuple", [False, True])
def test_zero_matrices_reproduce_the_base_bitwise(base: str, is_tuple: bool) -> None:
    solver = tdh.HyperSolver(base, net(base, 3 if is_tuple else 2, filled=False), steps=6)
    y0: Any = (start(4, 2), start(4)) if is_tuple else start(4, 2)

    def func(t: Tensor, y: Any) -> Any:
        return tuple(damped_wave(t, part) for part in y) if is_tuple else damped_wave(t, y)

    for t in (UNEVEN, UNEVEN.flip(0)):
        own = odeint(func, y0, t, method=solver.method, options={"solver": solver})
        host = odeint(func, y0, t, method=HOST[base])
        pairs = zip(own, host, strict=True) if is_tuple else [(own, host)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 5), (2, 2, 3, 4)])
@pytest.mark.parametrize("time_unit", [1.0, 2.5])
def test_the_form_for_grids_gives_the_numbers_of_single_steps(
    base: str, shape: tuple[int, ...], time_unit: float
) -> None:
    g = net(base, degree=2)
    g.measure_time_in(time_unit, g.order, (0.1, 0.8))
    y0 = start(*shape)
    for t in (UNEVEN, UNEVEN.flip(0)):
        fused = tdh.HyperSolver(base, g, steps=3)
        single = tdh.HyperSolver(base, Plain(g), steps=3)
        for a in (
            fused.solve(damped_wave, y0, t),
            odeint(damped_wave, y0, t, method=fused.method, options={"solver": fused}),
        ):
            torch.testing.assert_close(a, single.solve(damped_wave, y0, t), rtol=0, atol=1e-13)


def test_parts_of_a_tuple_are_channels() -> None:
    g = net("heun", 3)
    solver, y0 = tdh.HyperSolver("heun", g, steps=4), start(4, 3)

    def on_parts(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k = damped_wave(t, torch.cat([y[0], y[1].unsqueeze(1)], 1))
        return k[:, :2], k[:, 2]

    whole = solver.solve(damped_wave, y0, UNEVEN)
    first, second = solver.solve(on_parts, (y0[:, :2], y0[:, 2]), UNEVEN)
    torch.testing.assert_close(
        torch.cat([first, second.unsqueeze(2)], 2), whole, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("order", [2, 3, 4])
def test_numbers_for_matrices_are_adams_bashforth_methods(order: int) -> None:
    g = net("euler", history=3)
    g.start_as_adams_bashforth(order)
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = tdh.HyperSolver("euler", g, steps=10).solve(spiral, start(3, 2), grid)
    weights = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    weights += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    y, derivatives = start(3, 2), list[Tensor]()
    for n in range(10):
        derivatives.insert(0, spiral(grid[n], y))
        used = weights[min(n, order - 1)]
        y = y + 0.1 * sum(w * f for w, f in zip(used, derivatives, strict=False))
        torch.testing.assert_close(found[n + 1], y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_adams_bashforth_2_has_order_2(sign: int) -> None:
    g, y0 = net("euler"), start(3, 2)
    g.start_as_adams_bashforth(2)
    t = torch.tensor([0.0, sign * 1.0], dtype=torch.float64)
    exact = spiral_solution(t, y0)[-1]
    errors = [
        (tdh.HyperSolver("euler", g, steps=n).solve(spiral, y0, t)[-1] - exact).norm()
        for n in (40, 80)
    ]
    assert 1.9 < float(torch.log2(errors[0] / errors[1])) < 2.1


def test_half_the_last_difference_makes_euler_adams_bashforth_2() -> None:
    class Half(nn.Module):
        history = 1

        def forward(self, step: StepInput) -> Tensor:
            if not step.history:
                return torch.zeros_like(step.y)
            assert isinstance(step.f0, Tensor)
            return 0.5 * (step.f0 - step.history[0][0]) / step.dt

    g = net("euler")
    g.start_as_adams_bashforth(2)
    pair = (tdh.HyperSolver("euler", h, steps=8).solve(spiral, start(3, 2), T) for h in (g, Half()))
    torch.testing.assert_close(*pair, rtol=0, atol=1e-14)


@pytest.mark.parametrize("wrap", [lambda g: g, Plain])
def test_func_may_answer_in_one_buffer(wrap: Any) -> None:
    y0 = start(4, 2)
    buffer = torch.empty_like(y0)

    def reusing(t: Tensor, y: Tensor) -> Tensor:
        return buffer.copy_(damped_wave(t, y))

    solver = tdh.HyperSolver("euler", wrap(net("euler")), steps=6)
    with torch.no_grad():
        assert torch.equal(solver.solve(reusing, y0, T), solver.solve(damped_wave, y0, T))


def test_gradients_reach_start_times_and_matrices() -> None:
    g = net("heun", degree=1).requires_grad_(requires_grad=True)
    solver, func = tdh.HyperSolver("heun", g, steps=3), MLPField()

    def end(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            pass
        return torch.func.functional_call(
            _End(solver, func), {"solver.hypernet.weight": weight}, (y0, t)
        )

    weight = g.weight.detach().clone().requires_grad_()
    t = torch.tensor([0.1, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (start(2, 2).requires_grad_(), t, weight))


class _End(nn.Module):
    def __init__(self, solver: tdh.HyperSolver, func: nn.Module) -> None:
        super().__init__()
        self.solver, self.func = solver, func

    def forward(self, y0: Tensor, t: Tensor) -> Tensor:
        y = self.solver.solve(self.func, y0, t)
        assert isinstance(y, Tensor)
        return y[-1]


def test_kept_matrices_follow_weights_times_and_dtypes() -> None:
    g = net("euler")
    solver, y0 = tdh.HyperSolver("euler", g, steps=5), start(3, 2)
    fresh = lambda: tdh.HyperSolver("euler", copy.deepcopy(g), steps=5)  # noqa: E731
    for change in (
        lambda: g.weight.mul_(2),
        lambda: g.weight.data.add_(0.01),
        lambda: g.output_scale.mul_(3),
        lambda: g.measure_time_in(2.0, 1, (0.0, 3.0)),
    ):
        solver.solve(damped_wave, y0, T)
        change()
        for t in (T, T + 0.1, T.flip(0), T.float()):
            y = y0.to(t.dtype)
            assert torch.equal(solver.solve(damped_wave, y, t), fresh().solve(damped_wave, y, t))


def test_copies_pickles_and_files_hold_the_same_solver(tmp_path: Path) -> None:
    g = net("midpoint", history=1, degree=2, span=(0.0, 2.0))
    g.measure_time_in(2.0, 2)
    solver, y0 = tdh.HyperSolver("midpoint", g, steps=5), start(3, 2)
    wanted = solver.solve(damped_wave, y0, T)
    solver.save(tmp_path / "a.safetensors")
    for other in (
        copy.deepcopy(solver),
        pickle.loads(pickle.dumps(solver)),
        tdh.HyperSolver.load(tmp_path / "a.safetensors"),
    ):
        assert torch.equal(other.solve(damped_wave, y0, T), wanted)
        assert other.hypernet.architecture == g.architecture


@pytest.mark.parametrize("base", ["euler", "heun"])
def test_a_solve_with_memory_compiles_to_one_graph(base: str) -> None:
    solver, y0 = tdh.HyperSolver(base, net(base), steps=4), start(3, 2)
    compiled = torch.compile(solver.solve, fullgraph=True, backend="eager")
    for t in (T, T.flip(0)):
        wanted = solver.solve(damped_wave, y0, t)
        torch.testing.assert_close(compiled(damped_wave, y0, t), wanted, rtol=0, atol=1e-14)


def test_a_blow_up_is_replayed_from_the_first_step() -> None:
    solver = tdh.HyperSolver("euler", net("euler"), steps=6)

    def bursting(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, torch.inf, 1.0) * damped_wave(t, y)

    with pytest.raises(tdh.errors.NonFiniteError, match="at step 4, t = 0.6"):
        solver.solve(bursting, start(3, 2), T)
    with pytest.raises(tdh.errors.NonFiniteError, match="at step 4, t = 0.6"):
        odeint(bursting, start(3, 2), T, method="hypereuler", options={"solver": solver})


def test_states_of_other_channels_are_refused() -> None:
    solver = tdh.HyperSolver("euler", net("euler"), steps=6)
    for wrap in (solver, tdh.HyperSolver("euler", Plain(net("euler")), steps=6)):
        with pytest.raises(StateShapeError, match=r"has 3 channels along dim 1.*matrices 2"):
            wrap.solve(damped_wave, start(4, 3), T)
    with pytest.raises(OptionError, match="history is 9"):
        Multistep(2, history=9)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_one_fit_serves_step_sizes_around_and_beats_adams_bashforth(direction: str) -> None:
    torch.manual_seed(0)
    func, y0 = MLPField(width=8, dtype=torch.float32), 2 * torch.randn(256, 2)
    span = (0.0, 2.0) if direction == "forward" else (2.0, 0.0)
    config = tdh.FitConfig(iterations=150, max_seconds=300, batch_size=64)
    g = Multistep(2)
    solver = tdh.fit(func, y0, span, base="euler", steps=8, hypernet=g, config=config)
    assert solver.steps == 8
    assert solver.domain is not None
    assert round(2 / solver.domain.dt_max) == 6
    assert round(2 / solver.domain.dt_min) == 11
    assert g.span == span
    fresh, t = 2 * torch.randn(128, 2), torch.tensor(span)
    exact = odeint(func.requires_grad_(requires_grad=False), fresh, t, rtol=1e-6, atol=1e-6)[-1]
    for steps in (6, 8, 11):
        errors = []
        for h in (g, *g.classical_methods()):
            y = tdh.HyperSolver("euler", h, steps=steps).solve(func, fresh, t)
            assert isinstance(y, Tensor)
            errors.append(float((y[-1] - exact).norm(dim=1).mean()))
        assert errors[0] < 0.5 * min(errors[1:])


def _solver(base: str = "euler", **own: Any) -> tdh.HyperSolver:
    return tdh.HyperSolver(base, net(base, **own), steps=5)


def test_a_solve_in_inference_mode_leaves_training_of_func_possible() -> None:
    solver, func, y0 = _solver(), MLPField(), start(3, 2)
    with torch.inference_mode():
        solver.solve(func, y0, T)
    y = solver.solve(func, y0, T)
    assert isinstance(y, Tensor)
    y[-1].sum().backward()
    assert all(p.grad is not None for p in func.parameters())


@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 4)])
def test_autocast_rounds_neither_base_nor_later_solves(shape: tuple[int, ...]) -> None:
    y0, t = start(*shape).float(), T.float()
    solver = _solver(filled=False).float()
    with torch.autocast("cpu", torch.bfloat16):
        own = solver.solve(damped_wave, y0, t)
        host = odeint(damped_wave, y0, t, method="euler", options={"step_size": float(T[1]) / 5})
    torch.testing.assert_close(own, host, rtol=0, atol=1e-6)
    solver.hypernet.start_as_adams_bashforth(3)  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        solver.solve(damped_wave, y0, t)
    again = copy.deepcopy(solver).solve(damped_wave, y0, t)
    assert torch.equal(solver.solve(damped_wave, y0, t), again)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_kept_matrices_hide_no_tangent_and_no_batch_of_weights() -> None:
    solver, y0 = _solver(), start(3, 2)
    end = _End(solver, MLPField())

    def at(t: Tensor) -> Tensor:
        y: Tensor = end(y0, t)
        return y

    def weighted(weight: Tensor) -> Tensor:
        weights = {"solver.hypernet.weight": weight}
        y: Tensor = torch.func.functional_call(end, weights, (y0, T))
        return y

    at(T)
    torch.testing.assert_close(torch.func.jacfwd(at)(T), torch.func.jacrev(at)(T))
    weight = solver.hypernet.weight.detach()  # type: ignore[union-attr]
    batch = torch.stack([weight, 2 * weight])
    mapped = torch.func.vmap(weighted)(batch)
    torch.testing.assert_close(mapped, torch.stack([weighted(w) for w in batch]))
    torch.testing.assert_close(at(T), mapped[0])


@pytest.mark.parametrize("wrap", [lambda g: g, Plain])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_func_may_answer_in_another_dtype(
    wrap: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    state, answer = dtypes
    solver = tdh.HyperSolver("euler", wrap(net("euler", filled=False)).to(state), steps=4)
    y0, t = start(3, 2).to(state), T.to(state)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y).to(answer)

    own = odeint(func, y0, t, method="hypereuler", options={"solver": solver})
    host = odeint(func, y0, t, method="euler", options={"step_size": float(T[1]) / 4})
    torch.testing.assert_close(own, host, rtol=0, atol=1e-6)


def test_weights_alone_carry_span_and_time_unit() -> None:
    g = net("euler")
    g.measure_time_in(3.0, 1, (0.0, 3.0))
    other = Multistep(2).double()
    other.load_state_dict(g.state_dict())
    assert (other.span, other.time_unit) == ((0.0, 3.0), 3.0)
    pair = (
        tdh.HyperSolver("euler", h, steps=5).solve(damped_wave, start(3, 2), T) for h in (g, other)
    )
    torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_a_net_for_another_base_is_refused() -> None:
    y0 = start(4, 2)
    for wrap in (lambda g: g, Plain):
        solver = tdh.HyperSolver("heun", wrap(Multistep(2, order=2).double()), steps=3)
        with pytest.raises(StateShapeError, match="has 2 stages, the hypernet is for 1"):
            solver.solve(damped_wave, y0, T)
    solver = tdh.HyperSolver("heun", Multistep(2, n_stages=2).double(), steps=3)
    with pytest.raises(tdh.errors.BaseMismatchError, match="of order 1, the base has 2"):
        solver.solve(damped_wave, y0, T)
    for g, order in ((Multistep(2, n_stages=2, order=2), 2), (Multistep(2), 4)):
        with pytest.raises(OptionError, match="order is"):
            g.start_as_adams_bashforth(order)
    with pytest.raises(OptionError, match="span is"):
        Multistep(2, span=(1.0, 1.0))


def test_steps_of_size_zero_and_tiny_units_stay_finite() -> None:
    g, y0 = net("euler", history=4).float(), start(3, 2).float()
    g.start_as_adams_bashforth(5)
    solver = tdh.HyperSolver("euler", g, steps=6)
    y = solver.solve(damped_wave, y0, torch.tensor([0.0, 0.5, 0.5, 1.0]))
    assert torch.equal(y[1], y[2])
    for unit in (1e-12, 1e12):
        t = unit * torch.tensor([0.0, 1.0])
        y = solver.solve(lambda t, y, unit=unit: -y / unit, y0, t)
        torch.testing.assert_close(y[-1], y0 * torch.exp(torch.tensor(-1.0)), rtol=0.02, atol=0)
