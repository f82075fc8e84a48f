"""torchdyn's `NeuralODE` is fitted and evaluated as it is, its field as torchdyn solves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.errors import OptionError, StateTypeError
from torchdiffeq_hyper.fitting._distributed import ProcessGroup

pytestmark = pytest.mark.filterwarnings(
    # torchdyn 1.0.6 and what it imports, with their own dependencies of today.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning:torchsde",
)

CONFIG = tdh.FitConfig(iterations=120, pretrain_iterations=40, swap_every=5, max_seconds=1e6)
SPAN = torch.tensor([0.0, 1.0])


def starts(count: int = 60, dim: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


class Wave(nn.Module):
    """Depends on time and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 1.5, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.scale * damped_wave(2 * t, x)


@pytest.fixture(scope="module")
def torchdyn() -> Any:
    import torchdyn.core
    import torchdyn.models
    import torchdyn.nn

    return torchdyn


def neural_ode(torchdyn: Any, field: nn.Module, **arguments: Any) -> Any:
    given = {"solver": "dopri5", "atol": 1e-9, "rtol": 1e-9, **arguments}
    return torchdyn.core.NeuralODE(field, **given).double()


def fit(func: Any, y0: Any = None, **arguments: Any) -> tdh.HyperSolver:
    given = {"base": "heun", "steps": 4, "config": CONFIG, "progress": False, **arguments}
    return tdh.fit(func, starts() if y0 is None else y0, (0.0, 1.0), **given)


def control_net(torchdyn: Any) -> nn.Module:
    """Time and the start among the inputs, as torchdyn's tutorials build them."""
    torch.manual_seed(3)
    layers = torchdyn.nn
    return nn.Sequential(
        layers.DataControl(), layers.DepthCat(1), nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)
    )


def gain(solver: tdh.HyperSolver, node: Any, y0: Tensor) -> float:
    """Return how many times smaller than the base's the error against torchdyn itself is."""
    exact = node.trajectory(y0, SPAN.double())[-1]  # leaves data control set to y0
    base = tdh.HyperSolver(solver.base, lambda step: torch.zeros_like(step.y), steps=4)
    with torch.no_grad():
        errors = [
            float((s.solve(node.vf, y0, SPAN.double())[-1] - exact).norm()) for s in (base, solver)
        ]
    return errors[0] / errors[1]


def test_a_neural_ode_is_fitted_to_the_bits_of_its_field(torchdyn: Any) -> None:
    field = Wave()
    direct = fit(field)
    through = fit(neural_ode(torchdyn, field))
    for a, b in zip(direct.parameters(), through.parameters(), strict=True):
        assert torch.equal(a, b)


def test_second_order_systems_are_fitted_on_the_whole_state(torchdyn: Any) -> None:
    class Pendulum(nn.Module):
        def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            return torch.cos(3 * t) - torch.sin(2 * x[:, :1]) - 0.1 * x[:, 1:]

    node = neural_ode(torchdyn, Pendulum(), order=2)
    solver = fit(node, base="euler")
    assert gain(solver, node, starts(seed=2)) > 2.5
    slow = node.vf(torch.tensor(0.3).double(), starts())[:, :1]
    assert torch.equal(slow, starts()[:, 1:])


@pytest.mark.parametrize("objective", ["residual", "trajectory"])
def test_data_control_sees_the_start_of_every_batch(torchdyn: Any, objective: str) -> None:
    node = neural_ode(torchdyn, control_net(torchdyn))
    net = tdh.hypernets.MLP(2, inputs=("y", "stages", "dt", "t", "y0"), n_stages=2).double()
    solver = fit(node, hypernet=net, objective=objective)
    assert gain(solver, node, starts(seed=2)) > 4


def test_data_control_of_a_reverse_fit_sees_the_start_of_the_span(torchdyn: Any) -> None:
    node = neural_ode(torchdyn, control_net(torchdyn))
    y0 = starts(8)
    config = tdh.FitConfig(iterations=1, validation=0.5)
    report = fit(node, y0, direction="both", base="euler", config=config).report
    assert report is not None

    def controlled(t: Tensor, y: Tensor) -> Tensor:
        for module in node.vf.modules():
            if hasattr(module, "_control"):
                module._control = held_out
        return node.vf(t, y)

    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    held_out = y0[order[:4]]
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        exact = odeint(controlled, held_out, t, rtol=1e-10, atol=1e-10)
        sums = []
        for times, states in ((t, exact), (t.flip(0), exact.flip(0))):
            rolled = odeint(controlled, states[0], times, method="euler")
            sizes = states.norm(dim=-1)
            sizes = sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))
            sums.append(((rolled - states).norm(dim=-1) / sizes)[1:].mean())
    assert report.base_validation == pytest.approx(float(sum(sums)) / 2, rel=1e-6)


def test_integral_losses_are_part_of_the_state(torchdyn: Any) -> None:
    def loss(t: Tensor, x: Tensor) -> Tensor:
        return (x**2).sum(1) * torch.cos(t)

    node = neural_ode(torchdyn, control_net(torchdyn), integral_loss=loss)
    solver = fit(node, torch.cat([torch.zeros(60, 1).double(), starts()], dim=1))
    assert solver.domain is not None
    assert solver.domain.shapes == ((3,),)
    assert solver.report is not None
    assert solver.report.validation < solver.report.base_validation / 2


@pytest.mark.parametrize("estimator", ["autograd_trace", "hutch_trace"])
def test_normalizing_flows_are_fitted_with_their_log_density(
    torchdyn: Any, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributions import MultivariateNormal
    from torchdyn.models import cnf

    noise = MultivariateNormal(torch.zeros(2), torch.eye(2)) if estimator == "hutch_trace" else None
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    node = neural_ode(
        torchdyn,
        nn.Sequential(cnf.CNF(net, getattr(cnf, estimator), noise_dist=noise)),
        sensitivity="adjoint",
    )
    y0 = torch.cat([torch.zeros(60, 1).double(), starts()], dim=1)
    config = tdh.FitConfig(iterations=40, batch_size=64, validation=0.2)
    before = torch.get_rng_state()
    report = fit(node, y0, config=config).report
    assert torch.equal(torch.get_rng_state(), before)
    assert report is not None
    assert report.validation < report.base_validation / 1.5
    if noise is not None:
        monkeypatch.setattr(ProcessGroup, "current", lambda: ProcessGroup(0, 2))
        with pytest.raises(OptionError, match="trace from noise, and 2 processes"):
            fit(node, y0)


def test_a_neural_ode_comes_back_as_found(torchdyn: Any) -> None:
    node = neural_ode(torchdyn, control_net(torchdyn)).train()
    control, depth = node.vf.vf.vf[0], node.vf.vf.vf[1]
    node(starts(5), SPAN.double())
    node.vf.nfe = 7.0
    held, time, nfe = control._control, depth.t, node.vf.vf.nfe
    trained = [p.requires_grad for p in node.parameters()]
    solver = fit(node, config=tdh.FitConfig(iterations=4))
    tdh.evaluate(node, starts(4), (0.0, 1.0), ["euler", solver], steps=[2], repeats=1)
    assert control._control is held
    assert depth.t is time
    assert (node.vf.nfe, node.vf.vf.nfe) == (7.0, nfe)
    assert node.training
    assert [p.requires_grad for p in node.parameters()] == trained


def test_a_solver_attached_to_the_neural_ode_serves_its_evaluation(torchdyn: Any) -> None:
    node = neural_ode(torchdyn, control_net(torchdyn))
    solver = tdh.attach(node, fit(node))
    try:
        named, given = tdh.evaluate(
            node, starts(9), (0.0, 1.0), ["hyperheun", solver], steps=[4], progress=False, repeats=1
        ).rows
    finally:
        tdh.detach(node)
    assert named.relative_l2 == given.relative_l2
    assert named.nfe == given.nfe == 8


@pytest.mark.filterwarnings("ignore:Setting tolerances has no effect")  # of torchdyn's
def test_evaluation_solves_the_field_as_torchdyn_does(torchdyn: Any) -> None:
    node = neural_ode(torchdyn, control_net(torchdyn))
    y0, t = starts(9), torch.linspace(0, 1, 4, dtype=torch.float64)
    seen: list[Tensor] = []
    tdh.evaluate(
        node,
        y0,
        (0.0, 1.0),
        ["midpoint"],
        steps=[3],
        progress=False,
        repeats=1,
        metric=lambda y: seen.append(y) or 0.0,
    )
    node.solver = torchdyn.numerics.solvers.ode.str_to_solver("midpoint")
    torch.testing.assert_close(seen[0], node.trajectory(y0, t)[-1], rtol=1e-12, atol=1e-12)


def evaluate(func: Any) -> Any:
    return tdh.evaluate(func, starts(), (0.0, 1.0), ["euler"], steps=[2], progress=False)


class OnlyState(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


@pytest.mark.parametrize("func", [OnlyState(), lambda y: -y, nn.Sequential(nn.Linear(2, 2))])
@pytest.mark.parametrize("entry", [fit, evaluate])
def test_what_cannot_be_called_as_func_of_t_and_y_is_refused(func: Any, entry: Any) -> None:
    with pytest.raises(StateTypeError, match="cannot be called as func") as caught:
        entry(func)
    assert "func = lambda t, y: model(y)" in str(caught.value)


def test_fields_that_do_not_tell_their_signature_are_called() -> None:
    scripted = torch.jit.trace(
        lambda t, y: torch.sin(t) - y, (torch.tensor(0.0).double(), starts()), check_trace=False
    )
    assert fit(scripted, config=tdh.FitConfig(iterations=1)).report is not None


def test_tuple_states_of_a_neural_ode_are_refused(torchdyn: Any) -> None:
    with pytest.raises(StateTypeError, match="func is a NeuralODE"):
        fit(neural_ode(torchdyn, Wave()), (starts(), starts()))


def test_a_field_that_merely_holds_a_vf_is_itself() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vf = Wave()

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return 2 * self.vf(t, y)

    holder = Holder()
    first, second = fit(holder), fit(lambda t, y: 2 * damped_wave(2 * t, y) * 1.5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b)
