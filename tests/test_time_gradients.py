"""Gradients to every time of a solve, the first included, by every method and entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, TupleState, coupled, coupled_start, spiral, spiral_solution
from torchdiffeq_hyper.errors import NonFiniteError
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method
from torchdiffeq_hyper.solvers.bespoke import _rollout, classical

METHODS = list(_registry.methods())
TIMES = [(0.2, 0.9), (0.9, 0.2), (0.2, 0.5, 0.9), (0.9, 0.6, 0.2)]
STEP = 1e-5


class Spirals(nn.Module):
    """`spiral` on a tensor, or on each part of a tuple."""

    def forward(self, t: Tensor, y: Any) -> Any:
        return tuple(spiral(t, part) for part in y) if isinstance(y, tuple) else spiral(t, y)


class BySign(nn.Module):
    """Chooses among two candidates by the sign of a sample's first number."""

    def forward(self, y0: Any) -> Tensor:
        first = (y0[0] if isinstance(y0, tuple) else y0)[:, 0]
        return torch.stack([first, -first], dim=1)


def start() -> Tensor:
    return torch.linspace(-1, 1.5, 8, dtype=torch.float64).reshape(4, 2)


def domain(times: tuple[float, ...], shapes: tuple[tuple[int, ...], ...] = ((2,),)) -> Any:
    first, last = times[0], times[-1]
    sign, span = (1 if last > first else -1), (min(first, last), max(first, last))
    width = span[1] - span[0]
    return tdh.FitDomain(span, width, width, (sign,), shapes, len(shapes) > 1, "float64")


def bespoke(times: tuple[float, ...], *, n_parts: int = 1, calls: int = 48) -> tdh.BespokeSolver:
    return tdh.BespokeSolver(classical("rk4", calls), domain=domain(times, ((2,),) * n_parts))


def dise() -> tdh.Dise:
    fine = tdh.Candidate("dopri5", rtol=1e-8, atol=1e-8)
    return tdh.Dise([tdh.Candidate("rk4", steps=12), fine], selector=BySign())


def options_of(method: Method, times: tuple[float, ...], n_parts: int) -> dict[str, Any]:
    if method.corrects_base:
        return {"hypernet": zero, "step_size": 0.004 if method.order == 1 else 0.02}
    if method.kind is None:
        return {"step_size": 0.02}  # a plugin's ready class
    parts: dict[str | None, Callable[[], Any]] = {
        "solver": lambda: bespoke(times, n_parts=n_parts),
        "dise": dise,
    }
    return {} if method.option is None else {method.option: parts[method.option]()}


def exact_gradient(times: tuple[float, ...], y0: Tensor) -> Tensor:
    """Return the derivative of the sum of the last state by each time, from the exact solution."""

    def end(first: float, last: float) -> float:
        return float(spiral_solution(torch.tensor([last], dtype=torch.float64), y0, first).sum())

    first, last = times[0], times[-1]
    gradient = torch.zeros(len(times), dtype=torch.float64)
    gradient[0] = (end(first + STEP, last) - end(first - STEP, last)) / (2 * STEP)
    gradient[-1] = (end(first, last + STEP) - end(first, last - STEP)) / (2 * STEP)
    return gradient


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("times", [TIMES[0], TIMES[3]])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_time(
    name: str, times: tuple[float, ...], is_tuple: bool, solve: Any
) -> None:
    method = _registry.find(name)
    y0 = (start(), start().flip(0)) if is_tuple else start()
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    options = options_of(method, times, 2 if is_tuple else 1)
    y = solve(Spirals(), y0, t, method=name, options=options, rtol=1e-7, atol=1e-9)
    first = y[0] if is_tuple else y
    (found,) = torch.autograd.grad(first[-1].sum(), t)
    is_coarse = method.corrects_base and method.order == 1
    slack = 8e-2 if is_coarse else 2e-3
    torch.testing.assert_close(found, exact_gradient(times, start()), rtol=slack, atol=slack)


def parts_that_solve(times: tuple[float, ...]) -> dict[str, Any]:
    return {
        "bns": bespoke(times),
        "bns with a hypernet": tdh.BespokeSolver(
            classical("rk4", 48), hypernet=zero, domain=domain(times)
        ),
        "hyperheun": tdh.HyperSolver("heun", zero, steps=60),
        "dise": dise(),
    }


@pytest.mark.parametrize("times", TIMES[:2])
@pytest.mark.parametrize("name", list(parts_that_solve(TIMES[0])))
def test_gradients_reach_every_time_without_a_host(name: str, times: tuple[float, ...]) -> None:
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    y = parts_that_solve(times)[name].solve(spiral, start(), t)
    (found,) = torch.autograd.grad(y[-1].sum(), t)
    torch.testing.assert_close(found, exact_gradient(times, start()), rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
@pytest.mark.parametrize("times", TIMES)
def test_gradients_reach_every_time_through_torchdyn(times: tuple[float, ...]) -> None:
    numerics = pytest.importorskip("torchdyn.numerics")
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    _, y = numerics.odeint(spiral, start(), t, bespoke(times))
    (found,) = torch.autograd.grad(y[-1].sum(), t)
    torch.testing.assert_close(found, exact_gradient(times, start()), rtol=2e-3, atol=2e-3)


def fitted() -> tdh.BespokeSolver:
    config = tdh.FitConfig(iterations=30)
    y0 = torch.randn(128, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = tdh.fit(spiral, y0, (0.2, 0.9), base="bns", steps=5, config=config, progress=False)
    assert isinstance(solver, tdh.BespokeSolver)
    return solver


def test_a_fit_has_the_gradients_of_its_own_numbers_and_nearly_those_of_the_solution() -> None:
    solver = fitted()
    for times in ((0.2, 0.9), (0.2, 0.4, 0.9), (0.2, 0.5)):
        t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: solver.solve(spiral, start(), t), (t,))
        (found,) = torch.autograd.grad(solver.solve(spiral, start(), t)[-1].sum(), t)
        torch.testing.assert_close(found, exact_gradient(times, start()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hypernet", [None, lambda step: 0.1 * step.y * step.t + step.dt])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_bns_passes_gradcheck_in_reverse_with_states_that_move_too(
    hypernet: Any, is_tuple: bool
) -> None:
    times, shapes = (0.9, 0.5, 0.2), ((3,), (), ())
    domains = domain(times, shapes if is_tuple else ((2,),))
    if is_tuple and hypernet is not None:
        hypernet = lambda step: tuple(0.1 * part + step.dt for part in step.y)  # noqa: E731
    solver = tdh.BespokeSolver(classical("heun3", 6), hypernet=hypernet, domain=domains)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    y0: Any = coupled_start() if is_tuple else (start(),)

    def solve(t: Tensor, *y0: Tensor) -> Any:
        if not is_tuple:
            return solver.solve(spiral, y0[0], t)
        state: TupleState = (y0[0], y0[1], y0[2])
        return solver.solve(coupled, state, t)

    inputs = (t, *(part.clone().requires_grad_() for part in y0))
    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)


@pytest.mark.parametrize("chunk", [2, 2**18])
@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13's own rules
def test_bns_has_the_same_gradients_by_every_transform(
    times: tuple[float, ...], has_grad: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rollout, "CHUNK", chunk)
    solver, t = bespoke(times, calls=8), torch.tensor(times, dtype=torch.float64)

    def end(t: Tensor) -> Tensor:
        return solver.solve(spiral, start(), t)[-1].sum()

    def ends(t: Tensor) -> Tensor:
        return torch.vmap(end)(t).sum()

    leaf = t.clone().requires_grad_()
    (expected,) = torch.autograd.grad(end(leaf), leaf)
    both = torch.stack([t, t])
    with torch.set_grad_enabled(has_grad):
        found = [
            torch.func.grad(end)(t),
            torch.func.jacfwd(end)(t),
            torch.func.jacfwd(ends)(both)[0],
            torch.func.grad(ends)(both)[1],
            torch.vmap(torch.func.grad(end))(both)[0],
        ]
    for other in found:
        torch.testing.assert_close(other, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("times", [TIMES[0], TIMES[3]])
def test_compiled_bns_has_the_same_gradients(times: tuple[float, ...]) -> None:
    torch._dynamo.reset()
    solver = bespoke(times, calls=6)
    compiled = torch.compile(
        lambda y0, t: solver.solve(spiral, y0, t), backend="aot_eager", fullgraph=True
    )
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(solve(start(), t)[-1].sum(), t)[0]
        for solve in (compiled, lambda y0, t: solver.solve(spiral, y0, t))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", [(0.1, 0.7), (0.7, 0.1)])
def test_numbers_are_bitwise_the_same_whether_times_want_gradients(
    times: tuple[float, ...], dtype: torch.dtype
) -> None:
    solver, y0 = bespoke(times, calls=8), start().to(dtype)
    t = torch.tensor([times[0], 0.3, times[1]], dtype=dtype)
    plain = solver.solve(spiral, y0, t)
    assert torch.equal(solver.solve(spiral, y0, t.clone().requires_grad_()), plain)
    ends = t[[0, -1]]
    found = solver.solve(spiral, y0, ends.clone().requires_grad_())
    torch.testing.assert_close(found, solver.solve(spiral, y0, ends))


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("times", TIMES)
def test_gradients_on_a_grid_of_its_own_are_the_host_s(
    times: tuple[float, ...], interp: str
) -> None:
    gradients = []
    for method, own in (("hypermidpoint", {"hypernet": zero}), ("midpoint", {})):
        t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
        options = {"step_size": 0.11, "interp": interp, **own}
        y = odeint(spiral, start(), t, method=method, options=options)
        gradients.append(torch.autograd.grad(y.square().sum(), t)[0])
    assert torch.equal(*gradients)


def test_gradients_of_an_event_to_the_first_time_are_the_host_s() -> None:
    gradients = []
    for method, own in (("hypermidpoint", {"hypernet": zero}), ("midpoint", {})):
        t0 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        time, y = odeint_event(
            spiral,
            start()[:1],
            t0,
            event_fn=lambda t, y: y[0, 0] + 0.2,
            method=method,
            options={"step_size": 0.05, **own},
        )
        found = torch.autograd.grad(time + y[-1].sum(), t0, allow_unused=True)[0]
        gradients.append(torch.zeros(()) if found is None else found)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_first_time_that_wants_a_gradient_costs_one_call_more_and_others_none() -> None:
    func, solver = Counted(spiral), bespoke((0.2, 0.9), calls=8)
    for times in (torch.tensor([0.2, 0.9]).double(), torch.tensor([0.2, 0.5, 0.9]).double()):
        for needs_grad, calls in ((False, 8), (True, 9)):
            func.times.clear()
            solver.solve(func, start(), times.clone().requires_grad_(needs_grad))
            assert func.calls == calls
            with torch.no_grad():
                func.times.clear()
                solver.solve(func, start(), times.clone().requires_grad_(needs_grad))
                assert func.calls == 8


def test_a_field_that_is_not_finite_at_the_start_is_named_when_times_want_gradients() -> None:
    t = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    with pytest.raises(NonFiniteError, match="call 0 of func"):
        bespoke((0.2, 0.9), calls=4).solve(lambda t, y: y / 0, start(), t)
