"""Terms for a training loss that make a vector field easy to integrate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields._answers import own
from torchdiffeq_hyper._fields._energy import Energies, EnergyField
from torchdiffeq_hyper._state import StateLayout, part_norms, select
from torchdiffeq_hyper.errors import OptionError, closest
from torchdiffeq_hyper.recording import NothingRecordedError, Recorder, Solve, add

__all__ = [
    "Energies",
    "EnergyField",
    "LossTerms",
    "add_penalties",
    "error_dt_penalty",
    "error_penalty",
    "l1",
    "l2",
    "local_error_penalty",
    "stiffness_penalty",
]

Record = Recorder | Solve  # a scope's record, or one solve of it
Weights = nn.Module | Iterable[Tensor]  # a module, or its parameters


def error_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return the sum of the embedded errors of all accepted steps, a 0-d tensor.

    R_err = sum_x sum_i err_{x,i} over samples x and accepted steps i, err being `Steps.error`:
    the regulariser of "DISE: Dynamic Integrator Selection to Minimize Forward-pass Time in
    Neural ODEs", ICLR 2021 submission, eq. 2. Differentiable with respect to y0 and func's
    parameters. The same as ``record.error_penalty(part)``; no calls of func.

    Args:
        record: what `tdh.record` or `tdh.odeint_with_errors` gave.
        part: the part of tuple states that counts; None for all, see `Steps.error_of`.

    Raises:
        NothingRecordedError: no adaptive solve was recorded.
        FreedGraphError: a backward pass has freed the graph.
        AdjointGradientError: in backward, after `odeint_adjoint`.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> a, t = torch.tensor(-2.0, requires_grad=True), torch.tensor([0.0, 1.0])
        >>> _, solve = tdh.odeint_with_errors(lambda t, y: a * y, torch.ones(1), t, rtol=1e-3)
        >>> tdh.regularizers.error_penalty(solve).backward()
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
    gradient. Cost, arguments and errors are those of `error_penalty`.
    """
    terms = []
    for solve in record.adaptive_solves():
        error, size = solve.steps.error_of(part), solve.steps.dt.abs()
        size = size if size.dim() == error.dim() else size.unsqueeze(-1)
        terms.append(solve.sum_accepted(error * size.to(error.dtype)))
    return add(terms)


def stiffness_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return the sum of the stiffness estimates of all accepted steps, a 0-d tensor (SRNODE).

    R_S = sum_x sum_i S_{x,i} with S = |k_s - k_{s-1}| / |g_s - g_{s-1}|, k and g being the
    derivatives and states of the last two stages, which lie at the same time: a lower bound
    of func's Lipschitz constant there (Shampine, Stiffness and nonstiff differential
    equation solvers II, 1977). The stiffness regulariser of Pal, Ma, Shah and Rackauckas,
    Opening the Blackbox, ICML 2021 (arXiv 2105.03918). `OptionError` but for "dopri5" and
    "dopri8" and records of ``tdh.record(stiffness=True)``; else as `error_penalty`.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> with tdh.record(stiffness=True) as rec:
        ...     y = odeint(lambda t, y: -3 * y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> mean = tdh.regularizers.stiffness_penalty(rec) / rec.solves[-1].n_accepted
        >>> round(mean.item(), 1)
        3.0
    """
    return add(
        solve.sum_accepted(solve.steps.stiffness_of(part)) for solve in record.adaptive_solves()
    )


def local_error_penalty(record: Record, part: int | None = None) -> Tensor:
    r"""Return error times step size of one random accepted step, a 0-d tensor (LRNODE).

    R = sum_x err_{x,i} |dt_i| for a step i drawn evenly from the accepted ones of a solve
    (and summed over the solves of a scope): n_accepted R estimates `error_dt_penalty`
    without bias. The step is taken again from its recorded state, which is a constant to
    the gradient, as is dt: so it works with `odeint_adjoint` and under ``no_grad`` solves.
    Costs as many calls of func as the method has stages (7 for dopri5). The local regulariser
    of Pal, Edelman and Rackauckas, Locally Regularized Neural Differential Equations, ICML
    2023 (arXiv 2303.02262), with the error as in `Steps.error_of`, not scaled.

    Arguments are those of `error_penalty`; ``tdh.record(seed=...)`` makes the draw repeatable.
    `NothingRecordedError` where no solve was recorded whose method keeps a step.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint_adjoint
        >>> net, t = torch.nn.Linear(2, 2), torch.tensor([0.0, 1.0])
        >>> field, params = lambda t, y: torch.tanh(net(y)), tuple(net.parameters())
        >>> with tdh.record(seed=0) as rec:
        ...     y = odeint_adjoint(field, torch.ones(3, 2), t, adjoint_params=params)
        >>> (y[-1].sum() + 0.1 * tdh.regularizers.local_error_penalty(rec)).backward()
    """
    return add(_local_error(solve, part) for solve in record.adaptive_solves())


def _local_error(solve: Solve, part: int | None) -> Tensor:
    step = solve.sampled_step
    if step is None:
        raise NothingRecordedError(
            problem=f'the record of "{solve.method}" holds no step that can be taken again.',
            expected="a Runge-Kutta method of the host, and at least one accepted step.",
            fix='with tdh.record() as rec: odeint(func, y0, t, method="dopri5")',
        )
    layout = StateLayout.of(step.y)
    y0 = layout.join(step.y)
    real = y0.abs().dtype
    t0, dt, t1 = step.t0.to(real), step.dt.to(real), (step.t0 + step.dt).to(real)

    def derivative(t: Tensor, y: Tensor) -> Tensor:
        return own(layout.join(step.func(t, layout.split(y))).expand_as(y0))

    # Within the step, as in the host: its ends may be discontinuities of func.
    stages = [derivative(torch.nextafter(t0, t1), y0)]
    for node, weights in zip(step.nodes.tolist(), step.weights, strict=True):
        t = torch.nextafter(t1, t0) if node == 1 else t0 + node.real * dt
        y = y0 + torch.stack(stages, -1) @ (weights * dt)
        stages.append(derivative(t, y))
    error = torch.stack(stages, -1) @ (step.error_weights * dt)
    return select(part_norms(layout, error), layout, part).sum() * dt.abs()


def l1(weights: Weights) -> Tensor:
    """Return the sum of the absolute values of all parameters, a 0-d tensor.

    Draws parameters to zero (Tibshirani, Regression shrinkage and selection via the lasso,
    1996). Those are ``weights``' that require gradients, or the tensors themselves;
    `OptionError` if there are none.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper import regularizers
        >>> regularizers.l1([torch.tensor([3.0, -4.0])])
        tensor(7.)
    """
    return add(weight.abs().sum() for weight in _parameters(weights))


def l2(weights: Weights) -> Tensor:
    """Return the sum of the squares of all parameters, a 0-d tensor.

    Its gradient is twice the parameters: weight decay (Krogh and Hertz, A simple weight
    decay can improve generalization, 1991). Arguments and errors are those of `l1`.
    """
    return add(weight.abs().square().sum() for weight in _parameters(weights))


def _parameters(weights: Weights) -> list[Tensor]:
    if isinstance(weights, nn.Module):
        weights = (parameter for parameter in weights.parameters() if parameter.requires_grad)
    tensors = list(weights)
    if not tensors:
        raise OptionError(
            problem="there are no parameters to penalise.",
            expected="a module with parameters that require gradients, or a list of tensors.",
            fix="regularizers.l2(func)",
        )
    return tensors


_OF_RECORD: Mapping[str, Callable[[Record, int | None], Tensor]] = {
    "error": error_penalty,
    "error_dt": error_dt_penalty,
    "stiffness": stiffness_penalty,
    "local": local_error_penalty,
}
_OF_FUNC: Mapping[str, Callable[[nn.Module], Tensor]] = {"l1": l1, "l2": l2}


class LossTerms(NamedTuple):
    """A loss to call ``backward`` on, and the penalties in it: 0-d, detached, not weighted."""

    total: Tensor
    penalties: dict[str, Tensor]


def add_penalties(
    loss: Tensor,
    weights: Mapping[str, float],
    *,
    record: Record | None = None,
    func: nn.Module | None = None,
    part: int | None = None,
) -> LossTerms:
    """Return the task's loss, 0-d, plus weighted penalties, which are sums over the batch.

    ``weights`` go by the penalty's name: "error", "error_dt", "stiffness" and "local" of
    ``record`` (and its ``part``, see `error_penalty`), "l1" and "l2" of ``func``'s parameters.

    `OptionError` for an unknown name, or one whose record or func is not given.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> net, y0, t = torch.nn.Linear(2, 2), torch.ones(8, 2), torch.tensor([0.0, 1.0])
        >>> y, solve = tdh.odeint_with_errors(lambda t, y: net(y), y0, t)
        >>> task, weights = y[-1].square().mean(), {"error": 0.1, "l2": 1e-4}
        >>> terms = tdh.regularizers.add_penalties(task, weights, record=solve, func=net)
        >>> terms.total.backward()
    """
    penalties: dict[str, Tensor] = {}
    known = [*_OF_RECORD, *_OF_FUNC]
    for name, weight in weights.items():
        if name in _OF_RECORD and record is not None:
            penalty = _OF_RECORD[name](record, part)
        elif name in _OF_FUNC and func is not None:
            penalty = _OF_FUNC[name](func)
        elif name in known:
            argument = "record=rec" if name in _OF_RECORD else "func=func"
            problem, expected = f'"{name}" has nothing to work on.', f"the argument {argument}."
            raise OptionError(problem, expected, f"add_penalties(loss, weights, {argument})")
        else:
            raise OptionError(
                problem=f"no penalty is called {name!r}.",
                expected="one of " + ", ".join(f'"{penalty}"' for penalty in known) + ".",
                fix=f'{{"{closest(name, known)}": 0.1}}',
            )
        penalties[name] = penalty.detach()
        loss = loss + weight * penalty
    return LossTerms(loss, penalties)
