"""torchflows' FFJORD: it passes on a method's name and a tuple state, both ways in time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchflows.bijections.continuous.ffjord import FFJORD
from torchflows.flows import ContinuousFlow

import torchdiffeq_hyper as tdh

STEPS = 3

pytestmark = [
    # torchflows 1.2.1 indexes its base distribution with a list.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]


def make_flow() -> ContinuousFlow:
    """Return a flow whose field is far from linear, with noise that stays the same."""
    bijection = FFJORD(
        (2,),
        solver="dopri5",
        nn_kwargs={"hidden_size": 16},
        time_derivative_kwargs={"reuse_noise": True},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.45)
    return ContinuousFlow(bijection.requires_grad_(requires_grad=False)).eval()


@pytest.fixture
def flow() -> ContinuousFlow:
    return make_flow()


@pytest.fixture(scope="module")
def solver() -> tdh.HyperSolver:
    """Fitted on x alone, for both directions."""
    return tdh.fit(
        make_flow().bijection.f.forward_model,
        torch.randn(256, 2, generator=torch.Generator().manual_seed(1)),
        (0.0, 1.0),
        base="heun",
        steps=STEPS,
        direction="both",
        config=tdh.FitConfig(iterations=200),
        progress=False,
    )


@pytest.fixture
def published(solver: tdh.HyperSolver) -> Iterator[str]:
    tdh.register_method("ffjord-fast", solver)
    yield "ffjord-fast"
    tdh.unregister_method("ffjord-fast")


@pytest.fixture
def data(flow: ContinuousFlow) -> Tensor:
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(2))
    return transformed(flow, noise, "dopri5", is_forward=False)[0]


def transformed(
    flow: ContinuousFlow, x: Tensor, solver: str, *, is_forward: bool = True, **options: object
) -> list[Tensor]:
    """Return the other end and the log-determinant: of data, or of noise."""
    flow.bijection.solver = solver
    way = flow.bijection.forward if is_forward else flow.bijection.inverse
    return [part.detach() for part in way(x, **options)]


def test_log_prob_takes_the_fitted_number_of_steps(
    flow: ContinuousFlow, published: str, data: Tensor
) -> None:
    flow.bijection.solver = published
    (log_prob,) = flow.log_prob(data)
    assert log_prob.shape == (64,)
    assert int(flow.bijection.f._n_evals) == 2 * STEPS


def test_sample_takes_the_fitted_number_of_steps(flow: ContinuousFlow, published: str) -> None:
    flow.bijection.solver = published
    x = flow.sample(5, no_grad=True)
    assert x.shape == (5, 2)
    assert int(flow.bijection.f._n_evals) == 2 * STEPS


def test_both_directions_are_closer_than_the_base_at_the_same_calls(
    flow: ContinuousFlow, published: str, data: Tensor
) -> None:
    flow.bijection.atol = flow.bijection.rtol = 1e-7
    step = {"options": {"step_size": 1 / STEPS}}
    for is_forward in (True, False):
        start = data if is_forward else torch.randn_like(data)
        exact, plain, learned = (
            transformed(flow, start, solver, is_forward=is_forward, **options)
            for solver, options in (("dopri5", {}), ("heun2", step), (published, {}))
        )
        off, plain_off = (
            [float((a - b).norm()) for a, b in zip(result, exact, strict=True)]
            for result in (learned, plain)
        )
        assert off[0] < 0.5 * plain_off[0]


def test_log_prob_is_no_worse_than_that_of_the_base_at_the_same_calls(
    flow: ContinuousFlow, published: str, data: Tensor
) -> None:
    flow.bijection.atol = flow.bijection.rtol = 1e-7
    step = {"options": {"step_size": 1 / STEPS}}
    exact, plain, learned = (
        flow.base_log_prob(z) + log_det
        for z, log_det in (
            transformed(flow, data, solver, **options)
            for solver, options in (("dopri5", {}), ("heun2", step), (published, {}))
        )
    )
    assert (learned - exact).norm() <= (plain - exact).norm()


def test_log_determinant_takes_the_plain_base_on_a_flow_that_needs_no_correction(
    flow: ContinuousFlow, data: Tensor
) -> None:
    domain = tdh.FitDomain((0.0, 1.0), 1 / STEPS, 1 / STEPS, (1, -1), ((2,),), False, "float32")
    zero = tdh.HyperSolver(
        "heun", lambda step: torch.zeros_like(step.y), steps=STEPS, domain=domain
    )
    grid = {"options": {"grid_constructor": lambda f, y, t: torch.linspace(1, 0, STEPS + 1)}}
    plain = transformed(flow, data, "heun2", **grid)
    with tdh.using(zero):
        found = transformed(flow, data, "hyperheun")
    torch.testing.assert_close(found, plain)


def test_likelihood_can_be_trained_through_the_published_solver(
    flow: ContinuousFlow, published: str, data: Tensor
) -> None:
    flow.requires_grad_()
    flow.bijection.solver = published
    (log_prob,) = flow.log_prob(data)
    log_prob.mean().backward()
    gradients = [p.grad for p in flow.bijection.f.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients if g is not None)


def test_fresh_noise_in_every_call_is_refused_with_the_remedy(data: Tensor) -> None:
    bijection = FFJORD((2,), nn_kwargs={"hidden_size": 16})
    state = (data, torch.zeros(len(data)))
    with pytest.raises(tdh.HyperError, match="draw the noise once"):
        tdh.fit(bijection.f.eval(), state, (0.0, 1.0), base="heun", steps=STEPS, progress=False)
