"""Hypernets see the context of the samples of a solve, through every entry and wrapper."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError

T = torch.tensor([0.0, 1.0])
Y0 = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
RATE = torch.rand(6, 1, generator=torch.Generator().manual_seed(2)) + 0.5
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def decay(t: Tensor, y: Tensor, rate: Tensor, labels: Tensor) -> Tensor:
    return -rate * y + labels.to(y.dtype).unsqueeze(1) * torch.cos(t)


def conditioned() -> tdh.Conditioned:
    return tdh.Conditioned(decay, RATE, LABELS)


class Watch:
    """A hypernet that keeps what it sees of the samples."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, ...]] = []

    def __call__(self, step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        self.seen.append(step.context)
        return step.y * (0.1 * step.context[0] if step.context else 0.1)


def solver_of(base: str, net: Any) -> tdh.HyperSolver:
    if base == "bns":
        return tdh.BespokeSolver(tdh.BespokeSolver.classical("heun", 4).weights, hypernet=net)
    return tdh.HyperSolver(base, net, steps=2)


def by_host(solver: tdh.HyperSolver, func: Any) -> Any:
    return odeint(func, Y0, T, method=solver.method, options={"solver": solver})


def by_adjoint(solver: tdh.HyperSolver, func: Any) -> Any:
    given = {"method": solver.method, "options": {"solver": solver}, "adjoint_params": ()}
    return odeint_adjoint(func, Y0, T, **given)


def recorded(solver: tdh.HyperSolver, func: Any) -> Any:
    with tdh.record():
        return by_host(solver, func)


def compiled(solver: tdh.HyperSolver, func: Any) -> Any:
    return solver.solve(torch.compile(func, backend="eager"), Y0, T)


@pytest.mark.parametrize("base", ["euler", "midpoint", "heun", "alpha", "rk4", "bns"])
@pytest.mark.parametrize("solve", [by_host, by_adjoint, recorded, compiled])
def test_a_hypernet_sees_the_context_of_the_solve(solve: Callable[..., Any], base: str) -> None:
    watch, func = Watch(), conditioned()
    solver = solver_of(base, watch)
    alone = solver.solve(func, Y0, T)
    assert torch.allclose(solve(solver, func), alone, atol=1e-6)
    assert watch.seen
    assert all(context is func.inputs for context in watch.seen)


def test_without_context_a_hypernet_sees_none() -> None:
    watch = Watch()
    by_host(solver_of("heun", watch), lambda t, y: -y)
    assert watch.seen == [(), ()]


def test_reverse_time_and_tuple_states_have_the_same_context() -> None:
    seen = []

    def net(step: tdh.StepInput) -> tuple[Tensor, ...]:
        seen.append(step.context)
        return tuple(torch.zeros_like(part) for part in step.y)

    func = tdh.Conditioned(lambda t, s, rate: (-rate * s[0], s[1] + t), RATE)
    odeint(
        func,
        (Y0, Y0[:, 0]),
        T.flip(0),
        method="hyperheun",
        options={"solver": tdh.HyperSolver("heun", net, steps=2)},
    )
    assert [context[0] is RATE for context in seen] == [True, True]


def test_each_group_of_a_dispatched_solve_has_its_rows() -> None:
    watch = Watch()
    candidates = [tdh.Candidate(tdh.HyperSolver("heun", watch, steps=2)), tdh.Candidate("rk4")]
    costs = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[LABELS % 2]
    dise = tdh.Dise(candidates, selector=lambda y: costs)
    odeint(conditioned(), Y0, T, method="dise", options={"dise": dise})
    for rate, labels in watch.seen:
        assert torch.equal(rate, RATE[LABELS % 2 == 0])
        assert torch.equal(labels, LABELS[LABELS % 2 == 0])


def test_torchdyn_passes_the_context_on() -> None:
    pytest.importorskip("torchdyn")
    from torchdyn.numerics import odeint as torchdyn_odeint

    watch, func = Watch(), conditioned()
    solver = solver_of("heun", watch)
    _, found = torchdyn_odeint(func, Y0, T, solver=solver)
    assert torch.allclose(found[-1], solver.solve(func, Y0, T)[-1])
    assert all(context is func.inputs for context in watch.seen)


def test_a_compiled_solve_sees_the_context_and_is_not_compiled_anew_after_imports() -> None:
    import sys
    from types import ModuleType

    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    solver, func = solver_of("heun", concat(2)), conditioned()
    compiled = torch.compile(solver.solve, fullgraph=True, backend=backend)
    with torch.no_grad():
        first = compiled(func, Y0, T)
        sys.modules["imported_by_a_test"] = ModuleType("imported_by_a_test")
        second = compiled(func, Y0, T)
        del sys.modules["imported_by_a_test"]
        assert torch.equal(first, second)
        assert torch.allclose(first, solver.solve(func, Y0, T))
    assert len(graphs) == 1


def concat(n_context: int, inputs: tuple[str, ...] = ("y", "context")) -> tdh.ConcatHypernet:
    torch.manual_seed(0)
    return tdh.ConcatHypernet(nn.Linear(2 + n_context, 2), inputs=inputs)


def step_of(y: Tensor, *context: Tensor) -> tdh.StepInput:
    return tdh.StepInput(torch.tensor(0.1), torch.tensor(0.0), y, y, (y,), y, context)


def test_context_becomes_channels_in_its_order() -> None:
    joined = concat(2).concat(step_of(Y0, RATE, LABELS))
    assert torch.equal(joined, torch.cat([Y0, RATE, LABELS.float().unsqueeze(1)], 1))


def test_context_without_space_is_repeated_over_that_of_the_state() -> None:
    y, image = torch.randn(6, 2, 4, 5), torch.randn(6, 3, 4, 5)
    joined = concat(5).concat(step_of(y, LABELS, image, RATE))
    assert joined.shape == (6, 7, 4, 5)
    assert torch.equal(joined[:, 2], LABELS.float()[:, None, None].expand(6, 4, 5))
    assert torch.equal(joined[:, 3:6], image)
    assert torch.equal(joined[:, 6], RATE[:, :, None].expand(6, 4, 5))


@pytest.mark.parametrize(
    ("context", "error", "text"),
    [
        ((), StateTypeError, r'asks for "context"(?s:.*)tdh\.Conditioned'),
        ((RATE[:3],), StateShapeError, r"\(3, 1\)"),
        ((torch.ones(6, 1, 3),), StateShapeError, r"step\.context"),
        ((torch.ones(6, 1, dtype=torch.complex64),), StateTypeError, "complex"),
        ((RATE, RATE), StateShapeError, '"context" 2'),
    ],
)
def test_context_that_is_no_channel_is_refused(
    context: tuple[Tensor, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        concat(1)(step_of(Y0, *context))


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "bottleneck"])
def test_ready_nets_take_context_and_come_back_from_files(kind: str) -> None:
    hypernets = tdh.hypernets
    inputs: Any = {"inputs": ("y", "dt", "context"), "n_context": 2}
    nets: dict[str, Callable[[], Any]] = {
        "linear": lambda: hypernets.Linear(2, **inputs),
        "mlp": lambda: hypernets.MLP(2, (8,), **inputs),
        "conv": lambda: hypernets.Conv(2, 8, **inputs),
        "bottleneck": lambda: hypernets.Bottleneck(2, 4, **inputs),
    }
    torch.manual_seed(0)
    net = nets[kind]()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    y0 = Y0 if kind in {"linear", "mlp"} else torch.randn(6, 2, 4, 4)
    rate = RATE.reshape(-1, *[1] * (y0.dim() - 1))
    func = tdh.Conditioned(lambda t, y, rate, labels: -rate.reshape(rate_shape) * y, RATE, LABELS)
    rate_shape = rate.shape
    solver = tdh.HyperSolver("euler", net, steps=2)
    with tempfile.TemporaryDirectory() as folder:
        solver.save(f"{folder}/s.safetensors")
        loaded = tdh.HyperSolver.load(f"{folder}/s.safetensors")
    assert torch.equal(loaded.solve(func, y0, T), solver.solve(func, y0, T))


@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 4, 4)])
def test_the_net_that_suits_a_state_takes_context(shape: tuple[int, ...]) -> None:
    from torchdiffeq_hyper.tableaus import HEUN

    y0 = torch.zeros(shape)
    net = tdh.hypernets.ready(y0, HEUN, inputs=("y", "context"), n_context=2)
    out = net(step_of(y0, RATE, LABELS))
    assert isinstance(out, Tensor)
    assert out.shape == shape


def test_a_ready_net_must_know_the_channels_of_the_context() -> None:
    with pytest.raises(OptionError, match="n_context is 0"):
        tdh.hypernets.MLP(2, inputs=("y", "context"))
    with pytest.raises(OptionError, match=r"inputs=\('y', 'dt', 'context'\)"):
        tdh.hypernets.MLP(2, inputs=("y", "dt"), n_context=2)
    assert "n_context" not in tdh.hypernets.MLP(2).architecture


@pytest.mark.parametrize("base", ["heun", "bns"])
def test_a_fit_trains_a_net_on_the_context(base: str) -> None:
    generator = torch.Generator().manual_seed(5)
    count = 400 if base == "bns" else 80
    sizes = (2 * count, count)
    y0, rate = (torch.randn(n, generator=generator).reshape(count, -1).double() for n in sizes)
    net = tdh.hypernets.MLP(2, (16,), inputs=("y", "stages", "context"), n_stages=4, n_context=1)
    if base == "heun":
        net = tdh.hypernets.MLP(2, (16,), inputs=("y", "context"), n_context=1)
    solver = tdh.fit(
        lambda t, y, rate: -rate * y + torch.sin(t),
        y0,
        (0.0, 2.0),
        base=base,
        steps=4,
        hypernet=net.double(),
        context=rate,
        config=tdh.FitConfig(iterations=60, max_seconds=1e6),
        progress=False,
    )
    assert solver.report is not None
    assert solver.report.validation < solver.report.base_validation
    if solver.hypernet is None:  # a correction of "bns" may spoil the tail
        assert any("these are the weights alone" in note for note in solver.report.notes)


def test_evaluate_takes_the_context_of_its_samples() -> None:
    given: dict[str, Any] = {"steps": [2], "progress": False, "repeats": 1}
    methods = ["euler", "rk4", "dopri5", "dopri5_per_sample"]
    one = tdh.evaluate(decay, Y0, (0.0, 1.0), methods, context=(RATE, LABELS), **given)
    two = tdh.evaluate(conditioned(), Y0, (0.0, 1.0), methods, **given)
    assert [row.relative_l2 for row in one.rows] == [row.relative_l2 for row in two.rows]
    assert [row.nfe for row in one.rows] == [row.nfe for row in two.rows]
    assert all(row.relative_l2 < 1e-2 for row in one.rows[1:])


@pytest.mark.parametrize("is_inner", [False, True])
def test_evaluate_finds_what_is_attached_to_a_conditioned_func(is_inner: bool) -> None:
    func = conditioned()
    tdh.attach(decay if is_inner else func, solver_of("heun", Watch()))
    try:
        for field, context in ((func, None), *([(decay, func.inputs)] if is_inner else [])):
            given: Any = {"context": context, "steps": [2], "progress": False}
            table = tdh.evaluate(field, Y0, (0.0, 1.0), ["hyperheun"], **given)
            assert table.rows[0].is_learned
    finally:
        tdh.detach(decay if is_inner else func)


@pytest.mark.parametrize(
    ("context", "error", "text"),
    [
        ("batch", OptionError, "y0 is one state"),
        ((RATE[:2], LABELS[:2]), StateShapeError, "y0 has 6 samples"),
        ((RATE, LABELS, RATE), StateTypeError, "3 tensors of context"),
        (None, StateTypeError, r"tdh\.Conditioned"),
        ([RATE, LABELS[:2]], StateShapeError, r"\(6, 1\), \(2,\)"),
    ],
)
def test_evaluate_refuses_context_that_does_not_fit(
    context: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        tdh.evaluate(decay, Y0, (0.0, 1.0), ["euler"], steps=[2], context=context)
    with pytest.raises(StateTypeError, match="y0 is a list"):
        tdh.evaluate(conditioned(), [1.0], (0.0, 1.0), ["euler"], steps=[2])  # type: ignore[arg-type]
    with pytest.raises(StateShapeError, match="y0 has no samples"):
        tdh.evaluate(conditioned(), torch.tensor(1.0), (0.0, 1.0), ["euler"], steps=[2])
    with pytest.raises(StateShapeError, match="y0 has 3 samples"):
        tdh.evaluate(conditioned(), Y0[:3], (0.0, 1.0), ["euler"], steps=[2])


def test_a_neural_ode_takes_no_context() -> None:
    torchdyn = pytest.importorskip("torchdyn.core")
    node = torchdyn.NeuralODE(nn.Linear(2, 2))
    for func, context in ((node, RATE), (tdh.Conditioned(node, RATE), None)):
        with pytest.raises(OptionError, match="torchdyn calls its field with t and y alone"):
            tdh.fit(func, Y0, (0.0, 1.0), base="euler", steps=2, context=context)
    with pytest.raises(OptionError, match="the field itself"):
        tdh.evaluate(node, Y0, (0.0, 1.0), ["euler"], steps=[2], context=RATE)


def test_conditioned_is_public_where_it_was() -> None:
    assert tdh.dise.Conditioned is tdh.Conditioned


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3, RATE), StateTypeError),
        ((decay, [1.0]), StateTypeError),
        ((decay,), StateShapeError),
        ((decay, torch.tensor(1.0)), StateShapeError),
        ((decay, RATE, RATE[:2]), StateShapeError),
    ],
)
def test_conditioned_refuses_what_has_no_samples(
    arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"tdh\.Conditioned"):
        tdh.Conditioned(*arguments)
