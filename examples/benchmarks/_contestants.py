"""Every solver of the benchmark as one kind of thing: a function from problem to end state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.evaluation._measure import Problem
from torchdiffeq_hyper.solvers._grid import equal_steps

CALLS_A_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
STEPS = {
    "euler": (4, 8, 10, 16, 24),
    "midpoint": (2, 3, 4, 5, 6, 8, 12),
    "heun2": (2, 4, 5, 8),
    "heun3": (1, 2, 3, 4, 5, 6, 8),
    "rk4": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12),
}
QUICK_STEPS = {"euler": (4, 8, 16), "midpoint": (2, 4, 5, 8), "rk4": (1, 2, 4)}
TOLERANCES = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Contestant:
    """One solver at one setting.

    Attributes:
        method: its name in the tables.
        solve: returns the state at the end of the problem's span.
        steps: equal steps, of those that take them.
        tolerance: rtol = atol, of those that choose their steps.
        is_learned: whether something in it was fitted.
    """

    method: str
    solve: Callable[[Problem], Tensor]
    steps: int | None = None
    tolerance: float | None = None
    is_learned: bool = False


def classical(quick: bool = False) -> Iterator[Contestant]:
    """Yield torchdiffeq's own methods."""
    for method, counts in (QUICK_STEPS if quick else STEPS).items():
        for steps in counts:
            yield Contestant(method, partial(_fixed_step, method, steps), steps)
    for tolerance in TOLERANCES:
        yield Contestant("dopri5", partial(_adaptive, "dopri5", tolerance), tolerance=tolerance)


def learned(solvers: Iterable[tdh.Solver]) -> Iterator[Contestant]:
    """Yield fitted solvers, each at its own number of steps."""
    for solver in solvers:
        solve = partial(_learned, solver)
        yield Contestant(solver.method, solve, solver.n_steps, is_learned=True)


def other_libraries(quick: bool = False) -> Iterator[Contestant]:
    """Yield torchdyn's and torchode's adaptive methods, where these are installed."""
    for tolerance in TOLERANCES[:1] if quick else TOLERANCES:
        if find_spec("torchdyn"):
            solve = partial(_torchdyn, "tsit5", tolerance)
            yield Contestant("torchdyn tsit5", solve, tolerance=tolerance)
        if find_spec("torchode"):
            for method in ("dopri5", "tsit5"):
                solve = partial(_torchode, method, tolerance)
                yield Contestant(f"torchode {method}", solve, tolerance=tolerance)


def torchdyn_hypereuler(solver: tdh.Solver) -> Iterator[Contestant]:
    """Yield torchdyn's own HyperEuler with the net of ``solver``, which may use y and t only."""
    if find_spec("torchdyn"):
        solve = partial(_torchdyn_hypereuler, solver)
        yield Contestant("torchdyn HyperEuler", solve, solver.n_steps, is_learned=True)


def _fixed_step(method: str, steps: int, problem: Problem) -> Tensor:
    # Not step_size: torchdiffeq rounds the number of steps up, often to one too many.
    options = {"grid_constructor": lambda func, y0, t: equal_steps(t, steps)}
    y: Tensor = odeint(problem.func, problem.y0, problem.t, method=method, options=options)
    return y[-1]


def _learned(solver: tdh.Solver, problem: Problem) -> Tensor:
    method, options = solver.method, {"solver": solver}
    y: Tensor = odeint(problem.func, problem.y0, problem.t, method=method, options=options)
    return y[-1]


def _adaptive(method: str, tolerance: float, problem: Problem) -> Tensor:
    y: Tensor = odeint(
        problem.func, problem.y0, problem.t, method=method, rtol=tolerance, atol=tolerance
    )
    return y[-1]


def _torchdyn(method: str, tolerance: float, problem: Problem) -> Tensor:
    from torchdyn.numerics import odeint as torchdyn_odeint  # noqa: TID251 - a contestant

    _, y = torchdyn_odeint(
        problem.func, problem.y0, problem.t, solver=method, atol=tolerance, rtol=tolerance
    )
    end: Tensor = y[-1]
    return end


def _torchdyn_hypereuler(solver: tdh.Solver, problem: Problem) -> Tensor:
    from torchdyn.numerics import odeint as torchdyn_odeint  # noqa: TID251 - a contestant
    from torchdyn.numerics.solvers.hyper import HyperEuler  # noqa: TID251

    t, net = equal_steps(problem.t, solver.n_steps), solver.hypernet
    assert net is not None

    def g(time: Tensor, y: Tensor) -> Any:
        # torchdyn hands its nets no more than this.
        return net(tdh.StepInput(t[1] - t[0], time, y, y, (), y))

    _, y = torchdyn_odeint(problem.func, problem.y0, t, solver=HyperEuler(g))
    end: Tensor = y[-1]
    return end


def _torchode(method: str, tolerance: float, problem: Problem) -> Tensor:
    import torchode

    y0 = problem.y0
    assert isinstance(y0, Tensor)
    shape = y0.shape

    def flat(t: Tensor, y: Tensor) -> Tensor:
        # torchode's states are flat and every sample has its own time.
        k = problem.func(t.view(-1, *[1] * (len(shape) - 1)), y.view(shape))
        assert isinstance(k, Tensor)
        return k.flatten(1)

    term = torchode.ODETerm(flat)
    stepper = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5}[method](term=term)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    span = (problem.t[:1].expand(shape[0]), problem.t[1:].expand(shape[0]))
    ivp = torchode.InitialValueProblem(y0.flatten(1), *span, span[1].unsqueeze(1))
    solution = torchode.AutoDiffAdjoint(stepper, controller).solve(ivp)
    end: Tensor = solution.ys[:, -1].view(shape)
    return end
