"""torchcfm's way to sample: torchdyn's NeuralODE around torchcfm's wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh

STEPS = 4
T_SPAN = torch.linspace(0.0, 1.0, 2)


@pytest.fixture(scope="module")
def field() -> Any:
    """Return torchcfm's wrapper, f(t, x), around its own MLP."""
    from torchcfm.models.models import MLP
    from torchcfm.utils import torch_wrapper

    model = MLP(dim=2, time_varying=True, w=32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scale = 1.0 / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return torch_wrapper(model).requires_grad_(requires_grad=False)


@pytest.fixture
def starts() -> Tensor:
    return torch.randn(128, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def solver(field: Any) -> tdh.HyperSolver:
    return tdh.fit(
        field,
        torch.randn(256, 2, generator=torch.Generator().manual_seed(2)),
        (0.0, 1.0),
        base="heun",
        steps=STEPS,
        config=tdh.FitConfig(iterations=150),
        progress=False,
    )


@pytest.fixture
def published(solver: tdh.HyperSolver) -> Iterator[str]:
    tdh.register_method("cfm-fast", solver)
    yield "cfm-fast"
    tdh.unregister_method("cfm-fast")


def node(field: Any, solver: Any, **keywords: Any) -> Any:
    """Return the NeuralODE of torchcfm's examples."""
    from torchdyn.core import NeuralODE

    return NeuralODE(field, solver=solver, sensitivity="adjoint", **keywords)


def end(ode: Any, x: Tensor) -> Tensor:
    """Return what torchcfm's examples sample."""
    with torch.no_grad():
        y: Tensor = ode.trajectory(x, t_span=T_SPAN)[-1]
    return y


@pytest.mark.parametrize("kind", ["object", "name"])
def test_trajectory_takes_the_fitted_number_of_steps(
    field: Any, solver: tdh.HyperSolver, published: str, starts: Tensor, kind: str
) -> None:
    ode = node(field, solver if kind == "object" else published)
    found = end(ode, starts)
    assert ode.vf.nfe == 2 * STEPS
    expected = solver.solve(field, starts, T_SPAN)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected[-1])


def test_trajectory_is_closer_than_the_base_at_the_same_calls(
    field: Any, published: str, starts: Tensor
) -> None:
    exact = end(node(field, "dopri5", atol=1e-7, rtol=1e-7), starts)
    learned = end(node(field, published), starts)
    zero = tdh.HyperSolver("heun", tdh.hypernets.Linear(2), steps=STEPS)
    plain = end(node(field, zero.requires_grad_(requires_grad=False)), starts)
    assert (learned - exact).norm() < 0.7 * (plain - exact).norm()


def test_points_of_a_trajectory_are_the_grid(
    field: Any, solver: tdh.HyperSolver, starts: Tensor
) -> None:
    ode = node(field, solver)
    times = torch.linspace(0.0, 1.0, STEPS + 1)
    with torch.no_grad():
        path = ode.trajectory(starts, t_span=times)
    assert path.shape == (STEPS + 1, *starts.shape)
    assert ode.vf.nfe == 2 * STEPS
    torch.testing.assert_close(path[-1], end(ode, starts))
