"""Scopes in which solves are recorded; adaptive ones by their func, callbacks and norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import State, VectorField, is_half, part_norms
from torchdiffeq_hyper.errors import StateTypeError, explain
from torchdiffeq_hyper.hosts.torchdiffeq import _patches
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import (
    HostCall,
    Perturb,
    PerturbFunc,
    RKAdaptiveStepsizeODESolver,
)


@contextmanager
def record(*, stiffness: bool = False, seed: int | None = None) -> Iterator[recording.Recorder]:
    """Record every solve inside the block: calls, time, and each step's own error estimate.

    Adaptive methods keep their steps, all others are counted and timed. Solutions and
    numbers of calls are those outside of the scope, bitwise in float32 and float64. Scopes
    nest, and reach the threads that copy the context alone. Backward solves are not
    recorded, nor is `odeint_dense`, which names its solver itself.

    Where gradients are kept, a record holds on to the graph of its solves. In CUDA the
    device is synchronised before and after each solve, for its ``wall_s``.

    Args:
        stiffness: also record what `regularizers.stiffness_penalty` needs; costs two
            more states a step.
        seed: makes the choice of ``sampled_step`` repeatable.

    Raises:
        StateTypeError: at an adaptive solve with a half-precision state.
        MaxStepsError: at one that runs out of ``max_num_steps``; holds what there is.

    Example:
        >>> import torch, torchdiffeq, torchdiffeq_hyper as tdh
        >>> with tdh.record() as rec:
        ...     y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(3, 2), torch.tensor([0.0, 1.0]))
        >>> rec.solves[-1].steps.error.shape == (len(rec.solves[-1].steps.dt), 3)
        True
    """
    recorder = recording.Recorder(stiffness=stiffness, seed=seed)
    with recording.opened(recorder), _patches.watched(_watch):
        yield recorder


def odeint_with_errors(
    func: VectorField, y0: State, t: Tensor, **call: Any
) -> tuple[Any, recording.Solve]:
    """Return what `torchdiffeq.odeint` returns for these arguments, and the solve's record.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> a, t = torch.tensor(-2.0, requires_grad=True), torch.tensor([0.0, 1.0])
        >>> y, solve = tdh.odeint_with_errors(lambda t, y: a * y, torch.ones(1), t, rtol=1e-3)
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
    watched = _WatchedFunc(func, draft)
    if RKAdaptiveStepsizeODESolver in getattr(build, "__mro__", ()):
        if is_half(y0.dtype):
            raise StateTypeError(
                problem=f'y0 is {y0.dtype}: "{method}" would control its steps by rounding errors.',
                expected="float32 or float64 where errors are recorded.",
                fix="odeint(func, y0.float(), t, ...)   # of a tuple: part.float()",
            )
        build = partial(_recording_class(build), call, draft)
    return _WatchedSolver(build(func=watched, y0=y0, **options), draft)


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
        if isinstance(self._solver, _RecordsSteps):
            self._solver.conclude()
        self._draft.publish()
        return solution


class _WatchedFunc(PerturbFunc):  # type: ignore[misc]
    """Counts, and during a step keeps what it saw, in the place of the host's outermost wrapper.

    With two of those, the call would look like `odeint_adjoint`'s forward.
    """

    def __init__(self, func: PerturbFunc, draft: recording.Draft) -> None:
        super().__init__(func.base_func)
        self._replaced = (func,)  # in a tuple: not a submodule
        self._draft = draft
        self.stages: list[tuple[Tensor, Tensor]] | None = None
        self.outcome: Any = None  # of the latest step: (t0, dt, whether it was accepted)
        self.ratio: Any = None  # of its error to its tolerance

    def __getattr__(self, name: str) -> Any:
        if name.startswith("callback_"):
            return getattr(self._replaced[0], name)
        return super().__getattr__(name)

    def forward(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        self._draft.nfe += 1
        k: Tensor = super().forward(t, y, perturb=perturb)
        if self.stages is not None:
            self.stages.append((y, k))
        return k

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.outcome = (t0.detach(), dt.detach(), True)
        self._replaced[0].callback_accept_step(t0, y0, dt)

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.outcome = (t0.detach(), dt.detach(), False)
        self._replaced[0].callback_reject_step(t0, y0, dt)


class _RecordsSteps(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
    """What is put before an adaptive solver of the host to keep its steps."""

    def __init__(self, call: HostCall, draft: recording.Draft, func: Any, **given: Any) -> None:
        super().__init__(func=func, **given)
        self.call, self.draft = call, draft
        self.keeps_outputs = "max_num_steps" in given
        self.outputs: list[tuple[Tensor, Tensor]] = []
        # Times as the host has them, then norms, (batch,), for each part of the state.
        self.attempts: list[tuple[Any, ...]] = []
        self.marks: list[Any] = []
        self.n_accepted = 0
        ends_step = self.tableau.alpha[-2:].tolist() == [1.0, 1.0]
        self.with_slopes = ends_step and any(recorder.stiffness for recorder in draft.recorders)
        host_norm = self.norm

        # Holds func alone: in a cycle with the solver, graphs would outlive the solve.
        def noting_norm(scaled_error: Tensor) -> Any:
            func.ratio = host_norm(scaled_error)
            return func.ratio

        self.norm: Any = noting_norm

    def _before_integrate(self, t: Tensor) -> None:
        super()._before_integrate(t)
        self._note_output(self.rk_state.t0, self.y0)

    def _note_output(self, t: Tensor, y: Tensor) -> None:
        if self.keeps_outputs:
            self.outputs.append((t, y))

    def _adaptive_step(self, rk_state: Any) -> Any:
        f0, mark = recording.mark(rk_state.f1)
        stages: list[tuple[Tensor, Tensor]] = []
        self.func.stages = stages
        try:
            after = super()._adaptive_step(rk_state._replace(f1=f0))
        finally:
            self.func.stages = None
        t0, dt, is_accepted = self.func.outcome
        # Past a jump the host calls func once more, which is no stage.
        del stages[len(self.tableau.alpha) :]
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_accepted):
            norms = self._norms(dt, f0, stages)
        self.attempts.append((t0, dt, self.func.ratio.detach().abs(), is_accepted, *norms))
        if is_accepted:
            self.n_accepted += 1
            self.marks += [] if mark is None else [mark]
            self._sample(t0, dt, rk_state.y1)
        return after

    def _norms(self, dt: Tensor, f0: Tensor, stages: Any) -> tuple[tuple[Tensor, ...], ...]:
        """Return the norms of the embedded error, and of the last stages' differences."""
        y0, layout = self.y0, self.call.layout
        # The host's own operations in its own order, so that the error is its own bitwise.
        derivatives = [f0, *(k for _, k in stages)]
        k = torch.stack([d.to(y0.dtype).expand_as(f0) for d in derivatives], dim=-1)
        error = torch.sum(k * (dt.to(y0.abs().dtype) * self.tableau.c_error), dim=-1)
        errors = part_norms(layout, error.expand_as(y0))
        if not self.with_slopes:
            return errors, (), ()
        (g_before, k_before), (g_last, k_last) = stages[-2:]
        rise, run = (k_last - k_before).expand_as(y0), g_last - g_before
        return errors, part_norms(layout, rise), part_norms(layout, run)

    def _sample(self, t0: Tensor, dt: Tensor, y: Tensor) -> None:
        """Sample one accepted step uniformly (reservoir sampling: the n-th replaces with 1/n)."""
        recorders, sign = self.draft.recorders, self.call.sign
        if recorders and recorders[-1].random.random() * self.n_accepted < 1:
            self.draft.sampled_step = recording.SampledStep(
                func=self.call.func,
                t0=t0 * sign,
                dt=dt * sign,
                y=self.call.layout.split(y.detach()),
                nodes=self.tableau.alpha,
                weights=list(self.tableau.beta),
                error_weights=self.tableau.c_error,
            )

    def _advance(self, next_t: Tensor) -> Tensor:
        with self._partial_on_max_steps():
            y: Tensor = super()._advance(next_t)
        self._note_output(next_t, y)
        return y

    def _advance_until_event(self, event_fn: Any) -> Any:
        with self._partial_on_max_steps():
            return super()._advance_until_event(event_fn)

    @contextmanager
    def _partial_on_max_steps(self) -> Iterator[None]:
        """Turn the host's assertion about max_num_steps into an error with the solve so far."""
        try:
            yield
        except AssertionError as error:
            if "max_num_steps" not in str(error):
                raise
            if self.rk_state.t1 > self.outputs[-1][0]:
                self._note_output(self.rk_state.t1, self.rk_state.y1)
            times, states = zip(*self.outputs, strict=True)
            self.conclude()
            reached = recording.Partial(
                t=torch.stack([t.to(times[-1].dtype) for t in times]) * self.call.sign,
                y=self.call.layout.split(torch.stack(states)),
                solve=self.draft.finish(),
            )
            raise recording.MaxStepsError(
                explain(
                    f"{error} after t = {reached.t[-1].item():.6g}.",
                    "a solve within its steps; what there is, is in the error's partial.",
                    'options={"max_num_steps": ...}   # or larger rtol and atol',
                ),
                reached,
            ) from error

    def conclude(self) -> None:
        """Put the steps into the draft."""
        sign, layout = self.call.sign, self.call.layout
        if not self.attempts:
            self.draft.steps = recording.no_steps(layout, self.y0)
            return
        t0, dt, ratio, is_accepted, errors, rise, run = zip(*self.attempts, strict=True)
        self.draft.steps = recording.Steps(
            t0=torch.stack(t0) * sign,
            dt=torch.stack(dt) * sign,
            ratio=torch.stack(ratio),
            is_accepted=torch.tensor(is_accepted, device=t0[0].device),
            part_errors=_columns(errors),
            layout=layout,
            part_slopes=(_columns(rise), _columns(run)) if self.with_slopes else None,
            graph_check=recording.GraphCheck(tuple(self.marks)),
        )


def _columns(rows: Any) -> tuple[Tensor, ...]:
    """Return per part (n_steps, batch), from one tuple a step."""
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@cache
def _recording_class(solver: type) -> Any:
    return type(f"Recorded{solver.__name__}", (_RecordsSteps, solver), {})
