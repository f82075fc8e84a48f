"""Dispatch of samples to candidates, through torchdiffeq."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import MLPField, damped_wave, spiral
from torchdiffeq_hyper._fields._independence import is_probing
from torchdiffeq_hyper.dise import Candidate, Conditioned, Dise
from torchdiffeq_hyper.errors import (
    HyperError,
    NonFiniteError,
    OptionError,
    StateShapeError,
    StateTypeError,
)
from torchdiffeq_hyper.methods import _registry

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


class Given(nn.Module):
    """A selector that knows beforehand: the first number of a sample is its candidate."""

    def __init__(self, n_candidates: int) -> None:
        super().__init__()
        self.n_candidates = n_candidates
        self.calls = 0

    def forward(self, y0: Any) -> Tensor:
        self.calls += 1
        first = y0[0] if isinstance(y0, tuple) else y0
        chosen = first.flatten(1)[:, 0].real.long() % self.n_candidates
        return -nn.functional.one_hot(chosen, self.n_candidates).double()


class Calls:
    """Counts calls of func, and samples in them."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.calls = 0
        self.samples = 0

    def __call__(self, t: Tensor, y: Any) -> Any:
        if not is_probing():
            self.calls += 1
            self.samples += len(y[0] if isinstance(y, tuple) else y)
        return self.func(t, y)


def _candidates() -> list[Candidate]:
    solver = tdh.HyperSolver("heun", lambda step: step.y * step.t, steps=3)
    return [
        Candidate("euler", steps=1),
        Candidate("rk4", steps=4),
        Candidate("midpoint", options={"step_size": 0.1}),
        Candidate(solver),
        Candidate("dopri5_per_sample", rtol=1e-6, atol=1e-6, options={"first_step": 0.05}),
    ]


def _starts(batch: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return starts whose first number is 0, 1, 2, ..., so that `Given` deals them out."""
    return torch.stack([torch.arange(batch) + 0.25, torch.linspace(-1, 1, batch)], 1).to(dtype)


def _solve(dise: Dise, func: Any, y0: Any, t: Tensor, **more: Any) -> Any:
    return odeint(func, y0, t, method="dise", options={"dise": dise}, **more)


@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["forward", "reverse"])
@pytest.mark.parametrize("func", [spiral, MLPField()], ids=["spiral", "net"])
def test_every_sample_is_solved_as_its_candidate_solves_it_alone(func: Any, t: Tensor) -> None:
    candidates, y0 = _candidates(), _starts()
    dise = Dise(candidates, Given(len(candidates)))
    y = _solve(dise, func, y0, t)
    for i in range(len(y0)):
        candidate = candidates[i % len(candidates)]
        alone = candidate.solve(func, y0[i : i + 1], t, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(y[:, i : i + 1], alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(dise.solve(func, y0, t), y)
    assert torch.equal(dise(func, y0, t), y)
    assert torch.equal(dise.dispatch(func, y0, t, torch.arange(11) % 5), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flip", [False, True], ids=["forward", "reverse"])
def test_a_dopri5_group_is_odeint_on_the_sub_batch_bitwise(dtype: torch.dtype, flip: bool) -> None:
    tight = {"rtol": 1e-5, "atol": 1e-6}
    dise = Dise([Candidate("euler"), Candidate("dopri5"), Candidate("dopri5", **tight)], Given(3))
    y0, t = _starts(8, dtype), T.to(dtype)
    t = t.flip(0) if flip else t
    y = _solve(dise, spiral, y0, t, rtol=1e-3, atol=1e-4)
    assert torch.equal(y[:, 1::3], odeint(spiral, y0[1::3], t, rtol=1e-3, atol=1e-4))
    assert torch.equal(y[:, 2::3], odeint(spiral, y0[2::3], t, **tight))


def test_samples_are_evaluated_no_oftener_than_their_candidates_ask() -> None:
    dise = Dise([Candidate("euler", steps=1), Candidate("rk4", steps=3)], Given(2))
    func = Calls(spiral)
    _solve(dise, func, _starts(7), T)
    # Two intervals: euler one call in each, rk4 three steps of four.
    assert func.samples == 4 * 2 + 3 * 24
    assert func.calls == 2 + 24
    assert dise.selector.calls == 1


def test_candidates_count_steps_between_consecutive_points_of_t() -> None:
    y0 = _starts(3)
    fine = torch.cat([torch.linspace(0, 0.4, 5)[:-1], torch.linspace(0.4, 1, 5)]).double()
    one = Dise([Candidate("rk4", steps=4)], Given(1))
    torch.testing.assert_close(
        _solve(one, spiral, y0, T), odeint(spiral, y0, fine, method="rk4")[[0, 4, 8]]
    )


def _pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, z = state
    return -x + torch.sin(t) * torch.cos(x) * z.unsqueeze(-1), torch.cos(t) * x.mean(-1) - 0.5 * z


@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["forward", "reverse"])
@pytest.mark.parametrize("atol", [1e-6, (1e-7, 1e-4)], ids=["one", "per part"])
def test_tuple_states_are_taken_apart_and_put_together(t: Tensor, atol: Any) -> None:
    candidates = [Candidate("rk4", steps=2), Candidate("dopri5"), Candidate("dopri5_per_sample")]
    y0 = (_starts(7), torch.linspace(0.5, 1.5, 7, dtype=torch.float64))
    y = _solve(Dise(candidates, Given(3)), _pair, y0, t, rtol=1e-5, atol=atol)
    for position, candidate in enumerate(candidates):
        group = tuple(part[position::3] for part in y0)
        expected = candidate.solve(_pair, group, t, rtol=1e-5, atol=atol)
        for part, wanted in zip(y, expected, strict=True):
            assert torch.equal(part[:, position::3], wanted)


def test_tolerances_of_single_samples_follow_their_samples() -> None:
    y0 = _starts(6)
    atol = torch.logspace(-3, -8, 6, dtype=torch.float64).unsqueeze(1)
    dise = Dise([Candidate("euler"), Candidate("dopri5")], Given(2))
    y = _solve(dise, spiral, y0, T, rtol=1e-9, atol=atol)
    assert torch.equal(y[:, 1::2], odeint(spiral, y0[1::2], T, rtol=1e-9, atol=atol[1::2]))


def test_gradients_flow_through_every_group() -> None:
    field, candidates = MLPField(), _candidates()
    y0 = _starts(10).requires_grad_()
    inputs = (y0, *field.parameters())
    y = _solve(Dise(candidates, Given(5)), field, y0, T)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    expected = torch.stack(
        [
            candidates[i % 5].solve(field, y0[i : i + 1], T, rtol=1e-7, atol=1e-9)[:, 0]
            for i in range(10)
        ],
        dim=1,
    )
    got, wanted = (torch.autograd.grad((s * weights).sum(), inputs) for s in (y, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck_through_a_dispatched_solve() -> None:
    weight = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    t = T.clone().requires_grad_()
    dise = Dise([Candidate("euler", steps=2), Candidate("rk4")], Given(2))

    def solve(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return _solve(dise, lambda t, y: torch.tanh(y @ weight) * torch.cos(t), y0, t)

    assert torch.autograd.gradcheck(solve, (_starts(4).requires_grad_(), t, weight))


def test_adjoint_trains_func_with_the_hosts_dopri5_backward() -> None:
    dise = Dise([Candidate("rk4", steps=20), Candidate("dopri5")], Given(2))
    gradients = []
    for method, options in (("dise", {"dise": dise}), ("dopri5", None)):
        field, y0 = MLPField(), _starts(6).requires_grad_()
        y = odeint_adjoint(field, y0, T, method=method, options=options)
        y[-1].square().sum().backward()
        gradients.append([y0.grad, *(p.grad for p in field.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "dopri5_per_sample", "heun2"])
def test_half_precision_is_right_to_its_own_digits(dtype: torch.dtype, method: str) -> None:
    entry = _registry.host_methods().get(method, False)
    steps = 10 if entry else None
    dise = Dise([Candidate(method, steps=steps), Candidate("rk4", steps=64)], Given(2))
    y0 = torch.ones(3, 1, dtype=dtype)
    y0[1] = 0
    y = _solve(dise, lambda t, y: -y, y0, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4)
    exact = y0.float() * torch.exp(torch.tensor(-1.0))
    assert y.dtype == dtype
    torch.testing.assert_close(y[-1].float(), exact, rtol=0, atol=2e-3 if steps else 4e-3)


def test_autocast_does_not_cost_digits_of_the_state() -> None:
    net = nn.Linear(2, 2)
    dise = Dise([Candidate("rk4", steps=2), Candidate("dopri5")], Given(2))
    y0 = _starts(4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _solve(dise, lambda t, y: net(y), y0, T.float(), rtol=1e-2, atol=1e-2)
    assert y.dtype == torch.float32


# What func holds of every sample.

NOISE = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class HutchinsonFlow(nn.Module):
    """A continuous flow as FFJORD's: state (x, log-density), stored noise for the trace."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.net = MLPField()
        self.noise = noise

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        with torch.enable_grad():
            x = x.requires_grad_() if not x.requires_grad else x
            dx = self.net(t, x)
            (product,) = torch.autograd.grad(dx, x, self.noise, create_graph=True)
        return dx, -(product * self.noise).sum(1)

    def restrict(self, index: Tensor) -> HutchinsonFlow:
        part = HutchinsonFlow(self.noise[index])
        part.net = self.net
        return part


def test_stored_noise_goes_with_its_samples() -> None:
    flow, y0 = HutchinsonFlow(NOISE), (_starts(9), torch.zeros(9, dtype=torch.float64))
    candidates = [Candidate("rk4", steps=3), Candidate("dopri5"), Candidate("euler", steps=5)]
    y = _solve(Dise(candidates, Given(3)), flow, y0, T)
    for i in range(9):
        index = torch.tensor([i])
        alone = candidates[i % 3].solve(
            flow.restrict(index), (y0[0][index], y0[1][index]), T, rtol=1e-7, atol=1e-9
        )
        tolerance = 1e-6 if i % 3 == 1 else 1e-12
        for part, wanted in zip(y, alone, strict=True):
            torch.testing.assert_close(part[:, i : i + 1], wanted, rtol=tolerance, atol=tolerance)


def test_conditioning_goes_with_its_samples_and_gets_its_gradient() -> None:
    target = _starts(6).flip(0).requires_grad_()
    field = Conditioned(lambda t, y, x: torch.cos(t) * (x - y), target)
    candidates = [Candidate("rk4", steps=3), Candidate("dopri5_per_sample")]
    y0 = _starts(6)
    y = _solve(Dise(candidates, Given(2)), field, y0, T)
    exact = target + (y0 - target) * torch.exp(-torch.sin(T))[:, None, None]
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y[-1].sum(), target)
    torch.testing.assert_close(
        gradient,
        torch.full_like(target, 1 - float(torch.exp(-torch.sin(T[-1])))),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize(
    "func",
    [
        lambda t, y: y * NOISE,
        lambda t, y: torch.cat([y, NOISE], dim=1)[:, :2],
        lambda t, y: (y * NOISE.T.flip(0).T).cumsum(0),
    ],
    ids=["product", "concatenation", "broadcast"],
)
@pytest.mark.parametrize("batch", [9, 2], ids=["several", "one left over"])
def test_a_func_that_cannot_take_part_of_the_batch_is_explained(func: Any, batch: int) -> None:
    selection = torch.zeros(9, dtype=torch.long)
    selection[: batch // 2] = 1
    dise = Dise([Candidate("euler"), Candidate("rk4")])
    with pytest.raises(StateShapeError, match=r"batch of 9(?s:.*)tdh.Conditioned"):
        dise.dispatch(func, _starts(9), T, selection)


def test_an_error_of_funcs_own_is_not_explained_away() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        msg = "my own"
        raise RuntimeError(msg)

    dise = Dise([Candidate("euler"), Candidate("rk4")], Given(2))
    with pytest.raises(RuntimeError, match="my own") as caught:
        _solve(dise, broken, _starts(4), T)
    assert not isinstance(caught.value, HyperError)


def test_a_wrong_shape_of_the_whole_batch_is_named() -> None:
    dise = Dise([Candidate("euler")], Given(1))
    with pytest.raises(StateShapeError, match="returned shape"):
        _solve(dise, lambda t, y: y[:, :1], _starts(3), T)


# Binding.


def test_every_way_to_bind_finds_the_dise() -> None:
    dise = Dise([Candidate("euler", steps=2), Candidate("rk4")], Given(2))
    y0 = _starts(4)
    expected = dise.solve(spiral, y0, T)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return spiral(t, y)

    with pytest.raises(tdh.MissingHypernetError, match=r"tdh\.attach"):
        odeint(func, y0, T, method="dise")
    tdh.attach(func, dise)
    assert torch.equal(odeint(func, y0, T, method="dise"), expected)
    tdh.detach(func)
    with tdh.using(dise):
        assert torch.equal(odeint(func, y0, T, method="dise"), expected)
    tdh.register_method("dise-test", dise)
    try:
        assert torch.equal(odeint(func, y0, T, method="dise-test"), expected)
        with pytest.raises(OptionError, match="cannot be a candidate"):
            Candidate("dise-test")
    finally:
        tdh.unregister_method("dise-test")


def test_the_option_wins_over_what_is_attached() -> None:
    euler, rk4 = (Dise([Candidate(name)], Given(1)) for name in ("euler", "rk4"))
    y0 = _starts(3)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return spiral(t, y)

    tdh.attach(func, euler)
    with tdh.using(rk4):
        assert torch.equal(odeint(func, y0, T, method="dise"), euler.solve(func, y0, T))
        assert torch.equal(_solve(rk4, func, y0, T), rk4.solve(func, y0, T))


def test_a_dise_that_stands_in_for_dopri5_may_use_dopri5_itself() -> None:
    dise = Dise([Candidate("euler"), Candidate("dopri5")], Given(2))
    y0 = _starts(5)
    expected = dise.solve(spiral, y0, T, rtol=1e-5, atol=1e-6)
    with tdh.override("dopri5", dise):
        y = odeint(spiral, y0, T, rtol=1e-5, atol=1e-6, options={"max_num_steps": 1000})
        again = odeint(spiral, y0, T, rtol=1e-5, atol=1e-6, method="dopri5")
    assert torch.equal(y, expected)
    assert torch.equal(again, expected)


def test_a_solver_attached_to_func_serves_a_candidate_given_by_name() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return spiral(t, y)

    tdh.attach(func, tdh.HyperSolver("euler", zero))
    dise = Dise([Candidate("hypereuler", steps=2), Candidate("rk4")], Given(2))
    y0 = _starts(4)
    expected = Candidate("euler", steps=2).solve(func, y0[::2], T, rtol=0, atol=0)
    assert torch.equal(_solve(dise, func, y0, T)[:, ::2], expected)


def test_threads_do_not_see_each_others_choices() -> None:
    dise = Dise([Candidate("euler", steps=2), Candidate("rk4", steps=3)], Given(2))
    starts = [_starts(4) + shift for shift in range(6)]
    expected = [dise.solve(spiral, y0, T) for y0 in starts]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = _solve(dise, spiral, starts[i], T)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(6))


# Bad input.


def test_selectors_with_a_wrong_number_of_outputs_are_refused() -> None:
    dise = Dise([Candidate("euler"), Candidate("rk4")], Given(3))
    with pytest.raises(StateShapeError, match=r"\(4, 3\)(?s:.*)2 outputs"):
        _solve(dise, spiral, _starts(4), T)


def test_selectors_that_predict_nan_are_refused() -> None:
    dise = Dise([Candidate("euler")], lambda y0: y0[:, :1] * torch.nan)
    with pytest.raises(NonFiniteError, match="nan costs"):
        _solve(dise, spiral, _starts(4), T)


def test_selectors_that_return_choices_instead_of_costs_are_refused() -> None:
    dise = Dise([Candidate("euler")], lambda y0: torch.zeros(len(y0), 1, dtype=torch.long))
    with pytest.raises(StateTypeError, match="int64"):
        _solve(dise, spiral, _starts(4), T)


def test_a_dise_without_selector_shows_what_to_do() -> None:
    dise = Dise([Candidate("euler")])
    with pytest.raises(tdh.MissingHypernetError, match=r"dise\.fit"):
        _solve(dise, spiral, _starts(4), T)


@pytest.mark.parametrize(
    "selection",
    [
        torch.zeros(3, dtype=torch.long),
        torch.full((4,), 2),
        torch.full((4,), -1),
        torch.zeros(4),
        [0, 0, 0, 0],
    ],
)
def test_impossible_selections_are_refused(selection: Any) -> None:
    dise = Dise([Candidate("euler"), Candidate("rk4")])
    with pytest.raises(OptionError, match="each of the 4 samples"):
        dise.dispatch(spiral, _starts(4), T, selection)


def test_empty_batches_give_the_empty_solution_and_single_samples_work() -> None:
    dise = Dise([Candidate("euler"), Candidate("dopri5")], Given(2))
    assert _solve(dise, spiral, torch.ones(0, 2), T.float()).shape == (3, 0, 2)
    pair = _solve(dise, _pair, (torch.ones(0, 2), torch.ones(0)), T.float())
    assert [part.shape for part in pair] == [(3, 0, 2), (3, 0)]
    assert dise.dispatch(spiral, torch.ones(0, 2), T, torch.zeros(0).long()).shape == (3, 0, 2)
    one = _starts(2)[1:]
    assert torch.equal(_solve(dise, spiral, one, T), odeint(spiral, one, T))
    assert torch.equal(_solve(dise, spiral, one, T[:1]), one[None])


def test_samples_without_numbers_give_the_empty_solution() -> None:
    # dopri5 itself finds no step size for them.
    dise = Dise([Candidate("dopri5"), Candidate("euler")], lambda y0: torch.zeros(len(y0), 2))
    for y0, shape in ((torch.empty(3, 0), (3, 3, 0)), (torch.empty(3, 2, 0), (3, 3, 2, 0))):
        y = odeint(damped_wave, y0, T, method="dise", options={"dise": dise})
        assert y.shape == dise.dispatch(damped_wave, y0, T, torch.zeros(3).long()).shape == shape


def test_a_state_without_samples_is_refused() -> None:
    dise = Dise([Candidate("euler")], Given(1))
    with pytest.raises(StateShapeError, match="dim 0"):
        _solve(dise, damped_wave, torch.tensor(1.0), T.float())


def test_events_and_unknown_options_and_other_parts_are_refused() -> None:
    dise = Dise([Candidate("euler")], Given(1))
    with pytest.raises(OptionError, match="events"):
        odeint_event(
            spiral, _starts(2), T[0], event_fn=lambda t, y: y.sum(),
            method="dise", options={"dise": dise},
        )  # fmt: skip
    with pytest.raises(OptionError, match='no option "disse"'):
        odeint(spiral, _starts(2), T, method="dise", options={"disse": dise})
    norm = {"dise": dise, "norm": lambda y: y.abs().max()}
    with pytest.raises(OptionError, match='no option "norm"'):
        odeint(spiral, _starts(2), T, method="dise", options=norm)
    with pytest.raises(StateTypeError, match="a Dise"):
        odeint(spiral, _starts(2), T, method="dise", options={"dise": dise.candidates[0]})
