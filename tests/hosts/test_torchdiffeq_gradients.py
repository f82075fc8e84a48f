"""Gradients through the solvers, and the rules of `odeint_adjoint`."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event

import torchdiffeq_hyper as tdh
from stubs import MLPField, convergence_order, coupled, coupled_start
from torchdiffeq_hyper.errors import AdjointWarning
from torchdiffeq_hyper.methods import _registry

LEARNED = [m.name for m in _registry.methods().values() if m.corrects_base]


class SmallNet(nn.Module):
    """A smooth correction with parameters, for tensors of trailing dimension 2."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        assert isinstance(step.f0, Tensor)
        out: Tensor = self.linear(torch.cat([step.y * step.t, step.f0 + step.dt], -1))
        return torch.tanh(out)


def _frozen(steps: int, base: str = "heun") -> tdh.HyperSolver:
    return tdh.HyperSolver(base, SmallNet().requires_grad_(False), steps=steps)


def _gradients(func: nn.Module, solve: Any, y0: Tensor, t: Tensor, **call: Any) -> Tensor:
    func.zero_grad()
    y0 = y0.clone().requires_grad_()
    y = solve(func, y0, t, **call)
    (y[-1] ** 2).sum().backward()
    grads = [p.grad for p in func.parameters()] + [y0.grad]
    return torch.cat([g.reshape(-1) for g in grads if g is not None])


@pytest.mark.parametrize("times", [[0.1, 0.5, 0.8], [0.8, 0.3, 0.1]])
@pytest.mark.parametrize("method", LEARNED)
def test_gradcheck_through_y0_t_func_and_hypernet(method: str, times: list[float]) -> None:
    func, net = MLPField(dim=2, width=3), SmallNet()
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    parameters = [*func.parameters(), *net.parameters()]

    def solve(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        y = odeint(func, y0, t, method=method, options={"hypernet": net})
        assert isinstance(y, Tensor)
        return y

    assert torch.autograd.gradcheck(solve, (y0, t, *parameters))


def test_gradcheck_through_equal_steps_between_two_points() -> None:
    func, net = MLPField(dim=2, width=3), SmallNet()
    solver = tdh.HyperSolver("midpoint", net, steps=3)
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.9, 0.1], dtype=torch.float64, requires_grad=True)

    def hosted(y0: Tensor, t: Tensor) -> Any:
        return odeint(func, y0, t, method="hypermidpoint", options={"solver": solver})

    assert torch.autograd.gradcheck(hosted, (y0, t))
    assert torch.autograd.gradcheck(lambda y0, t: solver.solve(func, y0, t), (y0, t))


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("base", ["euler", "heun", "rk4"])
def test_adjoint_gradients_agree_to_the_bases_order(
    base: str, span: tuple[float, float], is_open: bool
) -> None:
    func, y0, t = MLPField(), torch.randn(4, 2).double(), torch.tensor(span).double()
    method = "hyper" + base
    errors, counts = [], (4, 8, 16)
    for n in counts:
        solver = _frozen(n, base)
        direct = _gradients(func, odeint, y0, t, method=method, options={"solver": solver})
        if is_open:
            with tdh.using(solver):
                adjoint = _gradients(func, odeint_adjoint, y0, t, method=method)
        else:
            func.zero_grad()
            start = y0.clone().requires_grad_()
            with tdh.using(solver):
                y = odeint_adjoint(func, start, t, method=method)
            (y[-1] ** 2).sum().backward()
            grads = [p.grad for p in func.parameters()] + [start.grad]
            adjoint = torch.cat([g.reshape(-1) for g in grads if g is not None])
        errors.append(float((adjoint - direct).norm() / direct.norm()))
    order = solver.tableau.order
    assert errors[-1] < 0.05
    assert convergence_order([1 / n for n in counts], errors) > order - 0.4


def test_adjoint_backward_takes_the_forwards_steps_with_the_plain_base() -> None:
    func, y0, t = MLPField(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    net_calls, times = [], []
    solver = _frozen(5)
    solver.hypernet.register_forward_hook(lambda *_: net_calls.append(1))  # type: ignore[union-attr]
    handle = func.register_forward_pre_hook(lambda _, args: times.append(args[0].item()))
    with tdh.using(solver):
        y = odeint_adjoint(func, y0.requires_grad_(), t, method="hyperheun")
    assert len(net_calls) == 5
    times.clear()
    y[-1].sum().backward()
    handle.remove()
    assert len(net_calls) == 5
    expected = [(1 - n / 5, 1 - (n + 1) / 5) for n in range(5)]
    assert times == [pytest.approx(value) for pair in expected for value in pair]


def test_adjoint_of_zero_correction_is_the_hosts_bitwise_on_a_grid() -> None:
    func, y0 = MLPField(), torch.randn(3, 2).double()
    for times in ([0.0, 0.2, 0.5, 1.0], [1.0, 0.4, 0.0]):
        t = torch.tensor(times).double()
        for options in ({}, {"step_size": 0.09}):
            expected = _gradients(func, odeint_adjoint, y0, t, method="heun2", options=options)
            solver = tdh.HyperSolver("heun", lambda s: torch.zeros_like(s.y))  # type: ignore[arg-type]
            got = _gradients(
                func,
                odeint_adjoint,
                y0,
                t,
                method="hyperheun",
                options={**options, "solver": solver},
            )
            assert torch.equal(got, expected)


def test_adjoint_backward_runs_on_another_thread_without_the_scope() -> None:
    func, y0, t = MLPField(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    solver = _frozen(6)
    with tdh.using(solver):
        inside = _gradients(func, odeint_adjoint, y0, t, method="hyperheun")
        func.zero_grad()
        start = y0.clone().requires_grad_()
        y = odeint_adjoint(func, start, t, method="hyperheun")
    failures: list[BaseException] = []

    def backward() -> None:
        try:
            (y[-1] ** 2).sum().backward()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failures
    grads = [p.grad for p in func.parameters()] + [start.grad]
    got = torch.cat([g.reshape(-1) for g in grads if g is not None])
    assert torch.equal(got, inside)


def test_adjoint_of_tuple_states_agrees_with_odeint() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.9).double())

        def forward(self, t: Tensor, s: Any) -> Any:
            return tuple(self.gain * part for part in coupled(t, s))

    def net(step: tdh.StepInput) -> Any:
        return tuple(0.05 * part for part in step.y)

    func = Coupled()
    t, options = torch.linspace(0.0, 1.0, 33).double(), {"hypernet": net}
    grads = []
    for solve in (odeint, odeint_adjoint):
        func.zero_grad()
        solution = solve(func, coupled_start(), t, method="hypermidpoint", options=options)
        sum(part[-1].sum() for part in solution).backward()
        assert func.gain.grad is not None
        grads.append(float(func.gain.grad))
    assert grads[1] == pytest.approx(grads[0], rel=2e-3)


def test_explicit_adjoint_method_is_honoured() -> None:
    func, y0, t = MLPField(), torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    call = {"method": "hyperrk4", "options": {"solver": _frozen(8, "rk4")}}
    exact = _gradients(func, odeint, y0, t, **call)
    tight = {"adjoint_method": "dopri5", "adjoint_options": {}}
    got = _gradients(func, odeint_adjoint, y0, t, **call, **tight)
    assert float((got - exact).norm() / exact.norm()) < 1e-3
    coarse = {"adjoint_method": "euler", "adjoint_options": {}}
    got = _gradients(func, odeint_adjoint, y0, t, **call, **coarse)
    assert float((got - exact).norm() / exact.norm()) > 1e-2


def test_adjoint_event_gradients_agree_with_odeints() -> None:
    func = MLPField()
    solver = _frozen(50)
    grads = []
    for solve in (odeint, odeint_adjoint):
        func.zero_grad()
        _, y = odeint_event(
            func,
            torch.tensor([1.0, 0.2]).double(),
            torch.tensor(0.0).double(),
            event_fn=lambda t, y: 0.2 - t,
            odeint_interface=solve,
            method="hyperheun",
            options={"solver": solver, "step_size": 0.01},
            atol=1e-9,
        )
        y[-1].sum().backward()
        grads.append(torch.cat([p.grad.reshape(-1) for p in func.parameters()]))  # type: ignore[union-attr]
    assert torch.allclose(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_adjoint_trains_func() -> None:
    func, target = MLPField(), torch.tensor([0.3, -0.3]).double()
    y0, t = torch.randn(8, 2).double(), torch.tensor([0.0, 1.0]).double()
    optimizer, losses = torch.optim.Adam(func.parameters(), lr=0.02), []
    solver = _frozen(4)
    for _ in range(30):
        optimizer.zero_grad()
        y = odeint_adjoint(func, y0, t, method="hyperheun", options={"solver": solver})
        loss = (y[-1] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_adjoint_warns_once_when_the_hypernet_wants_gradients() -> None:
    func, net = MLPField(), SmallNet()
    y0, t = torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    with pytest.warns(AdjointWarning, match="no gradient"):
        y = odeint_adjoint(func, y0, t, method="hypereuler", options={"hypernet": net})
    y[-1].sum().backward()
    assert all(p.grad is None for p in net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint_adjoint(func, y0, t, method="hypereuler", options={"hypernet": net})
        with torch.inference_mode():
            odeint_adjoint(func, y0, t, method="hypereuler", options={"hypernet": SmallNet()})


def test_copies_and_pickles_of_an_attached_func_are_not_attached() -> None:
    func = MLPField()
    before = {name: value.clone() for name, value in func.state_dict().items()}
    n_parameters = len(list(func.parameters()))
    tdh.attach(func, _frozen(4))
    y0, t = torch.randn(3, 2).double(), torch.tensor([0.0, 1.0]).double()
    odeint(func, y0, t, method="hyperheun")
    assert func.state_dict().keys() == before.keys()
    assert len(list(func.parameters())) == n_parameters
    for other in (copy.deepcopy(func), copy.copy(func), pickle.loads(pickle.dumps(func))):
        with pytest.raises(tdh.MissingHypernetError):
            odeint(other, y0, t, method="hyperheun")
    tdh.detach(func)
