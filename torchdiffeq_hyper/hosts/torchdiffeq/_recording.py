"""Scopes in which torchdiffeq's solves are recorded, errors of their steps included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import State, VectorField, is_half
from torchdiffeq_hyper.errors import StateTypeError
from torchdiffeq_hyper.hosts.torchdiffeq import _patches
from torchdiffeq_hyper.hosts.torchdiffeq._call import HostCall
from torchdiffeq_hyper.hosts.torchdiffeq._step_log import StepLog, WatchedFunc
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import PerturbFunc, RKAdaptiveStepsizeODESolver


@contextmanager
def record(*, stiffness: bool = False, seed: int | None = None) -> Iterator[recording.Recorder]:
    """Record every solve inside the block: calls, time, and each step's own error estimate.

    "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun" and whatever else the host
    steps adaptively keep their steps; all other methods are counted and timed. Solutions
    and numbers of calls are those outside of the scope, bitwise in float32 and float64.
    Scopes nest (each sees what is inside it), do not leak into other threads, and reach
    threads that copy the context. Backward solves are not recorded, nor is `odeint_dense`,
    which names its solver itself.

    Where gradients are kept, a record holds on to the graph of its solves. In CUDA the
    device is synchronised once before and once after each solve, so that ``wall_s`` is
    the solve's own.

    Args:
        stiffness: also record what `regularizers.stiffness_penalty` needs; costs two
            more states a step.
        seed: makes the choice of ``sampled_step`` repeatable.

    Yields:
        A record with ``solves`` and ``error_penalty()``.

    Raises:
        StateTypeError: at an adaptive solve with a half-precision state.
        MaxStepsError: at an adaptive solve that runs out of ``max_num_steps``; what it
            had is in the error's ``partial``.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> with tdh.record() as rec:
        ...     y = odeint(lambda t, y: -y, torch.ones(3, 2), torch.tensor([0.0, 1.0]))
        >>> solve = rec.solves[-1]
        >>> solve.method, solve.nfe == 2 + 6 * (solve.n_accepted + solve.n_rejected)
        ('dopri5', True)
        >>> solve.steps.error.shape == (len(solve.steps.dt), 3)
        True
    """
    recorder = recording.Recorder(stiffness=stiffness, seed=seed)
    with recording.opened(recorder), _patches.watched(_watch):
        yield recorder


def odeint_with_errors(
    func: VectorField, y0: State, t: Tensor, **call: Any
) -> tuple[Any, recording.Solve]:
    """Call `torchdiffeq.odeint` and return the record of the solve beside its solution.

    Args:
        func: ``func(t, y)``, y like ``y0``.
        y0: the state at t[0].
        t: (n,) times.
        **call: what `odeint` takes: rtol, atol, method (default "dopri5"), options,
            event_fn.

    Returns:
        What `odeint` returns, and the solve's record.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> a = torch.tensor(-2.0, requires_grad=True)
        >>> y, solve = tdh.odeint_with_errors(
        ...     lambda t, y: a * y, torch.ones(1), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3
        ... )
        >>> solve.error_penalty().backward()
        >>> bool(a.grad < 0)
        True
    """
    with record() as recorder:
        solution = odeint(func, y0, t, **call)
    return solution, recorder.solves[-1]


def _watch(method: str, build: Callable[..., Any], func: Any, y0: Tensor, **options: Any) -> Any:
    call = HostCall.of(func)
    # Only torchdiffeq's own calls come in its outermost wrapper.
    if call.is_adjoint_backward or not isinstance(func, PerturbFunc):
        return build(func=func, y0=y0, **options)
    # In backward a checkpointed solve runs again: as before, but not for the record.
    recorders = recording.open_recorders() if torch._C._current_graph_task_id() == -1 else ()
    draft = recording.Draft(method, y0, call.layout, recorders, is_adjoint=call.is_adjoint_forward)
    watched = WatchedFunc(func, draft)
    if not (isinstance(build, type) and issubclass(build, RKAdaptiveStepsizeODESolver)):
        return _WatchedSolver(build(func=watched, y0=y0, **options), draft)
    if is_half(y0.dtype):
        raise StateTypeError(
            problem=f'y0 is {y0.dtype}: "{method}" would control its steps by rounding errors.',
            expected="float32 or float64 where errors are recorded.",
            fix="y0 = tuple(part.float() for part in y0)"
            if call.layout.shapes
            else "odeint(func, y0.float(), t, ...)",
        )
    log = StepLog(call, draft, y0, keeps_outputs="max_num_steps" in options)
    return _WatchedSolver(_recording_class(build)(log, func=watched, y0=y0, **options), draft)


class _WatchedSolver:
    """A solver whose solve is timed and published."""

    def __init__(self, solver: Any, draft: recording.Draft) -> None:
        self._solver = solver
        self._draft = draft

    def integrate(self, t: Tensor) -> Any:
        return self._run(self._solver.integrate, t)

    def integrate_until_event(self, t0: Tensor, event_fn: Any) -> Any:
        return self._run(self._solver.integrate_until_event, t0, event_fn)

    def _run(self, solve: Callable[..., Any], *arguments: Any) -> Any:
        with self._draft.entered():
            solution = solve(*arguments)
        if isinstance(self._solver, RecordsSteps):
            self._solver.log.conclude()
        self._draft.publish()
        return solution


class RecordsSteps(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
    """What is put before an adaptive solver of the host to keep its steps."""

    def __init__(self, log: StepLog, func: WatchedFunc, y0: Tensor, **options: Any) -> None:
        super().__init__(func=func, y0=y0, **options)
        self.log = log
        self.norm: Any = log.noting_ratio(self.norm)

    def _before_integrate(self, t: Tensor) -> None:
        super()._before_integrate(t)
        self.log.start(self.rk_state.t0, self.tableau)

    def _adaptive_step(self, rk_state: Any) -> Any:
        with self.log.attempt(self.func, rk_state) as marked:
            return super()._adaptive_step(marked)

    def _advance(self, next_t: Tensor) -> Tensor:
        with self.log.partial_on_max_steps(lambda: self.rk_state):
            y: Tensor = super()._advance(next_t)
        self.log.note_output(next_t, y)
        return y

    def _advance_until_event(self, event_fn: Any) -> Any:
        with self.log.partial_on_max_steps(lambda: self.rk_state):
            return super()._advance_until_event(event_fn)


@cache
def _recording_class(solver: type) -> Any:
    return type(f"Recorded{solver.__name__}", (RecordsSteps, solver), {})
