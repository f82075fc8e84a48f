"""Scopes in which solves are recorded; hosts open them and fill in what happens."""

from __future__ import annotations

import contextvars
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, batch_size
from torchdiffeq_hyper.errors import explain
from torchdiffeq_hyper.recording._guard import NothingRecordedError
from torchdiffeq_hyper.recording._solve import SampledStep, Solve, Steps


class Recorder:
    """The record of a scope.

    Attributes:
        solves: the finished solves, in the order in which they finished: a solve that
            func ran inside another one comes before it. Backward solves are left out.
        stiffness: whether stiffness estimates are recorded.
        random: draws the steps that `sampled_step` keeps.
    """

    def __init__(self, *, stiffness: bool = False, seed: int | None = None) -> None:
        self.solves: list[Solve] = []
        self.stiffness = stiffness
        # A generator of our own: recording must not shift anybody else's random numbers.
        self.random = random.Random(seed)  # noqa: S311 - not for secrets

    def adaptive_solves(self) -> list[Solve]:
        """Return the solves whose method has error estimates.

        Raises:
            NothingRecordedError: there are none.
        """
        adaptive = [solve for solve in self.solves if solve.is_adaptive]
        if not adaptive:
            methods = sorted({f'"{solve.method}"' for solve in self.solves})
            raise NothingRecordedError(
                explain(
                    "no adaptive solve was recorded"
                    + (f", only {', '.join(methods)}." if methods else "."),
                    'a solve with "dopri5" or another adaptive method inside the scope.',
                    'with tdh.record() as rec: odeint(func, y0, t, method="dopri5")',
                )
            )
        return adaptive

    def error_penalty(self, part: int | None = None) -> Tensor:
        r"""Return the sum of the embedded errors of all accepted steps, a 0-d tensor.

        R_err = sum_x sum_i err_{x,i} over samples x and accepted steps i of all adaptive
        solves of the scope ([D] eq. 2), err_{x,i} being ``steps.error``. Differentiable
        with respect to y0 and func's parameters, if the solves were run by `odeint`.

        Args:
            part: the part of tuple states that counts; None for all, see `Steps.error_of`.

        Raises:
            NothingRecordedError: no adaptive solve was recorded.
            FreedGraphError: a backward pass has freed the graph (read the value alone
                under ``torch.no_grad()``).
            AdjointGradientError: in backward, after `odeint_adjoint`.
        """
        return add(solve.error_penalty(part) for solve in self.adaptive_solves())


def add(terms: Iterator[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors, on the first one's device."""
    total = next(terms)
    for term in terms:
        total = total + term.to(total.device)
    return total


_open: contextvars.ContextVar[tuple[Recorder, ...]] = contextvars.ContextVar("open", default=())
_running: contextvars.ContextVar[Draft | None] = contextvars.ContextVar("running", default=None)
_handed: contextvars.ContextVar[tuple[Draft, object] | None] = contextvars.ContextVar(
    "handed", default=None
)


def open_recorders() -> tuple[Recorder, ...]:
    """Return the records being kept in this context, the innermost last."""
    return _open.get()


@contextmanager
def opened(recorder: Recorder) -> Iterator[Recorder]:
    """Keep a record inside the block, beside those kept already."""
    token = _open.set((*_open.get(), recorder))
    try:
        yield recorder
    finally:
        _open.reset(token)


@contextmanager
def paused() -> Iterator[None]:
    """Keep no record inside the block."""
    token = _open.set(())
    try:
        yield
    finally:
        _open.reset(token)


def running() -> Draft | None:
    """Return the draft of the solve that runs in this context, None if it is not recorded."""
    return _running.get()


@contextmanager
def handed_over(part: object) -> Iterator[Draft | None]:
    """Leave the running draft to the part that solves the whole problem inside the block."""
    draft = running()
    token = _handed.set(None if draft is None else (draft, part))
    try:
        yield draft
    finally:
        _handed.reset(token)


def take_over(part: object) -> Draft | None:
    """Return the draft that a host left to this part, once; None if there is none.

    For methods that know more of themselves than their calls of func: they set the
    draft's ``nfe``, ``sample_nfe``, ``selection`` or ``steps``, and what they set is kept.
    They ask before they call func, which may run solves of its own by the same part.
    """
    handed = _handed.get()
    if handed is None or handed[1] is not part:
        return None
    _handed.set(None)
    return handed[0]


class Draft:
    """A solve being recorded.

    Attributes:
        recorders: the records it goes to.
        is_adjoint: whether it is part of the forward solve of `odeint_adjoint`.
        nfe: calls of func so far; the host counts them, a method may correct them.
        sample_nfe: (batch,) calls that each sample took part in; None: all of them.
        selection: (batch,) the candidate of each sample.
        steps: the attempted steps; None for methods without error estimates.
        sampled_step: an accepted step drawn at random.
    """

    def __init__(
        self,
        method: str,
        y0: Tensor,
        layout: StateLayout,
        recorders: tuple[Recorder, ...],
        *,
        is_adjoint: bool = False,
    ) -> None:
        outer = running()
        self.method = method
        self.recorders = recorders
        # What runs inside a solve that keeps no graph keeps none either.
        self.is_adjoint: bool = is_adjoint or (outer is not None and outer.is_adjoint)
        self.nfe = 0
        self.sample_nfe: Tensor | None = None
        self.selection: Tensor | None = None
        self.steps: Steps | None = None
        self.sampled_step: SampledStep | None = None
        self._layout = layout
        self._y0 = y0
        self._start = _now(y0)

    @contextmanager
    def entered(self) -> Iterator[Draft]:
        """Make this the running draft."""
        token = _running.set(self)
        try:
            yield self
        finally:
            _running.reset(token)

    def finish(self) -> Solve:
        """Return the solve as recorded so far."""
        batch = batch_size(self._layout.split(self._y0))
        sample_nfe = self.sample_nfe
        if sample_nfe is None:
            sample_nfe = torch.full((batch,), self.nfe, device=self._y0.device)
        return Solve(
            method=self.method,
            nfe=self.nfe,
            sample_nfe=sample_nfe,
            selection=self.selection,
            wall_s=_now(self._y0) - self._start,
            steps=no_steps(self._layout, self._y0) if self.steps is None else self.steps,
            is_adaptive=self.steps is not None,
            sampled_step=self.sampled_step,
        )

    def publish(self) -> None:
        """Hand the finished solve to the records."""
        solve = self.finish()
        for recorder in self.recorders:
            recorder.solves.append(solve)


def no_steps(layout: StateLayout, y0: Tensor) -> Steps:
    """Return the steps of a method that has no error estimates."""
    real = y0.abs().new_empty(0)
    state: State = layout.split(y0)
    parts = (state,) if isinstance(state, Tensor) else state
    errors = tuple(real.new_empty(0, len(part) if part.dim() else 1) for part in parts)
    return Steps(real, real, real, real.bool(), errors, layout)


def _now(y0: Tensor) -> float:
    if y0.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(y0.device)
    return time.perf_counter()
