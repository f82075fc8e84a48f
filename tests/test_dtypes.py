"""Every pair of dtypes of state and time, every size of step: right, finite, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_event

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import damped_wave
from torchdiffeq_hyper.errors import NonFiniteError, StateTypeError
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._stepping import is_power_in_range, power_factors
from torchdiffeq_hyper.tableaus import Tableau

LEARNED = [m.name for m in _registry.methods().values() if m.corrects_base]
HALVES = [torch.float16, torch.bfloat16]
TIMES = [*HALVES, torch.float32, torch.float64]
STATES = [*TIMES, torch.complex64, torch.complex128]
KINDS = ["scalar", "batch", "empty", "tuple", "scalars", "mixed"]


def _tableau(method: str) -> Tableau:
    tableau = _registry.find(method).tableau
    assert tableau is not None
    return tableau


def _start(kind: str, dtype: torch.dtype) -> Any:
    shapes: dict[str, Any] = {
        "scalar": (),
        "batch": (4, 3),
        "empty": (0, 3),
        "tuple": ((4, 3), (4,)),
        "scalars": ((), (), (2,)),
    }
    if kind == "mixed":
        return torch.randn(4, 3), torch.randn(4).to(dtype)
    shape = shapes[kind]
    if shape and isinstance(shape[0], tuple):
        return tuple(torch.randn(part).to(dtype) for part in shape)
    return torch.randn(shape).to(dtype)


def _parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _like(state: Any, change: Callable[..., Tensor], *others: Any) -> Any:
    changed = tuple(change(*parts) for parts in zip(*map(_parts, (state, *others)), strict=True))
    return changed if isinstance(state, tuple) else changed[0]


def _wave(t: Tensor, state: Any) -> Any:
    return _like(state, lambda y: -y + torch.sin(3 * t) * 0.7)


def _wide(state: Any) -> Any:
    return _like(state, lambda y: y.to(torch.promote_types(y.dtype, torch.float64)))


def _mixing(step: tdh.StepInput) -> Any:
    """Correct by arithmetic of everything a step gives."""
    weights = torch.cos(step.t), step.dt

    def of(y: Tensor, k: Tensor, f0: Tensor, y0: Tensor) -> Tensor:
        return 0.1 * (k * weights[0] + f0 + y0 * weights[1] - y)

    return _like(step.y, of, step.stages[-1], step.f0, step.y0)


@pytest.mark.parametrize("t_dtype", TIMES)
@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("method", [*LEARNED, "bns"])
def test_solve_gives_the_hosts_numbers_for_all_dtypes(
    method: str, dtype: torch.dtype, t_dtype: torch.dtype
) -> None:
    if method == "bns":
        solver: tdh.HyperSolver = tdh.BespokeSolver.classical("rk4", 8)
    else:
        solver = tdh.HyperSolver(_tableau(method).name, _mixing, steps=5)
    for kind in KINDS:
        for times in (
            ([0.25], [1.3, 0.5, 0.0]) if kind == "empty" else ([0.25, 1.5], [1.3, 0.5, 0.0])
        ):
            y0, t = _start(kind, dtype), torch.tensor(times).to(t_dtype)
            got = solver.solve(_wave, y0, t)
            host = odeint(_wave, y0, t, method=method, options={"solver": solver})
            exact = solver.solve(_wave, _wide(y0), t.double())
            joint = torch.cat([part.reshape(-1) for part in _parts(y0)]).dtype
            eps = max(torch.finfo(joint).eps, torch.finfo(torch.float32).eps)
            for one, other, wide in zip(_parts(got), _parts(host), _parts(exact), strict=True):
                assert one.dtype == other.dtype == joint
                torch.testing.assert_close(one, other, rtol=2 * eps, atol=2 * eps)
                torch.testing.assert_close(one.to(wide.dtype), wide, rtol=20 * eps, atol=20 * eps)


@pytest.mark.parametrize("t_dtype", HALVES)
@pytest.mark.parametrize("method", LEARNED)
def test_steps_between_times_of_half_precision_are_equal(method: str, t_dtype: torch.dtype) -> None:
    solver = tdh.HyperSolver(_tableau(method).name, zero, steps=10)
    sizes: list[float] = []

    def seen(step: tdh.StepInput) -> Any:
        sizes.append(float(step.dt))
        return zero(step)

    solver.hypernet = seen
    for times in ([100.0, 101.0], [101.0, 100.0]):
        t = torch.tensor(times, dtype=t_dtype)
        sizes.clear()
        solver.solve(damped_wave, torch.ones(2), t)
        odeint(damped_wave, torch.ones(2), t, method=method, options={"solver": solver})
        assert sizes == pytest.approx([math.copysign(0.1, times[1] - times[0])] * 20, rel=1e-3)


@pytest.mark.parametrize("t_dtype", HALVES)
def test_a_bespoke_solver_takes_the_ends_of_its_span_as_half_precision_rounds_them(
    t_dtype: torch.dtype,
) -> None:
    solver = tdh.BespokeSolver.classical("rk4", 8)
    solver.domain = tdh.FitDomain((0.1, 0.7), 0.6, 0.6, (1,), ((2,),), False, "float32")
    exact = torch.tensor([0.1, 0.7])
    got = solver.solve(damped_wave, torch.ones(3, 2), exact.to(t_dtype))
    torch.testing.assert_close(
        got, solver.solve(damped_wave, torch.ones(3, 2), exact), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("method", LEARNED)
def test_a_scalar_state_takes_corrections_in_the_times_wider_dtype(
    method: str, dtype: torch.dtype
) -> None:
    numerics = pytest.importorskip("torchdyn.numerics")
    solver = tdh.HyperSolver(_tableau(method).name, _mixing, steps=3)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y0 = torch.tensor(0.8, dtype=dtype)
    wide = solver.solve(_wave, _wide(y0), t)
    got = solver.solve(_wave, y0, t)
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(wide.dtype), wide, rtol=1e-6, atol=1e-6)
    assert torch.equal(numerics.odeint(_wave, y0, t, solver)[1], got)


def test_a_correction_wider_than_state_and_time_is_refused() -> None:
    solver = tdh.HyperSolver("euler", lambda step: step.y.double(), steps=2)  # type: ignore[union-attr]
    for y0 in (torch.tensor(1.0), torch.ones(2)):
        with pytest.raises(StateTypeError, match=r"torch\.float64"):
            solver.solve(damped_wave, y0, torch.tensor([0.0, 1.0]))
    with pytest.raises(StateTypeError, match=r"torch\.float64"):
        solver.solve(damped_wave, torch.ones(2), torch.tensor([0.0, 1.0], dtype=torch.float64))


def _grow(t: Tensor, y: Any) -> Any:
    return _like(y, lambda part: torch.full_like(part, 30000.0))


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("method", [*LEARNED, "bns", "dopri5_per_sample", "dise"])
def test_a_result_that_overflows_half_precision_is_refused(method: str, kind: str) -> None:
    y0: Any = torch.ones(2, 1, dtype=torch.float16)
    y0 = (y0, y0.clone()) if kind == "tuple" else y0
    if method == "bns":
        options: dict[str, Any] = {"solver": tdh.BespokeSolver.classical("rk4", 4)}
    elif method == "dopri5_per_sample":
        options = {}
    elif method == "dise":
        candidates = [tdh.Candidate("rk4", steps=2), tdh.Candidate("euler", steps=2)]
        dise = tdh.Dise(candidates, selector=lambda y: torch.zeros(2, 2))  # type: ignore[arg-type]
        options = {"dise": dise}
    else:
        options = {"solver": tdh.HyperSolver(_tableau(method).name, zero, steps=2)}
    for times in ([0.0, 3.0], [0.0, -3.0]):
        with pytest.raises(NonFiniteError, match=r"overflows the state's dtype, torch\.float16"):
            odeint(
                _grow, y0, torch.tensor(times), method=method, options=options, rtol=1e-3, atol=1e-3
            )
        solver = options.get("solver")
        if solver is not None:
            with pytest.raises(NonFiniteError, match=r"y0\.float\(\)"):
                solver.solve(_grow, y0, torch.tensor(times))


def test_a_point_between_that_overflows_half_precision_is_refused() -> None:
    def hill(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 2.9, 30000.0, -30000.0) * torch.ones_like(y)

    solver = tdh.HyperSolver("euler", zero)
    y0, t = torch.ones(2, dtype=torch.float16), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    for solve in (
        lambda: solver.solve(hill, y0, t),
        lambda: odeint(hill, y0, t, method="hypereuler", options={"solver": solver}),
    ):
        with pytest.raises(NonFiniteError, match="90001 and overflows"):
            solve()


def test_an_event_state_that_overflows_half_precision_is_refused() -> None:
    def late(t: Tensor, y: Tensor) -> Tensor:
        return t - 2.95

    options = {"hypernet": zero, "step_size": 0.5}
    with pytest.raises(NonFiniteError, match="overflows"):
        odeint_event(
            _grow,
            torch.ones(2, dtype=torch.float16),
            torch.tensor(0.0),
            event_fn=late,
            method="hypereuler",
            options=options,
        )


def test_a_scalar_state_that_overflows_its_own_dtype_is_refused() -> None:
    solver = tdh.HyperSolver("euler", zero, steps=2)
    y0, t = torch.tensor(1e38), torch.tensor([0.0, 4.0], dtype=torch.float64)
    for solve in (
        lambda: solver.solve(lambda t, y: y, y0, t),
        lambda: odeint(lambda t, y: y, y0, t, method="hypereuler", options={"solver": solver}),
    ):
        with pytest.raises(NonFiniteError, match=r"overflows the state's dtype, torch\.float32"):
            solve()


@pytest.mark.parametrize("name", ["rk4", "bns"])
def test_func_that_overflows_in_half_precision_is_told_of_float32(name: str) -> None:
    solver: tdh.HyperSolver = (
        tdh.BespokeSolver.classical("rk4", 4)
        if name == "bns"
        else tdh.HyperSolver(name, zero, steps=2)
    )
    y0 = torch.full((2,), 200.0, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"func is called in torch\.float16"):
        solver.solve(lambda t, y: y * y * y, y0, torch.tensor([0.0, 1.0]))


def _far(method: str, exponent: int) -> tuple[float, float, Any, Any]:
    """Return dt with dt^(p+1) = 10^exponent, y0, func = -y / dt, and g that adds y / 4."""
    power = _tableau(method).order + 1
    dt, half = 10.0 ** (exponent / power), 10.0 ** (-exponent / 2)
    scale = 10.0 ** (exponent * 0.15)

    def correct(step: tdh.StepInput) -> Any:
        return _like(step.y, lambda y: y * half * (half / 4))

    return dt, scale, lambda t, y: _like(y, lambda part: -part / dt), correct


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("exponent", [40, -42, 5])
@pytest.mark.parametrize("method", LEARNED)
def test_steps_whose_power_leaves_the_range_are_corrected(
    method: str, exponent: int, kind: str
) -> None:
    numerics = pytest.importorskip("torchdyn.numerics")
    tableau = _tableau(method)
    dt, scale, func, correct = _far(method, exponent)
    y0: Any = torch.tensor([1.0, -2.0]) * scale
    y0 = (y0, y0[:1]) if kind == "tuple" else y0
    for sign in (1, -1):
        t = torch.tensor([0.0, dt] if sign > 0 else [dt, 0.0])
        base = sum((-sign) ** k / math.factorial(k) for k in range(tableau.order + 1))
        for net, added in ((zero, 0.0), (correct, sign ** (tableau.order + 1) / 4)):
            solver = tdh.HyperSolver(tableau.name, net, steps=1)
            solutions = [
                solver.solve(func, y0, t),
                odeint(func, y0, t, method=method, options={"solver": solver}),
            ]
            if kind == "tensor" and sign > 0:
                solutions.append(numerics.odeint(func, y0, t, solver)[1])
            for solution in solutions:
                for part, start in zip(_parts(solution), _parts(y0), strict=True):
                    ratio = part[-1] / start
                    expected = torch.full_like(ratio, base + added)
                    torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [40, -40, 5])
@pytest.mark.parametrize("method", LEARNED)
def test_a_compiled_solve_corrects_steps_whose_power_leaves_the_range(
    method: str, exponent: int
) -> None:
    torch.compiler.reset()
    dt, scale, func, correct = _far(method, exponent)
    solver = tdh.HyperSolver(_tableau(method).name, correct, steps=1)
    compiled = torch.compile(solver.solve, backend="eager", fullgraph=True)
    y0, t = torch.tensor([1.0, -2.0]) * scale, torch.tensor([0.0, dt])
    torch.testing.assert_close(compiled(func, y0, t), solver.solve(func, y0, t))


def test_a_bespoke_solver_of_a_huge_span_takes_a_zero_correction() -> None:
    weights = tdh.BespokeSolver.classical("rk4", 4).weights
    solver = tdh.BespokeSolver(weights, hypernet=zero)
    y = solver.solve(lambda t, y: -y * 1e-20, torch.ones(2), torch.tensor([0.0, 1e20]))[-1]
    torch.testing.assert_close(y, torch.full((2,), 0.375))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_power_in_range_is_one_factor_with_the_same_bits(dtype: torch.dtype) -> None:
    dt = torch.tensor([0.1, -0.3, 7.0, 1e-5])
    power = dt * dt * dt
    assert is_power_in_range(dt, 3, dtype)
    (factor,) = power_factors(dt, 3, dtype, is_in_range=True)
    assert torch.equal(factor, power.to(dtype))
    # Unless that is known, there are factors of one.
    first, *others = power_factors(dt, 3, dtype, is_in_range=False)
    assert torch.equal(first, power.to(dtype))
    assert all(torch.equal(other, torch.ones_like(other)) for other in others)


def test_a_power_out_of_range_is_as_many_factors_dt() -> None:
    dt = torch.tensor([1e20, -1e-20, 0.0, 0.5], dtype=torch.float64)
    assert not is_power_in_range(dt, 2, torch.float32)
    assert not is_power_in_range(dt.float()[:1], 2, torch.float64)
    first, other = power_factors(dt, 2, torch.float32, is_in_range=False)
    assert torch.equal(first, torch.tensor([1e20, -1e-20, 0.0, 0.25]))
    assert torch.equal(other, torch.tensor([1e20, -1e-20, 0.0, 1.0]))


def test_gradients_to_time_are_finite_where_the_power_is_out_of_range() -> None:
    t = torch.tensor([0.0, 2.5e9], requires_grad=True)
    solver = tdh.HyperSolver("rk4", zero, steps=1)
    solver.solve(lambda t, y: -y * 4e-10, torch.ones(2), t)[-1].sum().backward()
    assert t.grad is not None
    assert torch.isfinite(t.grad).all()
    assert bool(t.grad.abs().gt(0).all())
