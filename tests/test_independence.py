"""Samples that depend on each other are found out, and independent ones are left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import MLPField, damped_wave, spiral
from torchdiffeq_hyper._fields._independence import check_independence, find_coupling, is_probing
from torchdiffeq_hyper.dise import Candidate, Dise
from torchdiffeq_hyper.errors import CoupledSamplesError, HyperError, StateShapeError

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
METHOD = "dopri5_per_sample"


def _starts(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _attention(t: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(y @ y.T, dim=1) @ y - y


def _normed(t: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(y, None, None, training=True)


COUPLED: dict[str, tuple[Callable[..., Any], Any]] = {
    "mean of a vector": (lambda t, y: y.mean() - y, _starts(5)),
    "mean of a large batch": (lambda t, y: y.mean(0) - y, _starts(300, 2)),
    "neighbours on a grid": (lambda t, y: y.roll(1, 0) + y.roll(-1, 0) - 2 * y, _starts(40)),
    "one sample drives another": (
        lambda t, y: torch.stack([-y[k] if k != 3 else y[-1] for k in range(len(y))]),
        _starts(6, 1),
    ),
    "attention": (_attention, _starts(6, 3)),
    "batch norm": (_normed, _starts(6, 3)),
    "sorted": (lambda t, y: y.sort(0).values, _starts(7, 2)),
    "size of the batch": (lambda t, y: y / len(y), _starts(7, 2)),
    "position in the batch": (
        lambda t, y: y * torch.linspace(0, 1, len(y), dtype=y.dtype).unsqueeze(1),
        _starts(7, 2),
    ),
    "zero at the first time": (lambda t, y: -y + t * y.mean(0), _starts(6, 2)),
    "zero at the first state": (
        lambda t, y: torch.cos(y) + (y * y.sum(0)) ** 2,
        torch.zeros(6, 2, dtype=torch.float64),
    ),
    "one part of a tuple": (
        lambda t, y: (-y[0], 1e-6 * y[1] * y[0].mean()),
        (_starts(5, 2), _starts(5)),
    ),
    "weak": (lambda t, y: -y + 1e-3 * y.mean(0), _starts(5, 2)),
    "small beside large": (
        lambda t, y: torch.stack([-y[:, 0], 1e-3 * y[:, 0].mean() * y[:, 1]], 1),
        torch.tensor([[1e6, 1.0], [2e6, 1.0]]).double(),
    ),
    "complex": (lambda t, y: 1j * y.mean(0) - y, _starts(5, 2).to(torch.complex128)),
    "float32": (lambda t, y: 0.01 * y.mean(0) - y, _starts(5, 2, dtype=torch.float32)),
    "bfloat16": (lambda t, y: y.mean(0) - y, _starts(5, 2, dtype=torch.bfloat16)),
    "float16": (lambda t, y: y.mean(0) - y, _starts(5, 2, dtype=torch.float16)),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("flip", [False, True], ids=["forward", "reverse"])
def test_coupled_samples_are_found_out(name: str, flip: bool) -> None:
    func, y0 = COUPLED[name]
    t = T.flip(0) - (1.0 if flip else 0.0) if flip else T
    everyone = torch.arange(len(y0[0] if isinstance(y0, tuple) else y0))
    with pytest.raises(CoupledSamplesError, match="depend on each other"):
        check_independence(func, y0, t, groups=everyone.split(1))


@pytest.mark.parametrize("mode", ["vmap", "vector", "loop"])
@pytest.mark.parametrize("name", ["mean of a vector", "zero at the first time", "bfloat16"])
def test_the_method_refuses_them_with_the_ways_out(name: str, mode: str) -> None:
    func, y0 = COUPLED[name]

    def at_any_times(t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = func(t.reshape(-1, *[1] * (y.dim() - 1)) if t.dim() else t, y)
        return k

    ways = r'y0\.unsqueeze\(0\)(?s:.*)method="dopri5"(?s:.*)Conditioned'
    with pytest.raises(CoupledSamplesError, match=ways):
        odeint(at_any_times, y0, T, method=METHOD, options={"time": mode})


@pytest.mark.parametrize("t", [T, T.flip(0)], ids=["forward", "reverse"])
@pytest.mark.parametrize("n", [2, 3, 100])
def test_a_vector_whose_numbers_go_through_a_matrix_is_refused_and_the_way_out_is_right(
    t: Tensor, n: int
) -> None:
    matrix = _starts(n, n) / n

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) * y @ matrix

    y0 = _starts(n)
    with pytest.raises(CoupledSamplesError, match=r"y0 = y0\.unsqueeze\(0\)"):
        odeint(func, y0, t, method=METHOD)
    y = odeint(func, y0.unsqueeze(0), t, method=METHOD)[:, 0]
    torch.testing.assert_close(y, odeint(func, y0, t), rtol=1e-6, atol=1e-7)


def test_a_tuple_of_vectors_is_refused() -> None:
    def oscillator(t: Tensor, state: Any) -> Any:
        q, p = state
        return p.flip(0), -q

    with pytest.raises(CoupledSamplesError, match=r"tuple\(part\.unsqueeze\(0\)"):
        odeint(oscillator, (_starts(4), _starts(4)), T, method=METHOD)


class _Deep(nn.Module):
    """A wide residual net: its rounding differs with the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        self.norm = nn.LayerNorm(64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            y = y + torch.tanh(layer(self.norm(y)))
        return y


def _in_bfloat16(t: Tensor, y: Tensor) -> Tensor:
    weight = torch.cos(torch.arange(64.0)).reshape(8, 8)
    return (y.bfloat16() @ weight.bfloat16()).to(y.dtype)


def _at_rest(t: Tensor, y: Tensor) -> Tensor:
    """Zero but for rounding: a difference of equal numbers, summed in two orders."""
    weight = torch.cos(torch.arange(256.0, dtype=y.dtype)).reshape(64, 4)
    wide = y @ torch.ones(y.shape[1], 64, dtype=y.dtype)
    return wide @ weight - (wide @ weight.double().sum(0).to(y.dtype).diag() / 64)


INDEPENDENT: dict[str, tuple[Callable[..., Any], Any]] = {
    "wave": (damped_wave, _starts(9, 3)),
    "spiral": (spiral, _starts(300, 2)),
    "net": (MLPField(), _starts(17, 2)),
    "deep net, float32": (_Deep(), _starts(300, 64, dtype=torch.float32)),
    "deep net, bfloat16": (_Deep().bfloat16(), _starts(33, 64, dtype=torch.bfloat16)),
    "deep net, float16": (_Deep().half(), _starts(33, 64, dtype=torch.float16)),
    "fewer digits inside": (_in_bfloat16, _starts(33, 8, dtype=torch.float32)),
    "zero at the start": (lambda t, y: t * torch.sin(y), _starts(5, 2)),
    "zero everywhere": (lambda t, y: torch.zeros_like(y), _starts(5, 2)),
    "zero state": (lambda t, y: torch.cos(y) * t, torch.zeros(5, 2)),
    "rest, float32": (_at_rest, _starts(20, 4, dtype=torch.float32)),
    "rest, float64": (_at_rest, _starts(20, 4)),
    "equal samples": (lambda t, y: -y, torch.ones(6, 2)),
    "not finite": (lambda t, y: y / 0, torch.tensor([[1.0], [0.0], [-1.0]])),
    "later not finite": (lambda t, y: torch.sqrt(0.1 - t) * y, _starts(4, 1)),
    "huge": (lambda t, y: -y, _starts(4, 1) * 1e300),
    "tiny": (lambda t, y: -y, _starts(4, 1) * 1e-300),
    "tuple": (lambda t, y: (-y[0] * y[1].unsqueeze(1), t * y[1]), (_starts(5, 2), _starts(5))),
    "a vector": (lambda t, y: torch.sin(y) * t, _starts(12)),
    "complex": (lambda t, y: 1j * y, _starts(5, 2).to(torch.complex64)),
    "empty part": (lambda t, y: (-y[0], y[1]), (_starts(5, 2), torch.zeros(5, 0))),
    "own rates": (
        tdh.Conditioned(lambda t, y, rate: -rate * y, _starts(40, 1)),
        _starts(40, 2),
    ),
}


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("by", ["halves", "singles"])
def test_independent_samples_are_never_refused(name: str, by: str) -> None:
    func, y0 = INDEPENDENT[name]
    everyone = torch.arange(len(y0[0] if isinstance(y0, tuple) else y0))
    groups = everyone.split(1) if by == "singles" else None
    for t in (T, T.flip(0), 1e9 * T, 1e-9 * T):
        with torch.no_grad():
            check_independence(func, y0, t, groups=groups)


def test_fresh_noise_is_no_coupling() -> None:
    check_independence(lambda t, y: -y + torch.randn_like(y), _starts(6, 2), T)


def test_an_inner_solver_that_shares_its_steps_is_no_coupling() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        inner: Tensor = odeint(spiral, y, T / 10, rtol=1e-7, atol=1e-7)[-1]
        return -inner

    check_independence(func, _starts(6, 2), T)


@pytest.mark.parametrize("y0", [_starts(1, 2), _starts(0, 2), torch.tensor(1.0), (_starts(1),)])
def test_a_single_sample_is_compared_with_nothing(y0: Any) -> None:
    def never(t: Tensor, y: Any) -> Any:
        raise AssertionError

    check_independence(never, y0, T)


def test_without_values_nothing_is_compared() -> None:
    def never(t: Tensor, y: Any) -> Any:
        raise AssertionError

    def look(y: Tensor) -> Tensor:
        check_independence(never, y, T)
        return y

    check_independence(never, torch.ones(3, 2, device="meta"), T)
    torch.func.vmap(look)(torch.ones(2, 3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(look, backend="eager", fullgraph=True)(torch.ones(3, 2))


@pytest.mark.parametrize("batch", [3, 50])
def test_a_func_of_a_fixed_batch_is_told_of_conditioned(batch: int) -> None:
    held = _starts(batch, 2)
    with pytest.raises(StateShapeError, match=rf"batch of {batch}\.(?s:.*)tdh\.Conditioned"):
        check_independence(lambda t, y: y * held, _starts(batch, 2), T)
    with pytest.raises(StateShapeError, match=r"returned shapes(?s:.*)tdh\.Conditioned"):
        check_independence(lambda t, y: held, _starts(batch, 2), T)


def test_a_func_that_fails_by_itself_is_left_to_the_solve() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        msg = "my own"
        raise RuntimeError(msg)

    for batch in (3, 50):
        check_independence(broken, _starts(batch, 2), T)
        with pytest.raises(RuntimeError, match="my own"):
            odeint(broken, _starts(batch, 2), T, method=METHOD, options={"time": "loop"})


def test_a_coupling_that_begins_later_is_found_at_the_time_asked_for() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y + torch.relu(t - 0.5) * y.mean(0)

    assert find_coupling(func, _starts(4, 2), T[:1]) is None
    found = find_coupling(func, _starts(4, 2), torch.tensor([0.0, 0.5, 1.0]))
    assert found is not None
    assert found.time == 1.0


def test_func_sees_no_more_than_sixteen_samples_of_a_large_batch() -> None:
    sizes: list[int] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(y))
        return -y

    check_independence(func, _starts(1000, 2), T)
    assert sizes == [16, 8, 8] * 2


def test_the_state_given_is_left_as_it_was() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y.requires_grad_() if not y.requires_grad else -y

    y0 = _starts(4, 2)
    before = y0.clone()
    check_independence(func, y0, T)
    assert not y0.requires_grad
    assert torch.equal(y0, before)


def test_a_func_that_reuses_its_output_buffer_is_not_refused() -> None:
    buffers: dict[int, Tensor] = {}

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.mul(y, -torch.cos(t), out=buffers.setdefault(len(y), torch.empty_like(y)))

    with torch.no_grad():
        check_independence(func, _starts(6, 2), T)


@pytest.mark.parametrize("mode", ["vmap", "loop", "vector"])
def test_batch_norm_in_training_mode_is_refused_by_its_name(mode: str) -> None:
    norm = nn.BatchNorm1d(2).double().train()
    with pytest.raises(CoupledSamplesError, match=r"func\.eval\(\)"):
        odeint(lambda t, y: norm(y), _starts(6, 2), T, method=METHOD, options={"time": mode})
    norm.eval()
    y = odeint(lambda t, y: norm(y), _starts(6, 2), T, method=METHOD, options={"time": mode})
    assert torch.isfinite(y).all()


def test_the_comparison_counts_in_no_record_and_no_table() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        if not is_probing():
            calls.append(len(y))
        return -y - odeint(spiral, y, T / 10, method="euler")[-1]

    calls: list[int] = []
    with tdh.record() as rec:
        odeint(
            func, _starts(5, 2), T, method=METHOD, rtol=1e-3, atol=1e-3, options={"time": "loop"}
        )
    solve = rec.solves[-1]
    assert solve.nfe == len(calls) == len(rec.solves) - 1, "solves inside func, too"
    table = tdh.evaluate(
        lambda t, y: -y * t, _starts(5, 2), (0.0, 1.0), [METHOD], tolerances=1e-3, repeats=1,
        progress=False,
    )  # fmt: skip
    with tdh.record() as rec:
        odeint(lambda t, y: -y * t, _starts(5, 2), T, method=METHOD, rtol=1e-3, atol=1e-3)
    assert table.rows[0].nfe == rec.solves[-1].nfe


def test_gradients_do_not_see_the_comparison() -> None:
    y0 = _starts(4, 2).requires_grad_()
    y = odeint(spiral, y0, T, method=METHOD, rtol=1e-9)
    one = torch.zeros_like(y[-1])
    one[2] = 1
    (gradient,) = torch.autograd.grad((y[-1] * one).sum(), y0)
    assert gradient[[0, 1, 3]].abs().max() == 0
    assert gradient[2].abs().min() > 0


# Where samples go to different candidates.


def _dise() -> Dise:
    return Dise([Candidate("rk4", steps=2), Candidate("euler", steps=3)])


def _coupled(t: Tensor, y: Tensor) -> Tensor:
    return y.mean(0, keepdim=True) - y


@pytest.mark.parametrize("y0", [_starts(6), _starts(6, 2), _starts(100, 2)])
def test_groups_of_coupled_samples_are_refused(y0: Tensor) -> None:
    selection = torch.arange(len(y0)) % 2
    with pytest.raises(CoupledSamplesError, match="depend on each other"):
        _dise().dispatch(_coupled, y0, T, selection)
    rare = torch.zeros(len(y0)).long()
    rare[1] = 1
    with pytest.raises(CoupledSamplesError, match="depend on each other"):
        _dise().dispatch(_coupled, y0, T, rare)


def test_one_group_of_coupled_samples_is_solved_as_the_whole_batch() -> None:
    y0 = _starts(6, 2)
    y = _dise().dispatch(_coupled, y0, T, torch.zeros(6).long())
    exact = y0.mean(0) + (y0 - y0.mean(0)) * torch.exp(-T[-1])
    torch.testing.assert_close(y[-1], exact, rtol=0, atol=2e-3)


def test_measuring_refuses_coupled_samples_whatever_it_measures() -> None:
    y0, dise = _starts(12, 2), _dise()
    cost = tdh.ClassificationCost(lambda y: y, torch.zeros(12).long(), 0.3, 1e4)
    for measure in (dise.fit, dise.oracle, dise.suggest):
        with pytest.raises(CoupledSamplesError, match="depend on each other"):
            measure(_coupled, y0, T, cost=cost, progress=False)
    with pytest.raises(CoupledSamplesError, match="depend on each other"):
        tdh.evaluate(_coupled, y0, (0.0, 1.0), ["dopri5", METHOD], repeats=1, progress=False)
    table = tdh.evaluate(_coupled, y0, (0.0, 1.0), ["dopri5"], repeats=1, progress=False)
    assert table.rows[0].relative_l2 < 1e-2


def test_errors_of_the_package_pass_through() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        if len(y) < 6:
            raise HyperError("mine")  # noqa: EM101
        return -y

    with pytest.raises(HyperError, match="mine"):
        check_independence(func, _starts(6, 2), T)


def test_a_coarse_answer_that_others_change_is_coupling() -> None:
    # 1 % is what bfloat16 inside func explains; that others change it, it does not.
    with pytest.raises(CoupledSamplesError):
        check_independence(lambda t, y: y + 0.01 * y.mean(0), _starts(5, 2), T)
