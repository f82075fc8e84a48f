"""flow-matching's ODESolver as its users call it: the method's name is all that it passes on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from torch import Tensor, nn

import torchdiffeq_hyper as tdh

NAME = "my-published-solver"
STEPS = 3
CONFIG = tdh.FitConfig(iterations=200)


class Velocity(ModelWrapper):
    """A velocity u(x, t) on (batch, 2) that counts its calls."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
        self.requires_grad_(requires_grad=False)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
        """Return dx/dt."""
        self.calls += 1
        u: Tensor = self.model(torch.cat([x, t.expand(len(x), 1)], dim=1))
        return u


def with_log_density(model: Velocity) -> object:
    """Return the dynamics of (x, log-density), the divergence being exact."""

    def dynamics(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            u = model(x, t)
            columns = [torch.autograd.grad(u[:, i].sum(), x, create_graph=True)[0] for i in (0, 1)]
        return u, columns[0][:, 0] + columns[1][:, 1]

    return dynamics


def log_p0(x: Tensor) -> Tensor:
    """Return the log-density of the standard normal distribution."""
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(dim=1)


@pytest.fixture(scope="module")
def model() -> Velocity:
    return Velocity()


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(256, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data(model: Velocity) -> Tensor:
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(2))
    return ODESolver(model).sample(noise, step_size=None, method="dopri5")


@pytest.fixture(scope="module")
def solver(model: Velocity, noise: Tensor) -> tdh.HyperSolver:
    """Fitted on x alone, for both directions."""
    return tdh.fit(
        lambda t, x: model(x, t),
        noise,
        (0.0, 1.0),
        base="heun",
        steps=STEPS,
        direction="both",
        config=CONFIG,
        progress=False,
    )


@pytest.fixture
def published(solver: tdh.HyperSolver) -> Iterator[str]:
    tdh.register_method(NAME, solver)
    yield NAME
    tdh.unregister_method(NAME)


@pytest.fixture
def starts() -> Tensor:
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(3))


def test_sample_without_step_size_takes_the_fitted_number_of_steps(
    model: Velocity, published: str, starts: Tensor
) -> None:
    model.calls = 0
    ODESolver(model).sample(x_init=starts, step_size=None, method=published)
    assert model.calls == 2 * STEPS


def test_sample_with_step_size_takes_steps_of_that_size(
    model: Velocity, published: str, starts: Tensor
) -> None:
    model.calls = 0
    with pytest.warns(tdh.HyperWarning, match="outside what this solver was fitted for"):
        ODESolver(model).sample(x_init=starts, step_size=0.125, method=published)
    assert model.calls == 2 * 8


def test_sample_equals_the_solver_without_a_host(
    model: Velocity, solver: tdh.HyperSolver, published: str, starts: Tensor
) -> None:
    y = ODESolver(model).sample(x_init=starts, step_size=None, method=published)
    expected = solver.solve(lambda t, x: model(x, t), starts, torch.tensor([0.0, 1.0]))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(y, expected[-1])


def test_sample_is_closer_than_the_base_at_the_same_calls(
    model: Velocity, published: str, starts: Tensor
) -> None:
    sampler = ODESolver(model)
    exact = sampler.sample(starts, step_size=None, method="dopri5", atol=1e-7, rtol=1e-7)
    learned = sampler.sample(starts, step_size=None, method=published)
    plain = sampler.sample(starts, step_size=1 / STEPS, method="heun2")
    assert (learned - exact).norm() < 0.5 * (plain - exact).norm()


def test_sample_returns_every_point_of_a_time_grid(
    model: Velocity, published: str, starts: Tensor
) -> None:
    grid = torch.linspace(0.0, 1.0, STEPS + 1)
    model.calls = 0
    path = ODESolver(model).sample(
        starts, None, method=published, time_grid=grid, return_intermediates=True
    )
    assert isinstance(path, Tensor)
    assert path.shape == (STEPS + 1, *starts.shape)
    assert model.calls == 2 * STEPS


def test_sample_passes_gradients_to_the_start(
    model: Velocity, published: str, starts: Tensor
) -> None:
    starts.requires_grad_()
    y = ODESolver(model).sample(starts, None, method=published, enable_grad=True)
    assert isinstance(y, Tensor)
    (gradient,) = torch.autograd.grad(y.square().sum(), starts)
    assert gradient.abs().min() > 0


def test_sample_in_a_scope_finds_the_solver_through_the_closure(
    model: Velocity, solver: tdh.HyperSolver, starts: Tensor
) -> None:
    model.calls = 0
    with tdh.using(solver):
        ODESolver(model).sample(x_init=starts, step_size=None, method="hyperheun")
    assert model.calls == 2 * STEPS


def test_unpublished_name_is_explained_by_the_host(model: Velocity, starts: Tensor) -> None:
    with pytest.raises(tdh.MissingHypernetError, match="register_method"):
        ODESolver(model).sample(x_init=starts, step_size=None, method="hyperheun")


def likelihood(model: Velocity, x: Tensor, method: str, **keywords: object) -> tuple[Tensor, ...]:
    """Return noise and log-likelihood of data, solved from t = 1 back to 0."""
    return ODESolver(model).compute_likelihood(
        x, log_p0, step_size=None, method=method, exact_divergence=True, **keywords
    )


def test_likelihood_with_a_solver_fitted_on_x_is_no_worse_than_the_plain_base(
    model: Velocity, data: Tensor, published: str
) -> None:
    held_out = data[-64:]
    exact = likelihood(model, held_out, "dopri5", atol=1e-7, rtol=1e-7)
    grid = torch.linspace(1.0, 0.0, STEPS + 1)
    plain = likelihood(model, held_out, "heun2", time_grid=grid)
    model.calls = 0
    learned = likelihood(model, held_out, published)
    assert model.calls == 2 * STEPS
    off, plain_off = (
        [float((a - b).norm()) for a, b in zip(result, exact, strict=True)]
        for result in (learned, plain)
    )
    assert off[0] < 0.5 * plain_off[0]
    assert off[1] <= plain_off[1]


def test_likelihood_with_a_solver_fitted_on_the_log_density_reaches_the_error_of_its_table(
    model: Velocity, data: Tensor
) -> None:
    dynamics = with_log_density(model)
    fitted_on, held_out = data[:192], data[192:]
    solver = tdh.fit(
        dynamics,
        (fitted_on, torch.zeros(len(fitted_on))),
        (1.0, 0.0),
        base="heun",
        steps=STEPS,
        config=CONFIG,
        progress=False,
    )
    start = (held_out, torch.zeros(len(held_out)))
    table = tdh.evaluate(
        dynamics, start, (1.0, 0.0), ["heun2", solver], steps=STEPS, repeats=1, progress=False
    )
    plain, learned = table.rows
    assert learned.relative_l2 < 0.5 * plain.relative_l2

    tdh.register_method("my-likelihood", solver)
    try:
        results = [
            likelihood(model, held_out, method, atol=1e-7, rtol=1e-7)
            for method in ("dopri5", "my-likelihood")
        ]
    finally:
        tdh.unregister_method("my-likelihood")
    exact, found = (torch.cat([x, (ll - log_p0(x))[:, None]], dim=1) for x, ll in results)
    off = ((found - exact).norm(dim=1) / exact.norm(dim=1)).mean()
    assert float(off) == pytest.approx(learned.relative_l2, rel=0.02)


def test_its_own_solver_tests_pass_with_our_methods_installed(tmp_path: Path) -> None:
    # The wheel installs its tests as a top-level package named "tests".
    spec = importlib.util.find_spec("flow_matching")
    assert spec is not None
    assert spec.origin is not None
    suite = Path(spec.origin).parent.parent / "tests" / "solver"
    if not suite.is_dir():
        pytest.skip("this release of flow-matching installs no tests")
    settings = tmp_path / "pytest.ini"  # else pytest finds ours, above the environment
    settings.write_text("[pytest]\n")
    arguments = ["-q", "-c", str(settings), str(suite)]
    code = f"import torchdiffeq_hyper, pytest; raise SystemExit(pytest.main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
