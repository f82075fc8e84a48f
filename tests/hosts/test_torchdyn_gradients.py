"""Gradients under torchdyn's three sensitivities."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics import HyperEuler

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import MLPField, convergence_order
from torchdiffeq_hyper.errors import AdjointWarning, HostWarning, OptionError
from torchdyn_stubs import Field, SmallNet, times

# Said of every solver with fixed steps, because the adjoints hand on tolerances.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect")

ADJOINTS = ["adjoint", "interpolated_adjoint"]


@pytest.fixture
def func() -> Field:
    return Field()


def _frozen(base: str = "heun", steps: int | None = 4) -> tdh.HyperSolver:
    return tdh.HyperSolver(base, SmallNet().requires_grad_(False), steps=steps)


def _gradients(func: nn.Module, solve: Any, t: Tensor) -> Tensor:
    func.zero_grad()
    y0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    (solve(y0, t)[-1] ** 2).sum().backward()
    return torch.cat([p.grad.reshape(-1) for p in [*func.parameters(), y0] if p.grad is not None])


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
@pytest.mark.parametrize("points", [(0.1, 0.9), (0.9, 0.1), (0.1, 0.4, 0.9), (0.9, 0.3, 0.1)])
def test_autograd_gives_the_gradient_of_the_solver_exactly(
    func: Field, points: tuple[float, ...]
) -> None:
    solver, t = _frozen(), times(*points)
    node = NeuralODE(func, solver=solver, sensitivity="autograd")
    wanted = _gradients(func, lambda y0, t: solver.solve(func, y0, t), t)
    found = _gradients(func, lambda y0, t: node(y0, t)[1], t)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_autograd_trains_the_hypernet_and_reaches_the_times(func: Field) -> None:
    solver = tdh.HyperSolver("midpoint", SmallNet(), steps=3)
    node = NeuralODE(func, solver=solver)
    y0, t = torch.randn(3, 2, dtype=torch.float64), times(0.1, 0.9).requires_grad_()
    node(y0, t)[1][-1].sum().backward()
    found = [p.grad for p in [*solver.parameters(), t]]
    wanted = torch.autograd.grad(
        solver.solve(func, y0, t)[-1].sum(),  # type: ignore[union-attr]
        [*solver.parameters(), t],
    )
    torch.testing.assert_close(found, list(wanted))


@pytest.mark.parametrize("base", ["euler", "heun"])
def test_adjoint_agrees_with_autograd_to_the_order_of_the_base(func: Field, base: str) -> None:
    numbers, errors = (8, 16, 32), []
    for n in numbers:
        solver = _frozen(base, n)
        node = NeuralODE(func, solver=solver, sensitivity="adjoint")
        found = _gradients(func, lambda y0, t, node=node: node(y0, t)[1], times(0.1, 0.9))
        wanted = _gradients(func, lambda y0, t, s=solver: s.solve(func, y0, t), times(0.1, 0.9))
        errors.append(float((found - wanted).norm()))
    order = {"euler": 1, "heun": 2}[base]
    assert convergence_order([1 / n for n in numbers], errors) == pytest.approx(order, abs=0.25)


def test_interpolated_adjoint_comes_closer_to_autograd_with_every_point(func: Field) -> None:
    solver, errors = _frozen("heun", None), []
    node = NeuralODE(func, solver=solver, sensitivity="interpolated_adjoint")
    for n in (8, 16, 32):
        t = torch.linspace(0.1, 0.9, n + 1, dtype=torch.float64)
        found = _gradients(func, lambda y0, t: node(y0, t)[1], t)
        wanted = _gradients(func, lambda y0, t: solver.solve(func, y0, t), t)
        errors.append(float((found - wanted).norm()))
    assert errors[2] < errors[1] / 3 < errors[0] / 9


def test_interpolated_adjoint_sees_the_steps_between_two_points(func: Field) -> None:
    errors, numbers = [], (16, 32, 64)
    for n in numbers:
        solver = _frozen("heun", n)
        node = NeuralODE(func, solver=solver, sensitivity="interpolated_adjoint")
        found = _gradients(func, lambda y0, t, node=node: node(y0, t)[1], times(0.1, 0.9))
        wanted = _gradients(func, lambda y0, t, s=solver: s.solve(func, y0, t), times(0.1, 0.9))
        errors.append(float((found - wanted).norm()))
    assert convergence_order([1 / n for n in numbers], errors) == pytest.approx(2, abs=0.5)


def test_adjoint_in_half_precision_steps_in_float32() -> None:
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        net.to(dtype)
        node = NeuralODE(net, solver=tdh.HyperSolver("heun", zero, 64), sensitivity="adjoint")
        y0 = torch.linspace(-1, 1, 6).reshape(3, 2).to(dtype)
        node(y0, torch.tensor([0.0, 1.0]))[1][-1].float().sum().backward()
        grads.append([p.grad.float() for p in net.parameters() if p.grad is not None])
    for precise, half in zip(*grads, strict=True):
        torch.testing.assert_close(half, precise, rtol=0.1, atol=0.1)


class _Watched(Field):
    """Keeps the times of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        self.times.append(float(t.detach()))
        return super().forward(t, x)


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ((0.0, 0.8), [0.8, 0.6, 0.4, 0.2]),
        ((0.0, 0.2, 0.8), [0.8, 0.2]),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_backward_steps_where_the_forward_did(
    points: tuple[float, ...], wanted: list[float], by_name: bool
) -> None:
    func, solver = _Watched(), _frozen("euler", 4)
    node = NeuralODE(func, solver="hypereuler" if by_name else solver, sensitivity="adjoint")
    y0 = torch.randn(3, 2, dtype=torch.float64)
    with tdh.using(solver):
        y = node(y0, times(*points))[1]
    func.times.clear()
    y[-1].sum().backward()  # outside the scope
    evaluations = [round(t, 10) for t in func.times]
    # torchdyn itself looks at the field at the end of every interval, too.
    assert sorted(set(evaluations), reverse=True) == wanted
    assert len(evaluations) == 1 + len(wanted) + len(points) - 1


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_adjoint_state_never_meets_the_hypernet(func: Field, sensitivity: str) -> None:
    def g(step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        assert step.y.shape == (3, 2)
        return torch.tanh(step.y)

    node = NeuralODE(func, solver=tdh.HyperSolver("heun", g, steps=4), sensitivity=sensitivity)
    assert _gradients(func, lambda y0, t: node(y0, t)[1], times(0.1, 0.9)).isfinite().all()


def test_adjoint_state_meets_the_net_of_torchdyns_own_hypersolvers(func: Field) -> None:
    """What ours must not share: a net for states of this shape breaks there."""
    own = HyperEuler(_OfTimeAndState(), torch.float64)
    node = NeuralODE(func, solver=own, sensitivity="adjoint")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size mismatch"):
        _gradients(func, lambda y0, t: node(y0, t)[1], times(0.1, 0.9))


class _OfTimeAndState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, x: Tensor) -> Any:
        return self.linear(x)


def test_backward_works_on_a_thread_that_saw_no_scope(func: Field) -> None:
    solver = _frozen("heun", 8)
    node = NeuralODE(func, solver="hyperheun", sensitivity="adjoint")
    y0 = torch.randn(3, 2, dtype=torch.float64)
    with tdh.using(solver):
        loss = node(y0, times(0.0, 1.0))[1][-1].sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in func.net.parameters())


def test_calls_that_overlap_keep_their_own_steps(func: Field) -> None:
    node = NeuralODE(func, solver="hyperheun", sensitivity="adjoint")
    t, coarse, fine = times(0.1, 0.9), _frozen("heun", 2), _frozen("heun", 9)

    def both(y0: Tensor, t: Tensor) -> Tensor:
        with tdh.using(coarse):
            first = node(y0, t)[1]
        with tdh.using(fine):
            return first + 0 * node(y0, t)[1]

    def one(y0: Tensor, t: Tensor) -> Tensor:
        with tdh.using(coarse):
            solution: Tensor = node(y0, t)[1]
        return solution

    torch.testing.assert_close(_gradients(func, both, t), _gradients(func, one, t))


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_whole_problem_methods_go_back_with_torchdyns_dopri5(func: Field, sensitivity: str) -> None:
    tolerances = {"atol": 1e-8, "rtol": 1e-8, "atol_adjoint": 1e-8, "rtol_adjoint": 1e-8}
    t = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    dise = tdh.Dise([tdh.Candidate("dopri5", rtol=1e-9, atol=1e-9)], lambda y0: y0[:, :1])
    wanted = _gradients(func, lambda y0, t: _frozen().solve(func, y0, t), t)
    reference = NeuralODE(func, solver="dopri5", sensitivity="autograd", **tolerances)
    wanted = _gradients(func, lambda y0, t: reference(y0, t)[1], t)
    for solver in (dise, "dopri5_per_sample"):
        node = NeuralODE(func, solver=solver, sensitivity=sensitivity, **tolerances)
        found = _gradients(func, lambda y0, t, node=node: node(y0, t)[1], t)
        accuracy = 1e-6 if sensitivity == "adjoint" else 1e-2  # splines between the points
        torch.testing.assert_close(found, wanted, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("solver", ["dise", "dopri5_per_sample"])
def test_interpolated_adjoint_of_whole_solves_sees_the_way_between_two_points(
    func: Field, solver: str
) -> None:
    tight = {"atol": 1e-8, "rtol": 1e-8, "atol_adjoint": 1e-8, "rtol_adjoint": 1e-8}
    dise = tdh.Dise([tdh.Candidate("dopri5", rtol=1e-9, atol=1e-9)], lambda y0: y0[:, :1])
    by = {"solver": dise if solver == "dise" else solver, "sensitivity": "interpolated_adjoint"}
    node = NeuralODE(func, **by, **tight)
    reference = NeuralODE(func, solver="dopri5", **tight)
    t = times(0.1, 0.9)
    found, wanted = (_gradients(func, lambda y0, t, n=n: n(y0, t)[1], t) for n in (node, reference))
    # Through a straight line between the ends they would be off by 0.1.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_an_explicit_adjoint_solver_is_honoured(func: Field) -> None:
    solver, t = _frozen("euler", 3), times(0.1, 0.9)
    accurate = {"atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
    node = NeuralODE(
        func, solver=solver, sensitivity="adjoint", solver_adjoint="dopri5", **accurate
    )
    plain = NeuralODE(func, solver=solver, sensitivity="adjoint")
    own, ours = (_gradients(func, lambda y0, t, n=n: n(y0, t)[1], t) for n in (node, plain))
    assert (own - ours).norm() > 1e-3
    by_name = NeuralODE(func, solver="dopri5", sensitivity="adjoint", solver_adjoint="hyperheun")
    reference = NeuralODE(func, solver="dopri5", sensitivity="adjoint", solver_adjoint="midpoint")
    first, second = (
        _gradients(func, lambda y0, t, n=n: n(y0, t)[1], times(0.1, 0.2))
        for n in (by_name, reference)
    )
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_hypernet_without_gradient_is_warned_about_once(func: Field, sensitivity: str) -> None:
    solver = tdh.HyperSolver("heun", SmallNet(), steps=4)
    node = NeuralODE(func, solver=solver, sensitivity=sensitivity)
    y0 = torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        node(y0, times(0.0, 1.0))
    with pytest.warns(AdjointWarning, match="no gradient, and they require one"):
        node(y0, times(0.0, 1.0))
    node(y0, times(0.0, 1.0))[1].sum().backward()
    assert all(p.grad is None for p in solver.parameters())


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
def test_wrong_reverse_adjoint_gradients_are_named_once_a_solver(func: Field) -> None:
    node = NeuralODE(func, solver=_frozen(), sensitivity="adjoint")
    y0 = torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        node(y0, times(1.0, 0.0))
    with pytest.warns(HostWarning, match="adjoint gradients of a reverse-time solve"):
        node(y0, times(1.0, 0.0))
    node(y0, times(1.0, 0.0))


@pytest.fixture
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_silent")
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_reverse_adjoint_gradients_of_torchdyns_own_methods_are_as_wrong(
    func: Field, solver: str
) -> None:
    """If this fails, torchdyn has mended them, and our warning can go."""
    grads = [
        _gradients(
            func,
            lambda y0, t, s=s: NeuralODE(func, solver=solver, sensitivity=s)(y0, t)[1],
            torch.linspace(0.9, 0.1, 65, dtype=torch.float64),
        )
        for s in ("autograd", "adjoint")
    ]
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()


def test_ignored_save_at_and_impossible_args_are_named(func: Field) -> None:
    node = NeuralODE(func, solver=_frozen(), sensitivity="adjoint")
    y0, t = torch.randn(3, 2, dtype=torch.float64), times(0.0, 0.5, 1.0)
    with pytest.warns(HostWarning, match="ignores save_at under adjoint"):
        assert len(node(y0, t, save_at=t[-1:])[1]) == 3
    with pytest.raises(OptionError, match="cannot hand it to the vector field"):
        node(y0, t, args={"u": 1.0})


def test_lambda_field_without_parameters_has_gradients_through_y0() -> None:
    node = NeuralODE(lambda t, x, args: -x, solver=_frozen(), sensitivity="adjoint")
    y0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    node(y0, times(0.0, 1.0))[1][-1].sum().backward()
    torch.testing.assert_close(y0.grad, torch.full_like(y0, 0.3679), rtol=0.02, atol=0)


def test_field_of_parameters_is_trained_by_any_sensitivity() -> None:
    """A few steps of descent lower a loss under each of the three."""
    for sensitivity in ("autograd", *ADJOINTS):
        func = Field()
        assert isinstance(func.net, MLPField)
        node = NeuralODE(func, solver=_frozen(), sensitivity=sensitivity)
        y0, t = torch.randn(8, 2, dtype=torch.float64), times(0.0, 0.5, 1.0)
        optimizer, losses = torch.optim.Adam(func.parameters(), lr=0.05), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (node(y0, t)[1][-1] ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
