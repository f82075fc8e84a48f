"""The solver itself: sums, times, what lies between the ends, refusals."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from stubs import (
    Counted,
    MLPField,
    convergence_order,
    coupled,
    coupled_start,
    damped_wave,
    spiral,
    spiral_solution,
)
from torchdiffeq_hyper import (
    BespokeSolver,
    ConcatHypernet,
    FitDomain,
    HyperSolver,
    Solver,
    StepInput,
)
from torchdiffeq_hyper.errors import NonFiniteError, OptionError, StateShapeError, StateTypeError
from torchdiffeq_hyper.solvers.bespoke import _rollout, classical, compositions

SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)
HOSTS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


def start(batch: int = 5) -> Tensor:
    return torch.linspace(-1, 1.5, 2 * batch, dtype=torch.float64).reshape(batch, 2)


def random_solver(n: int = 5, seed: int = 0) -> BespokeSolver:
    """Weights of no classical method, with knots of their own."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, n, generator=generator, dtype=torch.float64).tril()
    times = torch.linspace(0, 1, n + 1, dtype=torch.float64)[1:] ** 1.3
    return BespokeSolver(weights * (times / weights.sum(1))[:, None])


@pytest.mark.parametrize("method", HOSTS)
@pytest.mark.parametrize("n_steps", [1, 3])
def test_classical_weights_equal_the_host_s_method_to_rounding(method: str, n_steps: int) -> None:
    calls = n_steps * HOSTS[method]
    solver = BespokeSolver.classical(method, calls)
    host = "heun2" if method == "heun" else method
    t = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
    expected = odeint(damped_wave, start(), t, method=host)[-1]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = solver.solve(damped_wave, start(), SPAN)[-1].detach()
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)]
)
def test_classical_weights_converge_in_the_order_of_their_method(method: str, order: int) -> None:
    counts = [4, 8, 16, 32]
    exact = spiral_solution(SPAN, start())[-1]
    errors = []
    for n in counts:
        solver = BespokeSolver.classical(method, n * HOSTS[method])
        errors.append(float((solver.solve(spiral, start(), SPAN)[-1] - exact).norm()))
    assert convergence_order([1 / n for n in counts], errors) == pytest.approx(order, abs=0.25)


def test_calls_that_do_not_come_out_even_go_to_a_shorter_method() -> None:
    solver = BespokeSolver.classical("rk4", 10)
    t = torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)
    y = odeint(damped_wave, start(), t, method="rk4")[-1]
    t = torch.tensor([0.8, 1.0], dtype=torch.float64)
    expected = odeint(damped_wave, y, t, method="midpoint")[-1]
    found = solver.solve(damped_wave, start(), SPAN)[-1].detach()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 8])
def test_every_composition_passes_the_whole_span_in_order(calls: int) -> None:
    for weights in compositions(calls).values():
        times = BespokeSolver(weights).times
        assert bool((times.diff() >= -1e-12).all())
        assert float(weights[-1].sum()) == pytest.approx(1)
    assert compositions(calls)["euler"].shape == (calls, calls)


def test_constant_derivatives_are_integrated_exactly_at_every_time() -> None:
    solver = random_solver()
    t = torch.tensor([0.0, 0.13, 0.5, 0.77, 1.0], dtype=torch.float64)
    slope = torch.tensor([2.0, -3.0], dtype=torch.float64)
    found = solver.solve(lambda t, y: slope.expand_as(y), start(), t)
    expected = start() + t[:, None, None] * slope
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_derivatives_linear_in_time_are_exact_from_second_order_on() -> None:
    solver = BespokeSolver.classical("midpoint", 6)
    found = solver.solve(lambda t, y: 3 * t * torch.ones_like(y), start(), SPAN)[-1]
    torch.testing.assert_close(found, start() + 1.5, rtol=1e-12, atol=1e-12)


def test_func_is_called_n_times_at_the_sums_of_the_weights() -> None:
    solver = random_solver(6)
    func = Counted(damped_wave)
    t = torch.tensor([2.0, 2.3, 3.0], dtype=torch.float64)
    with torch.no_grad():
        solver.solve(func, start(), t)
    expected = 2 + torch.cat([torch.zeros(1), solver.weights[:-1].sum(1)])
    assert func.times == pytest.approx(expected.tolist())


def test_sums_without_autograd_equal_those_with_it() -> None:
    solver, field = random_solver().requires_grad_(), MLPField()
    images = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    by_channel = lambda t, y: field(t, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731
    layouts = (images, images.to(memory_format=torch.channels_last), images[:1].expand(3, 2, 4, 4))
    for y0 in layouts:
        expected = solver.solve(by_channel, y0, SPAN)[-1].detach()
        with torch.no_grad():
            found = solver.solve(by_channel, y0, SPAN)[-1]
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_func_sees_channels_last_states_in_that_format() -> None:
    seen = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(y.is_contiguous(memory_format=torch.channels_last))
        return -y

    y0 = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        BespokeSolver.classical("rk4", 4).solve(func, y0, torch.tensor([0.0, 1.0]))
    assert all(seen)


def test_interior_points_lie_near_the_solution_and_cost_no_call() -> None:
    solver = BespokeSolver.classical("rk4", 16)
    t = torch.linspace(0, 1, 23, dtype=torch.float64)
    func = Counted(spiral)
    found = solver.solve(func, start(), t)
    assert func.calls == 16
    torch.testing.assert_close(found, spiral_solution(t, start()), rtol=0, atol=4e-2)
    torch.testing.assert_close(
        found[-1], solver.solve(spiral, start(), SPAN)[-1], rtol=1e-14, atol=1e-14
    )


def test_reverse_time_undoes_forward_time() -> None:
    solver = BespokeSolver.classical("rk4", 16)
    end = solver.solve(spiral, start(), SPAN)[-1]
    back = solver.solve(spiral, end, SPAN.flip(0))[-1]
    torch.testing.assert_close(back, start(), rtol=0, atol=3e-3)


def test_tuple_states_equal_their_parts_in_one() -> None:
    solver = BespokeSolver.classical("rk4", 12)
    y0 = coupled_start()
    found = solver.solve(coupled, y0, SPAN)
    with torch.no_grad():
        fast = solver.solve(coupled, y0, SPAN)
    reference = odeint(coupled, y0, SPAN, rtol=1e-9, atol=1e-9)
    for part, quick, exact, first in zip(found, fast, reference, y0, strict=True):
        assert part.shape == (2, *first.shape)
        torch.testing.assert_close(part.detach(), quick, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part[-1].detach(), exact[-1], rtol=0, atol=2e-3)


def test_gradients_pass_gradcheck() -> None:
    solver, field = random_solver(3), MLPField()
    y0 = start(2).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)

    def solve(y0: Tensor, t: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        names = [name for name, _ in field.named_parameters()]
        func = lambda t, y: torch.func.functional_call(  # noqa: E731
            field, dict(zip(names, values, strict=True)), (t, y)
        )
        return torch.func.functional_call(solver, {"weights": weights}, (func, y0, t))

    weights = solver.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(solve, (y0, t, weights, *field.parameters()))


def test_vmap_over_starts_equals_the_batch() -> None:
    solver = random_solver()
    with torch.no_grad():
        expected = solver.solve(damped_wave, start(), SPAN)
        found = torch.vmap(lambda y: solver.solve(damped_wave, y, SPAN), out_dims=1)(start())
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("points", "is_tuple", "is_fitted", "reverse"),
    [
        (2, False, False, False),
        (2, False, True, True),
        (2, True, True, False),
        (4, True, True, True),
        (4, False, False, True),
    ],
)
def test_solve_compiles_to_one_graph(
    points: int, is_tuple: bool, is_fitted: bool, reverse: bool
) -> None:
    torch._dynamo.reset()
    func, y0 = (coupled, coupled_start()) if is_tuple else (MLPField(), start())
    shapes = ((3,), (), ()) if is_tuple else ((2,),)
    solver = random_solver(3)
    if is_fitted:
        solver.domain = FitDomain(
            (0.0, 1.0), 1.0, 1.0, (-1 if reverse else 1,), shapes, is_tuple, "float64"
        )
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    t = t.flip(0) if reverse else t
    compiled = torch.compile(
        lambda y0, t: solver.solve(func, y0, t), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        expected, found = solver.solve(func, y0, t), compiled(y0, t)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_exported_solve_gives_the_same_numbers(tmp_path: object) -> None:
    solver, field = random_solver(3), MLPField()
    net = ConcatHypernet(nn.Linear(2 + 3 * 2, 2).double(), inputs=("y", "stages"))
    solver.hypernet = net.requires_grad_(False)
    solver.domain = FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")
    path = f"{tmp_path}/bns.pt2"
    with torch.no_grad():
        solver.export(path, field, start(), SPAN)
        program = torch.export.load(path).module()
        expected = solver.solve(field, start(7), SPAN)
        torch.testing.assert_close(program(start(7), SPAN), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "times", [(0.5, 1.0), (0.0, 2.0), (1.0, 0.0), (0.0, 0.5, 1.5), (0.0, -0.5, 1.0)]
)
def test_compiled_and_exported_solves_give_nan_outside_the_fitted_span(
    times: tuple[float, ...], tmp_path: object
) -> None:
    torch._dynamo.reset()
    solver, field, path = random_solver(3), MLPField(), f"{tmp_path}/bns.pt2"
    solver.domain = FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")
    t = torch.tensor(times, dtype=torch.float64)
    inside = torch.linspace(0, 0.7, len(t), dtype=torch.float64)
    solver.export(path, field, start(), inside)
    compiled = torch.compile(
        lambda y0, t: solver.solve(field, y0, t), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        expected = solver.solve(field, start(), inside)
        for solve in (compiled, torch.export.load(path).module()):
            torch.testing.assert_close(solve(start(), inside), expected, rtol=1e-12, atol=1e-12)
            assert bool(solve(start(), t)[1:].isnan().all())


def test_half_precision_is_summed_in_float32() -> None:
    y0, t = start().half(), torch.tensor([0.0, 1.0])
    solver = BespokeSolver.classical("euler", 64)
    found = solver.solve(damped_wave, y0, t)
    assert found.dtype == torch.float16
    exact = solver.solve(damped_wave, y0.double(), t.double())
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)


def test_a_correction_is_added_at_the_end_with_the_span_squared() -> None:
    seen: list[StepInput] = []

    def net(step: StepInput) -> Tensor:
        seen.append(step)
        return torch.full_like(step.y, 0.5)

    plain = random_solver(4)
    solver = BespokeSolver(plain.weights, hypernet=net)
    t = torch.tensor([1.0, 1.5, 3.0], dtype=torch.float64)
    with torch.no_grad():
        expected, found = (s.solve(spiral, start(), t) for s in (plain, solver))
    added = torch.tensor([0.0, 2.0 / 16, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    torch.testing.assert_close(found, expected + added.expand_as(found), rtol=1e-12, atol=1e-12)
    (step,) = seen
    assert (float(step.dt), float(step.t), len(step.stages)) == (2, 1, 4)
    torch.testing.assert_close(step.y, expected[-1])
    torch.testing.assert_close(step.stages[0], spiral(t[0], start()))


@pytest.mark.parametrize("is_fitted", [True, False])
def test_a_correction_far_from_zero_has_the_digits_of_the_state(is_fitted: bool) -> None:
    seen: list[StepInput] = []

    def g(step: StepInput) -> Tensor:
        seen.append(step)
        return torch.ones_like(step.y)  # type: ignore[arg-type]

    span = (30000.0, 29999.7)
    domain = FitDomain(span, 0.3, 0.3, (-1,), ((2,),), is_tuple=False, dtype="float32")
    weights = classical("midpoint", 2)
    solver = BespokeSolver(weights, hypernet=g, domain=domain if is_fitted else None)
    t = torch.tensor(span, dtype=torch.float64)
    y = solver.solve(lambda t, y: torch.zeros_like(y), torch.zeros(3, 2), t)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y[-1], torch.full((3, 2), 0.09), rtol=1e-6, atol=0)
    assert seen[0].dt.dtype == torch.float32


def test_it_is_a_solver_of_method_bns() -> None:
    solver = random_solver(4)
    assert isinstance(solver, Solver)
    assert (solver.method, solver.base, solver.steps, solver.n_steps) == ("bns", "bns", 4, 4)
    assert not solver.follows_grid
    assert HyperSolver("euler", lambda step: step.y).follows_grid


@pytest.mark.parametrize("n", [1, 5])
def test_every_way_to_sum_gives_the_sums_of_the_reference(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rollout, "CHUNK", 3)
    y = torch.randn(4, 3, 2, dtype=torch.float64).transpose(1, 2)
    row, stages = torch.randn(n, dtype=torch.float64), [torch.randn_like(y) for _ in range(n)]
    expected = _rollout._add_one_by_one(y, row, stages)
    for add in (partial(_rollout._add_in_chunks, y), _rollout._Matrix(y, n)):
        for known in range(1, n):  # as a roll-out does, one derivative more each time
            add(row[:known], stages[:known])
        torch.testing.assert_close(add(row, list(stages)), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_give_the_same_numbers(copier: object) -> None:
    solver = random_solver(4)
    twin = copier(solver)  # type: ignore[operator]
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    assert torch.equal(twin.solve(spiral, start(), t), solver.solve(spiral, start(), t))


def test_empty_states_and_single_times_come_back() -> None:
    solver = random_solver(4)
    assert solver.solve(spiral, start()[:0], SPAN).shape == (2, 0, 2)
    assert torch.equal(solver.solve(spiral, start(), SPAN[:1])[0], start())


@pytest.mark.parametrize(
    ("weights", "kind", "text"),
    [
        (torch.ones(3), StateShapeError, "(n, n)"),
        (torch.eye(2, dtype=torch.int64), StateTypeError, "floating-point"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.5]]), OptionError, "above its diagonal"),
        (torch.tensor([[0.5, 0.0], [0.3, 0.3]]), OptionError, "the last one 1"),
        (torch.tensor([[-0.5, 0.0], [0.5, 0.5]]), OptionError, "never decrease"),
        (torch.tensor([[1.5, 0.0], [0.5, 0.5]]), OptionError, "never decrease"),
        (torch.tensor([[torch.nan, 0.0], [0.5, 0.5]]), OptionError, "not finite"),
    ],
)
def test_impossible_weights_are_refused(weights: Tensor, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text.replace("(", r"\(").replace(")", r"\)")):
        BespokeSolver(weights)


def test_unknown_classical_methods_are_refused() -> None:
    with pytest.raises(OptionError, match="midpoint"):
        classical("midpont", 8)
    with pytest.raises(OptionError, match="enough calls"):
        classical("rk4", 3)


def test_a_field_that_blows_up_is_named_with_its_call_and_time() -> None:
    solver = BespokeSolver.classical("euler", 4)
    with pytest.raises(NonFiniteError, match=r"call 2 of func, t = 0\.5"):
        solver.solve(lambda t, y: y / (t < 0.4), start(), SPAN)
    with pytest.raises(NonFiniteError, match="y0 holds"):
        solver.solve(spiral, start() * torch.nan, SPAN)


def test_a_hypernet_that_blows_up_is_named() -> None:
    solver = BespokeSolver(classical("euler", 4), hypernet=lambda step: step.y / 0)
    with pytest.raises(NonFiniteError, match="hypernet returned inf or nan"):
        solver.solve(spiral, start(), SPAN)


@pytest.mark.parametrize("times", [(0.5, 1.0), (0.0, 1.2), (1.0, 0.0), (0.0, -0.1, 1.0)])
def test_times_outside_the_fitted_span_are_refused(times: tuple[float, ...]) -> None:
    solver = random_solver()
    solver.domain = FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")
    with pytest.raises(OptionError, match="fitted from 0 to 1"):
        solver.solve(spiral, start(), torch.tensor(times, dtype=torch.float64))


def test_a_solve_may_end_within_the_fitted_span() -> None:
    solver = random_solver()
    solver.domain = FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    whole = solver.solve(spiral, start(), t)
    torch.testing.assert_close(solver.solve(spiral, start(), t[:2]), whole[:2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_states_are_summed_in_chunks_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format
) -> None:
    monkeypatch.setattr(_rollout, "CHUNK", 64)
    solver, seen = random_solver(), []

    def field(t: Tensor, y: Tensor) -> Tensor:
        seen.append(y.stride())
        return torch.cos(t) * y.roll(1, dims=1) - y**3

    y0 = torch.rand(5, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=layout)
    expected = solver.solve(field, y0, SPAN)
    seen.clear()
    with torch.no_grad():
        found = solver.solve(field, y0, SPAN)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert set(seen) == {y0.stride()}


def test_large_states_under_vmap_have_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rollout, "CHUNK", 4)
    solver, y0 = random_solver(), start()

    def scaled(factor: Tensor) -> Tensor:
        return solver.solve(lambda t, y: factor * damped_wave(t, y), y0, SPAN)

    factors = torch.tensor([0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        found = torch.vmap(scaled)(factors)
        expected = torch.stack([scaled(factor) for factor in factors])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_weights_written_behind_autograd_s_back_are_used() -> None:
    solver = random_solver()
    solver.domain = FitDomain((0.0, 1.0), 1.0, 1.0, (1,), ((2,),), False, "float64")
    with torch.no_grad():
        solver.solve(damped_wave, start(), SPAN)
        solver.weights.data.copy_(classical("rk4", 5))
        found = solver.solve(damped_wave, start(), SPAN)
    expected = BespokeSolver.classical("rk4", 5).solve(damped_wave, start(), SPAN)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


# torch 2.13's own forward-mode rules use what it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_large_states_have_the_gradients_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    solver, field = random_solver(), MLPField()
    directions = torch.ones_like(start())

    def derivatives() -> list[Tensor]:
        y0 = start().requires_grad_()

        def end(y: Tensor) -> Tensor:
            return solver.solve(field, y, SPAN)[-1]

        loss = end(y0).square().sum()
        first = torch.autograd.grad(loss, (y0, *field.parameters()), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), y0)
        _, tangent = torch.func.jvp(end, (start(),), (directions,))
        return [*first, *second, tangent]

    expected = derivatives()
    monkeypatch.setattr(_rollout, "CHUNK", 4)
    for found, wanted in zip(derivatives(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
