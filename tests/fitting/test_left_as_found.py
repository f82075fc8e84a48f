"""A fit leaves func, the hypernet it could not fit, and the random state as they were."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper._fields._restore import left_as_found
from torchdiffeq_hyper.errors import StateShapeError

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


class Counting(nn.Module):
    """Counts on a class's default, on the instance, in a part; keeps a cache and its size."""

    nfe = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.time = 1.5
        self.size, self.cache = 2, torch.ones(2)
        self.fails_at: int | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        self.time = float(t)
        if self.nfe == self.fails_at:
            raise KeyboardInterrupt
        if self.size != len(y):
            self.size, self.cache = len(y), torch.ones(len(y), dtype=y.dtype)
        return self.inner(t, y) * self.cache.to(y.dtype).unsqueeze(1)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.was_called = 3, False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls, self.was_called = self.calls + 1, True
        return torch.sin(t) - y


class Plain:
    """No module: a count on the object of a bound method, or of a callable."""

    def __init__(self) -> None:
        self.nfe = 7

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        return torch.sin(t) - y

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y)


def plain_function(t: Tensor, y: Tensor) -> Tensor:
    plain_function.calls += 1  # type: ignore[attr-defined]
    return torch.sin(t) - y


def run_fit(func: Any, base: str = "euler") -> None:
    tdh.fit(func, Y0, (0.0, 1.0), base=base, steps=3, config=QUICK, progress=False)


def run_evaluate(func: Any) -> None:
    tdh.evaluate(func, Y0, (0.0, 1.0), ["euler", "dopri5"], steps=[2], repeats=1, progress=False)


def run_dise(func: Any) -> None:
    candidates = [tdh.Candidate("euler", steps=1), tdh.Candidate("rk4", steps=1)]
    cost = tdh.RegressionCost(
        lambda y, index: y.flatten(1).norm(dim=1), threshold=9.0, alpha=0.3, penalty=1e3
    )
    config = tdh.dise.SelectorConfig(iterations=3)
    dise = tdh.Dise(candidates)
    dise.fit(func, Y0, torch.tensor([0.0, 1.0]), cost=cost, config=config, progress=False)


def run_export(func: Any) -> None:
    solver = tdh.HyperSolver("euler", lambda step: step.y * 0, steps=2)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(tdh.errors.ExportError):
        solver.export(f"{folder}/solve.pt2", func, Y0, torch.tensor([0.0, 1.0]))


RUNS = [run_fit, partial(run_fit, base="bns"), run_evaluate, run_dise, run_export]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.filterwarnings("ignore::torchdiffeq_hyper.errors.OneCandidateWarning")
def test_counters_come_back_as_found(run: Any) -> None:
    func, plain = Counting(), Plain()
    plain_function.calls = 0  # type: ignore[attr-defined]
    cache = func.cache
    for form in (func, func.field, partial(func), plain, plain.field, plain_function):
        run(form)
        assert "nfe" not in vars(func)
        assert (func.time, func.size, func.inner.calls) == (1.5, 2, 3)
        assert func.inner.was_called is False
        assert func.cache is cache
        assert plain.nfe == 7
        assert plain_function.calls == 0  # type: ignore[attr-defined]


def test_counters_come_back_as_found_after_an_interruption() -> None:
    func = Counting()
    for fails_at in (1, 60):
        func.fails_at = fails_at
        with pytest.raises(KeyboardInterrupt):
            run_fit(func)
        assert "nfe" not in vars(func)
        assert func.inner.calls == 3
