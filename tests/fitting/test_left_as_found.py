"""A fit leaves func, the hypernet it could not fit, and the random state as they were."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import StateShapeError
from torchdiffeq_hyper.fitting.guard import left_as_found

QUICK = tdh.FitConfig(iterations=8, pretrain_iterations=2, swap_every=2, batch_size=8)
Y0 = torch.randn(24, 3, generator=torch.Generator().manual_seed(5))


class Messy(nn.Module):
    """Dropout, batch norm, a counter in a buffer, frozen and trained parameters, modes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("unset", None)
        self.net[0].weight.requires_grad_(False)
        self.net[4].weight.grad = torch.full((3, 8), 7.0)
        self.train()
        self.net[1].eval()
        self.seen: set[tuple[bool, bool]] = set()
        self.fails = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.last = t.detach().clone()
        trained = any(p.requires_grad for p in self.parameters())
        self.seen.add((any(m.training for m in self.modules()), trained))
        if self.fails and self.calls > 40:
            raise KeyboardInterrupt
        return self.net(torch.cat([y, t.expand(len(y), 1)], dim=1))


def condition(module: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "state": copy.deepcopy(module.state_dict()),
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["modes"] == second["modes"]
    assert first["requires_grad"] == second["requires_grad"]
    for a, b in zip(first["grads"], second["grads"], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def call_plainly(func: nn.Module) -> Any:
    return func


def call_method(func: nn.Module) -> Any:
    return func.forward


def call_partial(func: nn.Module) -> Any:
    return partial(lambda scale, t, y, f: scale * f(t, y), 1.0, f=func)


@pytest.mark.parametrize("wrap", [call_plainly, call_method, call_partial])
def test_func_comes_back_as_found(wrap: Any) -> None:
    func = Messy()
    before, grad = condition(func), func.net[4].weight.grad
    buffers = dict(func.named_buffers())
    tdh.fit(wrap(func), Y0, (0.0, 1.0), base="euler", steps=3, config=QUICK, progress=False)
    assert_same(condition(func), before)
    assert func.net[4].weight.grad is grad
    assert all(buffers[name] is buffer for name, buffer in func.named_buffers())


def test_func_is_fitted_in_evaluation_mode_without_gradients() -> None:
    func = Messy()
    tdh.fit(func, Y0, (0.0, 1.0), base="euler", steps=3, config=QUICK, progress=False)
    assert func.seen == {(False, False)}


def test_func_comes_back_as_found_after_an_interruption() -> None:
    func = Messy()
    func.fails = True
    before = condition(func)
    with pytest.raises(KeyboardInterrupt):
        tdh.fit(func, Y0, (0.0, 1.0), base="euler", steps=3, config=QUICK, progress=False)
    assert_same(condition(func), before)


def test_func_comes_back_as_found_after_an_error() -> None:
    class Wrong(Messy):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(t, y)[:, :2]

    func = Wrong()
    before = condition(func)
    with pytest.raises(StateShapeError, match="func returned shape"):
        tdh.fit(func, Y0, (0.0, 1.0), base="euler", steps=3, config=QUICK, progress=False)
    assert_same(condition(func), before)


def test_what_a_closure_hides_is_left_alone() -> None:
    func = Messy()
    with left_as_found(lambda t, y: 2 * func(t, y)):
        assert func.training


@pytest.mark.parametrize("kind", ["interrupt", "error"])
def test_a_hypernet_that_could_not_be_fitted_is_as_before(kind: str) -> None:
    net = tdh.ConcatHypernet(
        nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
    )
    net.net[0].bias.requires_grad_(False)
    before = condition(net)
    calls = 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 230 and kind == "interrupt":
            raise KeyboardInterrupt
        return torch.sin(t) - y + (torch.inf if calls > 230 else 0.0)

    with pytest.raises(KeyboardInterrupt if kind == "interrupt" else tdh.HyperError):
        tdh.fit(
            func, Y0, (0.0, 1.0), base="euler", steps=3, hypernet=net, config=QUICK, progress=False
        )
    assert calls > 230, "the fit ended before it was disturbed"
    assert_same(condition(net), before)


def test_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    net = tdh.ConcatHypernet(nn.Sequential(nn.Linear(7, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    after_init = torch.get_rng_state()
    assert not torch.equal(before, after_init)
    tdh.fit(
        lambda t, y: torch.sin(t) - y,
        Y0,
        (0.0, 1.0),
        base="euler",
        steps=3,
        hypernet=net,
        config=QUICK,
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), after_init)


def test_global_random_state_does_not_matter() -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        solver = tdh.fit(
            lambda t, y: torch.sin(t) - y,
            Y0,
            (0.0, 1.0),
            base="euler",
            steps=3,
            config=QUICK,
            progress=False,
        )
        weights.append(torch.cat([p.flatten() for p in solver.parameters()]))
    assert torch.equal(*weights)


def test_y0_is_not_written_to() -> None:
    y0 = Y0.clone().requires_grad_()
    tdh.fit(
        lambda t, y: torch.sin(t) - y,
        y0,
        (0.0, 1.0),
        base="heun",
        steps=3,
        config=QUICK,
        progress=False,
    )
    assert torch.equal(y0, Y0)
    assert y0.grad is None
