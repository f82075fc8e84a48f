"""torchcde's cdeint: it hands its field to `odeint_adjoint` inside a module of its own."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torchcde
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import AdjointWarning

HIDDEN, CHANNELS, LENGTH = 4, 3, 6


class Field(nn.Module):
    """The f of dz = f(t, z) dX, shape (batch, hidden, channels); counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Linear(HIDDEN, HIDDEN * CHANNELS, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Return the matrices that act on dX/dt."""
        self.calls += 1
        return torch.tanh(self.net(z) + t).reshape(*z.shape[:-1], HIDDEN, CHANNELS)


@pytest.fixture
def field() -> Field:
    return Field()


@pytest.fixture
def path() -> torchcde.CubicSpline:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, LENGTH, CHANNELS, generator=generator, dtype=torch.float64)
    return torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(x))


@pytest.fixture
def z0() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)


def correction(step: tdh.StepInput) -> Tensor:
    """Return a correction that depends on time, state and derivative."""
    assert isinstance(step.y, Tensor)
    assert isinstance(step.f0, Tensor)
    return 0.01 * torch.cos(step.t) * (step.y - step.f0)


@pytest.fixture
def solver() -> tdh.HyperSolver:
    return tdh.HyperSolver("heun", correction, steps=LENGTH - 1)


def solve(path: Any, field: Field, z0: Tensor, **keywords: Any) -> Tensor:
    """Return z at the ends of the path, (batch, 2, hidden)."""
    z: Tensor = torchcde.cdeint(X=path, func=field, z0=z0, t=path.interval, **keywords)
    return z


@pytest.mark.parametrize("adjoint", [True, False])
def test_cdeint_takes_the_fitted_number_of_steps(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver, *, adjoint: bool
) -> None:
    options = {"solver": solver}
    extra: dict[str, Any] = {"adjoint_options": {}} if adjoint else {}
    z = solve(path, field, z0, method="hyperheun", options=options, adjoint=adjoint, **extra)
    assert z.shape == (5, 2, HIDDEN)
    assert field.calls == 1 + 2 * (LENGTH - 1)  # torchcde looks at the field once itself


@pytest.mark.parametrize("adjoint", [True, False])
def test_cdeint_equals_the_solver_without_a_host(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver, *, adjoint: bool
) -> None:
    def dynamics(t: Tensor, z: Tensor) -> Tensor:
        product: Tensor = (field(t, z) @ path.derivative(t).unsqueeze(-1)).squeeze(-1)
        return product

    with tdh.using(solver):
        z = solve(path, field, z0, method="hyperheun", adjoint=adjoint)
    expected = solver.solve(dynamics, z0, path.interval)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(z[:, -1], expected[-1], rtol=1e-12, atol=1e-12)


def gradients(path: Any, field: Field, z0: Tensor, **keywords: Any) -> list[Tensor]:
    """Return the gradients of a loss with respect to z0 and the field's parameters."""
    loss = solve(path, field, z0, **keywords)[:, -1].square().sum()
    return list(torch.autograd.grad(loss, [z0, *field.parameters()]))


def test_default_adjoint_runs_the_plain_base_backward_outside_the_scope(
    path: Any, field: Field, z0: Tensor
) -> None:
    zero = tdh.HyperSolver("heun", lambda step: torch.zeros_like(step.y), steps=20)
    with tdh.using(zero):
        loss = solve(path, field, z0, method="hyperheun")[:, -1].square().sum()
    found = torch.autograd.grad(loss, [z0, *field.parameters()])
    options = {"step_size": (LENGTH - 1) / 20}
    expected = gradients(path, field, z0, method="heun2", options=options)
    torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-10)


def test_autograd_through_cdeint_sees_the_correction(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver
) -> None:
    plain = tdh.HyperSolver("heun", lambda step: torch.zeros_like(step.y), steps=LENGTH - 1)
    found = [
        gradients(path, field, z0, method="hyperheun", options={"solver": part}, adjoint=False)
        for part in (solver, plain)
    ]
    assert all((a - b).norm() > 1e-6 for a, b in zip(*found, strict=True))


def test_published_name_needs_no_other_argument(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver
) -> None:
    tdh.register_method("cde-fast", solver)
    try:
        gradients(path, field, z0, method="cde-fast")
    finally:
        tdh.unregister_method("cde-fast")
    assert field.calls == 1 + 2 * (LENGTH - 1) + 2 * (LENGTH - 1)  # forward, and backward


def test_override_serves_the_default_method_that_cdeint_never_names(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver
) -> None:
    with torch.no_grad(), tdh.override("dopri5", solver):
        found = solve(path, field, z0)
        assert field.calls == 1 + 2 * (LENGTH - 1)
    with torch.no_grad(), tdh.using(solver):
        named = solve(path, field, z0, method="hyperheun")
    assert torch.equal(found, named)
    gc.collect()  # the host's method is served until the adjoint's graph is gone


def test_override_accepts_the_jump_times_that_torchcde_s_users_give_to_dopri5(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver
) -> None:
    options = {"jump_t": path.grid_points}
    exact = gradients(path, field, z0, method="dopri5", options=options)
    field.calls = 0
    with tdh.override("dopri5", solver):
        loss = solve(path, field, z0, method="dopri5", options=options)[:, -1].square().sum()
        assert field.calls == 1 + 2 * (LENGTH - 1)
    # Backward runs the host's own dopri5, with the jump times, from where the forward ended.
    found = torch.autograd.grad(loss, [z0, *field.parameters()])
    assert [g.shape for g in found] == [g.shape for g in exact]
    assert field.calls > 1 + 4 * (LENGTH - 1)
    del loss
    gc.collect()


def test_points_between_the_ends_come_back_in_order(
    path: Any, field: Field, z0: Tensor, solver: tdh.HyperSolver
) -> None:
    with torch.no_grad(), tdh.using(solver):
        all_points = torchcde.cdeint(
            X=path, func=field, z0=z0, t=path.grid_points, method="hyperheun"
        )
        ends = solve(path, field, z0, method="hyperheun")
    assert all_points.shape == (5, LENGTH, HIDDEN)
    torch.testing.assert_close(all_points[:, [0, -1]], ends, rtol=1e-12, atol=1e-12)


def test_trainable_net_under_the_default_adjoint_warns_once(
    path: Any, field: Field, z0: Tensor
) -> None:
    net = tdh.hypernets.Linear(channels=HIDDEN).double()
    solver = tdh.HyperSolver("heun", net, steps=LENGTH - 1)
    with tdh.using(solver), pytest.warns(AdjointWarning, match="no gradient"):
        solve(path, field, z0, method="hyperheun")
    with tdh.using(solver):
        solve(path, field, z0, method="hyperheun")
