"""Scopes in which solves are recorded, filled in by hosts."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper._state import StateLayout, batch_size, part_norms
from torchdiffeq_hyper.recording._solve import GraphCheck, SampledStep, Solve, Steps, adaptive_among


class Recorder:
    """The record of a scope; ``solves`` are in the order in which they finished.

    Solves of backward passes are not in it. For the arguments see `tdh.record`.
    """

    def __init__(self, *, stiffness: bool = False, seed: int | None = None) -> None:
        self.solves: list[Solve] = []
        self.stiffness = stiffness
        # A generator of our own: recording must not shift anybody else's random numbers.
        self.random = random.Random(seed)  # noqa: S311 - not for secrets

    def adaptive_solves(self) -> list[Solve]:
        """Return the solves whose method has error estimates; `NothingRecordedError` without."""
        return adaptive_among(self.solves)

    def error_penalty(self, part: int | None = None) -> Tensor:
        """Return the sum of the embedded errors of all accepted steps, a 0-d tensor.

        For its formula, ``part`` and errors see `regularizers.error_penalty`. Under
        ``torch.no_grad()`` it can be read after a backward pass too.
        """
        return add(solve.error_penalty(part) for solve in self.adaptive_solves())


def add(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors, on the first one's device."""
    return reduce(lambda total, term: total + term.to(total.device), terms)


_open: ContextVar[tuple[Recorder, ...]] = ContextVar("open", default=())
_running: ContextVar[Draft | None] = ContextVar("running", default=None)
_handed: ContextVar[tuple[Draft, object] | None] = ContextVar("handed", default=None)


@contextmanager
def assigned(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Give a variable of the context another value inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def open_recorders() -> tuple[Recorder, ...]:
    """Return the records being kept in this context, the innermost last."""
    return _open.get()


def opened(recorder: Recorder) -> AbstractContextManager[None]:
    """Keep a record inside the block, beside those kept already."""
    return assigned(_open, (*_open.get(), recorder))


def paused() -> AbstractContextManager[None]:
    """Keep no record inside the block."""
    return assigned(_open, ())


def running() -> Draft | None:
    """Return the draft of the solve that runs in this context, None if it is not recorded."""
    return _running.get()


@contextmanager
def handed_over(part: object) -> Iterator[Draft | None]:
    """Leave the running draft to a part that solves the whole problem, inside the block."""
    draft = running()
    with assigned(_handed, None if draft is None else (draft, part)):
        yield draft


def take_over(part: object) -> Draft | None:
    """Return the draft that a host left to this part, once; None if there is none.

    Methods ask before they call func, which may run solves of its own by the same part.
    """
    handed = _handed.get()
    if handed is None or handed[1] is not part:
        return None
    _handed.set(None)
    return handed[0]


@dataclass
class Draft:
    """A solve being recorded: the `Solve` to be, as far as it is known."""

    method: str
    y0: Tensor
    layout: StateLayout
    recorders: tuple[Recorder, ...]
    is_adjoint: bool = False  # whether it is part of the forward solve of `odeint_adjoint`
    nfe: int = 0  # counted by the host; a method may correct it
    sample_nfe: Tensor | None = None  # None: all of these
    selection: Tensor | None = None
    steps: Steps | None = None  # None: a method without error estimates
    sampled_step: SampledStep | None = None

    def __post_init__(self) -> None:
        """Start the clock."""
        outer = running()
        # What runs inside a solve that keeps no graph keeps none either.
        self.is_adjoint |= outer is not None and outer.is_adjoint
        self._start = _now(self.y0)

    def entered(self) -> AbstractContextManager[None]:
        """Make this the running draft."""
        return assigned(_running, self)

    def finish(self) -> Solve:
        """Return the solve as recorded so far."""
        steps, calls = self.steps, self.sample_nfe
        if steps is None:
            steps = no_steps(self.layout, self.y0)
        elif self.is_adjoint:
            steps = replace(steps, graph_check=GraphCheck(is_adjoint=True))
        if calls is None:
            batch = batch_size(self.layout.split(self.y0))
            calls = torch.full((batch,), self.nfe, device=self.y0.device)
        wall_s, adaptive = _now(self.y0) - self._start, self.steps is not None
        return Solve(
            self.method, self.nfe, calls, self.selection, wall_s, steps, adaptive, self.sampled_step
        )

    def publish(self) -> None:
        """Hand the finished solve to the records."""
        solve = self.finish()
        for recorder in self.recorders:
            recorder.solves.append(solve)


def no_steps(layout: StateLayout, y0: Tensor) -> Steps:
    """Return the steps of a method that has no error estimates."""
    none = y0.abs().new_empty(0)
    norms = tuple(n.new_empty(0, len(n)) for n in part_norms(layout, y0.detach()))
    return Steps(none, none, none, none.bool(), norms, layout)


def _now(y0: Tensor) -> float:
    if y0.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(y0.device)
    return time.perf_counter()
