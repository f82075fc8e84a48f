"""Several solvers of one method on one field: the call's times choose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint, odeint_event
from torchdyn.core import NeuralODE
from torchdyn.numerics import odeint as torchdyn_odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import damped_wave
from torchdiffeq_hyper.errors import OptionError, OutsideFitWarning, StateTypeError
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers.bespoke import classical
from torchdyn_stubs import Field

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
Y0 = torch.linspace(-1, 1.5, 12, dtype=torch.float64).reshape(6, 2)
LEARNED = [m.name for m in _registry.methods().values() if m.corrects_base and m.follows_grid]

Bind: TypeAlias = Callable[[Any, list[Any]], Any]


def _domain(span: tuple[float, float], *directions: int) -> tdh.FitDomain:
    return tdh.FitDomain(span, 1e-3, 10.0, directions or (1,), ((2,),), False, "float64")


def bespoke(span: tuple[float, float], calls: int, direction: int = 1) -> tdh.BespokeSolver:
    """A solver of its own number of calls, by which the solution tells it from others."""
    return tdh.BespokeSolver(classical("euler", calls), domain=_domain(span, direction))


def hyper(
    span: tuple[float, float] | None, steps: int, *directions: int, base: str = "euler"
) -> tdh.HyperSolver:
    """A hypersolver of its own number of steps."""
    domain = None if span is None else _domain(span, *directions)
    return tdh.HyperSolver(base, zero, steps=steps, domain=domain)


def _attached(func: Any, solvers: list[Any]) -> ExitStack:
    stack = ExitStack()
    for solver in solvers:
        tdh.attach(func, solver)
    stack.callback(tdh.detach, func)
    return stack


def _scoped(func: Any, solvers: list[Any]) -> ExitStack:
    stack = ExitStack()
    for solver in solvers:
        stack.enter_context(tdh.using(solver))
    return stack


BOTH_WAYS = pytest.mark.parametrize("bind", [_attached, _scoped])


def _torchdiffeq(func: Any, t: Tensor, method: str) -> Tensor:
    found: Tensor = odeint(func, Y0, t, method=method)
    return found


def _torchdyn(func: Any, t: Tensor, method: str) -> Tensor:
    found: Tensor = torchdyn_odeint(func, Y0, t, method)[1]
    return found


def _torchdyn_model(func: Any, t: Tensor, method: str) -> Tensor:
    found: Tensor = NeuralODE(func, solver=method)(Y0, t)[1]
    return found


HOSTS = pytest.mark.parametrize("solve", [_torchdiffeq, _torchdyn, _torchdyn_model])
pytestmark = pytest.mark.filterwarnings("ignore:torchdyn returns the times")


@pytest.fixture
def func() -> Field:
    return Field()


@HOSTS
@BOTH_WAYS
@pytest.mark.parametrize("order", [1, -1])
def test_each_direction_takes_its_own_bespoke_solver(
    func: Field, solve: Any, bind: Bind, order: int
) -> None:
    there, back = bespoke((0.0, 1.0), 5), bespoke((1.0, 0.0), 7, 1)
    # The same span as a fit with direction="reverse" writes it.
    written_forward = bespoke((0.0, 1.0), 7, -1)
    for reverse in (back, written_forward):
        reverse.domain = _domain(reverse.domain.span, -1)  # type: ignore[union-attr]
        assert reverse.span == (1.0, 0.0)
        with torch.no_grad(), bind(func, [there, reverse][::order]):
            for t, solver in ((T, there), (T.flip(0), reverse)):
                torch.testing.assert_close(
                    solve(func, t, "bns"), solver.solve(func, Y0, t), rtol=1e-13, atol=1e-13
                )


@HOSTS
@BOTH_WAYS
def test_each_span_takes_its_own_bespoke_solver(func: Field, solve: Any, bind: Bind) -> None:
    spans = [(0.0, 1.0), (1.0, 3.0), (-2.0, 0.5), (0.0, 0.25)]
    solvers = [bespoke(span, 4 + i) for i, span in enumerate(spans)]
    with torch.no_grad(), bind(func, solvers):
        for span, solver in zip(spans, solvers, strict=True):
            for points in (2, 4):
                t = torch.linspace(*span, points, dtype=torch.float64)
                assert torch.equal(solve(func, t, "bns"), solver.solve(func, Y0, t))
        inside = torch.tensor([0.0, 0.8], dtype=torch.float64)
        assert torch.equal(solve(func, inside, "bns"), solvers[0].solve(func, Y0, inside))


@HOSTS
@BOTH_WAYS
def test_times_that_no_solver_serves_are_answered_with_all_that_there_are(
    func: Field, solve: Any, bind: Bind
) -> None:
    with bind(func, [bespoke((0.0, 1.0), 4), bespoke((1.0, 0.0), 5, -1)]):
        for t in (2 * T, T + 0.5, (2 * T).flip(0)):
            with pytest.raises(OptionError) as caught:
                solve(func, t, "bns")
            text = str(caught.value)
            assert "from 0 to 1, from 1 to 0" in text
            assert f"t goes from {t[0]:g} to {t[1]:g}" in text
            assert f"tdh.fit(func, y0, ({t[0]:g}, {t[1]:g})" in text


@BOTH_WAYS
def test_event_that_no_bespoke_solver_serves_says_where_it_starts(func: Field, bind: Bind) -> None:
    with (
        bind(func, [bespoke((0.0, 1.0), 4), bespoke((0.0, 2.0), 5)]),
        pytest.raises(OptionError, match="does not look for events"),
    ):
        odeint_event(func, Y0, T[1], event_fn=lambda t, y: y.sum(), method="bns")
    with (
        tdh.override("dopri5", bespoke((0.0, 1.0), 4)),
        pytest.raises(OptionError, match='overrides "dopri5", of method "bns", does not look for'),
    ):
        odeint_event(func, Y0, T[1], event_fn=lambda t, y: y.sum(), method="dopri5")


@HOSTS
@BOTH_WAYS
@pytest.mark.parametrize("method", LEARNED)
def test_hypersolver_is_chosen_by_span_then_direction_then_age(
    func: Field, solve: Any, bind: Bind, method: str
) -> None:
    base = _registry.find(method).tableau.name  # type: ignore[union-attr]
    solvers = [
        hyper((0.0, 1.0), 3, 1, base=base),
        hyper((0.0, 1.0), 4, -1, base=base),
        hyper((0.0, 4.0), 5, 1, base=base),
        hyper((2.0, 3.0), 6, 1, -1, base=base),
    ]
    wanted = {(0.0, 1.0): 3, (1.0, 0.0): 4, (0.0, 4.0): 5, (3.0, 2.0): 6, (2.0, 3.0): 6}
    wanted |= {(0.0, 0.5): 6, (4.0, 0.0): 6}  # the latest of those fitted for the direction
    with torch.no_grad(), bind(func, solvers):
        for span, steps in wanted.items():
            t = torch.tensor(span, dtype=torch.float64)
            own = hyper(None, steps, base=base).solve(func, Y0, t)
            torch.testing.assert_close(solve(func, t, method), own, rtol=1e-13, atol=1e-13)


@HOSTS
@BOTH_WAYS
def test_hypersolver_of_the_other_direction_serves_where_there_is_no_better(
    func: Field, solve: Any, bind: Bind
) -> None:
    solvers = [hyper((0.0, 1.0), 3, 1), hyper((0.0, 2.0), 4, 1)]
    with torch.no_grad(), bind(func, solvers), pytest.warns(OutsideFitWarning):
        found = solve(func, T.flip(0), "hypereuler")
    own = hyper(None, 4).solve(func, Y0, T.flip(0))
    torch.testing.assert_close(found, own, rtol=1e-13, atol=1e-13)


def test_solver_without_a_domain_serves_all_times_and_the_latest_wins(func: Field) -> None:
    plain, fitted = hyper(None, 3), hyper((0.0, 1.0), 4)
    for solvers, steps in (([plain, fitted], 4), ([fitted, plain], 3)):
        with torch.no_grad(), _attached(func, solvers):
            found = odeint(func, Y0, T, method="hypereuler")
            assert torch.equal(found, hyper(None, steps).solve(func, Y0, T))
            found = odeint(func, Y0, T.flip(0), method="hypereuler")  # and no warning
    with torch.no_grad(), tdh.using(fitted), tdh.using(plain):
        found = odeint(func, Y0, T, method="hypereuler")
    assert torch.equal(found, plain.solve(func, Y0, T))


def test_solver_of_the_same_direction_and_span_replaces_the_old_one(func: Field) -> None:
    tdh.attach(func, bespoke((0.0, 1.0), 3))
    latest = tdh.attach(func, bespoke((0.0, 1.0), 4))
    other = tdh.attach(func, bespoke((0.0, 2.0), 5))
    with torch.no_grad():
        assert torch.equal(odeint(func, Y0, T, method="bns"), latest.solve(func, Y0, T))
        assert torch.equal(odeint(func, Y0, 2 * T, method="bns"), other.solve(func, Y0, 2 * T))
    tdh.attach(func, hyper(None, 2))
    tdh.detach(func, "bns")
    with pytest.raises(tdh.MissingHypernetError):
        odeint(func, Y0, 2 * T, method="bns")
    odeint(func, Y0, T, method="hypereuler")
    tdh.detach(func)


def test_scoped_solver_serves_times_that_the_attached_one_was_not_fitted_for(
    func: Field,
) -> None:
    there, back = bespoke((0.0, 1.0), 3), bespoke((0.0, 1.0), 4, -1)
    with torch.no_grad(), _attached(func, [there]), tdh.using(back):
        assert torch.equal(odeint(func, Y0, T, method="bns"), there.solve(func, Y0, T))
        t = T.flip(0)
        assert torch.equal(odeint(func, Y0, t, method="bns"), back.solve(func, Y0, t))
    forward, reverse = hyper((0.0, 1.0), 3, 1), hyper((0.0, 5.0), 4, -1)
    with torch.no_grad(), _attached(func, [forward]), tdh.using(reverse):
        assert torch.equal(odeint(func, Y0, T, method="hypereuler"), forward.solve(func, Y0, T))
        assert torch.equal(odeint(func, Y0, t, method="hypereuler"), reverse.solve(func, Y0, t))


@BOTH_WAYS
@pytest.mark.parametrize("method", ["bns", "hyperheun"])
def test_adjoint_solves_are_chosen_as_others_and_train(bind: Bind, method: str) -> None:
    func = Field()
    if method == "bns":
        pair = [bespoke((0.0, 1.0), 40), bespoke((1.0, 0.0), 41, -1)]
    else:
        pair = [hyper((0.0, 1.0), s, d, base="heun") for s, d in ((10, 1), (11, -1))]  # type: ignore[misc]
    with bind(func, pair):
        for t, solver in ((T, pair[0]), (T.flip(0), pair[1])):
            y0 = Y0.clone().requires_grad_()
            y = odeint_adjoint(func, y0, t, method=method)
            torch.testing.assert_close(y, solver.solve(func, Y0, t), rtol=1e-12, atol=1e-12)
            found = torch.autograd.grad(y[-1].sum(), [y0, *func.parameters()])
            exact = odeint(func, y0, t)[-1].sum()
            wanted = torch.autograd.grad(exact, [y0, *func.parameters()])
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@BOTH_WAYS
def test_events_are_chosen_by_start_and_direction(bind: Bind) -> None:
    def line(t: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(y)

    taken: list[int] = []

    def marked(mark: int, span: tuple[float, float], direction: int) -> tdh.HyperSolver:
        def net(step: tdh.StepInput) -> Any:
            taken.append(mark)
            return torch.zeros_like(step.y)  # type: ignore[arg-type]

        return tdh.HyperSolver("euler", net, steps=4, domain=_domain(span, direction))

    solvers = [marked(0, (0.0, 1.0), 1), marked(1, (1.0, 0.0), -1), marked(2, (5.0, 6.0), 1)]
    y0 = torch.zeros(1, dtype=torch.float64)
    with bind(line, solvers):
        for start, reverse, mark in ((0.0, False, 0), (1.0, True, 1), (5.0, False, 2)):
            taken.clear()
            at = -0.7 if reverse else 0.7
            odeint_event(
                line,
                y0,
                torch.tensor(start, dtype=torch.float64),
                event_fn=lambda t, y, at=at: y[0] - at,
                reverse_time=reverse,
                method="hypereuler",
                options={"step_size": 0.25},
            )
            assert set(taken) == {mark}


def test_half_precision_times_choose_too(func: Field) -> None:
    func = func.to(torch.float32)
    solvers = [bespoke((0.0, 1.0), 3), bespoke((0.0, 3.0), 5)]
    for solver in solvers:
        solver.to(torch.float32)
    with torch.no_grad(), _attached(func, solvers):
        for end, solver in zip((1.0, 3.0), solvers, strict=True):
            t = torch.tensor([0.0, end], dtype=torch.bfloat16)
            found = odeint(func, Y0.float(), t, method="bns")
            torch.testing.assert_close(
                found, solver.solve(func, Y0.float(), t.float()), rtol=1e-5, atol=1e-5
            )


class _Foreign:
    """A fitted part of somebody else's, which has a domain and is no solver of ours."""

    method = "hypereuler"

    def __init__(self, span: tuple[float, float]) -> None:
        self.domain = _domain(span)


def test_foreign_parts_with_a_domain_are_refused_as_any_other_part() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y

    for span in ((0.0, 1.0), (1.0, 2.0)):
        tdh.attach(func, _Foreign(span))
    with pytest.raises(StateTypeError, match='part for method "hypereuler" is a _Foreign'):
        odeint(func, torch.ones(2), torch.tensor([0.0, 1.0]), method="hypereuler")


class _Unreadable:
    """Times that must not be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def _find(func: Any, method: str, t: Any, *, is_negated: bool = False) -> Any:
    from torchdiffeq_hyper.solvers._binding import Times, find_bound

    return find_bound(func, method, Times(t, is_negated=is_negated))


def test_values_of_t_are_not_looked_at_where_there_is_one_solver() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    assert _find(func, "bns", _Unreadable()) is None
    there = tdh.attach(func, bespoke((0.0, 1.0), 3))
    tdh.attach(func, hyper((0.0, 1.0), 3))
    assert _find(func, "bns", _Unreadable()) is there
    plain = tdh.attach(func, hyper(None, 3, base="heun"))
    with tdh.using(hyper((0.0, 1.0), 3, base="heun")):
        assert _find(func, "hyperheun", _Unreadable()) is plain


def test_times_that_the_host_would_refuse_choose_by_what_there_is() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    tdh.attach(func, hyper((0.0, 1.0), 3))
    latest = tdh.attach(func, hyper((0.0, 2.0), 3))
    assert _find(func, "hypereuler", T[:0]) is latest
    assert _find(func, "hypereuler", T[:1]) is latest


@pytest.mark.parametrize("kind", ["meta", "fake", "vmap", "compiled"])
def test_times_without_values_choose_by_direction(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    def find(*, is_negated: bool, method: str = "bns") -> Any:
        found: list[Any] = []
        if kind == "compiled":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            return _find(func, method, T, is_negated=is_negated)
        if kind == "meta":
            return _find(func, method, T.to("meta"), is_negated=is_negated)
        if kind == "fake":
            from torch._subclasses import FakeTensorMode

            with FakeTensorMode() as mode:
                t = mode.from_tensor(T)
                return _find(func, method, t, is_negated=is_negated)

        def look(t: Tensor) -> Tensor:
            found.append(_find(func, method, t, is_negated=is_negated))
            return t

        torch.func.vmap(look)(T.expand(3, 2))
        return found[0]

    there = tdh.attach(func, bespoke((0.0, 1.0), 3))
    back = tdh.attach(func, bespoke((0.0, 1.0), 3, -1))
    assert find(is_negated=False) is there
    assert find(is_negated=True) is back
    tdh.attach(func, bespoke((0.0, 2.0), 4))
    assert find(is_negated=True) is back
    with pytest.raises(OptionError, match=r"options=\{\"solver\": solver\}"):
        find(is_negated=False)
    # Hypersolvers serve any span.
    tdh.attach(func, hyper((0.0, 1.0), 3))
    latest = tdh.attach(func, hyper((0.0, 2.0), 4))
    assert find(is_negated=False, method="hypereuler") is latest


def test_bespoke_solvers_of_the_other_direction_alone_name_the_direction_asked_for() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return damped_wave(t, y)

    tdh.attach(func, bespoke((0.0, 1.0), 3))
    tdh.attach(func, bespoke((0.0, 2.0), 3))
    with pytest.raises(OptionError, match="t goes in reverse; .*from 0 to 1, from 0 to 2"):
        _find(func, "bns", T.to("meta"), is_negated=True)
    with pytest.raises(OptionError, match="t starts at 3 and goes forward"):
        _find(func, "bns", 3 * T[1])


def test_published_and_given_solvers_are_not_chosen_among(func: Field) -> None:
    there, back = bespoke((0.0, 1.0), 3), bespoke((1.0, 0.0), 4, -1)
    with torch.no_grad(), _attached(func, [there, back]):
        given = bespoke((0.0, 1.0), 6)
        found = odeint(func, Y0, T, method="bns", options={"solver": given})
        assert torch.equal(found, given.solve(func, Y0, T))
        tdh.register_method("published", given)
        try:
            found = odeint(func, Y0, T, method="published")
        finally:
            tdh.unregister_method("published")
        assert torch.equal(found, given.solve(func, Y0, T))
        with tdh.override("dopri5", given):
            assert torch.equal(odeint(func, Y0, T, method="dopri5"), given.solve(func, Y0, T))
