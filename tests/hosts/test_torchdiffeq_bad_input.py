"""Bad input gets an error of its own, with a fix, and leaves nothing behind."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_event

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import coupled, coupled_start, damped_wave
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    NonFiniteError,
    OptionError,
    OutsideFitWarning,
    StateShapeError,
    StateTypeError,
)

Y0 = torch.ones(3, 2)
T = torch.tensor([0.0, 0.5, 1.0])
METHODS = ["hypereuler", "hypermidpoint", "hyperheun", "hyper2", "hyperrk4"]


def _solve(
    net: Any = zero, func: Any = damped_wave, y0: Any = Y0, t: Tensor = T, **more: Any
) -> Any:
    options = {"hypernet": net, **more.pop("options", {})}
    return odeint(func, y0, t, method=more.pop("method", "hypereuler"), options=options)


def _domain(**changes: Any) -> tdh.FitDomain:
    fields: dict[str, Any] = {
        "span": (0.0, 1.0),
        "dt_min": 0.1,
        "dt_max": 0.1,
        "directions": (1,),
        "shapes": ((2,),),
        "is_tuple": False,
        "dtype": "float32",
    }
    return tdh.FitDomain(**{**fields, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_missing_part_shows_every_way_to_bind(method: str) -> None:
    with pytest.raises(tdh.MissingHypernetError) as caught:
        odeint(damped_wave, Y0, T, method=method)
    for way in ("tdh.fit(", 'options={"solver"', "tdh.attach(", "tdh.using(", "register_method("):
        assert way in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, tdh.HyperError)


@pytest.mark.parametrize("option", ["step_sise", "grid", "hyper_net", "rtol_", "options"])
def test_unknown_option_is_refused_with_the_nearest_name(option: str) -> None:
    with pytest.raises(OptionError, match=f'no option "{option}"'):
        _solve(options={option: 0.1})


def test_alpha_belongs_to_hyper2() -> None:
    with pytest.raises(OptionError, match="hyper2"):
        _solve(options={"alpha": 0.5})
    for alpha in (0.0, -1.0, float("nan"), float("inf"), "half"):
        with pytest.raises(OptionError, match="alpha is"):
            _solve(method="hyper2", options={"alpha": alpha})


@pytest.mark.parametrize("step_size", [0.0, -0.1, float("nan")])
def test_step_size_must_be_positive(step_size: float) -> None:
    with pytest.raises(OptionError, match="step_size"):
        _solve(options={"step_size": step_size})


def test_unknown_interpolation_is_refused_before_any_call() -> None:
    with pytest.raises(OptionError, match="quadratic"):
        _solve(func=None, options={"interp": "quadratic"})


def test_hypernet_and_solver_together_are_refused() -> None:
    with pytest.raises(OptionError, match="both"):
        _solve(options={"solver": tdh.HyperSolver("euler", zero)})


def test_solver_given_as_hypernet_is_refused() -> None:
    with pytest.raises(StateTypeError, match=re.escape('{"solver": solver}')):
        _solve(tdh.HyperSolver("euler", zero))


def test_solver_of_another_kind_is_refused() -> None:
    with pytest.raises(StateTypeError, match="Linear"):
        odeint(damped_wave, Y0, T, method="hypereuler", options={"solver": nn.Linear(2, 2)})


def test_net_fitted_for_another_base_is_refused() -> None:
    solver = tdh.HyperSolver("heun", zero)
    with pytest.raises(BaseMismatchError, match='method="hyperheun"'):
        odeint(damped_wave, Y0, T, method="hypereuler", options={"solver": solver})


@pytest.mark.parametrize("shape", [(3, 1), (3, 3), (2,), (3, 2, 1)])
def test_correction_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StateShapeError, match=re.escape(str(shape))):
        _solve(lambda step: torch.zeros(shape))


def test_correction_that_does_not_promote_is_refused() -> None:
    with pytest.raises(StateTypeError, match=r"float64.*\n.*float32"):
        _solve(lambda step: step.y.double())
    _solve(lambda step: step.y.half())


def test_correction_of_another_kind_is_refused() -> None:
    with pytest.raises(StateTypeError, match="NoneType"):
        _solve(lambda step: None)
    with pytest.raises(StateTypeError, match="tuple of 2"):
        _solve(lambda step: step.y[:2], coupled, coupled_start())


def test_net_on_another_device_is_refused() -> None:
    with pytest.raises(StateTypeError, match=r"on meta.*\n.*\n.*hypernet.to"):
        _solve(nn.Linear(2, 2, device="meta"))
    with pytest.raises(StateTypeError, match="a tensor on meta"):
        _solve(lambda step: step.y.to("meta"))


@pytest.mark.parametrize("answer", [None, 1.0])
def test_func_that_returns_no_tensor_is_refused(answer: Any) -> None:
    with pytest.raises(StateTypeError, match="func returned a"):
        tdh.HyperSolver("heun", zero).solve(lambda t, y: answer, Y0, T)


@pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
def test_func_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(shape)

    with pytest.raises(StateShapeError, match="func returned shape"):
        _solve(func=func)
    with pytest.raises(StateShapeError, match="func returned shape"):
        tdh.HyperSolver("heun", zero).solve(func, Y0, T)


def test_integer_state_is_refused() -> None:
    with pytest.raises(StateTypeError, match=r"int64[\s\S]*y0.float\(\)"):
        _solve(y0=torch.ones(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, (5, 2), (0, 3), (1, 2, 3)])
def test_impossible_steps_are_refused(steps: Any) -> None:
    with pytest.raises(OptionError, match="steps is"):
        tdh.HyperSolver("euler", zero, steps=steps)


def test_unknown_base_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match='base="euler"'):
        tdh.HyperSolver("eular", zero)
    with pytest.raises(OptionError, match="alpha goes with"):
        tdh.HyperSolver("euler", zero, alpha=0.5)
    with pytest.raises(StateTypeError, match="callable"):
        tdh.HyperSolver("euler", "net")  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 0.75, 0.5, 0.25, 0.0]])
@pytest.mark.parametrize("method", METHODS)
def test_non_finite_hypernet_names_step_and_time(method: str, times: list[float]) -> None:
    def net(step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        return step.y * (float("inf") if step.t.item() == 0.5 else 0.0)

    t = torch.tensor(times, requires_grad=True)
    with pytest.raises(NonFiniteError, match=r"hypernet returned inf or nan at step 2, t = 0.5"):
        _solve(net, method=method, t=t)
    base = {"hyper2": "alpha"}.get(method, method.removeprefix("hyper"))
    with pytest.raises(NonFiniteError, match=r"at step 2, t = 0.5"):
        tdh.HyperSolver(base, net).solve(damped_wave, Y0, t)


def test_non_finite_func_and_start_are_told_apart_from_the_hypernet() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * (float("nan") if float(t) > 0.4 else 1.0)

    with pytest.raises(NonFiniteError, match=r"func's answers.*[\s\S]*dopri5"):
        _solve(func=func)
    with pytest.raises(NonFiniteError, match="y0 holds"):
        _solve(y0=torch.tensor([1.0, float("nan")]))


def test_non_finite_solve_to_an_event_names_the_step() -> None:
    def net(step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        return step.y * (float("nan") if float(step.t) > 0.45 else 0.0)

    with pytest.raises(NonFiniteError, match=r"step 5, t = 0.5"):
        odeint_event(
            damped_wave,
            torch.ones(2),
            torch.tensor(0.0),
            event_fn=lambda t, y: y[0] - 0.2,
            method="hypereuler",
            options={"hypernet": net, "step_size": 0.1},
        )


def test_event_without_a_step_size_needs_a_fitted_span() -> None:
    call: dict[str, Any] = {"event_fn": lambda t, y: 0.35 - t, "method": "hypereuler", "atol": 1e-6}
    start = torch.tensor(0.0)
    with pytest.raises(OptionError, match="step_size"):
        odeint_event(damped_wave, Y0, start, options={"hypernet": zero}, **call)
    solver = tdh.HyperSolver("euler", zero, steps=10, domain=_domain())
    event_t, _ = odeint_event(damped_wave, Y0, start, options={"solver": solver}, **call)
    assert float(event_t) == pytest.approx(0.35, abs=1e-4)
    with pytest.warns(OutsideFitWarning, match=r"dt = 0\.3"):
        odeint_event(damped_wave, Y0, start, options={"solver": solver, "step_size": 0.3}, **call)


def test_use_outside_the_fitted_step_sizes_and_direction_warns_once_and_works() -> None:
    solver = tdh.HyperSolver("euler", zero, steps=10, domain=_domain())
    options = {"solver": solver}
    odeint(damped_wave, Y0, torch.tensor([0.0, 1.0]), method="hypereuler", options=options)
    with pytest.warns(OutsideFitWarning, match="dt = 0.5 "):
        odeint(damped_wave, Y0, T, method="hypereuler", options=options)
    odeint(damped_wave, Y0, T, method="hypereuler", options=options)
    t = torch.tensor([1.0, 0.0], requires_grad=True)
    with pytest.warns(OutsideFitWarning, match=r"dt = -0.1 .*forward"):
        odeint(damped_wave, Y0, t, method="hypereuler", options=options)
    solver.solve(damped_wave, Y0, torch.tensor([1.0, 0.0]))


def test_tensor_fitted_solver_corrects_the_matching_part_of_a_tuple() -> None:
    def one(step: tdh.StepInput) -> Tensor:
        assert isinstance(step.y, Tensor)
        assert step.y.shape == (4, 3)
        return torch.ones_like(step.y)

    domain = _domain(shapes=((3,),), dt_min=0.5, dt_max=0.5)
    solver = tdh.HyperSolver("heun", one, domain=domain)
    plain = tdh.HyperSolver("heun", zero)
    y0 = coupled_start()
    t = torch.tensor([0.0, 0.5]).double()
    for solve in (
        lambda s: odeint(coupled, y0, t, method="hyperheun", options={"solver": s}),
        lambda s: s.solve(coupled, y0, t),
    ):
        corrected, base = solve(solver), solve(plain)
        assert torch.allclose(corrected[0][-1] - base[0][-1], torch.tensor(0.125).double())
        assert torch.equal(corrected[1], base[1])
        assert torch.equal(corrected[2], base[2])


def test_ambiguous_or_unmatched_tuple_is_refused() -> None:
    solver = tdh.HyperSolver("heun", zero, domain=_domain(shapes=((2,),)))
    twice = (torch.ones(3, 2), torch.ones(5, 2))
    with pytest.raises(StateShapeError, match="2 of its parts"):
        odeint(lambda t, y: y, twice, T, method="hyperheun", options={"solver": solver})
    with pytest.raises(StateShapeError, match="0 of its parts"):
        solver.solve(coupled, coupled_start(), T)


def test_tuple_fitted_solver_refuses_other_structures() -> None:
    solver = tdh.HyperSolver("heun", zero, domain=_domain(shapes=((2,), ()), is_tuple=True))
    with pytest.raises(StateTypeError, match="fitted on a tuple"):
        odeint(damped_wave, Y0, T, method="hyperheun", options={"solver": solver})
    with pytest.raises(StateShapeError, match="tuple of 3"):
        solver.solve(coupled, coupled_start(), T)


@pytest.mark.parametrize(
    ("t", "error"),
    [
        ([0.0, 1.0], StateTypeError),
        (torch.tensor([0, 1]), StateTypeError),
        (torch.tensor(0.0), StateShapeError),
        (torch.empty(0), StateShapeError),
    ],
)
def test_solve_refuses_times_that_are_none(t: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"t = torch\.tensor"):
        tdh.HyperSolver("euler", zero).solve(damped_wave, Y0, t)


@pytest.mark.parametrize("y0", [[1.0], None, (1.0, 2.0), ()])
def test_solve_refuses_states_that_are_none(y0: Any) -> None:
    with pytest.raises(StateTypeError, match="y0 is a"):
        tdh.HyperSolver("euler", zero).solve(damped_wave, y0, T)


def test_failed_calls_leave_the_scope_and_registry_alone() -> None:
    with tdh.using(tdh.HyperSolver("euler", zero)):
        with pytest.raises(OptionError):
            odeint(damped_wave, Y0, T, method="hypereuler", options={"nope": 1})
        odeint(damped_wave, Y0, T, method="hypereuler")
