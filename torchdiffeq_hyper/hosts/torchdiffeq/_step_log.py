"""What an adaptive solve of the host does step by step, seen from its func and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import part_norms
from torchdiffeq_hyper.errors import explain
from torchdiffeq_hyper.hosts.torchdiffeq._call import HostCall
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import Perturb, PerturbFunc


class WatchedFunc(PerturbFunc):  # type: ignore[misc]
    """The host's outermost wrapper, which counts and, during a step, keeps what it saw.

    It takes the place of the wrapper it is made from: with both, the call would look like
    the forward solve of `odeint_adjoint`.
    """

    def __init__(self, func: PerturbFunc, draft: recording.Draft) -> None:
        super().__init__(func.base_func)
        self._replaced = (func,)  # in a tuple: not a submodule
        self._draft = draft
        self.stages: list[tuple[Tensor, Tensor]] | None = None
        self.outcome: tuple[Tensor, Tensor, bool] | None = None

    def __getattr__(self, name: str) -> Any:
        """Return the callbacks of the wrapper that this one replaces."""
        if name.startswith("callback_"):
            return getattr(self._replaced[0], name)
        return super().__getattr__(name)

    def forward(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        """Call func."""
        self._draft.nfe += 1
        k: Tensor = super().forward(t, y, perturb=perturb)
        if self.stages is not None:
            self.stages.append((y, k))
        return k

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        """Note the step and its outcome, and call the user's callback."""
        self.outcome = (t0, dt, True)
        self._replaced[0].callback_accept_step(t0, y0, dt)

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        """Note the step and its outcome, and call the user's callback."""
        self.outcome = (t0, dt, False)
        self._replaced[0].callback_reject_step(t0, y0, dt)


class StepLog:
    """The steps of one solve as they come.

    Args:
        call: the host's call.
        draft: the record to fill in.
        y0: the flat state at the start.
        keeps_outputs: whether the solve may end before the last output point.
    """

    def __init__(
        self, call: HostCall, draft: recording.Draft, y0: Tensor, *, keeps_outputs: bool
    ) -> None:
        self._call = call
        self._draft = draft
        self._y0 = y0
        self._keeps_outputs = keeps_outputs
        self._with_slopes = any(recorder.stiffness for recorder in draft.recorders)
        self._tableau: Any = None
        self._ratio: Tensor | None = None
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._places: list[tuple[Tensor, Tensor, Tensor]] = []
        self._are_accepted: list[bool] = []
        self._errors: list[tuple[Tensor, ...]] = []
        self._slopes: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        self._marks: list[Any] = []
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None

    def start(self, t0: Tensor, tableau: Any) -> None:
        """Begin at ``t0`` (host time)."""
        self._tableau = tableau
        ends = tableau.alpha[-2:].tolist()
        self._with_slopes = self._with_slopes and ends == [1.0, 1.0]
        self.note_output(t0, self._y0)

    def noting_ratio(self, norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the host's norm; its last value within a step is the error ratio."""

        def noted(scaled_error: Tensor) -> Tensor:
            self._ratio = norm(scaled_error)
            return self._ratio

        return noted

    def note_output(self, t: Tensor, y: Tensor) -> None:
        """Keep an output point for `MaxStepsError.partial`."""
        if self._keeps_outputs:
            self._outputs.append((t, y))

    @contextmanager
    def attempt(self, func: WatchedFunc, rk_state: Any) -> Iterator[Any]:
        """Note the step that the host attempts inside the block from the yielded state."""
        f0, mark = recording.mark(rk_state.f1)
        stages: list[tuple[Tensor, Tensor]] = []
        func.stages = stages
        try:
            yield rk_state._replace(f1=f0)
        finally:
            func.stages = None
        assert func.outcome is not None
        assert self._ratio is not None
        t0, dt, is_accepted = func.outcome
        t0, dt = t0.detach(), dt.detach()
        self._places.append((t0, dt, self._ratio.detach().abs()))
        self._are_accepted.append(is_accepted)
        # Past a jump the host calls func once more, which is no stage.
        del stages[len(self._tableau.alpha) :]
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_accepted):
            self._note_errors(dt, f0, stages)
        if is_accepted:
            self._marks += [] if mark is None else [mark]
            self._draw(t0, dt, rk_state.y1)

    def _note_errors(self, dt: Tensor, f0: Tensor, stages: list[tuple[Tensor, Tensor]]) -> None:
        y0, layout = self._y0, self._call.layout
        # The host's own operations in its own order, so that the error is its own bitwise.
        derivatives = [f0, *(k for _, k in stages)]
        k = torch.stack([d.to(y0.dtype).expand_as(f0) for d in derivatives], dim=-1)
        error = torch.sum(k * (dt.to(y0.abs().dtype) * self._tableau.c_error), dim=-1)
        self._errors.append(part_norms(layout, error.expand_as(y0)))
        if self._with_slopes:
            (g_before, k_before), (g_last, k_last) = stages[-2:]
            rise, run = (k_last - k_before).expand_as(y0), g_last - g_before
            self._slopes.append((part_norms(layout, rise), part_norms(layout, run)))

    def _draw(self, t0: Tensor, dt: Tensor, y: Tensor) -> None:
        """Sample one accepted step uniformly (reservoir sampling: the n-th replaces with 1/n)."""
        if self._draft.recorders:
            n = sum(self._are_accepted)
            if self._draft.recorders[-1].random.random() * n < 1:
                self._drawn = (t0, dt, y.detach())

    @contextmanager
    def partial_on_max_steps(self, rk_state: Callable[[], Any]) -> Iterator[None]:
        """Turn the host's assertion about max_num_steps into an error with the solve so far."""
        try:
            yield
        except AssertionError as error:
            if "max_num_steps" not in str(error):
                raise
            partial = self._partial(rk_state())
            raise recording.MaxStepsError(
                explain(
                    f"{error} after t = {partial.t[-1].item():.6g}.",
                    "a solve within its steps; what there is, is in the error's partial.",
                    'options={"max_num_steps": ...}   # or larger rtol and atol',
                ),
                partial,
            ) from error

    def _partial(self, rk_state: Any) -> recording.Partial:
        if rk_state.t1 > self._outputs[-1][0]:
            self.note_output(rk_state.t1, rk_state.y1)
        times, states = zip(*self._outputs, strict=True)
        self.conclude()
        return recording.Partial(
            t=torch.stack([t.to(times[-1].dtype) for t in times]) * self._call.sign,
            y=self._call.layout.split(torch.stack(states)),
            solve=self._draft.finish(),
        )

    def conclude(self) -> None:
        """Put the steps into the draft."""
        sign, layout = self._call.sign, self._call.layout
        guard = recording.Guard(tuple(self._marks), self._draft.is_adjoint)
        empty = recording.no_steps(layout, self._y0)
        if not self._places:
            self._draft.steps = empty
            return
        t0, dt, ratio = (torch.stack(column) for column in zip(*self._places, strict=True))
        self._draft.steps = recording.Steps(
            t0=t0 * sign,
            dt=dt * sign,
            ratio=ratio,
            is_accepted=torch.tensor(self._are_accepted, device=t0.device),
            part_errors=_columns(self._errors),
            layout=layout,
            part_slopes=self._part_slopes(),
            guard=guard,
        )
        if self._drawn is not None:
            t0, dt, y = self._drawn
            self._draft.sampled_step = recording.SampledStep(
                func=self._call.func,
                t0=t0 * sign,
                dt=dt * sign,
                y=layout.split(y),
                nodes=self._tableau.alpha,
                weights=list(self._tableau.beta),
                error_weights=self._tableau.c_error,
            )

    def _part_slopes(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        if not self._with_slopes:
            return None
        rise, run = zip(*self._slopes, strict=True)
        return _columns(rise), _columns(run)


def _columns(rows: Any) -> tuple[Tensor, ...]:
    """Return per part (n_steps, batch), from one tuple a step."""
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
