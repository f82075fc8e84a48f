"""Penalties on what the solver reports of its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields import own
from torchdiffeq_hyper._state import StateLayout
from torchdiffeq_hyper.errors import explain
from torchdiffeq_hyper.recording import NothingRecordedError, Recorder, SampledStep, Solve

Record = Recorder | Solve
"""A scope's record, or one solve of it."""


def solves_of(record: Record) -> list[Solve]:
    """Return the adaptive solves of a record.

    Raises:
        NothingRecordedError: there are none.
    """
    return record.adaptive_solves() if isinstance(record, Recorder) else [record]


def error_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return the sum of the embedded errors of all accepted steps, a 0-d tensor.

    R_err = sum_x sum_i err_{x,i} over samples x and accepted steps i: the regulariser of
    DISE, ICLR 2021 submission, eq. 2. The same as ``record.error_penalty(part)``; no calls
    of func beyond the solve's.

    Args:
        record: what `tdh.record` or `tdh.odeint_with_errors` gave.
        part: the part of tuple states that counts; None for all, see `Steps.error_of`.

    Raises:
        NothingRecordedError: no adaptive solve was recorded.
        FreedGraphError: a backward pass has freed the graph.
        AdjointGradientError: in backward, after `odeint_adjoint`.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq_hyper import regularizers
        >>> a = torch.tensor(-2.0, requires_grad=True)
        >>> _, solve = tdh.odeint_with_errors(
        ...     lambda t, y: a * y, torch.ones(1), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3
        ... )
        >>> regularizers.error_penalty(solve).backward()
        >>> bool(a.grad < 0)
        True
    """
    return record.error_penalty(part)


def error_dt_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return the sum of embedded error times step size, a 0-d tensor (ERNODE).

    R_E = sum_x sum_i err_{x,i} |dt_i| over samples x and accepted steps i, the error-estimate
    regulariser of Pal, Ma, Shah and Rackauckas, Opening the Blackbox, ICML 2021
    (arXiv 2105.03918). There the error is one number a step; here it is `Steps.error_of`,
    a sample's own and not scaled by the tolerances. The step sizes are constants to the
    gradient. No calls of func beyond the solve's.

    Args:
        record: what `tdh.record` or `tdh.odeint_with_errors` gave.
        part: the part of tuple states that counts; None for all.

    Raises:
        NothingRecordedError: no adaptive solve was recorded.
        FreedGraphError: a backward pass has freed the graph.
        AdjointGradientError: in backward, after `odeint_adjoint`.
    """
    return recording.add(_error_dt(solve, part) for solve in solves_of(record))


def _error_dt(solve: Solve, part: int | None) -> Tensor:
    error, size = solve.steps.error_of(part), solve.steps.dt.abs()
    size = size if size.dim() == error.dim() else size.unsqueeze(-1)
    return solve.sum_accepted(error * size.to(error.dtype))


def stiffness_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return the sum of the stiffness estimates of all accepted steps, a 0-d tensor (SRNODE).

    R_S = sum_x sum_i S_{x,i} with S = |k_s - k_{s-1}| / |g_s - g_{s-1}|, k and g being the
    derivatives and states of the last two stages, which lie at the same time: a lower bound
    of func's Lipschitz constant there (Shampine, Stiffness and nonstiff differential
    equation solvers II, 1977). The stiffness regulariser of Pal, Ma, Shah and Rackauckas,
    Opening the Blackbox, ICML 2021 (arXiv 2105.03918). "dopri5" and "dopri8" have such
    stages. No calls of func beyond the solve's.

    Args:
        record: a record of ``tdh.record(stiffness=True)``.
        part: the part of tuple states that counts; None for all.

    Raises:
        OptionError: stiffness was not recorded, or the method has no such stages.
        NothingRecordedError: no adaptive solve was recorded.
        FreedGraphError: a backward pass has freed the graph.
        AdjointGradientError: in backward, after `odeint_adjoint`.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> from torchdiffeq_hyper import regularizers
        >>> with tdh.record(stiffness=True) as rec:
        ...     y = odeint(lambda t, y: -3 * y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> mean = regularizers.stiffness_penalty(rec) / rec.solves[-1].n_accepted
        >>> round(mean.item(), 1)
        3.0
    """
    return recording.add(
        solve.sum_accepted(solve.steps.stiffness_of(part)) for solve in solves_of(record)
    )


def local_error_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return error times step size of one random accepted step, a 0-d tensor (LRNODE).

    R = sum_x err_{x,i} |dt_i| for a step i drawn evenly from the accepted ones of a solve
    (and summed over the solves of a scope): n_accepted R estimates `error_dt_penalty`
    without bias. The step is taken again from its recorded state, which is a constant to
    the gradient, as is dt: the gradient goes to func's parameters through this one step and
    needs nothing of the solve. So it works with `odeint_adjoint` and under ``no_grad``
    solves. Costs as many calls of func as the method has stages (7 for dopri5).

    The local regulariser, with its time drawn from the solver's own steps, of Pal, Edelman
    and Rackauckas, Locally Regularized Neural Differential Equations, ICML 2023
    (arXiv 2303.02262). There the error is scaled by the tolerances; here it is
    `Steps.error_of`.

    Args:
        record: what `tdh.record` or `tdh.odeint_with_errors` gave; ``record(seed=...)``
            makes the draw repeatable.
        part: the part of tuple states that counts; None for all.

    Raises:
        NothingRecordedError: no solve was recorded whose method keeps a step, or it took none.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint_adjoint
        >>> from torchdiffeq_hyper import regularizers
        >>> func = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
        >>> field = lambda t, y: func(y)
        >>> with tdh.record(seed=0) as rec:
        ...     y = odeint_adjoint(
        ...         field, torch.ones(3, 2), torch.tensor([0.0, 1.0]),
        ...         adjoint_params=func.parameters(),
        ...     )
        >>> (y[-1].sum() + 0.1 * regularizers.local_error_penalty(rec)).backward()
    """
    return recording.add(_local_error(_sampled(solve), part) for solve in solves_of(record))


def _sampled(solve: recording.Solve) -> SampledStep:
    if solve.sampled_step is None:
        raise NothingRecordedError(
            explain(
                f'the record of "{solve.method}" holds no step that can be taken again.',
                "a Runge-Kutta method of the host, and at least one accepted step.",
                'with tdh.record() as rec: odeint(func, y0, t, method="dopri5")',
            )
        )
    return solve.sampled_step


def _local_error(step: SampledStep, part: int | None) -> Tensor:
    layout = StateLayout.of(step.y)
    y0 = layout.join(step.y)
    real = y0.abs().dtype
    t0, dt = step.t0.to(real), step.dt.to(real)
    t1 = (step.t0 + step.dt).to(real)

    def derivative(t: Tensor, y: Tensor) -> Tensor:
        return own(layout.join(step.func(t, layout.split(y))).expand_as(y0))

    # Within the step, as in the host: its ends may be discontinuities of func.
    stages = [derivative(torch.nextafter(t0, t1), y0)]
    for node, weights in zip(step.nodes.tolist(), step.weights, strict=True):
        t = torch.nextafter(t1, t0) if node == 1 else t0 + node.real * dt
        y = y0 + torch.stack(stages, -1) @ (weights * dt)
        stages.append(derivative(t, y))
    error = torch.stack(stages, -1) @ (step.error_weights * dt)
    norms = recording.part_norms(layout, error)
    return recording.select(norms, layout, part).sum() * dt.abs()
