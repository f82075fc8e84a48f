"""A library that hard-codes dopri5, its tolerances and its options: served by `tdh.override`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import Counted, MLPField, damped_wave

STEPS = 4


def likelihood(func: Any, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noise and log-determinant, as diffusion libraries compute them.

    The state is a tuple, the trace is estimated, the method and its options are fixed.
    """
    noise = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1

    def dynamics(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            u = func(t, x)
            (product,) = torch.autograd.grad((u * noise).sum(), x)
        return u.detach(), (product * noise).flatten(1).sum(1)

    t = x.new_tensor([0.0, 1.0])
    start = (x, x.new_zeros(len(x)))
    options = {"first_step": 1e-3, "max_num_steps": 10_000}
    x, log_det = odeint(dynamics, start, t, atol=1e-8, rtol=1e-8, method="dopri5", options=options)
    return x[-1], log_det[-1]


@pytest.fixture
def field() -> Counted:
    return Counted(MLPField())


@pytest.fixture
def starts(generator: torch.Generator) -> Tensor:
    return torch.randn(64, 2, generator=generator, dtype=torch.float64)


@pytest.fixture
def solver(field: Counted, starts: Tensor) -> tdh.HyperSolver:
    solver = tdh.fit(
        field.func,
        starts,
        (0.0, 1.0),
        base="heun",
        steps=STEPS,
        config=tdh.FitConfig(iterations=150),
        progress=False,
    )
    return solver.eval()


def seeded() -> torch.Generator:
    """Return the numbers of the trace's estimate."""
    return torch.Generator().manual_seed(7)


def test_override_serves_a_hard_coded_tuple_solve_in_the_fitted_steps(
    field: Counted, solver: tdh.HyperSolver, starts: Tensor
) -> None:
    exact = likelihood(field, starts, seeded())
    assert field.calls > 40
    field.times.clear()
    with tdh.override("dopri5", solver):
        found = likelihood(field, starts, seeded())
    assert field.calls == 2 * STEPS
    plain = tdh.HyperSolver("heun", lambda step: torch.zeros_like(step.y), steps=STEPS)
    plain.domain = solver.domain
    with tdh.override("dopri5", plain):
        base = likelihood(field, starts, seeded())
    off, base_off = (
        [float((a - b).norm()) for a, b in zip(result, exact, strict=True)]
        for result in (found, base)
    )
    assert off[0] < 0.5 * base_off[0]
    assert off[1] <= 1.05 * base_off[1]


def test_hard_coded_call_is_the_host_s_again_after_the_block(
    field: Counted, solver: tdh.HyperSolver, starts: Tensor
) -> None:
    before = likelihood(field, starts, seeded())
    with tdh.override("dopri5", solver):
        likelihood(field, starts, seeded())
    after = likelihood(field, starts, seeded())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_methods_inside_the_block_are_not_affected(
    solver: tdh.HyperSolver, starts: Tensor
) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = odeint(damped_wave, starts, t, method="bosh3")
    with tdh.override("dopri5", solver):
        assert torch.equal(odeint(damped_wave, starts, t, method="bosh3"), expected)
