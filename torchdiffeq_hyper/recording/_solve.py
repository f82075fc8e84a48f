"""What a record holds: solves, their steps, and whether these can be differentiated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_hyper._state import State, StateLayout, select
from torchdiffeq_hyper.errors import HyperError, OptionError


class NothingRecordedError(HyperError, ValueError):
    """A penalty was asked of a record that holds nothing to make it of."""


class FreedGraphError(HyperError, RuntimeError):
    """The gradient of a record was asked for after backward had freed its graph."""


class AdjointGradientError(HyperError, RuntimeError):
    """The gradient of a record was asked for after `odeint_adjoint`, which keeps no graph."""


@dataclass(frozen=True)
class GraphCheck:
    """Checks whether the graph of a record's numbers is there to be differentiated."""

    marks: tuple[Any, ...] = ()  # nodes put into the graph by `mark`, one an accepted step
    is_adjoint: bool = False  # whether the solve was the forward one of `odeint_adjoint`

    def protect(self, value: Tensor) -> Tensor:
        """Return ``value``, whose backward raises where its graph cannot serve it."""
        if not torch.is_grad_enabled():
            return value.detach()
        if self.is_adjoint:
            value = value + torch.zeros((), requires_grad=True)  # for a backward to raise in
        elif value.requires_grad:
            value = value.view_as(value)
        else:
            return value
        value.register_hook(self.check)
        return value

    def check(self, *_: Tensor) -> None:
        """Raise if there never was a graph, or a backward pass has freed it."""
        if self.is_adjoint:
            raise AdjointGradientError(
                problem="odeint_adjoint keeps no graph, so its steps' errors have no gradient.",
                expected="a solve by odeint, or a regulariser that is differentiated on its own.",
                fix="odeint(func, y0, t, ...)   # instead of odeint_adjoint\n"
                "tdh.regularizers.local_error_penalty(rec)   # one random step, any adjoint\n"
                "tdh.regularizers.EnergyField(func)   # integrals carried in the state",
            )
        if not all(map(_is_alive, self.marks)):
            raise FreedGraphError(
                problem="a backward pass has freed the graph of this record.",
                expected="one backward pass for the loss and the penalty together.",
                fix="(loss + weight * rec.error_penalty()).backward()\n"
                "loss.backward(retain_graph=True)   # or keep the graph\n"
                "with torch.no_grad(): rec.error_penalty()   # the value alone",
            )


def mark(x: Tensor) -> tuple[Tensor, Any]:
    """Return ``x`` and a node put into its graph, freed with it; None where there is no graph."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    marked: Tensor = _Mark.apply(x)  # type: ignore[no-untyped-call]
    return marked, marked.grad_fn


def _is_alive(node: Any) -> bool:
    try:
        return node.saved_tensors is not None
    except RuntimeError:
        return False


class _Mark(torch.autograd.Function):
    """The identity; its saved (empty) tensor goes when the graph's buffers go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@dataclass(frozen=True, eq=False)
class Steps:
    """The attempted steps of one adaptive solve, in their order.

    Methods that give every sample its own steps have (n_steps, batch) in all fields, NaN-padded.

    Attributes:
        t0: (n_steps,) where each step starts; the solver's time dtype, no gradient.
        dt: (n_steps,) its size, negative in reverse time; no gradient.
        ratio: (n_steps,) the solver's error ratio, accepted up to 1; no gradient.
        is_accepted: (n_steps,) bool.
        part_errors: for each part of the state that ``layout`` has, see `error_of`.
        part_slopes: for each part, numerators and denominators of `stiffness_of`.
    """

    t0: Tensor
    dt: Tensor
    ratio: Tensor
    is_accepted: Tensor
    part_errors: tuple[Tensor, ...]
    layout: StateLayout = field(default_factory=lambda: StateLayout(None))
    part_slopes: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
    graph_check: GraphCheck = field(default_factory=GraphCheck)

    @property
    def error(self) -> Tensor:
        """(n_steps, batch): L2 norms of the unscaled embedded errors, see `error_of`."""
        return self.error_of()

    def error_of(self, part: int | None = None) -> Tensor:
        """Return (n_steps, batch) L2 norms of the embedded errors over non-batch dimensions.

        The errors are in the state's units, not scaled by tolerances. With the graph of the
        solve kept, those of accepted steps carry gradient to y0 and func's parameters (``dt``
        as a factor is detached).

        Args:
            part: one part of a tuple state (a 0-d part counts as a batch of 1). None takes
                all parts together, which must share their leading dimension; 0-d parts
                belong to no sample and are left out (unless all are 0-d: one sample).
                `OptionError` for no part, `StateShapeError` for batches that differ.
        """
        return self.graph_check.protect(select(self.part_errors, self.layout, part))

    def stiffness_of(self, part: int | None = None) -> Tensor:
        """Return (n_steps, batch) estimates of how much func stretches, in 1/time.

        |k_s - k_{s-1}| / |g_s - g_{s-1}| of the last two stages, which lie at the same
        time: k their derivatives, g their states (0 where the states coincide). `OptionError`
        where it was not recorded or the method has no such stages.
        """
        if self.part_slopes is None:
            raise OptionError(
                problem="no stiffness was recorded.",
                expected="a scope that asks for it; a method whose last two stages end the step.",
                fix='with tdh.record(stiffness=True): odeint(..., method="dopri5")',
            )
        rise, run = (select(norms, self.layout, part) for norms in self.part_slopes)
        is_zero = run == 0
        stiffness = torch.where(is_zero, 0.0, rise / torch.where(is_zero, 1.0, run))
        return self.graph_check.protect(stiffness)


class SampledStep(NamedTuple):
    """One accepted step, drawn at random, with what it takes to redo it.

    Attributes:
        t0, dt, y: its start, its signed size (0-d tensors) and the state there, detached.
        nodes: positions of the stages after the first within the step, (s - 1,).
        weights: how the derivatives so far make each of these stages' states.
        error_weights: how the derivatives make the embedded error, (s,).
    """

    func: Any
    t0: Tensor
    dt: Tensor
    y: State
    nodes: Tensor
    weights: list[Tensor]
    error_weights: Tensor


@dataclass(frozen=True, eq=False)
class Solve:
    """One recorded solve, by the string ``method``.

    Attributes:
        nfe: calls of func.
        sample_nfe: (batch,) int64: how many of them each sample took part in.
        selection: (batch,) int64: the candidate that solved each sample; None but for dise.
        wall_s: seconds it took, everything included.
        steps: its attempted steps; empty unless ``is_adaptive``: with error estimates.
        sampled_step: an accepted step drawn at random; None where there is none.
    """

    method: str
    nfe: int
    sample_nfe: Tensor
    selection: Tensor | None
    wall_s: float
    steps: Steps
    is_adaptive: bool
    sampled_step: SampledStep | None = None

    @property
    def n_accepted(self) -> int:
        """Number of accepted steps (of all samples, where each has its own)."""
        return int(self.steps.is_accepted.sum())

    @property
    def n_rejected(self) -> int:
        """Number of rejected steps (of all samples, where each has its own)."""
        return int((~self.steps.is_accepted & ~self.steps.dt.isnan()).sum())

    def adaptive_solves(self) -> list[Solve]:
        """Return this solve alone: it is a record of one, see `Recorder.adaptive_solves`."""
        return adaptive_among([self])

    def error_penalty(self, part: int | None = None) -> Tensor:
        """Return this solve's share of `Recorder.error_penalty`, a 0-d tensor."""
        return self.sum_accepted(self.steps.error_of(part))

    def sum_accepted(self, values: Tensor) -> Tensor:
        """Return the sum of ``values``, (n_steps, batch), over accepted steps and samples."""
        self.adaptive_solves()
        if torch.is_grad_enabled() and not self.steps.graph_check.is_adjoint:
            self.steps.graph_check.check()
        return values[self.steps.is_accepted].sum()


class Partial(NamedTuple):
    """How far a solve came: its record, and states (n, *shape) at the times (n,) reached.

    The last of these is the end of the last accepted step.
    """

    t: Tensor
    y: State
    solve: Solve


class MaxStepsError(HyperError, AssertionError):
    """A recorded solve took its ``max_num_steps`` without arriving; see its ``partial``."""

    def __init__(self, message: str, partial: Partial) -> None:
        super().__init__(message)
        self.partial = partial


def adaptive_among(solves: list[Solve]) -> list[Solve]:
    """Return the solves whose method has error estimates, of which there must be one."""
    adaptive = [solve for solve in solves if solve.is_adaptive]
    if not adaptive:
        others = ", ".join(sorted({f'"{solve.method}"' for solve in solves}))
        others = f"; without error estimates: {others}" if others else ""
        raise NothingRecordedError(
            problem=f"no adaptive solve was recorded{others}.",
            expected='a solve with "dopri5" or another adaptive method.',
            fix='with tdh.record() as rec: odeint(func, y0, t, method="dopri5")',
        )
    return adaptive
