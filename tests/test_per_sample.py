"""dopri5_per_sample: every sample steps as it would alone, in any mode of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event

import torchdiffeq_hyper as tdh
from stubs import MLPField, damped_wave, spiral
from torchdiffeq_hyper._fields._independence import is_probing
from torchdiffeq_hyper.errors import (
    HyperError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    UnfinishedSolveError,
)
from torchdiffeq_hyper.solvers._per_sample import PerSampleDopri5

METHOD = "dopri5_per_sample"
FORWARD = torch.tensor([0.0, 0.3, 0.31, 2.0, 5.0], dtype=torch.float64)
BACKWARD = torch.tensor([2.0, 0.3, -1.0], dtype=torch.float64)


def _starts(*shape: int) -> Tensor:
    return torch.linspace(-2.0, 2.0, int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(
        shape
    )


class _Counted(nn.Module):
    def __init__(self, func: Any) -> None:
        super().__init__()
        self.func = func
        self.calls = 0

    def forward(self, t: Tensor, y: Any) -> Any:
        self.calls += not is_probing()
        return self.func(t, y)


class _First(nn.Module):
    """A selector that predicts the lowest cost for the first of two candidates."""

    def forward(self, y0: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0]).expand(len(y0), 2)


def _alone(func: Any, y0: Any, t: Tensor, **more: Any) -> tuple[Any, list[int]]:
    """Solve each sample alone by torchdiffeq's dopri5; return solutions and calls."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    solutions, calls = [], []
    for i in range(len(parts[0])):
        counted = _Counted(func)
        start = tuple(part[i : i + 1] for part in parts)
        y = odeint(counted, start if isinstance(y0, tuple) else start[0], t, **more)
        solutions.append(y if isinstance(y, tuple) else (y,))
        calls.append(counted.calls)
    joined = tuple(torch.cat(column, dim=1) for column in zip(*solutions, strict=True))
    return (joined if isinstance(y0, tuple) else joined[0]), calls


def _pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tuple of (batch, 3) and (batch,); the samples are independent."""
    x, z = state
    return -x + torch.sin(t) * torch.cos(x) * z.unsqueeze(-1), torch.cos(t) * x.mean(-1) - 0.5 * z


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """State (position, velocity, mu); the larger mu, the stiffer."""
    x, v, mu = y.unbind(-1)
    return torch.stack([v, mu * (1 - x**2) * v - x, torch.zeros_like(mu)], dim=-1)


@pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("func", "y0"),
    [(spiral, _starts(5, 2)), (damped_wave, _starts(4, 2, 3) / 4), (MLPField(), _starts(5, 2))],
    ids=["spiral", "damped wave", "net"],
)
def test_every_sample_takes_the_steps_it_takes_alone(func: Any, y0: Tensor, t: Tensor) -> None:
    tolerances = {"rtol": 1e-6, "atol": 1e-7}
    expected, calls = _alone(func, y0, t, **tolerances)
    assert len(set(calls)) > 1, "samples that all take the same steps prove nothing"
    y, nfe = PerSampleDopri5().run(func, y0, t, **tolerances)
    assert nfe.tolist() == calls
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    assert torch.equal(odeint(func, y0, t, method=METHOD, **tolerances), y)


@pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["forward", "reverse"])
@pytest.mark.parametrize("atol", [1e-7, (1e-7, 1e-4)], ids=["one", "per part"])
def test_tuple_states_step_as_alone(t: Tensor, atol: Any) -> None:
    y0 = (_starts(4, 3) / 4, _starts(4))
    expected, calls = _alone(_pair, y0, t, rtol=1e-6, atol=atol)
    counted = _Counted(_pair)
    y = odeint(counted, y0, t, method=METHOD, rtol=1e-6, atol=atol, options={"time": "loop"})
    assert counted.calls == sum(calls)
    for part, alone in zip(y, expected, strict=True):
        torch.testing.assert_close(part, alone, rtol=1e-12, atol=1e-12)


def test_tolerances_may_differ_from_sample_to_sample() -> None:
    y0 = _starts(3, 2)
    atol = torch.tensor([[1e-3], [1e-6], [1e-9]], dtype=torch.float64)
    y = odeint(spiral, y0, FORWARD, method=METHOD, rtol=1e-9, atol=atol)
    for i in range(3):
        alone = odeint(spiral, y0[i : i + 1], FORWARD, rtol=1e-9, atol=float(atol[i]))
        torch.testing.assert_close(y[:, i : i + 1], alone, rtol=1e-11, atol=1e-11)


def test_one_stiff_sample_does_not_make_the_others_pay() -> None:
    mu = torch.cat([torch.linspace(0.1, 1.0, 15), torch.tensor([50.0])]).double()
    y0 = torch.stack([torch.full_like(mu, 2.0), torch.zeros_like(mu), mu], dim=1)
    t = torch.tensor([0.0, 10.0], dtype=torch.float64)
    together, alone = _Counted(van_der_pol), 0
    odeint(together, y0, t, rtol=1e-6, atol=1e-6)
    expected, calls = _alone(van_der_pol, y0, t, rtol=1e-6, atol=1e-6)
    alone = sum(calls)
    y, nfe = PerSampleDopri5().run(van_der_pol, y0, t, rtol=1e-6, atol=1e-6)
    assert int(nfe.sum()) <= 1.1 * alone < 0.25 * 16 * together.calls
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_finished_samples_are_not_evaluated_any_more() -> None:
    sizes: list[int] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        sizes.extend([] if is_probing() else [len(y)])
        return -y * y.abs() * torch.sin(t).unsqueeze(-1) ** 2

    y0 = torch.tensor([[0.1], [1.0], [30.0]], dtype=torch.float64)
    solver = PerSampleDopri5(time="vector")
    _, nfe = solver.run(func, y0, torch.tensor([0.0, 9.0]), rtol=1e-8, atol=1e-8)
    # The check that func takes times of shape (batch,) evaluates a sample four times.
    assert sum(sizes) == int(nfe.sum()) + 4
    assert set(sizes[3:]) == {1, 2, 3}


def test_the_modes_of_time_agree() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(3 * t).reshape(-1, 1) * torch.cos(y) - y

    y0 = _starts(4, 3)
    for t in (FORWARD, BACKWARD / 4):
        solutions = [
            odeint(func, y0, t, method=METHOD, rtol=1e-8, options={"time": mode})
            for mode in ("vmap", "vector", "loop")
        ]
        for y in solutions[1:]:
            torch.testing.assert_close(y, solutions[0], rtol=1e-12, atol=1e-12)


class _ImageField(nn.Module):
    """Normalises, convolves and concatenates: needs a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.conv = nn.Conv2d(5, 4, 3, padding=1)
        self.double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        assert y.dim() == 4
        assert t.dim() == 0
        clock = t * torch.ones_like(y[:, :1])
        return torch.tanh(self.conv(torch.cat([self.norm(y), clock], dim=1)))


def test_vmap_keeps_a_batch_of_one_for_nets_that_need_it() -> None:
    func, y0 = _ImageField(), _starts(3, 4, 5, 5)
    expected, _ = _alone(func, y0, FORWARD[:3], rtol=1e-6, atol=1e-6)
    y = odeint(func, y0, FORWARD[:3], method=METHOD, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


NOISE = _starts(4, 2) ** 2


def _noisy(t: Tensor, y: Tensor) -> Tensor:
    return -y + t * NOISE


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_stored_noise_is_refused_with_the_remedy(mode: str) -> None:
    with pytest.raises(StateShapeError, match=r"shape \(4, 2\)(?s:.*)tdh.Conditioned"):
        odeint(_noisy, _starts(4, 2), FORWARD, method=METHOD, options={"time": mode})


@pytest.mark.parametrize("mode", ["vmap", "vector", "loop"])
def test_conditioned_fields_give_every_sample_its_own_inputs(mode: str) -> None:
    def func(t: Tensor, y: Tensor, rate: Tensor, target: Tensor) -> Tensor:
        return rate.unsqueeze(-1) * (target - y) * (2 + torch.cos(t)).reshape(-1, 1)

    rate = torch.tensor([0.1, 5.0, 30.0], dtype=torch.float64)
    target, y0 = _starts(3, 2), _starts(3, 2).flip(0)
    field = tdh.Conditioned(func, rate, target)
    y = odeint(field, y0, FORWARD, method=METHOD, rtol=1e-8, options={"time": mode})
    for i in range(3):
        one = torch.tensor([i])
        alone = odeint(field.restrict(one), y0[one], FORWARD, rtol=1e-8)
        torch.testing.assert_close(y[:, i : i + 1], alone, rtol=1e-11, atol=1e-11)


def test_a_func_that_vmap_cannot_take_is_told_of_the_other_modes() -> None:
    def branching(t: Tensor, y: Tensor) -> Tensor:
        return -y if t > 1 else y

    with pytest.raises(OptionError, match=r'"vmap"(?s:.*)"vector"(?s:.*)"loop"'):
        odeint(branching, _starts(2, 2), FORWARD, method=METHOD)
    y = odeint(branching, _starts(2, 2), FORWARD[:3], method=METHOD, options={"time": "loop"})
    torch.testing.assert_close(y[-1], _starts(2, 2) * torch.exp(FORWARD[2]))


def test_dropout_under_vmap_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double().train()
    with pytest.raises(OptionError, match="vmap"):
        odeint(lambda t, y: net(y) * t, _starts(2, 2), FORWARD, method=METHOD)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2), (3, 3)])
def test_a_wrong_broadcast_of_vector_times_is_never_silent(shape: tuple[int, int]) -> None:
    # With as many channels as samples, t of shape (batch,) goes along the wrong axis.
    with pytest.raises(HyperError, match='"vector"'):
        odeint(
            lambda t, y: t * y,
            _starts(*shape),
            FORWARD,
            method=METHOD,
            options={"time": "vector"},
        )


@pytest.mark.parametrize("mode", ["vmap", "vector", "loop"])
def test_gradcheck_through_state_times_and_parameters(mode: str) -> None:
    weight = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    y0 = _starts(2, 2).requires_grad_()
    t = torch.tensor([0.0, 0.25, 0.7], dtype=torch.float64, requires_grad=True)
    frozen = {"first_step": 0.2, "min_step": 0.2, "max_step": 0.2, "time": mode}

    def solve(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ weight) * torch.cos(t).reshape(-1, 1)

        return odeint(func, y0, t, method=METHOD, options=frozen)

    assert torch.autograd.gradcheck(solve, (y0, t, weight))


def test_gradients_are_those_of_solves_alone() -> None:
    func, y0 = MLPField(), _starts(4, 2).requires_grad_()
    inputs = (y0, *func.parameters())
    y = odeint(func, y0, FORWARD, method=METHOD, rtol=1e-10, atol=1e-10)
    expected, _ = _alone(func, y0, FORWARD, rtol=1e-10, atol=1e-10)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    got, wanted = (torch.autograd.grad((s * weights).sum(), inputs) for s in (y, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_adjoint_backward_is_the_hosts_dopri5_at_the_adjoint_tolerances() -> None:
    y0 = _starts(3, 2)

    def gradients(method: str, options: Any) -> tuple[list[Tensor], int]:
        func = MLPField()
        counted = _Counted(func)
        y = odeint_adjoint(
            counted, y0, FORWARD, method=method, rtol=1e-9, atol=1e-9, options=options,
            adjoint_rtol=1e-4, adjoint_atol=1e-4,
        )  # fmt: skip
        before = counted.calls
        y[-1].sum().backward()
        return [p.grad for p in func.parameters() if p.grad is not None], counted.calls - before

    got, calls = gradients(METHOD, {"time": "vmap", "max_num_steps": 1000})
    wanted, host_calls = gradients("dopri5", None)
    assert calls == host_calls
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_to_its_own_digits(dtype: torch.dtype) -> None:
    y0 = torch.ones(3, 1, dtype=dtype)
    t = torch.tensor([0.0, 1.0])
    seen: set[torch.dtype] = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.update({t.dtype, y.dtype})
        return -y

    y = odeint(func, y0, t.to(dtype), method=METHOD)
    assert y.dtype == dtype
    assert seen == {dtype}
    exact = torch.exp(torch.tensor(-1.0))
    assert float((y[-1].float() - exact).abs().max()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    y0 = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(3, 2).to(dtype)
    rate = torch.tensor(1j if dtype.is_complex else 1.0, dtype=dtype)
    y = odeint(lambda t, y: rate * y, y0, FORWARD.float()[:4], method=METHOD, rtol=1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y[-1], y0 * torch.exp(2 * rate), rtol=2e-5, atol=2e-5)


def test_step_controls_are_the_hosts() -> None:
    y0 = _starts(3, 2)
    controls = {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.4, "first_step": 0.05}
    limits = {"max_step": 0.2, "min_step": 1e-6}
    for options in (controls, limits):
        expected, calls = _alone(spiral, y0, FORWARD, rtol=1e-6, atol=1e-6, options=options)
        y, nfe = PerSampleDopri5(**options).run(spiral, y0, FORWARD, rtol=1e-6, atol=1e-6)
        assert nfe.tolist() == calls
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_max_num_steps_hands_out_the_partial_solution() -> None:
    y0 = torch.tensor([[2.0, 0.0, 0.5], [2.0, 0.0, 80.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 6.0], dtype=torch.float64)
    with pytest.raises(UnfinishedSolveError, match=r"sample 1 .*max_num_steps = 100") as caught:
        odeint(
            van_der_pol, y0, t, method=METHOD, rtol=1e-7, atol=1e-7,
            options={"max_num_steps": 100},
        )  # fmt: skip
    solution = caught.value.solution
    assert torch.equal(solution[0], y0)
    assert torch.isfinite(solution[1]).all()
    assert torch.isfinite(solution[2, 0]).all()
    assert torch.isnan(solution[2, 1]).all()
    assert isinstance(caught.value, AssertionError), "as the host raises"


def test_a_solution_that_blows_up_names_sample_and_time() -> None:
    y0 = torch.tensor([[0.1], [1.0]], dtype=torch.float64)
    with pytest.raises(HyperError, match=r"sample 1 at t = 1\b|sample 1 at t = 0\.99"):
        odeint(lambda t, y: y**2, y0, torch.tensor([0.0, 2.0]).double(), method=METHOD)


def test_a_func_that_returns_nan_is_named() -> None:
    y0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="inf or nan for sample 1"):
        odeint(lambda t, y: torch.sqrt(y), y0, FORWARD, method=METHOD)


def test_samples_that_overflow_in_a_trial_step_recover() -> None:
    y0 = torch.tensor([[1.0]], dtype=torch.float64)
    y = odeint(
        lambda t, y: -torch.exp(y), y0, torch.tensor([0.0, 1.0]).double(), method=METHOD,
        options={"first_step": 500.0}, rtol=1e-9,
    )  # fmt: skip
    exact = -torch.log(torch.exp(-y0) + 1)
    torch.testing.assert_close(y[-1], exact, rtol=1e-7, atol=1e-7)


def _square(t: Tensor, y: Any) -> Any:
    """Blows up at t = 1 / y0, on either side of t = 0."""
    return tuple(part**2 for part in y) if isinstance(y, tuple) else y**2


_LIMITS: dict[str, dict[str, Any]] = {
    "none": {},
    "min_step": {"min_step": 0.01},
    "small min_step": {"min_step": 1e-4},
    "min_step and max_step": {"min_step": 0.003, "max_step": 0.003},
    "first_step": {"first_step": 0.1, "min_step": 0.1},
    "max_num_steps": {"max_num_steps": 3, "min_step": 1e-3},
}


@pytest.mark.parametrize("limits", _LIMITS.values(), ids=_LIMITS.keys())
@pytest.mark.parametrize("mode", ["vmap", "vector"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "complex"])
def test_a_blow_up_is_an_error_whatever_the_limits_of_steps(
    limits: dict[str, Any], mode: str, sign: int, kind: str
) -> None:
    y0: Any = sign * torch.tensor([[0.1], [2.0], [3.0]], dtype=torch.float64)
    if kind == "tuple":
        y0 = (y0, y0.squeeze(1) / 2)
    elif kind == "complex":
        y0 = y0.to(torch.complex64)
    t = sign * torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    with pytest.raises((NonFiniteError, UnfinishedSolveError), match=r"sample [012] at t = -?[01]"):
        odeint(_square, y0, t, method=METHOD, rtol=1e-4, options={"time": mode, **limits})


def test_a_smallest_step_that_leaves_the_finite_range_names_itself_and_hands_out_the_rest() -> None:
    y0 = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    with pytest.raises(UnfinishedSolveError, match=r"sample 1 .*min_step = 0\.01") as caught:
        odeint(_square, y0, t, method=METHOD, options={"min_step": 0.01})
    solution = caught.value.solution
    torch.testing.assert_close(solution[1], 1 / (1 / y0 - 0.25), rtol=1e-4, atol=1e-6)
    assert torch.isnan(solution[2, 1]).all()


def test_a_smallest_step_is_still_accepted_whatever_its_error() -> None:
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"min_step": 0.1, "first_step": 0.1}
    stiff = 30.0
    y = odeint(lambda t, y: -stiff * y, y0, t, method=METHOD, options=options)
    for i in range(2):
        alone = odeint(lambda t, y: -stiff * y, y0[i : i + 1], t, options=options)
        torch.testing.assert_close(y[:, i : i + 1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1], ids=["forward", "reverse"])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_a_state_that_overflows_its_dtype_is_an_error(sign: int, is_tuple: bool) -> None:
    def grow(t: Tensor, y: Any) -> Any:
        k = torch.full_like(y[0] if is_tuple else y, sign * 3e38)
        return (k, torch.zeros_like(y[1])) if is_tuple else k

    y0 = torch.ones(2, 1)
    t = torch.tensor([0.0, 0.5, 5.0]) * sign
    options = {"first_step": 5.0}
    with pytest.raises(NonFiniteError, match=r"sample 0 at t = -?0.5 left the finite range"):
        odeint(grow, (y0, y0) if is_tuple else y0, t, method=METHOD, options=options)


def test_a_float16_solution_that_overflows_on_the_cast_back_is_an_error() -> None:
    y0, t = torch.ones(2, 1, dtype=torch.float16), torch.tensor([0.0, 3.0])
    with pytest.raises(NonFiniteError, match=r"state's dtype, torch\.float16(?s:.*)y0\.float\(\)"):
        odeint(lambda t, y: 30000 * torch.ones_like(y), y0, t, method=METHOD)


@pytest.mark.parametrize("sign", [1, -1], ids=["forward", "reverse"])
@pytest.mark.parametrize("method", [METHOD, "dise"])
@pytest.mark.parametrize(
    ("func", "reached"),
    [
        (lambda t, y: 4e4 + 0 * y, r"6\.5\de\+04|6[45]\d\d\d"),  # the largest float16 is 65504
        (lambda t, y: y * y, r"25\d\.\d"),
        (lambda t, y: torch.where(y < 2, 1.0, torch.nan), r"1\.99\d|2"),
    ],
    ids=["state ends", "func overflows", "func has a domain"],
)
def test_a_solution_that_reaches_the_end_of_what_func_takes_is_an_error_and_no_endless_solve(
    func: Any, reached: str, method: str, sign: int
) -> None:
    def signed(t: Tensor, y: Tensor) -> Tensor:
        return sign * func(t, y)

    y0, t = torch.ones(2, 1, dtype=torch.float16), torch.tensor([0.0, 4.0]) * sign
    options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    if method == "dise":
        one = tdh.Candidate(METHOD, **options)
        dise = tdh.Dise([one, tdh.Candidate("euler", steps=1)], selector=_First())
        options = {"options": {"dise": dise}}
    text = rf"reached ({reached})(?s:.*)dtype ends(?s:.*)y0\.double\(\)"
    with pytest.raises(NonFiniteError, match=text):
        odeint(signed, y0, t, method=method, **options)


def test_a_slow_state_may_end_where_func_does_in_time() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return 1e-9 * torch.sqrt(1 - t) + 0 * y

    y0, t = torch.full((2, 1), 100.0), torch.tensor([0.0, 1.0])
    y = odeint(func, y0, t, method=METHOD, options={"first_step": 1.5})
    assert torch.equal(y[-1], y0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_times_that_are_not_finite_are_refused(bad: float) -> None:
    for t in ([0.0, bad], [bad, 0.0], [0.0, 1.0, bad]):
        with pytest.raises(OptionError, match="inf or nan"):
            PerSampleDopri5().solve(damped_wave, torch.ones(2, 2), torch.tensor(t))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"step_t": torch.ones(1)}, 'no option "step_t"'),
        ({"saftey": 0.9}, '"safety"'),
        ({"time": "vamp"}, '"vmap"'),
        ({"safety": 0.0}, "safety is 0.0"),
        ({"ifactor": 0.5}, "ifactor is 0.5"),
        ({"dfactor": 1.5}, "dfactor is 1.5"),
        ({"first_step": -0.1}, "first_step is -0.1"),
        ({"min_step": -1.0}, "min_step is -1.0"),
        ({"first_step": math.inf}, "first_step is inf"),
        ({"first_step": math.nan}, "first_step is nan"),
        ({"ifactor": math.inf}, "ifactor is inf"),
        ({"min_step": math.inf}, "min_step is inf"),
        ({"min_step": math.nan}, "min_step is nan"),
        ({"max_step": math.nan}, "max_step is nan"),
        ({"max_step": 0.0}, "max_step is 0.0"),
        ({"max_num_steps": math.nan}, "max_num_steps is nan"),
        ({"min_step": "0.1"}, "min_step is '0.1'"),
        ({"first_step": torch.ones(2)}, "first_step is tensor"),
        ({"safety": None}, "safety is None"),
        ({"max_step": 0.1, "min_step": 0.2}, "max_step is 0.1"),
        ({"max_num_steps": 0}, "max_num_steps is 0"),
        ({"norm": lambda y: y.abs().max()}, 'no option "norm"'),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        odeint(damped_wave, _starts(2, 2), FORWARD, method=METHOD, options=options)


def test_events_are_refused() -> None:
    with pytest.raises(OptionError, match="events"):
        odeint_event(
            damped_wave, _starts(2, 2), torch.tensor(0.0).double(),
            event_fn=lambda t, y: y.sum(), method=METHOD,
        )  # fmt: skip


def test_a_state_without_samples_is_refused() -> None:
    with pytest.raises(StateShapeError, match="dim 0"):
        odeint(lambda t, y: -y, torch.tensor(1.0), FORWARD.float(), method=METHOD)
    with pytest.raises(StateShapeError, match="as many in every part"):
        odeint(_pair, (_starts(3, 3), _starts(2)), FORWARD, method=METHOD)


def test_empty_batches_and_single_times_give_the_trivial_solution() -> None:
    assert odeint(damped_wave, torch.ones(0, 2), FORWARD, method=METHOD).shape == (5, 0, 2)
    assert torch.equal(
        odeint(damped_wave, torch.ones(3, 2), FORWARD[:1], method=METHOD), torch.ones(1, 3, 2)
    )


def test_times_that_go_back_and_forth_are_refused() -> None:
    t = torch.tensor([0.0, 1.0, 0.5])
    with pytest.raises(OptionError, match="back and forth"):
        PerSampleDopri5().solve(damped_wave, torch.ones(2, 2), t)


@pytest.mark.parametrize(
    ("name", "value"), [("rtol", (1e-3, 1e-3)), ("atol", torch.ones(5, dtype=torch.float64))]
)
def test_tolerances_of_another_shape_are_refused(name: str, value: Any) -> None:
    solve: Callable[..., Any] = PerSampleDopri5().solve
    with pytest.raises(HyperError, match=name):
        solve(damped_wave, torch.ones(2, 2), FORWARD.float(), **{name: value})


def test_a_wrong_broadcast_that_vanishes_at_both_ends_is_refused() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(2 * torch.pi * t) * y  # t (2,) meets the last dimension of y (2, 2)

    solver = PerSampleDopri5(time="vector")
    y0 = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    with pytest.raises(OptionError, match='"vector"'):
        solver.solve(func, y0, torch.tensor([0.0, 1.0]))
