"""A penalty on one step, redone outside of the solve: it needs no graph of the solve."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._reuse import own
from torchdiffeq_hyper.errors import explain
from torchdiffeq_hyper.recording import NothingRecordedError, SampledStep
from torchdiffeq_hyper.regularizers._steps import Record, solves_of


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
