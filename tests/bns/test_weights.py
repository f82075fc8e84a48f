"""Weights that an optimizer may change: every value of the parameter is a method."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from stubs import MLPField, damped_wave, spiral
from torchdiffeq_hyper.solvers.bespoke import classical, compositions
from torchdiffeq_hyper.solvers.bespoke._weights import WeightCache, consistent, is_method, selected

SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)
DOMAIN = tdh.FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")


def start() -> Tensor:
    return torch.linspace(-1, 1.5, 10, dtype=torch.float64).reshape(5, 2)


def solver_of(calls: int = 6, method: str = "rk4") -> tdh.BespokeSolver:
    return tdh.BespokeSolver(classical(method, calls), domain=DOMAIN)


def assert_is_method(weights: Tensor) -> None:
    sums = torch.cat([weights.new_zeros(1), weights.detach().sum(1)])
    assert not weights.detach().triu(1).any()
    assert float(sums.diff().min()) > -1e-10
    assert float(sums[-1]) == pytest.approx(1, abs=1e-10)


def trained(solver: tdh.BespokeSolver, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        solver.solve(damped_wave, start(), SPAN)[-1].square().sum().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.3),
    "decay": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=1.0),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_leaves_a_method_that_integrates_constants_exactly(name: str) -> None:
    model = nn.ModuleDict({"solver": solver_of(), "field": MLPField()}).requires_grad_()
    solver = model["solver"]
    assert isinstance(solver, tdh.BespokeSolver)
    trained(solver, OPTIMIZERS[name](model["solver"].parameters()))
    assert_is_method(solver.weights)
    for is_thawed in (True, False):
        model.requires_grad_(is_thawed)
        for has_grad in (True, False):
            with torch.set_grad_enabled(has_grad):
                y = solver.solve(lambda t, y: torch.full_like(y, 2.0), start(), SPAN)
            torch.testing.assert_close(y[-1].detach(), start() + 2, rtol=1e-9, atol=1e-9)
    assert_is_method(solver.weights)


@pytest.mark.parametrize("seed", range(5))
def test_every_value_of_the_parameter_is_a_method(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = 10.0 ** (seed - 2) * torch.randn(7, 7, generator=generator, dtype=torch.float64)
    weights = consistent(matrix)
    assert_is_method(weights)
    torch.testing.assert_close(consistent(weights), weights, rtol=1e-12, atol=1e-12)
    assert is_method(weights)
    assert not is_method(matrix)
    tdh.BespokeSolver(weights)


def test_a_parameter_of_zeros_is_a_method_with_equal_times() -> None:
    weights = consistent(torch.zeros(4, 4, dtype=torch.float64))
    assert_is_method(weights)
    torch.testing.assert_close(weights.sum(1), torch.linspace(0, 1, 5, dtype=torch.float64)[1:])


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_methods_are_mapped_to_themselves(calls: int) -> None:
    for weights in compositions(calls).values():
        torch.testing.assert_close(consistent(weights), weights, rtol=1e-14, atol=1e-14)
        assert torch.equal(selected(weights), weights)


def test_gradients_to_the_parameter_pass_gradcheck_away_from_methods_too() -> None:
    solver = solver_of(4)
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    parameter = (solver.weights.detach() + noise).requires_grad_()

    def solve(weights: Tensor) -> Tensor:
        arguments = (damped_wave, start(), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
        return torch.func.functional_call(solver, {"weights": weights}, arguments)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(solve, (parameter,))
    stacked = torch.stack([parameter.detach()] * 2)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(solve)(stacked)[0], solve(parameter.detach()))


def test_frozen_weights_are_the_parameter_itself() -> None:
    solver = solver_of()
    parameter = solver.get_parameter("weights")
    assert solver.weights is parameter
    assert [name for name, _ in solver.named_parameters()] == ["weights"]
    assert list(solver.state_dict()) == ["weights", "knot_values", "knot_slopes"]
    with torch.no_grad():
        solver.weights.copy_(classical("euler", 6))
    assert torch.equal(solver.times, BY_SIXTHS)


BY_SIXTHS = classical("euler", 6).sum(1).roll(1) * torch.tensor([0.0, 1, 1, 1, 1, 1]).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cast_to_fewer_digits_are_used_as_they_are(dtype: torch.dtype) -> None:
    solver = solver_of(20, "heun3").to(dtype)
    assert solver.weights is solver.get_parameter("weights")


def test_a_checkpoint_from_the_middle_of_a_training_goes_on_as_if_never_interrupted() -> None:
    solver = solver_of().requires_grad_()
    optimizer = torch.optim.Adam(solver.parameters(), lr=0.05)
    trained(solver, optimizer)
    other = solver_of().requires_grad_()
    other.load_state_dict(copy.deepcopy(solver.state_dict()))
    resumed = torch.optim.Adam(other.parameters(), lr=0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(solver, optimizer)
    trained(other, resumed)
    assert torch.equal(solver.weights, other.weights)


def test_a_trained_solver_is_saved_and_loaded_as_a_method(tmp_path: Path) -> None:
    solver = solver_of().requires_grad_()
    trained(solver, torch.optim.SGD(solver.parameters(), lr=0.1))
    solver.save(tmp_path / "s.safetensors")
    loaded = tdh.BespokeSolver.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.weights, solver.weights)
    assert not loaded.weights.requires_grad


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_frozen_copy_of_what_is_trained_is_a_method_when_its_parameter_is_written(
    copier: Callable[[tdh.BespokeSolver], tdh.BespokeSolver], is_compiled: bool
) -> None:
    torch._dynamo.reset()
    average = copier(solver_of().requires_grad_())
    average.requires_grad_(requires_grad=False)
    average.set_weights(torch.randn(6, 6, dtype=torch.float64))

    def solve(y0: Tensor, t: Tensor) -> Any:
        return average.solve(lambda t, y: torch.ones_like(y), y0, t)

    used = torch.compile(solve, backend="eager", fullgraph=True) if is_compiled else solve
    torch.testing.assert_close(used(start(), SPAN)[-1], start() + 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_compiled_solves_are_methods_before_and_after_a_training(mode: Any) -> None:
    torch._dynamo.reset()
    solver = solver_of(4)

    def solve(y0: Tensor, t: Tensor) -> Any:
        return solver.solve(damped_wave, y0, t)

    compiled = torch.compile(solve, backend="eager", fullgraph=True)

    def check() -> None:
        with mode():
            expected, found = solve(start(), SPAN), compiled(start(), SPAN)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    check()
    solver.requires_grad_()
    check()
    trained(solver, torch.optim.SGD(solver.parameters(), lr=0.1))
    check()
    solver.requires_grad_(requires_grad=False)
    check()
    fresh = solver_of(4)
    fresh.load_state_dict(solver.state_dict())
    solver = fresh
    check()


def test_weights_seen_first_in_inference_mode_serve_in_training() -> None:
    solver = solver_of()
    solver.set_weights(torch.randn(6, 6, dtype=torch.float64))
    field = MLPField()
    with torch.inference_mode():
        expected = solver.solve(field, start(), SPAN)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = solver.solve(field, start().requires_grad_(), t)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected.clone(), rtol=1e-12, atol=1e-12)


def test_weights_made_in_inference_mode_are_methods_too() -> None:
    with torch.inference_mode():
        solver = solver_of()
        y = solver.solve(damped_wave, start(), SPAN)
        solver.weights.mul_(2)
        twice = solver.solve(lambda t, y: torch.ones_like(y), start(), SPAN)
    torch.testing.assert_close(y, solver_of().solve(damped_wave, start(), SPAN))
    torch.testing.assert_close(twice[-1], start() + 1, rtol=1e-12, atol=1e-12)


def test_plain_tensors_take_the_parameters_place_in_replicas() -> None:
    solver = solver_of()
    replica = solver._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    replica.weights = classical("euler", 6)
    replica.knot_values, replica.knot_slopes = solver.knot_values, solver.knot_slopes
    expected = tdh.BespokeSolver.classical("euler", 6).solve(damped_wave, start(), SPAN)
    torch.testing.assert_close(replica.solve(damped_wave, start(), SPAN), expected)


def test_weights_without_values_are_taken_as_they_are() -> None:
    meta = torch.empty(3, 3, device="meta")
    assert WeightCache().of(meta) is meta
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.eye(3))
        assert WeightCache().of(fake) is fake


class Switching:
    """Threads that change places after every few instructions."""

    def __enter__(self) -> None:
        self.before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self.before)


def test_one_solver_serves_threads_of_other_dtypes_spans_and_weights() -> None:
    solver = tdh.BespokeSolver(classical("heun3", 6), domain=DOMAIN)
    dtypes = [torch.float32, torch.float64, torch.complex64]
    with torch.no_grad():
        wanted = [solver.solve(spiral, start().to(d), SPAN) for d in dtypes]
    failures: list[str] = []

    def work(dtype: torch.dtype, expected: Tensor) -> None:
        try:
            for _ in range(200):
                with torch.no_grad():
                    found = solver.solve(spiral, start().to(dtype), SPAN)
                if not torch.equal(found, expected):
                    failures.append(f"{dtype}: other numbers")
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            failures.append(repr(error))

    arguments = list(zip(dtypes, wanted, strict=True)) * 2
    threads = [threading.Thread(target=work, args=one) for one in arguments]
    with Switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_parameter_put_in_another_s_place_is_used_at_once() -> None:
    solver, other = solver_of(6), solver_of(6, "euler")
    with torch.no_grad():
        solver.solve(damped_wave, start(), SPAN)
        solver.load_state_dict(other.state_dict(), assign=True)
        found = solver.solve(damped_wave, start(), SPAN)
        expected = other.solve(damped_wave, start(), SPAN)
    assert torch.equal(found, expected)
