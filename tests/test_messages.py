"""The advice in an error or warning applies to the call that it is given for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_event

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, damped_wave
from torchdiffeq_hyper.errors import OptionError, OutsideFitWarning, StateShapeError, StateTypeError
from torchdiffeq_hyper.methods import _registry

T = torch.tensor([0.0, 1.0])
Y0 = torch.ones(4, 2)
PAIR = (torch.ones(4, 2), torch.ones(4))
QUICK = tdh.FitConfig(iterations=4, pretrain_iterations=2)
LEARNED = [name for name, method in _registry.methods().items() if method.corrects_base]


def _fix(error: BaseException) -> str:
    return str(error).split("fix:", 1)[1].strip()


def _domain(span: tuple[float, float], steps: int) -> tdh.FitDomain:
    dt = abs(span[1] - span[0]) / steps
    sign = 1 if span[1] > span[0] else -1
    return tdh.FitDomain(span, dt, dt, (sign,), ((2,),), is_tuple=False, dtype="float32")


def _like(value: float) -> Callable[[tdh.StepInput], Any]:
    def net(step: tdh.StepInput) -> Any:
        if isinstance(step.y, Tensor):
            return step.y * value
        return tuple(part * value for part in step.y)

    return net


# many output points


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.0, 0.7), (2.0, 0.3), (100.0, 103.3)])
@pytest.mark.parametrize("steps", [1, 3, 10, 32])
@pytest.mark.parametrize("method", LEARNED)
def test_many_points_say_once_how_to_take_the_fitted_steps(
    method: str, steps: int, span: tuple[float, float]
) -> None:
    base = _registry.methods()[method].tableau
    assert base is not None
    solver = tdh.HyperSolver(base.name, zero, steps, domain=_domain(span, steps))
    share = torch.cat([torch.zeros(1), torch.rand(39).sort().values, torch.ones(1)])
    t = span[0] + share * (span[1] - span[0])
    t[-1] = span[1]
    with pytest.warns(OutsideFitWarning, match=f"41 points.*{steps} step") as caught:
        odeint(damped_wave, Y0, t, method=method, options={"solver": solver})
    assert len(caught) == 1
    odeint(damped_wave, Y0, t, method=method, options={"solver": solver})
    solver.solve(damped_wave, Y0, t)
    advised = eval("{" + str(caught[0].message).split("{..., ")[1])
    func = Counted(damped_wave)
    fresh = tdh.HyperSolver(base.name, zero, steps, domain=solver.domain)
    y = odeint(func, Y0, t, method=method, options={"solver": fresh, **advised})  # warns of nothing
    assert func.calls == steps * base.calls + 1
    assert y.shape == (41, 4, 2)


def test_solve_names_the_host_for_many_points() -> None:
    solver = tdh.HyperSolver("heun", _like(0.1), 4, domain=_domain((0.0, 1.0), 4))
    t = torch.linspace(0, 1, 12)
    with pytest.warns(OutsideFitWarning, match="torchdiffeq.odeint") as caught:
        solver.solve(damped_wave, Y0, t)
    call = str(caught[0].message).split("torchdiffeq.", 1)[1]
    y = eval(call, {"odeint": odeint, "func": damped_wave, "y0": Y0, "t": t, "solver": solver})
    ends = odeint(damped_wave, Y0, T, method="hyperheun", options={"solver": solver})
    torch.testing.assert_close(y[-1], ends[-1], rtol=1e-4, atol=1e-4)


def test_points_at_fitted_step_sizes_warn_of_nothing() -> None:
    solver = tdh.HyperSolver("heun", zero, 10, domain=_domain((0.0, 1.0), 10))
    odeint(
        damped_wave, Y0, torch.linspace(0, 3, 31), method="hyperheun", options={"solver": solver}
    )


def test_points_within_less_than_a_fitted_step_are_told_of_the_step_size_alone() -> None:
    solver = tdh.HyperSolver("heun", zero, 10, domain=_domain((0.0, 1.0), 10))
    with pytest.warns(OutsideFitWarning, match="tdh.evaluate"):
        solver.solve(damped_wave, Y0, torch.linspace(0, 0.01, 5))


@pytest.mark.parametrize("options", [{"perturb": True}, {}])
def test_cubic_reading_gives_the_hosts_numbers_and_gradients(options: dict[str, Any]) -> None:
    options = {"step_size": 0.3, "interp": "cubic", **options}
    t = torch.linspace(0, 1, 9)
    y, rate = Y0.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    grads = []
    for method, more in (("heun2", {}), ("hyperheun", {"hypernet": zero})):
        out = odeint(
            lambda t, y: damped_wave(t, rate * y), y, t, method=method, options=options | more
        )
        grads.append((out, *torch.autograd.grad(out.square().sum(), (y, rate))))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1:], grads[1][1:])


# states


@pytest.mark.parametrize(
    "inputs", [("y", "f0", "dt"), ("y", "stages", "t"), ("y0", "y", "dt", "t")]
)
@pytest.mark.parametrize("channels", [2, 5])
def test_a_state_without_a_batch_is_told_so(channels: int, inputs: tuple[str, ...]) -> None:
    net = tdh.hypernets.MLP(channels, (4,), inputs=inputs, n_stages=2)
    solver = tdh.HyperSolver("heun", net, steps=2)
    y0 = torch.randn(channels)
    with pytest.raises(StateShapeError, match="no batch dimension") as caught:
        solver.solve(damped_wave, y0, T)
    scope = {"y0": y0}
    exec(_fix(caught.value), scope)
    solver.solve(damped_wave, scope["y0"], T)
    with pytest.raises(StateShapeError, match="no batch dimension"):
        odeint(damped_wave, y0, T, method="hyperheun", options={"solver": solver})
    with pytest.raises(StateShapeError, match="no batch dimension"):
        torch.func.vmap(lambda y: solver.solve(damped_wave, y, T))(torch.randn(3, channels))


def test_an_image_without_a_batch_is_told_so() -> None:
    net = nn.Sequential(nn.Conv2d(3 + 3 + 1, 3, 3, padding=1))
    solver = tdh.HyperSolver("euler", tdh.ConcatHypernet(net), steps=1)
    with pytest.raises(StateShapeError, match=r"no batch dimension[\s\S]*unsqueeze\(0\)"):
        solver.solve(damped_wave, torch.randn(3, 8, 8), T)
    ready = tdh.HyperSolver("euler", tdh.hypernets.Conv(3, n_spatial=2), steps=1)
    with pytest.raises(StateShapeError, match=r"unsqueeze\(0\)"):
        ready.solve(damped_wave, torch.randn(3, 8, 8), T)


def test_a_net_of_other_channels_is_still_told_so() -> None:
    solver = tdh.HyperSolver("euler", tdh.hypernets.MLP(3), steps=1)
    with pytest.raises(StateShapeError, match="first layer with 5 input channels"):
        solver.solve(damped_wave, torch.randn(7, 2), T)


def test_integer_parts_of_a_tuple_are_cast_part_by_part() -> None:
    y0 = (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    solver = tdh.HyperSolver("euler", _like(0.0), steps=1)
    with pytest.raises(StateTypeError) as caught:
        solver.solve(lambda t, y: y, y0, T)
    scope = {"y0": y0}
    exec(_fix(caught.value), scope)
    solver.solve(lambda t, y: y, scope["y0"], T)


@pytest.mark.parametrize("y0", [(torch.ones(3, 2), torch.tensor(1.0)), torch.tensor(1.0)])
def test_states_without_samples_get_advice_for_their_kind(y0: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: odeint(lambda t, y: y, y0, T, method="dopri5_per_sample"),
        lambda: tdh.evaluate(lambda t, y: y, y0, (0.0, 1.0), ["dopri5"], progress=False),
    ]
    for call in calls:
        with pytest.raises(StateShapeError) as caught:
            call()
        assert ("tuple(" in _fix(caught.value)) == isinstance(y0, tuple)


def test_batches_with_labels_are_told_of_context() -> None:
    loader = [[torch.randn(8, 2), torch.zeros(8, dtype=torch.long)]]
    with pytest.raises(StateTypeError, match='context="batch"'):
        tdh.fit(damped_wave, loader, (0.0, 1.0), base="euler", steps=2, progress=False)


# methods


@pytest.mark.parametrize(
    "solver",
    [
        tdh.BespokeSolver.classical("rk4", 4),
        tdh.Dise([tdh.Candidate("euler", steps=1)], selector=lambda y0: torch.zeros(len(y0), 1)),
    ],
)
def test_an_event_under_override_is_not_sent_back_to_the_overridden_method(solver: Any) -> None:
    def event() -> Any:
        start, crosses = torch.tensor(0.0), lambda t, y: y[0, 0] - 0.5
        return odeint_event(lambda t, y: -y, Y0, start, event_fn=crosses, method="dopri5")

    with tdh.override("dopri5", solver), pytest.raises(OptionError) as caught:
        event()
    assert 'method="dopri5"' not in _fix(caught.value)
    assert "outside of the block" in _fix(caught.value)
    event()  # outside of the block


def test_a_hypersolver_given_to_bns_is_sent_to_its_own_method() -> None:
    solver = tdh.HyperSolver("heun", zero, steps=2)
    with pytest.raises(StateTypeError, match='method="hyperheun"'):
        odeint(damped_wave, Y0, T, method="bns", options={"solver": solver})


def _bespoke(span: tuple[float, float]) -> tdh.BespokeSolver:
    made = tdh.BespokeSolver.classical("rk4", 16)
    return tdh.BespokeSolver(made.weights, domain=_domain(span, 1))


@pytest.mark.parametrize("t", [[0.0, 3.0], [1.0, 2.0], [2.0, 0.5]])
def test_times_outside_are_answered_with_a_fit_of_as_many_calls(t: list[float]) -> None:
    with pytest.raises(OptionError) as caught:
        _bespoke((0.0, 2.0)).solve(damped_wave, Y0, torch.tensor(t))
    assert f'({t[0]:g}, {t[1]:g}), base="bns", steps=16)' in _fix(caught.value)


def test_the_way_back_is_answered_with_a_fit_in_reverse() -> None:
    with pytest.raises(OptionError) as caught:
        _bespoke((0.0, 2.0)).solve(damped_wave, Y0, torch.tensor([2.0, 0.0]))
    assert '(0, 2), base="bns", steps=16, direction="reverse")' in _fix(caught.value)


# func's answers


def _entries() -> dict[str, Callable[[Any, Any], Any]]:
    entries: dict[str, Callable[[Any, Any], Any]] = {}

    def by_host(method: str, t: Tensor, options: dict[str, Any]) -> Callable[[Any, Any], Any]:
        return lambda func, y: odeint(func, y, t, method=method, options=options)

    dise = tdh.Dise(
        [tdh.Candidate("euler", steps=1), tdh.Candidate("dopri5", rtol=1e-3, atol=1e-3)],
        selector=lambda y0: torch.eye(2)[torch.arange(4) % 2],
    )
    known = {"bns": {"solver": tdh.BespokeSolver.classical("rk4", 4)}, "dise": {"dise": dise}}
    learned = {name: {"hypernet": _like(0.0)} for name in LEARNED}
    for name, options in {**learned, **known, "dopri5_per_sample": {}}.items():
        entries[name] = by_host(name, T, options)
        entries[f"{name} in reverse"] = by_host(name, T.flip(0), options)
    entries["solve"] = lambda func, y: tdh.HyperSolver("rk4", _like(0.0), steps=2).solve(func, y, T)
    entries["bns solve"] = lambda func, y: known["bns"]["solver"].solve(func, y, T)
    for base in ("euler", "bns"):
        entries[f"fit {base}"] = lambda func, y, base=base: tdh.fit(
            func, y, (0.0, 1.0), base=base, steps=3, config=QUICK, progress=False
        )
    entries["evaluate"] = lambda func, y: tdh.evaluate(
        func, y, (0.0, 1.0), ["euler", "dopri5"], steps=[2], progress=False
    )
    cost = tdh.RegressionCost(
        lambda y, index: torch.zeros(len(index)), threshold=0.1, alpha=0.3, penalty=1e3
    )
    entries["dise.fit"] = lambda func, y: tdh.Dise(list(dise.candidates)).fit(
        func, y, T, cost=cost, progress=False
    )
    return entries


ENTRIES = _entries()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_func_without_a_tensor_is_named_at_every_entry(entry: str) -> None:
    for y0 in (Y0, PAIR):
        for answer in (None, 1.0, [1.0, 2.0], (1.0, 2.0), (None, Y0)):
            with pytest.raises(StateTypeError, match="func returned a") as caught:
                ENTRIES[entry](lambda t, y, answer=answer: answer, y0)
            assert "as_tensor" not in _fix(caught.value)
    with pytest.raises(tdh.HyperError, match="func returned"):
        ENTRIES[entry](lambda t, y: (y[0],), PAIR)
    with pytest.raises(tdh.HyperError, match="func returned"):
        ENTRIES[entry](lambda t, y: (y[0], y[0]), PAIR)


@pytest.mark.parametrize(
    ("answer", "way_out"),
    [
        (None, "ends without a return"),
        (1.0, "torch.full_like"),
        ((Y0[:, 0], Y0[:, 1]), "torch.stack"),
        (Y0.numpy(), "torch.as_tensor"),
    ],
)
def test_the_way_out_of_an_answer_without_a_tensor_is_by_its_kind(
    answer: Any, way_out: str
) -> None:
    with pytest.raises(StateTypeError, match="func returned a") as caught:
        odeint(lambda t, y: answer, Y0, T, method="hyperheun", options={"hypernet": zero})
    assert way_out in _fix(caught.value)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_func_without_a_tensor_is_named_in_torchdyn(reverse: bool) -> None:
    numerics = pytest.importorskip("torchdyn.numerics")
    t = T.flip(0) if reverse else T
    for solver in (tdh.HyperSolver("heun", zero, steps=2), tdh.BespokeSolver.classical("rk4", 4)):
        for answer in (None, 1.0):
            with pytest.raises(StateTypeError, match="func returned a"):
                numerics.odeint(lambda t, y, answer=answer: answer, Y0, t, solver)


def test_errors_inside_func_pass_as_they_are() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        message = "of my own"
        raise TypeError(message)

    with pytest.raises(TypeError, match="of my own"):
        odeint(func, Y0, T, method="hypereuler", options={"hypernet": zero})
