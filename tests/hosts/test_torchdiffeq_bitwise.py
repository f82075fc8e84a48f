"""A solve without correction is the host's own method, to the last bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_event

from exact import zero
from stubs import Counted, coupled, coupled_start, damped_wave
from torchdiffeq_hyper.methods._registry import find

HOST = {
    "hypereuler": "euler",
    "hypermidpoint": "midpoint",
    "hyperheun": "heun2",
    "hyperrk4": "rk4",
}
DTYPES = [torch.float32, torch.float64]


def _uneven_grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
    weights = torch.linspace(0, 1, 8, dtype=t.dtype) ** 2
    return torch.unique(torch.cat([torch.lerp(t[0], t[-1], weights), t]), sorted=True)


def _descending_grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
    return -_uneven_grid(func, y0, -t)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "step_size": {"step_size": 0.07},
    "cubic": {"step_size": 0.07, "interp": "cubic"},
    "grid_constructor": {"grid_constructor": _uneven_grid},
    "perturb": {"perturb": True},
    "all": {"step_size": 0.11, "interp": "cubic", "perturb": True},
}
TIMES = {"forward": [0.1, 0.4, 0.55, 1.3], "reverse": [1.3, 0.7, 0.2, -0.2]}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _start(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if kind == "tuple":
        return coupled, coupled_start(dtype=dtype)
    if kind == "scalar":
        return damped_wave, torch.tensor(0.8, dtype=dtype)
    return damped_wave, torch.randn(4, 3, 2, dtype=dtype)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "scalar"])
@pytest.mark.parametrize("direction", TIMES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", HOST)
def test_zero_correction_reproduces_the_host_bitwise(
    method: str, options: str, direction: str, kind: str
) -> None:
    chosen = dict(OPTIONS[options])
    if options == "grid_constructor" and direction == "reverse":
        chosen["grid_constructor"] = _descending_grid
    for dtype in DTYPES:
        for t_dtype in DTYPES:
            func, y0 = _start(kind, dtype)
            t = torch.tensor(TIMES[direction], dtype=t_dtype)
            expected = odeint(func, y0, t, method=HOST[method], options=dict(chosen))
            got = odeint(func, y0, t, method=method, options={**chosen, "hypernet": zero})
            assert _equal(got, expected)


@pytest.mark.parametrize(("alpha", "host"), [(0.5, "midpoint"), (1.0, "heun2")])
def test_hyper2_contains_midpoint_and_heun(alpha: float, host: str) -> None:
    y0, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.0, 0.4, 1.0])
    expected = odeint(damped_wave, y0, t, method=host)
    options = {"alpha": alpha, "hypernet": zero}
    got = odeint(damped_wave, y0, t, method="hyper2", options=options)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", HOST)
def test_no_call_of_func_beyond_the_hosts_own(method: str, interp: str) -> None:
    t = torch.tensor([0.0, 0.35, 1.0])
    options = {"step_size": 0.1, "interp": interp}
    theirs, ours = Counted(damped_wave), Counted(damped_wave)
    odeint(theirs, torch.ones(2), t, method=HOST[method], options=dict(options))
    odeint(ours, torch.ones(2), t, method=method, options={**options, "hypernet": zero})
    if interp == "linear":
        assert ours.times == theirs.times
    else:  # the derivative at the end of a step is the next one's first stage
        assert not Counter(ours.times) - Counter(theirs.times)
        assert ours.calls == 10 * find(method).calls_per_step + 1


@pytest.mark.parametrize("reverse_time", [False, True])
@pytest.mark.parametrize("method", HOST)
def test_events_are_the_hosts_bitwise(method: str, reverse_time: bool) -> None:
    def fall(t: Tensor, s: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return s[1], -9.8 * (1 + 0.1 * torch.sin(t)) * torch.ones_like(s[0])

    def ground(t: Tensor, s: tuple[Tensor, Tensor]) -> Tensor:
        return s[0]

    start = (torch.tensor([3.0]), torch.tensor([0.0]))
    call: dict[str, Any] = {
        "event_fn": ground,
        "reverse_time": reverse_time,
        "rtol": 1e-6,
        "atol": 1e-6,
    }
    options = {"step_size": 0.01}
    t0 = torch.tensor(0.0)
    expected = odeint_event(fall, start, t0, method=HOST[method], options=dict(options), **call)
    options = {**options, "hypernet": zero}
    got = odeint_event(fall, start, t0, method=method, options=options, **call)
    assert _equal(got[0], expected[0])
    assert _equal(got[1], expected[1])


@pytest.mark.parametrize("direction", TIMES)
def test_callbacks_are_called_as_by_the_host(direction: str) -> None:
    class Logged:
        def __init__(self) -> None:
            self.log: list[tuple[float, float, float]] = []

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return damped_wave(t, y)

        def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            self.log.append((float(t0), float(y0.sum()), float(dt)))

    theirs, ours = Logged(), Logged()
    t = torch.tensor(TIMES[direction])
    odeint(theirs, torch.ones(2), t, method="heun2")
    odeint(ours, torch.ones(2), t, method="hyperheun", options={"hypernet": zero})
    assert ours.log == theirs.log
    assert len(ours.log) == len(t) - 1


def test_one_time_point_gives_the_start() -> None:
    y0 = torch.randn(3, 2)
    y = odeint(damped_wave, y0, torch.tensor([0.3]), method="hyperrk4", options={"hypernet": zero})
    assert torch.equal(y, y0[None])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty_states_give_the_empty_solution(shape: tuple[int, ...]) -> None:
    y0, t = torch.empty(shape), torch.tensor([0.0, 0.5, 1.0])
    y = odeint(damped_wave, y0, t, method="hyperheun", options={"hypernet": zero})
    assert y.shape == (3, *shape)


def test_complex_states_work() -> None:
    y0, t = torch.randn(3, dtype=torch.complex128), torch.linspace(0, 1, 5, dtype=torch.float64)

    def rotate(t: Tensor, y: Tensor) -> Tensor:
        return 1j * torch.cos(t) * y

    expected = odeint(rotate, y0, t, method="rk4")
    got = odeint(rotate, y0, t, method="hyperrk4", options={"hypernet": zero})
    assert torch.equal(got, expected)
