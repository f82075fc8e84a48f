"""Regularisers: what they compute, and that their gradients are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

import torchdiffeq_hyper as tdh
from stubs import Counted, MLPField, coupled, coupled_start, spiral
from torchdiffeq_hyper import regularizers
from torchdiffeq_hyper.errors import OptionError, StateShapeError
from torchdiffeq_hyper.hosts.torchdiffeq._recording import odeint_with_errors, record
from torchdiffeq_hyper.recording import AdjointGradientError, FreedGraphError, NothingRecordedError
from torchdiffeq_hyper.regularizers import EnergyField

F64 = torch.float64
PENALTIES = [
    regularizers.error_penalty,
    regularizers.error_dt_penalty,
    regularizers.stiffness_penalty,
]


def _start(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.5, math.prod(shape), dtype=F64).reshape(shape)


def _frozen(step: float) -> dict[str, float]:
    return {"first_step": step, "min_step": step, "max_step": step}


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.5, -0.5]])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_of_steps_pass_gradcheck_with_frozen_steps(
    penalty: Callable[..., Tensor], times: list[float]
) -> None:
    func = MLPField(dim=2, width=3)
    y0 = torch.randn(2, 2, dtype=F64, requires_grad=True)
    t = torch.tensor(times, dtype=F64)
    scale = 1.0 if penalty is regularizers.stiffness_penalty else 1e3

    def value(y0: Tensor, *_: Tensor) -> Tensor:
        with record(stiffness=True) as rec:
            odeint(func, y0, t, options=_frozen(0.5))
        return penalty(rec) * scale

    assert torch.autograd.gradcheck(value, (y0, *func.parameters()))


def test_error_penalties_are_sums_over_accepted_steps_and_samples() -> None:
    y0, t = _start(5, 2), torch.tensor([2.0, 0.0], dtype=F64)
    with record() as rec:
        for _ in range(2):
            odeint(spiral, y0, t, rtol=1e-4, atol=1e-4, options={"first_step": 1.0})
    solve = rec.solves[0]
    steps = solve.steps
    assert solve.n_rejected > 0
    error = sum_dt = 0.0
    for dt, row, is_accepted in zip(steps.dt, steps.error, steps.is_accepted, strict=True):
        if is_accepted:
            error += float(row.sum())
            sum_dt += float(row.sum() * dt.abs())
    assert float(regularizers.error_penalty(solve)) == pytest.approx(error, rel=1e-12)
    assert float(regularizers.error_dt_penalty(solve)) == pytest.approx(sum_dt, rel=1e-12)
    assert float(regularizers.error_penalty(rec)) == pytest.approx(2 * error, rel=1e-12)
    assert float(regularizers.error_dt_penalty(rec)) == pytest.approx(2 * sum_dt, rel=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_stiffness_of_a_linear_field_is_its_rate(method: str) -> None:
    rates = torch.tensor([1.0, 3.0, 20.0], dtype=F64).unsqueeze(-1)
    y0 = torch.ones(3, 2, dtype=F64)
    with record(stiffness=True) as rec:
        odeint(lambda t, y: -rates * y, y0, torch.tensor([0.0, 1.0], dtype=F64), method=method)
    solve = rec.solves[0]
    stiffness = solve.steps.stiffness_of()[solve.steps.is_accepted]
    torch.testing.assert_close(stiffness[0], rates.squeeze(-1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        regularizers.stiffness_penalty(rec), stiffness.sum(), rtol=1e-12, atol=0.0
    )


def test_stiffness_of_tuples_is_joint_or_of_a_part() -> None:
    y0 = (torch.ones(3, 2, dtype=F64), torch.ones(3, dtype=F64), torch.tensor(1.0, dtype=F64))
    with record(stiffness=True) as rec:
        odeint(lambda t, y: (-2 * y[0], -5 * y[1], -y[2]), y0, torch.tensor([0.0, 1.0], dtype=F64))
    steps = rec.solves[0].steps
    rate = [float(steps.stiffness_of(part)[0, 0]) for part in range(3)]
    assert rate == pytest.approx([2.0, 5.0, 1.0], rel=1e-6)
    assert 2.0 < float(steps.stiffness_of()[0, 0]) < 5.0


@pytest.mark.parametrize("method", ["bosh3", "fehlberg2", "adaptive_heun"])
def test_stiffness_needs_two_stages_at_the_steps_end(method: str) -> None:
    with record(stiffness=True) as rec:
        odeint(spiral, _start(5, 2), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3, method=method)
    with pytest.raises(OptionError, match="last two stages"):
        regularizers.stiffness_penalty(rec)


def test_stiffness_needs_to_be_recorded() -> None:
    _, solve = odeint_with_errors(spiral, _start(5, 2), torch.tensor([0.0, 1.0]))
    with pytest.raises(OptionError, match=r"tdh.record\(stiffness=True\)"):
        regularizers.stiffness_penalty(solve)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_of_steps_refuse_gradients_through_adjoints(
    penalty: Callable[..., Tensor],
) -> None:
    func = MLPField()
    with record(stiffness=True) as rec:
        odeint_adjoint(func, _start(5, 2), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)
    value = penalty(rec)
    assert value.item() > 0
    with pytest.raises(AdjointGradientError, match="local_error_penalty"):
        value.backward()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_of_steps_notice_a_freed_graph(penalty: Callable[..., Tensor]) -> None:
    func = MLPField()
    with record(stiffness=True) as rec:
        y = odeint(func, _start(5, 2), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)
    y.sum().backward()
    with pytest.raises(FreedGraphError):
        penalty(rec)
    with torch.no_grad():
        assert float(penalty(rec)) > 0


@pytest.mark.parametrize("penalty", [*PENALTIES, regularizers.local_error_penalty])
def test_penalties_of_nothing_say_so(penalty: Callable[..., Tensor]) -> None:
    with record() as rec:
        odeint(spiral, _start(5, 2), torch.tensor([0.0, 1.0]), method="euler")
    with pytest.raises(NothingRecordedError, match="euler"):
        penalty(rec)


def test_a_solve_without_steps_has_no_step_to_take_again() -> None:
    with record() as rec:
        odeint(spiral, _start(5, 2), torch.tensor([0.5]))
    assert float(rec.error_penalty()) == 0.0
    with pytest.raises(NothingRecordedError, match="can be taken again"):
        regularizers.local_error_penalty(rec)


LOCAL = {
    "forward": (spiral, _start(5, 2), [0.0, 2.0]),
    "reverse": (spiral, _start(5, 2), [2.0, 0.0]),
    "tuple": (coupled, coupled_start(), [0.0, 2.0]),
    "reverse tuple": (coupled, coupled_start(), [2.0, 0.0]),
    "complex": (lambda t, y: (1j - t) * y, _start(5, 2).to(torch.complex128), [0.0, 2.0]),
}


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("problem", LOCAL)
def test_the_step_taken_again_has_the_error_it_had(problem: str, method: str) -> None:
    func, y0, times = LOCAL[problem]
    counted = Counted(func)
    with record(seed=1) as rec:
        t = torch.tensor(times, dtype=F64)
        odeint(counted, y0, t, rtol=1e-4, atol=1e-4, method=method)
    (solve,) = rec.solves
    step = solve.sampled_step
    assert step is not None
    (position,) = (solve.steps.t0 == step.t0).nonzero()[-1:, 0]
    assert bool(solve.steps.is_accepted[position])
    part = 1 if isinstance(y0, tuple) else None
    expected = solve.steps.error_of(part)[position].sum() * step.dt.abs()
    before = counted.calls
    got = regularizers.local_error_penalty(solve, part)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-16)
    assert counted.calls - before == len(step.nodes) + 1


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_the_local_penalty_passes_gradcheck_and_works_with_adjoints(
    solve: Callable[..., Any],
) -> None:
    func = MLPField(dim=2, width=3)
    t = torch.tensor([1.0, 0.0], dtype=F64)
    with record(seed=0) as rec:
        y = solve(func, _start(2, 2), t, options=_frozen(0.5), method="dopri5")
        y[-1].sum().backward()
        regularizers.local_error_penalty(rec).backward()
    parameters = tuple(func.parameters())
    assert all(p.grad is not None for p in parameters)
    # The recorded state stays as it was while the parameters change.
    assert torch.autograd.gradcheck(
        lambda *_: regularizers.local_error_penalty(rec) * 1e3, parameters
    )


def test_the_local_penalty_estimates_error_times_dt_without_bias() -> None:
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0], dtype=F64)
    with record(seed=0) as rec:
        for _ in range(200):
            odeint(spiral, y0, t, rtol=1e-3, atol=1e-3)
    values = [
        float(regularizers.local_error_penalty(solve)) * solve.n_accepted for solve in rec.solves
    ]
    expected = float(regularizers.error_dt_penalty(rec.solves[0]))
    assert sum(values) / len(values) == pytest.approx(expected, rel=0.25)
    assert len(set(values)) > 1


MATRIX = torch.tensor([[0.0, 1.0, 0.3], [-1.0, 0.0, 0.2], [0.1, 0.0, -0.5]], dtype=F64)


class Linear(nn.Module):
    """y' = y A^T, whose Jacobian is A everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(MATRIX.clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix.T


def _solve_energy(field: EnergyField, y0: Any, times: list[float], solve: Any = odeint) -> Any:
    t = torch.tensor(times, dtype=F64)
    noise = None
    if field.jacobian:
        counted = y0 if isinstance(y0, Tensor) else y0[0]
        noise = torch.ones_like(counted)
    state = field.start(y0, noise=noise)
    solution = solve(field, state, t, rtol=1e-9, atol=1e-10, method="dopri5")
    return field.finish(solution)


@pytest.mark.parametrize("times", [[0.0, 0.5, 1.5], [1.5, 0.5, 0.0]])
def test_energies_of_a_linear_field_are_the_exact_integrals(times: list[float]) -> None:
    y0 = _start(4, 3)
    y, energies = _solve_energy(EnergyField(Linear()), y0, times)
    t = torch.tensor(times, dtype=F64)
    expected = odeint(Linear(), y0, t, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    # Trapezoidal sums of |A y|^2 on a fine grid.
    grid = torch.linspace(times[0], times[-1], 2001, dtype=F64)
    speed = (odeint(Linear(), y0, grid, rtol=1e-9, atol=1e-10) @ MATRIX.T).square().sum(-1)
    kinetic = torch.trapezoid(speed, dx=1.5 / 2000, dim=0)
    torch.testing.assert_close(energies.kinetic[-1], kinetic, rtol=1e-5, atol=1e-7)
    slope = MATRIX.sum(0).square().sum()  # ones^T A
    elapsed = (t - t[0]).abs().unsqueeze(-1).expand(3, 4)
    torch.testing.assert_close(energies.jacobian, slope * elapsed, rtol=1e-6, atol=1e-9)


def test_the_jacobian_term_is_the_frobenius_norm_in_the_mean() -> None:
    field, y0 = EnergyField(Linear(), kinetic=False), _start(4000, 3)
    state = field.start(y0, generator=torch.Generator().manual_seed(0))
    _, energies = field.finish(odeint(field, state, torch.tensor([0.0, 1.0], dtype=F64)))
    assert energies.kinetic is None
    frobenius = float(MATRIX.square().sum())
    assert energies.jacobian[-1].mean().item() == pytest.approx(frobenius, rel=0.05)


@pytest.mark.parametrize("times", [[0.0, 0.6], [0.6, 0.0]])
def test_energies_pass_gradcheck(times: list[float]) -> None:
    func, t = MLPField(dim=2, width=3), torch.tensor(times, dtype=F64)
    field = EnergyField(func)
    y0 = torch.randn(2, 2, dtype=F64, requires_grad=True)
    noise = torch.randn(2, 2, dtype=F64)

    def energies(y0: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        solution = odeint(field, field.start(y0, noise=noise), t, method="rk4")
        _, found = field.finish(solution)
        assert found.kinetic is not None
        assert found.jacobian is not None
        return found.kinetic[-1], found.jacobian[-1]

    assert torch.autograd.gradcheck(energies, (y0, *func.parameters()))


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]])
def test_energies_have_the_same_gradient_through_adjoints(times: list[float]) -> None:
    def gradient(solve: Any) -> Tensor:
        func = MLPField(dim=2, width=4)
        _, energies = _solve_energy(EnergyField(func), _start(3, 2), times, solve)
        (energies.kinetic[-1] + 0.3 * energies.jacobian[-1]).sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in func.parameters()])

    torch.testing.assert_close(gradient(odeint_adjoint), gradient(odeint), rtol=1e-5, atol=1e-7)


def test_energies_of_tuples_count_all_parts_of_the_batch_or_one() -> None:
    y0 = coupled_start()
    t = torch.tensor([0.0, 1.0], dtype=F64)
    plain = odeint(coupled, y0, t, rtol=1e-9, atol=1e-10)
    found = {}
    for part in (None, 0, 1):
        field = EnergyField(coupled, jacobian=False, part=part)
        solution = odeint(field, field.start(y0), t, rtol=1e-9, atol=1e-10)
        y, energies = field.finish(solution)
        assert isinstance(y, tuple)
        for got, expected in zip(y, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        found[part] = energies.kinetic[-1]
    torch.testing.assert_close(found[None], found[0] + found[1], rtol=1e-6, atol=1e-9)
    assert found[None].shape == (4,)


def test_the_jacobian_of_one_part_is_with_respect_to_that_part() -> None:
    def func(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return y[0] @ MATRIX.T, 7 * y[1] + y[0].sum(-1)

    y0 = (_start(4, 3), torch.ones(4, dtype=F64))
    _, energies = _solve_energy(EnergyField(func, kinetic=False, part=0), y0, [0.0, 1.0])
    slope = float(MATRIX.sum(0).square().sum())
    assert energies.jacobian[-1].tolist() == pytest.approx([slope] * 4, rel=1e-6)


def test_energies_need_no_gradient_mode_and_leave_no_graph() -> None:
    field = EnergyField(MLPField())
    with torch.no_grad():
        y, energies = _solve_energy(field, _start(3, 2), [0.0, 1.0])
    assert not y.requires_grad
    assert not energies.jacobian.requires_grad
    expected = _solve_energy(field, _start(3, 2), [0.0, 1.0])[1]
    torch.testing.assert_close(energies.jacobian, expected.jacobian, rtol=1e-12, atol=0.0)


def test_a_field_that_does_not_depend_on_the_state_has_no_jacobian() -> None:
    field = EnergyField(lambda t, y: torch.cos(t).expand_as(y))
    _, energies = _solve_energy(field, _start(3, 2), [0.0, 1.0])
    assert energies.jacobian.tolist() == [[0.0] * 3] * 2


def test_noise_may_come_as_a_list() -> None:
    field = regularizers.EnergyField(spiral, jacobian=True)
    noise = torch.randn(2, 2, dtype=F64)
    y0 = torch.ones(2, 2, dtype=F64)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    one, other = (odeint(field, field.start(y0, noise=n), t) for n in (noise, [noise]))
    assert all(map(torch.equal, one, other))


def test_a_field_of_some_samples_keeps_their_noise() -> None:
    field = EnergyField(MLPField())
    state = field.start(_start(5, 2))
    index = torch.tensor([3, 0])
    t = torch.tensor(0.2, dtype=F64)
    whole = field(t, state)
    some = field.restrict(index)(t, tuple(part[index] for part in state))
    for part, expected in zip(some, whole, strict=True):
        torch.testing.assert_close(part, expected[index])


def test_a_solver_attached_to_the_field_inside_serves_the_wrapper() -> None:
    func, seen = MLPField(), []

    def net(step: tdh.StepInput) -> Any:
        seen.append(step)
        return step.y

    tdh.attach(func, tdh.HyperSolver("heun", net, steps=3))
    field = EnergyField(func, jacobian=False)
    try:
        odeint(field, field.start(_start(3, 2)), torch.tensor([0.0, 1.0]), method="hyperheun")
    finally:
        tdh.detach(func)
    assert len(seen) == 3


def test_energy_fields_say_what_is_wrong() -> None:
    func = MLPField()
    with pytest.raises(OptionError, match="neither"):
        EnergyField(func, kinetic=False, jacobian=False)
    with pytest.raises(StateShapeError, match="as many in every part"):
        EnergyField(func).start((torch.ones(3, 2), torch.ones(4)))
    with pytest.raises(StateShapeError, match="samples along dim 0"):
        EnergyField(func).start(torch.tensor(1.0))
    with pytest.raises(OptionError, match="part is 2"):
        EnergyField(func, part=2).start((torch.ones(3, 2), torch.ones(3)))
    with pytest.raises(StateShapeError, match="the noise has shapes"):
        EnergyField(func).start(torch.ones(3, 2), noise=torch.ones(3, 1))
    with pytest.raises(StateShapeError, match=r"field\.start"):
        odeint(EnergyField(func), torch.ones(3, 2), torch.tensor([0.0, 1.0]), method="euler")
    field = EnergyField(func)
    field.start(torch.ones(3, 2, dtype=F64))
    other = EnergyField(func).start(torch.ones(4, 2, dtype=F64))
    with pytest.raises(StateShapeError, match="before every solve"):
        odeint(field, other, torch.tensor([0.0, 1.0]), method="euler")


def test_l1_and_l2_sum_over_parameters_that_are_trained() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, -4.0]]))
        module.bias.fill_(100.0)
    module.bias.requires_grad_(False)
    assert regularizers.l1(module).item() == 7.0
    assert regularizers.l2(module.parameters()).item() == 25.0 + 100.0**2
    parameters = [torch.randn(3, dtype=F64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *p: regularizers.l1(p), parameters)
    assert torch.autograd.gradcheck(lambda *p: regularizers.l2(p), parameters)
    with pytest.raises(OptionError, match="no parameters"):
        regularizers.l2(nn.Linear(2, 1).requires_grad_(False))


def test_a_loss_is_the_task_plus_weighted_penalties() -> None:
    func = MLPField()
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0], dtype=F64)
    with record(stiffness=True, seed=0) as rec:
        y = odeint(func, y0, t, rtol=1e-3, atol=1e-3)
    task = y[-1].square().mean()
    weights = dict.fromkeys(("error", "error_dt", "stiffness", "local", "l1", "l2"), 0.5)
    total, penalties = regularizers.add_penalties(task, weights, record=rec, func=func)
    assert list(penalties) == list(weights)
    assert total.item() == pytest.approx(task.item() + 0.5 * sum(map(float, penalties.values())))
    assert penalties["error"].item() == rec.error_penalty().item()
    assert not penalties["error"].requires_grad
    total.backward()
    assert all(p.grad is not None for p in func.parameters())


def test_a_loss_with_an_unknown_or_unfed_penalty_says_so() -> None:
    loss = torch.tensor(1.0)
    with pytest.raises(OptionError, match="error_dt"):
        regularizers.add_penalties(loss, {"eror_dt": 1.0})
    with pytest.raises(OptionError, match="record=rec"):
        regularizers.add_penalties(loss, {"error": 1.0})
    with pytest.raises(OptionError, match="func=func"):
        regularizers.add_penalties(loss, {"l2": 1.0})
    assert regularizers.add_penalties(loss, {}) == (loss, {})
