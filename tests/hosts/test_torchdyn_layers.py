"""What NeuralODE puts around a vector field: layers, orders, losses, arguments, times to save."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import DataControl, DepthCat, Fourier, GalLinear
from torchdyn.numerics import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import spiral
from torchdiffeq_hyper.errors import HostWarning, OptionError, StateTypeError
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver, classical
from torchdyn_stubs import Field, SmallNet, Spiral, times

SPAN = times(0.1, 0.9)


def _solver(dim: int = 2, steps: int = 3) -> tdh.HyperSolver:
    return tdh.HyperSolver("heun", SmallNet(dim).requires_grad_(False), steps=steps)


def _net(inputs: int, outputs: int = 2, *before: nn.Module) -> nn.Sequential:
    return nn.Sequential(*before, nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def assert_agrees(node: NeuralODE, y0: Tensor, func: Any, solver: tdh.HyperSolver) -> None:
    """Hold a NeuralODE against torchdiffeq on a plain func."""
    wanted = torchdiffeq.odeint(func, y0, SPAN, method=solver.method, options={"solver": solver})
    torch.testing.assert_close(node(y0, SPAN)[1], wanted, rtol=0, atol=1e-10)


def test_field_without_time() -> None:
    net, solver = _net(2), _solver()
    y0 = torch.randn(3, 2, dtype=torch.float64)
    assert_agrees(NeuralODE(net, solver=solver), y0, lambda t, y: net(y), solver)
    node = NeuralODE(net, solver="hyperheun")
    tdh.attach(net, solver)
    assert_agrees(node, y0, lambda t, y: net(y), solver)


def test_depth_is_the_true_time_of_each_stage() -> None:
    net, solver = _net(3, 2, DepthCat(1)), _solver()
    y0 = torch.randn(3, 2, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Any:
        return net[1:](torch.cat([y, t.expand(len(y), 1)], 1))

    for node in (NeuralODE(net, solver=solver), NeuralODE(net, solver="hyperheun")):
        with tdh.using(solver):
            assert_agrees(node, y0, func, solver)


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
def test_galerkin_layers_follow_time_both_ways() -> None:
    net = nn.Sequential(DepthCat(1), GalLinear(2, 2, expfunc=Fourier(3)), nn.Tanh())
    y0, solver = torch.randn(4, 2), tdh.HyperSolver("midpoint", zero, steps=64)
    for t in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])):
        found = NeuralODE(net, solver=solver)(y0, t)[1][-1]
        exact = NeuralODE(net, solver="dopri5", atol=1e-6, rtol=1e-6).trajectory(y0, t)[-1]
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_data_control_reaches_the_field() -> None:
    net, solver = _net(4, 2, DataControl()), _solver()
    y0 = torch.randn(3, 2, dtype=torch.float64)
    node = NeuralODE(net, solver=solver)
    assert_agrees(node, y0, lambda t, y: net[1:](torch.cat([y, y0], 1)), solver)


def test_second_order_systems() -> None:
    net, solver = _net(4), _solver(4)
    y0 = torch.randn(3, 4, dtype=torch.float64)
    node = NeuralODE(net, order=2, solver=solver)
    assert_agrees(node, y0, lambda t, y: torch.cat([y[:, 2:], net(y)], 1), solver)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_integral_losses(sensitivity: str) -> None:
    def loss(t: Tensor, x: Tensor) -> Tensor:
        return t * x.norm(dim=-1)

    net, dim = _net(2), 3 if sensitivity == "autograd" else 2
    solver, y0 = _solver(dim), torch.randn(3, dim, dtype=torch.float64)
    node = NeuralODE(net, solver=solver, integral_loss=loss, sensitivity=sensitivity)

    def func(t: Tensor, y: Tensor) -> Any:
        if dim == 2:
            return net(y)
        return torch.cat([loss(t, y[:, 1:])[:, None], net(y[:, 1:])], 1)

    assert_agrees(node, y0, func, solver)


def test_flow_with_its_density() -> None:
    flow, solver = CNF(_net(2)), _solver(3)
    y0 = torch.randn(5, 3, dtype=torch.float64)
    node = NeuralODE(flow, solver=solver)
    assert_agrees(node, y0, lambda t, y: flow(y), solver)


@pytest.mark.parametrize("solver", ["dise", "dopri5_per_sample"])
@pytest.mark.parametrize("batch", [1, 6])
def test_methods_that_go_by_sample_take_every_samples_own_control(solver: str, batch: int) -> None:
    net = _net(5, 2, DataControl(), DepthCat(1))
    y0 = torch.randn(batch, 2, dtype=torch.float64)
    # Accurate candidates, between which the samples are spread.
    dise = tdh.Dise(
        [tdh.Candidate("rk4", steps=20), tdh.Candidate("dopri5_per_sample", rtol=1e-8, atol=1e-8)],
        lambda y: torch.stack([y[:, 0], -y[:, 0]], 1),
    )
    node = NeuralODE(net, solver=solver, atol=1e-8, rtol=1e-8)
    reference = NeuralODE(net, solver="dopri5", atol=1e-10, rtol=1e-10)
    with tdh.using(dise), torch.no_grad():
        if solver == "dise":
            with pytest.warns(UserWarning, match="Setting tolerances has no effect"):
                found = node(y0, SPAN)[1]
        else:
            found = node(y0, SPAN)[1]
        torch.testing.assert_close(found, reference(y0, SPAN)[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(net[0]._control, y0)
    assert net[1].t.shape in ((), (1,))


@pytest.mark.filterwarnings("ignore::torchdiffeq_hyper.errors.OneCandidateWarning")
def test_selector_is_fitted_on_a_model_with_data_control() -> None:
    net = _net(4, 2, DataControl())
    y0 = torch.randn(40, 2, dtype=torch.float64)
    cost = tdh.RegressionCost(lambda y, index: y[:, 0].abs(), 0.5, 1.0, 1e3, at="end")
    dise = tdh.Dise([tdh.Candidate("euler", steps=1), tdh.Candidate("rk4", steps=2)])
    node = NeuralODE(net, solver="dise")
    tdh.attach(node, dise)
    config = tdh.SelectorConfig(iterations=20)
    dise.fit(node, y0, SPAN, cost=cost, config=config, progress=False)
    assert net[0]._control is None
    solution = node(y0, SPAN)[1]
    wanted = dise.solve(
        tdh.Conditioned(lambda t, y, u: net[1:](torch.cat([y, u], 1)), y0), y0, SPAN
    )
    torch.testing.assert_close(solution, wanted)


def test_methods_that_go_by_sample_take_every_samples_own_noise() -> None:
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    flow = CNF(_net(2).float(), trace_estimator=hutch_trace, noise_dist=noise)
    y0 = torch.randn(5, 3)
    half = tdh.Dise(
        [tdh.Candidate("euler", steps=4), tdh.Candidate("heun2", steps=4)],
        lambda y: torch.stack([y[:, 1], -y[:, 1]], 1),
    )
    node = NeuralODE(flow, solver=half)
    found = node(y0, SPAN.float())[1]
    for j, method in enumerate(["euler", "heun2"]):
        grid = torch.lerp(*SPAN.float(), torch.linspace(0, 1, 5))
        alone = torchdiffeq.odeint(lambda t, y: flow(y), y0, grid, method=method)[-1]
        rows = half.select(y0) == j
        assert rows.any()
        torch.testing.assert_close(found[-1][rows], alone[rows])


def test_field_restricts_itself_if_it_can() -> None:
    rate = torch.rand(6, 1, dtype=torch.float64)
    func = tdh.Conditioned(lambda t, y, rate: -rate * y, rate)
    y0 = torch.ones(6, 2, dtype=torch.float64)
    y = odeint(func, y0, times(0.0, 1.0), "dopri5_per_sample", rtol=1e-7, atol=1e-7)[1]
    torch.testing.assert_close(y[-1], torch.exp(-rate).expand(6, 2), rtol=1e-5, atol=1e-5)


class _Rates(nn.Module):
    """Holds a rate for every sample, takes args, and knows how to be restricted."""

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return -self.rate * x

    def restrict(self, index: Tensor) -> _Rates:
        return _Rates(self.rate[index])


def test_field_that_takes_args_restricts_itself_if_it_can() -> None:
    rate, y0 = torch.rand(6, 1, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
    solver, t = tdh.Dise([tdh.Candidate("rk4", steps=9)], lambda y: y[:, :1]), times(0.0, 1.0)
    y = odeint(_Rates(rate), y0, t, solver, args={"drive": 1.0})[1]
    torch.testing.assert_close(y[-1], torch.exp(-rate).expand(6, 2), rtol=1e-4, atol=1e-4)
    y = odeint(_Rates(rate), y0, t, "dopri5_per_sample", rtol=1e-7, atol=1e-7)[1]
    torch.testing.assert_close(y[-1], torch.exp(-rate).expand(6, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
def test_whole_problem_methods_solve_all_points_at_once(span: tuple[float, float]) -> None:
    y0, t = torch.randn(4, 2, dtype=torch.float64), torch.linspace(*span, 4).double()
    dise = tdh.Dise(
        [tdh.Candidate("euler", steps=2), tdh.Candidate("rk4", steps=1)],
        lambda y: torch.stack([y[:, 0], -y[:, 0]], 1),
    )
    wanted = torchdiffeq.odeint(spiral, y0, t, method="dise", options={"dise": dise})
    assert torch.equal(odeint(spiral, y0, t, dise)[1], wanted)
    with tdh.using(dise):
        assert torch.equal(NeuralODE(Spiral(), solver="dise")(y0, t)[1], wanted)
    kwargs = {"rtol": 1e-5, "atol": 1e-6}
    wanted = torchdiffeq.odeint(spiral, y0, t, method="dopri5_per_sample", **kwargs)
    assert torch.equal(odeint(spiral, y0, t, "dopri5_per_sample", **kwargs)[1], wanted)


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
def test_bespoke_solvers_solve_their_whole_span_and_no_other() -> None:
    domain = tdh.FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")
    solver = BespokeSolver(classical("rk4", 8), domain=domain)
    y0, func = torch.randn(4, 2, dtype=torch.float64), Spiral()
    tdh.attach(func, solver)
    for t in (times(0.0, 1.0), times(0.0, 0.3, 0.7, 1.0)):
        wanted = solver.solve(spiral, y0, t)
        for sensitivity in ("autograd", "adjoint", "interpolated_adjoint"):
            for given in (solver, "bns"):
                node = NeuralODE(func, solver=given, sensitivity=sensitivity)
                with torch.no_grad():
                    torch.testing.assert_close(node(y0, t)[1], wanted)
    step = solver.step(func, y0, *times(0.0, 1.0))[1]  # type: ignore[operator]
    torch.testing.assert_close(step, wanted[-1])
    for t in (times(0.0, 2.0), times(1.0, 0.0)):
        with pytest.raises(OptionError, match="was fitted from 0 to 1"):
            odeint(spiral, y0, t, solver)


class _Driven(nn.Module):
    """A field that is told its drive at each call."""

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        # Without args torchdyn itself calls it, ahead of its adaptive loop.
        return (args or {}).get("drive", 0.0) * torch.sin(t) - x


@pytest.mark.filterwarnings("ignore:torchdyn returns the times")
@pytest.mark.parametrize("points", [(0.0, 1.0), (1.0, 0.0)])
def test_args_reach_a_func_that_takes_them(points: tuple[float, float]) -> None:
    solver, func, args = _solver(), _Driven(), {"drive": 3.0}
    y0, t = torch.randn(3, 2, dtype=torch.float64), times(*points)
    wanted = solver.solve(lambda t, y: 3.0 * torch.sin(t) - y, y0, t)
    assert torch.equal(odeint(func, y0, t, solver, args=args)[1], wanted)
    assert torch.equal(NeuralODE(func, solver=solver)(y0, t, args=args)[1], wanted)
    node = NeuralODE(lambda t, x, args: args["drive"] * torch.sin(t) - x, solver=solver)
    assert torch.equal(node(y0, t, args=args)[1], wanted)
    by_sample = NeuralODE(func, solver="dopri5_per_sample", atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(by_sample(y0, t, args=args)[1][-1], wanted[-1], rtol=0.3, atol=0.3)


def test_args_do_not_disturb_a_func_that_takes_none() -> None:
    solver, y0 = _solver(), torch.randn(3, 2, dtype=torch.float64)
    wanted = odeint(spiral, y0, SPAN, solver)[1]
    assert torch.equal(odeint(spiral, y0, SPAN, solver, args={"drive": 1.0})[1], wanted)

    def open_field(t: Tensor, y: Tensor, **keywords: Any) -> Tensor:
        return spiral(t, y) * keywords.get("args", {}).get("drive", 1.0)

    assert torch.equal(odeint(open_field, y0, SPAN, solver)[1], wanted)
    assert not torch.equal(odeint(open_field, y0, SPAN, solver, args={"drive": 2.0})[1], wanted)


def test_args_that_torchdyn_keeps_from_the_field_are_named_once() -> None:
    node = NeuralODE(_net(4), order=2, solver=_solver(4))
    y0 = torch.randn(3, 4, dtype=torch.float64)
    with pytest.warns(HostWarning, match="keeps args from the vector field"):
        node(y0, SPAN, args={"drive": 1.0})
    node(y0, SPAN, args={"drive": 1.0})


@pytest.mark.parametrize("wanted", [[0.5], [0.0, 1.0], [1.0, 0.25]])
@pytest.mark.parametrize("reverse", [False, True])
def test_save_at_returns_these_points(wanted: list[float], reverse: bool) -> None:
    solver, y0 = _solver(), torch.randn(3, 2, dtype=torch.float64)
    t = times(0.0, 0.25, 0.5, 1.0)
    t = t.flip(0) if reverse else t
    node = NeuralODE(Field(), solver=solver)
    everything = node.trajectory(y0, t.clone()) if not reverse else None
    for save_at in (wanted, times(*wanted)):
        t_eval, found = node(y0, t, save_at=save_at)
        assert t_eval.tolist() == wanted
        if everything is not None:
            assert torch.equal(found, everything[[t.tolist().index(s) for s in wanted]])
        assert len(found) == len(wanted)


def test_save_at_is_torchdyns_own_for_sorted_points_forward() -> None:
    y0, t = torch.randn(3, 2, dtype=torch.float64), times(0.0, 0.25, 0.5, 1.0)
    own = odeint(spiral, y0, t, "euler", save_at=t[1:3])
    ours = odeint(spiral, y0, t, tdh.HyperSolver("euler", zero), save_at=t[1:3])
    assert all(torch.equal(a, b) for a, b in zip(own, ours, strict=True))


def test_save_at_outside_of_t_span_raises() -> None:
    y0 = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(OptionError, match=r"save_at holds 0\.3, which is not in t_span"):
        odeint(spiral, y0, SPAN, _solver(), save_at=[0.1, 0.3])


@pytest.mark.parametrize("solver", [_solver(), "dopri5_per_sample"])
def test_states_that_are_no_tensor_are_refused(solver: Any) -> None:
    state = {"x": torch.zeros(1)}
    if isinstance(solver, str):
        solver = NeuralODE(Spiral(), solver=solver).solver
    with pytest.raises(StateTypeError, match="the state is a dict"):
        odeint(spiral, state, SPAN, solver)


def test_models_can_be_copied_pickled_printed_and_moved() -> None:
    solver, func = _solver(), Field()
    y0 = torch.randn(3, 2, dtype=torch.float64)
    by_name, by_object = (NeuralODE(func, solver=given) for given in ("hyperheun", solver))
    wanted = by_object(y0, SPAN)[1]
    assert "hyperheun" in repr(by_name)
    assert "HyperSolver" in repr(by_object)
    for node in (by_name, by_object):
        # Not the model: torchdyn's holds its weights a second time, flat, which nothing copies.
        for other in (copy.deepcopy(node.solver), pickle.loads(pickle.dumps(node.solver))):
            with tdh.using(solver):
                assert torch.equal(NeuralODE(func, solver=other)(y0, SPAN)[1], wanted)
    assert by_object.float()(y0.float(), SPAN.float())[1].dtype == torch.float32
    for node in (by_name, by_object):
        assert not [key for key in node.state_dict() if "solver" in key]


def test_problem_without_a_neural_ode() -> None:
    solver, y0 = _solver(), torch.randn(3, 2, dtype=torch.float64)
    problem = ODEProblem(Spiral(), solver, atol=1e-3, rtol=1e-3)
    assert torch.equal(problem(y0, SPAN)[1], solver.solve(spiral, y0, SPAN))


def test_parallel_shooting_runs_on_a_fitted_coarse_method() -> None:
    from torchdyn.numerics import MSZero, odeint_mshooting

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y)

    y0, t = torch.randn(1, 2, dtype=torch.float64), torch.linspace(0, 1, 5).double()
    with tdh.using(tdh.HyperSolver("euler", zero, steps=2)):
        found = odeint_mshooting(func, y0, t, MSZero("hypereuler", "rk4"), maxiter=3)[1]
    wanted = odeint_mshooting(func, y0, t, MSZero("euler", "rk4"), maxiter=3)[1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
