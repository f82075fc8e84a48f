"""Recording torchdiffeq's solves: same numbers, same calls, and the steps' own errors."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchdiffeq._impl.rk_common as host_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

import torchdiffeq_hyper as tdh
from stubs import Counted, MLPField, coupled, coupled_start, damped_wave, spiral
from torchdiffeq_hyper import recording
from torchdiffeq_hyper.errors import HyperError, StateTypeError
from torchdiffeq_hyper.hosts.torchdiffeq._recording import odeint_with_errors, record

ADAPTIVE = [
    name
    for name, solver in SOLVERS.items()
    if isinstance(solver, type) and issubclass(solver, RKAdaptiveStepsizeODESolver)
]
FIXED = ["euler", "midpoint", "heun2", "rk4", "explicit_adams", "implicit_adams"]


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """Stiff enough that steps are rejected."""
    x, v = y[..., 0], y[..., 1]
    return torch.stack([v, 8 * (1 - x**2) * v - x + torch.sin(3 * t)], dim=-1)


def switching(t: Tensor, y: Tensor) -> Tensor:
    return -y + (2.0 if t > 0.4 else -1.0)


class Problem(NamedTuple):
    func: Callable[..., Any]
    y0: Any
    t: list[float]
    call: dict[str, Any] = {}  # noqa: RUF012 - never changed
    event: Callable[..., Any] | None = None


def _start(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    n = max(1, torch.Size(shape).numel())
    return torch.linspace(-1.0, 1.5, n, dtype=dtype).reshape(shape)


PROBLEMS = {
    "one tensor": Problem(damped_wave, _start(4, 3), [0.0, 0.7, 2.0]),
    "float32": Problem(spiral, _start(5, 2, dtype=torch.float32), [0.1, 1.0, 3.0]),
    "reverse": Problem(spiral, _start(5, 2), [3.0, 1.0, -0.5]),
    "many times, rejections": Problem(
        van_der_pol, _start(3, 2), [0.2 * i for i in range(40)], {"rtol": 1e-4, "atol": 1e-5}
    ),
    "tuple": Problem(coupled, coupled_start(), [0.0, 0.5, 2.0]),
    "reverse tuple, tolerances by part": Problem(
        coupled, coupled_start(), [2.0, 1.0, 0.0], {"rtol": (1e-4, 1e-5, 1e-6), "atol": 1e-6}
    ),
    "event": Problem(spiral, _start(1, 2), [0.0, 1.0], {}, lambda t, y: y[0, 0] + 0.5),
    "reverse event": Problem(spiral, _start(1, 2), [2.0, 1.0], {}, lambda t, y: y[0, 0] + 0.7),
    "tuple event": Problem(coupled, coupled_start(), [0.0, 1.0], {}, lambda t, y: y[1].sum() - 3.0),
    "jump and step times": Problem(
        switching,
        _start(4, 3),
        [0.0, 0.7, 1.0],
        {"options": {"jump_t": torch.tensor([0.4]), "step_t": torch.tensor([0.2, 0.9])}},
    ),
    "reverse jump": Problem(
        switching, _start(4, 3), [1.0, 0.0], {"options": {"jump_t": torch.tensor([0.4])}}
    ),
    "frozen steps": Problem(
        damped_wave,
        _start(4, 3),
        [0.0, 1.0],
        {"options": {"first_step": 0.125, "min_step": 0.125, "max_step": 0.125}},
    ),
    "small steps": Problem(
        van_der_pol,
        _start(3, 2),
        [0.0, 2.0],
        {"rtol": 1e-3, "atol": 1e-3, "options": {"first_step": 1.0, "max_step": 0.5}},
    ),
    "own norm": Problem(
        spiral, _start(5, 2), [0.0, 1.0], {"options": {"norm": lambda y: y.abs().max()}}
    ),
    "time in float32": Problem(
        spiral,
        _start(5, 2, dtype=torch.float32),
        [0.0, 1.0],
        {"rtol": 1e-4, "atol": 1e-4, "options": {"dtype": torch.float32}},
    ),
    "no dimensions": Problem(damped_wave, torch.tensor(0.4), [0.0, 1.0]),
    "complex": Problem(
        lambda t, y: (-1 + 2j) * t * y, _start(4, 3).to(torch.complex128), [0.0, 1.0]
    ),
    "one time": Problem(damped_wave, _start(4, 3), [0.5]),
}


class WithCallbacks(nn.Module):
    """Counts func's calls and the host's callbacks; keeps what accept and reject are given."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.counted = Counted(func)
        self.steps = 0
        self.accepted: list[tuple[float, float]] = []
        self.rejected: list[tuple[float, float]] = []

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.counted(t, y)

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.steps += 1

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.accepted.append((float(t0), float(dt)))

    def callback_reject_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.rejected.append((float(t0), float(dt)))


def _solve(problem: Problem, func: Any, method: str) -> list[Tensor]:
    dtype = torch.float32 if problem.y0 is None else torch.float64
    t = torch.tensor(problem.t, dtype=dtype)
    call = {"rtol": 1e-5, "atol": 1e-6, **problem.call, "method": method}
    if problem.event is None:
        out = odeint(func, problem.y0, t, **call)
        return list(out) if isinstance(out, tuple) else [out]
    reverse = problem.t[0] > problem.t[1]
    event_fn = problem.event
    event_t, out = odeint_event(
        func, problem.y0, t[0], event_fn=event_fn, reverse_time=reverse, **call
    )
    return [event_t, *(out if isinstance(out, tuple) else [out])]


@pytest.mark.parametrize("name", PROBLEMS)
def test_recorded_dopri5_is_bitwise_plain_dopri5_with_the_same_calls(name: str) -> None:
    problem = PROBLEMS[name]
    plain, recorded = WithCallbacks(problem.func), WithCallbacks(problem.func)
    expected = _solve(problem, plain, "dopri5")
    with record() as rec:
        got = _solve(problem, recorded, "dopri5")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert recorded.counted.times == plain.counted.times
    assert (recorded.accepted, recorded.rejected) == (plain.accepted, plain.rejected)
    (solve,) = rec.solves
    assert solve.method == "dopri5"
    assert solve.nfe == plain.counted.calls
    assert (solve.n_accepted, solve.n_rejected) == (len(plain.accepted), len(plain.rejected))
    assert solve.n_accepted + solve.n_rejected == plain.steps


def test_the_problems_reject_steps_and_go_through_jumps() -> None:
    plain = WithCallbacks(van_der_pol)
    _solve(PROBLEMS["many times, rejections"], plain, "dopri5")
    assert len(plain.rejected) > 3


@pytest.mark.parametrize("name", ["reverse tuple, tolerances by part", "many times, rejections"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_adaptive_method_is_bitwise_the_hosts(method: str, name: str) -> None:
    problem = PROBLEMS[name]._replace(t=PROBLEMS[name].t[:4], call={"rtol": 1e-3, "atol": 1e-3})
    plain, recorded = WithCallbacks(problem.func), WithCallbacks(problem.func)
    expected = _solve(problem, plain, method)
    with record(stiffness=True) as rec:
        got = _solve(problem, recorded, method)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    solve = rec.solves[-1]
    assert solve.nfe == plain.counted.calls == recorded.counted.calls
    assert (solve.n_accepted, solve.n_rejected) == (len(plain.accepted), len(plain.rejected))


class HostErrors:
    """Listens to the host's own error estimates, ratios and fates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[Tensor] = []
        self.ratios: list[Tensor] = []
        step, ratio = host_steps._runge_kutta_step, host_steps._compute_error_ratio

        def listening_step(*args: Any, **kwargs: Any) -> Any:
            out = step(*args, **kwargs)
            self.errors.append(out[2])
            return out

        def listening_ratio(*args: Any, **kwargs: Any) -> Any:
            out = ratio(*args, **kwargs)
            self.ratios.append(out)
            return out

        monkeypatch.setattr(host_steps, "_runge_kutta_step", listening_step)
        monkeypatch.setattr(host_steps, "_compute_error_ratio", listening_ratio)


@pytest.mark.parametrize("name", ["many times, rejections", "float32", "reverse", "reverse jump"])
def test_errors_and_ratios_are_the_hosts_own_bitwise(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, host = PROBLEMS[name], HostErrors(monkeypatch)
    with record() as rec:
        _solve(problem, problem.func, "dopri5")
    steps = rec.solves[-1].steps
    norms = [torch.linalg.vector_norm(e.reshape(len(e), -1), dim=-1) for e in host.errors]
    assert torch.equal(steps.error, torch.stack(norms))
    assert torch.equal(steps.ratio, torch.stack(host.ratios))
    assert steps.error.shape == (len(host.errors), len(problem.y0))


@pytest.mark.parametrize("name", ["many times, rejections", "reverse", "reverse jump"])
def test_times_and_fates_are_those_of_the_callbacks_in_true_time(name: str) -> None:
    problem = PROBLEMS[name]
    func = WithCallbacks(problem.func)
    with record() as rec:
        _solve(problem, func, "dopri5")
    steps = rec.solves[-1].steps
    # The host's callbacks get true t0, but dt without its sign.
    sign = 1 if problem.t[-1] > problem.t[0] else -1
    places = [(t, sign * dt) for t, dt in zip(steps.t0.tolist(), steps.dt.tolist(), strict=True)]
    fates = steps.is_accepted.tolist()
    assert [p for p, fate in zip(places, fates, strict=True) if fate] == func.accepted
    assert [p for p, fate in zip(places, fates, strict=True) if not fate] == func.rejected
    assert float(steps.t0[0]) == problem.t[0]
    assert bool((steps.dt * sign > 0).all())
    ends = (steps.t0 + steps.dt)[steps.is_accepted]
    assert torch.allclose(ends[:-1], steps.t0[steps.is_accepted][1:], rtol=0, atol=1e-12)


def test_errors_of_a_tuple_are_kept_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, host = PROBLEMS["tuple"], HostErrors(monkeypatch)
    with record() as rec:
        _solve(problem, problem.func, "dopri5")
    steps = rec.solves[-1].steps
    flat = torch.stack(host.errors)
    x, z, w = flat[:, :12].reshape(-1, 4, 3), flat[:, 12:16], flat[:, 16:]
    close = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(steps.error_of(0), x.norm(dim=-1), **close)
    torch.testing.assert_close(steps.error_of(1), z.abs(), **close)
    torch.testing.assert_close(steps.error_of(2), w.abs(), **close)
    joint = torch.sqrt(x.square().sum(-1) + z.square())
    torch.testing.assert_close(steps.error, joint, **close)
    assert float(rec.error_penalty(part=1)) == pytest.approx(
        float(z.abs()[steps.is_accepted].sum()), rel=1e-12
    )


def _frozen(step: float) -> dict[str, float]:
    return {"first_step": step, "min_step": step, "max_step": step}


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.9, 0.4, -0.1]])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_penalty_passes_gradcheck_through_y0_and_func_with_frozen_steps(
    method: str, times: list[float]
) -> None:
    func = MLPField(dim=2, width=3)
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(times, dtype=torch.float64)

    def penalty(y0: Tensor, *_: Tensor) -> Tensor:
        with record() as rec:
            # Steps so large that the errors stand out from rounding.
            odeint(func, y0, t, method=method, options=_frozen(0.5))
        return rec.error_penalty() * 1e3

    assert torch.autograd.gradcheck(penalty, (y0, *func.parameters()))


def test_penalty_of_tuples_passes_gradcheck_by_part_and_jointly() -> None:
    start = tuple(part.requires_grad_() for part in coupled_start(batch=2))
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def penalties(*y0: Tensor) -> tuple[Tensor, Tensor]:
        with record() as rec:
            odeint(coupled, y0, t, options=_frozen(0.5))
        return rec.error_penalty() * 1e3, rec.error_penalty(part=2) * 1e3

    assert torch.autograd.gradcheck(penalties, start)


def test_penalty_has_the_gradient_of_the_hosts_own_error_estimates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = HostErrors(monkeypatch)
    func = MLPField(dim=2)
    with record() as rec:
        t = torch.tensor([0.0, 3.0], dtype=torch.float64)
        odeint(func, _start(5, 2), t, rtol=1e-6, atol=1e-6, options={"first_step": 2.0})
    accepted = rec.solves[0].steps.is_accepted.tolist()
    assert not all(accepted)
    own = sum(e.norm(dim=-1).sum() for e, fate in zip(host.errors, accepted, strict=True) if fate)
    parameters = list(func.parameters())
    expected = torch.autograd.grad(own, parameters, retain_graph=True)
    got = torch.autograd.grad(rec.error_penalty(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["one tensor", "tuple", "many times, rejections"])
def test_gradients_of_the_solution_are_those_of_the_plain_solve(name: str) -> None:
    problem = PROBLEMS[name]

    def gradients() -> list[Tensor]:
        leaves = problem.y0 if isinstance(problem.y0, tuple) else (problem.y0,)
        leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
        start = leaves if isinstance(problem.y0, tuple) else leaves[0]
        out = _solve(problem._replace(y0=start), problem.func, "dopri5")
        return list(torch.autograd.grad(sum(part[-1].sum() for part in out), leaves))

    expected = gradients()
    with record():
        got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_loss_and_penalty_go_backward_together() -> None:
    func = MLPField()
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    with record() as rec:
        y = odeint(func, y0, t, rtol=1e-3, atol=1e-3)
    penalty = rec.error_penalty()
    (y[-1].square().sum() + penalty).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in func.parameters())


def test_descending_the_penalty_lowers_the_number_of_calls() -> None:
    func = MLPField(dim=2, width=16, seed=3)
    with torch.no_grad():
        func.net[2].weight.mul_(20)
    y0, t = _start(6, 2), torch.tensor([0.0, 2.0])
    optimizer = torch.optim.Adam(func.parameters(), lr=0.02)
    calls = []
    for _ in range(25):
        with record() as rec:
            odeint(func, y0, t, rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        rec.error_penalty().backward()
        optimizer.step()
        calls.append(rec.solves[-1].nfe)
    assert calls[-1] < 0.8 * calls[0]


def test_adjoint_solves_give_the_value_and_refuse_its_gradient() -> None:
    func = MLPField()
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    with record() as plain:
        odeint(func, y0, t, rtol=1e-3, atol=1e-3)
    with record() as rec:
        y = odeint_adjoint(func, y0, t, rtol=1e-3, atol=1e-3)
        y[-1].sum().backward()
        # The backward solve is not in the record.
        assert len(rec.solves) == 1
    assert torch.equal(rec.error_penalty(), plain.error_penalty())
    assert rec.solves[0].nfe == plain.solves[0].nfe
    penalty = rec.error_penalty()
    with pytest.raises(recording.AdjointGradientError, match="# instead of"):
        (y.sum().detach() + 0.1 * penalty).backward()
    with pytest.raises(recording.AdjointGradientError, match="EnergyField"):
        rec.solves[0].steps.error.sum().backward()
    with torch.no_grad():
        assert not rec.error_penalty().requires_grad


def test_solves_inside_an_adjoint_solve_refuse_their_gradient_too() -> None:
    inner, inner_t = MLPField(), torch.tensor([0.0, 0.5], dtype=torch.float64)

    class Outer(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return odeint(inner, y, inner_t, rtol=1e-2, atol=1e-2)[-1] - y

    with record() as rec:
        t = torch.tensor([0.0, 1.0])
        odeint_adjoint(Outer(), _start(5, 2), t, rtol=1e-3, atol=1e-3, adjoint_params=())
    with pytest.raises(recording.AdjointGradientError):
        rec.solves[0].error_penalty().backward()


def test_adjoint_gradients_and_callbacks_are_those_outside_of_a_scope() -> None:
    class Field(MLPField):
        forward_steps = 0
        backward_steps = 0

        def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
            self.forward_steps += 1

        def callback_accept_step_adjoint(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
            self.backward_steps += 1

    def run(func: Field) -> Tensor:
        y = odeint_adjoint(func, _start(5, 2), torch.tensor([1.0, 0.0]), rtol=1e-3, atol=1e-3)
        y[-1].square().sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in func.parameters()])

    plain, recorded = Field(), Field()
    expected = run(plain)
    with record():
        got = run(recorded)
    assert torch.equal(got, expected)
    assert (recorded.forward_steps, recorded.backward_steps) == (
        plain.forward_steps,
        plain.backward_steps,
    )
    assert plain.backward_steps > 0


def test_reading_after_backward_has_freed_the_graph_says_so() -> None:
    func = MLPField()
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    with record() as rec:
        y = odeint(func, y0, t, rtol=1e-3, atol=1e-3)
    early = rec.error_penalty()
    y[-1].sum().backward()
    with pytest.raises(recording.FreedGraphError, match="retain_graph"):
        rec.error_penalty()
    with pytest.raises(HyperError, match="retain_graph"):
        early.backward()
    # The numbers stay readable.
    with torch.no_grad():
        assert rec.error_penalty().item() == early.item()
    assert bool((rec.solves[0].steps.error >= 0).all())


def test_a_kept_graph_can_be_read_again() -> None:
    func = MLPField()
    with record() as rec:
        y = odeint(func, _start(5, 2), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)
    y[-1].sum().backward(retain_graph=True)
    rec.error_penalty().backward()
    with pytest.raises(recording.FreedGraphError):
        rec.error_penalty()


@pytest.mark.parametrize("method", [*FIXED, "scipy_solver"])
def test_other_methods_are_counted_and_timed_and_have_no_steps(method: str) -> None:
    plain, recorded = Counted(spiral), Counted(spiral)
    y0, t = _start(5, 2), torch.linspace(0, 1, 9, dtype=torch.float64)
    call = {"method": method, "rtol": 1e-2, "atol": 1e-2}
    expected = odeint(plain, y0, t, **call)
    with record() as rec:
        got = odeint(recorded, y0, t, **call)
    (solve,) = rec.solves
    assert torch.equal(got, expected)
    assert solve.method == method
    assert solve.nfe == plain.calls == recorded.calls
    assert solve.sample_nfe.tolist() == [plain.calls] * 5
    assert solve.steps.error.shape == (0, 5)
    assert solve.wall_s > 0
    assert not solve.is_adaptive
    with pytest.raises(recording.NothingRecordedError, match=method):
        rec.error_penalty()


@pytest.mark.parametrize("adjoint", [False, True])
def test_hypersolvers_are_counted_and_published_names_opened_inside_too(adjoint: bool) -> None:
    solver = tdh.HyperSolver("heun", lambda step: step.y * step.t, steps=7)
    func, t = MLPField(), torch.tensor([1.0, 0.0])
    solve = odeint_adjoint if adjoint else odeint
    with record() as rec:
        tdh.register_method("decay-inside", solver)
        try:
            solve(func, _start(5, 2), t, method="decay-inside")
        finally:
            tdh.unregister_method("decay-inside")
        solve(func, _start(5, 2), t, method="hyperheun", options={"solver": solver})
    assert [(s.method, s.nfe) for s in rec.solves] == [("decay-inside", 14), ("hyperheun", 14)]
    assert "decay-inside" not in SOLVERS


def test_penalty_sums_all_adaptive_solves_of_the_scope() -> None:
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    alone = [
        odeint_with_errors(spiral, y0, t, rtol=1e-3, atol=1e-3, method=method)[1]
        for method in ("dopri5", "bosh3")
    ]
    with record() as rec:
        odeint(spiral, y0, t, rtol=1e-3, atol=1e-3)
        odeint(spiral, y0, t, method="euler")
        odeint(spiral, y0, t, rtol=1e-3, atol=1e-3, method="bosh3")
    assert len(rec.solves) == 3
    assert torch.equal(rec.error_penalty(), alone[0].error_penalty() + alone[1].error_penalty())


def test_penalty_with_nothing_recorded_says_so() -> None:
    with record() as rec:
        pass
    with pytest.raises(recording.NothingRecordedError, match=r"no adaptive solve was recorded\."):
        rec.error_penalty()
    assert issubclass(recording.NothingRecordedError, ValueError)


def test_rejected_errors_carry_no_gradient_and_no_graph() -> None:
    y0 = _start(3, 2).requires_grad_()
    problem = PROBLEMS["many times, rejections"]
    with record() as rec:
        _solve(problem._replace(y0=y0), problem.func, "dopri5")
    steps = rec.solves[0].steps
    rejected = steps.error[~steps.is_accepted].sum()
    assert rec.solves[0].n_rejected > 0
    (grad,) = torch.autograd.grad(rejected, y0, retain_graph=True, allow_unused=True)
    assert grad is None or bool((grad == 0).all())


def test_nested_solves_do_not_mix() -> None:
    """The vector field itself solves an inner problem at every call."""
    inner_t = torch.tensor([0.0, 0.5], dtype=torch.float64)

    def outer(t: Tensor, y: Tensor) -> Tensor:
        return odeint(spiral, y, inner_t, method="bosh3", rtol=1e-3, atol=1e-3)[-1] - y

    y0, t = _start(5, 2), torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = odeint(outer, y0, t, rtol=1e-3, atol=1e-3)
    with record() as rec:
        got = odeint(outer, y0, t, rtol=1e-3, atol=1e-3)
    assert torch.equal(got, expected)
    *inner, last = rec.solves
    assert last.method == "dopri5"
    assert [s.method for s in inner] == ["bosh3"] * last.nfe
    assert last.nfe == 2 + 6 * len(last.steps.dt)
    assert float((last.steps.t0 + last.steps.dt)[-1]) >= 1.0
    # dopri5 alone, on a field that is not recorded.
    with record() as alone:
        odeint(lambda t, y: contextvars.Context().run(outer, t, y), y0, t, rtol=1e-3, atol=1e-3)
    assert torch.equal(alone.solves[-1].steps.error, last.steps.error)
    assert len(alone.solves) == 1


def test_scopes_nest_and_each_sees_what_is_inside_it() -> None:
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    with record() as outer:
        odeint(spiral, y0, t, method="euler")
        with record() as inner:
            odeint(spiral, y0, t, method="rk4")
        _, solve = odeint_with_errors(spiral, y0, t)
        odeint(spiral, y0, t, method="midpoint")
    odeint(spiral, y0, t)
    assert [s.method for s in outer.solves] == ["euler", "rk4", "dopri5", "midpoint"]
    assert [s.method for s in inner.solves] == ["rk4"]
    assert outer.solves[2] is solve


def test_threads_do_not_mix_and_copied_contexts_are_recorded() -> None:
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    barrier = threading.Barrier(3, timeout=20)
    records: dict[str, recording.Recorder] = {}

    def run(method: str) -> None:
        with record() as rec:
            barrier.wait()
            for _ in range(5):
                odeint(spiral, y0, t, method=method)
            barrier.wait()
        records[method] = rec

    threads = [threading.Thread(target=run, args=(m,)) for m in ("dopri5", "bosh3")]
    for thread in threads:
        thread.start()
    barrier.wait()
    odeint(spiral, y0, t, method="rk4")
    barrier.wait()
    for thread in threads:
        thread.join()
    for method, rec in records.items():
        assert [s.method for s in rec.solves] == [method] * 5
        assert len({s.nfe for s in rec.solves}) == 1

    with record() as copied:
        for target in (
            lambda: odeint(spiral, y0, t, method="euler"),
            lambda: contextvars.Context().run(odeint, spiral, y0, t, method="midpoint"),
        ):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(target,))
            thread.start()
            thread.join()
    assert [s.method for s in copied.solves] == ["euler"]


def test_outside_a_scope_the_classes_are_the_hosts_own() -> None:
    before = dict(SOLVERS)
    with record():
        assert SOLVERS["dopri5"] is not before["dopri5"]
        with pytest.raises(ZeroDivisionError), record():
            raise ZeroDivisionError
        assert SOLVERS["dopri5"] is not before["dopri5"]
    assert list(SOLVERS.items()) == list(before.items())


def test_methods_that_come_and_go_inside_a_scope_leave_no_trace() -> None:
    before = dict(SOLVERS)
    with record() as rec:
        tdh.uninstall()
        assert "hypereuler" not in SOLVERS
        tdh.install()
        solver = tdh.HyperSolver("euler", lambda step: step.y, steps=3)
        with tdh.using(solver):
            odeint(spiral, _start(5, 2), torch.tensor([0.0, 1.0]), method="hypereuler")
    assert [s.nfe for s in rec.solves] == [3]
    assert list(SOLVERS) == list(before)
    assert SOLVERS["dopri5"] is before["dopri5"]


OPENERS = ["record", "override"]


@pytest.mark.parametrize("outer", OPENERS)
@pytest.mark.parametrize("closes_first", OPENERS)
def test_record_and_override_nest_in_any_order(outer: str, closes_first: str) -> None:
    before = dict(SOLVERS)
    solver = tdh.HyperSolver("euler", lambda step: step.y, steps=4)
    rec = recording.Recorder()
    scopes = {"record": record(), "override": tdh.override("dopri5", solver)}
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    contexts = {}
    for name in (outer, *(n for n in OPENERS if n != outer)):
        contexts[name] = scopes[name].__enter__()
    rec = contexts["record"]
    odeint(spiral, y0, t)
    assert [(s.method, s.nfe, s.is_adaptive) for s in rec.solves] == [("dopri5", 4, False)]
    last = next(n for n in OPENERS if n != outer)
    # Inner scopes close before outer ones; the remaining one stays in force.
    scopes[last].__exit__(None, None, None)
    with record() as after:
        odeint(spiral, y0, t)
    assert after.solves[0].is_adaptive == (last == "override")
    scopes[outer].__exit__(None, None, None)
    assert list(SOLVERS.items()) == list(before.items())


def test_odeint_dense_is_not_recorded() -> None:
    with record() as rec:
        odeint_dense(spiral, _start(5, 2), torch.tensor(0.0), torch.tensor(1.0))
    assert rec.solves == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_recorded_adaptive_methods_refuse_half_precision(method: str, dtype: torch.dtype) -> None:
    y0, t = torch.ones(3, 2, dtype=dtype), torch.tensor([0.0, 1.0])
    with record(), pytest.raises(StateTypeError, match=str(dtype)):
        odeint(lambda t, y: -y, y0, t, method=method)
    with pytest.raises(TypeError, match=r"part\.float"):
        odeint_with_errors(lambda t, y: -y, (y0, y0), t, method=method)


def test_fixed_methods_are_recorded_in_half_precision() -> None:
    y0, t = torch.ones(3, 2, dtype=torch.bfloat16), torch.linspace(0, 1, 5)
    with record() as rec:
        odeint(lambda t, y: -y, y0, t, method="rk4")
    assert rec.solves[0].nfe == 16


def test_a_half_precision_func_of_a_float32_state_is_recorded() -> None:
    """As under autocast: the state is float32, the derivatives are not."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (-y).bfloat16()

    y0, t = torch.ones(3, 2), torch.tensor([0.0, 1.0])
    expected = odeint(func, y0, t, rtol=1e-2, atol=1e-2)
    with record() as rec:
        got = odeint(func, y0, t, rtol=1e-2, atol=1e-2)
    assert torch.equal(got, expected)
    assert rec.solves[0].steps.error.dtype == torch.float32


@pytest.mark.parametrize("name", ["many times, rejections", "reverse tuple, tolerances by part"])
def test_running_out_of_steps_hands_over_the_solution_so_far(name: str) -> None:
    problem = PROBLEMS[name]._replace(call={"rtol": 1e-9, "atol": 1e-9})
    y0, t = problem.y0, torch.tensor(problem.t, dtype=torch.float64)
    call = {"rtol": 1e-9, "atol": 1e-9}
    limit = {"max_num_steps": 12}
    with pytest.raises(AssertionError, match="max_num_steps"):
        odeint(problem.func, y0, t, **call, options=limit)
    with record() as rec, pytest.raises(recording.MaxStepsError, match="max_num_steps") as caught:
        odeint(problem.func, y0, t, **call, options=limit)
    assert isinstance(caught.value, HyperError)
    assert isinstance(caught.value, AssertionError)
    assert rec.solves == []
    partial = caught.value.partial
    steps = partial.solve.steps
    end = (steps.t0 + steps.dt)[steps.is_accepted][-1]
    assert torch.allclose(partial.t[-1], end, rtol=0, atol=1e-12)
    assert float(partial.t[0]) == problem.t[0]
    assert partial.t.tolist()[:-1] == problem.t[: len(partial.t) - 1]
    reference = odeint(problem.func, y0, partial.t, **call)
    got = partial.y if isinstance(partial.y, tuple) else (partial.y,)
    expected = reference if isinstance(reference, tuple) else (reference,)
    for part, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-6)


def test_running_out_of_steps_before_an_event_and_under_adjoint_says_the_same() -> None:
    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    with record(), pytest.raises(recording.MaxStepsError) as caught:
        odeint_event(
            spiral,
            y0,
            t[0],
            event_fn=lambda t, y: y[0, 0] - 1e3,
            method="dopri5",
            options={"max_num_steps": 3},
        )
    assert len(caught.value.partial.t) == 2
    with record(), pytest.raises(recording.MaxStepsError):
        odeint_adjoint(MLPField(), y0, t, method="dopri5", options={"max_num_steps": 1})


def test_other_assertions_of_the_host_pass_through() -> None:
    with record(), pytest.raises(AssertionError, match="underflow") as caught:
        odeint(lambda t, y: y * torch.inf, _start(5, 2), torch.tensor([0.0, 1.0]))
    assert not isinstance(caught.value, HyperError)


def test_a_failed_solve_leaves_no_entry_and_the_next_one_is_recorded() -> None:
    def failing(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.3:
            raise ZeroDivisionError
        return -y

    y0, t = _start(5, 2), torch.tensor([0.0, 1.0])
    with record() as rec:
        with pytest.raises(ZeroDivisionError):
            odeint(failing, y0, t)
        assert recording.running() is None
        odeint(spiral, y0, t)
    assert len(rec.solves) == 1


def test_sample_counts_follow_the_shared_batch_and_nothing_is_selected() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with record() as rec:
        odeint(coupled, coupled_start(batch=6), t)
        odeint(damped_wave, torch.tensor(0.4), t)
        odeint(lambda t, y: y, (torch.ones(3, 2), torch.ones(4)), t)
    shapes = [tuple(solve.sample_nfe.shape) for solve in rec.solves]
    assert shapes == [(6,), (1,), (1,)]
    assert all(bool((solve.sample_nfe == solve.nfe).all()) for solve in rec.solves)
    assert all(solve.selection is None for solve in rec.solves)
    with pytest.raises(HyperError, match="share no batch"):
        rec.error_penalty()
    assert rec.solves[2].error_penalty(part=1) > 0


def test_checkpointed_solves_are_recorded_once() -> None:
    func = MLPField()
    y0, t = _start(5, 2).requires_grad_(), torch.tensor([0.0, 1.0])
    with record() as rec:
        y = checkpoint(
            lambda y0: odeint(func, y0, t, rtol=1e-3, atol=1e-3), y0, use_reentrant=False
        )
        y[-1].sum().backward()
    assert len(rec.solves) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sampled_step_is_repeatable_and_leaves_random_numbers_alone(seed: int) -> None:
    y0, t = _start(3, 2), torch.tensor([0.0, 4.0], dtype=torch.float64)
    drawn = []
    state = torch.get_rng_state()
    for _ in range(2):
        with record(seed=seed) as rec:
            odeint(van_der_pol, y0, t, rtol=1e-4, atol=1e-4)
        drawn.append(float(rec.solves[0].sampled_step.t0))
    assert drawn[0] == drawn[1]
    assert torch.equal(state, torch.get_rng_state())


def test_every_accepted_step_is_drawn_about_as_often() -> None:
    y0, t = _start(3, 2), torch.tensor([0.0, 1.0], dtype=torch.float64)
    counts: dict[float, int] = {}
    with record(seed=0) as rec:
        for _ in range(300):
            odeint(spiral, y0, t, rtol=1e-3, atol=1e-3)
    for solve in rec.solves:
        counts[float(solve.sampled_step.t0)] = counts.get(float(solve.sampled_step.t0), 0) + 1
    steps = rec.solves[0].steps
    assert sorted(counts) == steps.t0[steps.is_accepted].tolist()
    expected = 300 / len(counts)
    assert all(0.5 * expected < n < 1.5 * expected for n in counts.values())
