r"""Weights of a method over a whole span, and what keeps them so in training.

A method's weights w are lower triangular; its times :math:`c_i = \sum_j w_{ij}` never
decrease, from 0 on, and the last one is 1. `consistent` maps any matrix to such weights, and
those of a method to themselves. It is what is used, and differentiated, while the
parameter may change; a frozen one that passes `violation` is used as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdiffeq_hyper._state import is_finite
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, closest

SLACK = 1e-6
"""By which sums of weights may miss: those of float32 do."""


def stage_times(weights: Tensor) -> Tensor:
    """Return the share of the span passed at each call of func, (n,), the first one 0."""
    return torch.cat([weights.new_zeros(1), weights[:-1].sum(1)])


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a tensor carries a gradient or a tangent, in reverse or forward mode.

    Under vmap, which hides that, it may.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_batchedtensor(tensor):  # noqa: SLF001 - there is no public way
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def check_matrix(name: str, matrix: Tensor, fix: str, shape: tuple[int, int] | None = None) -> None:
    """Refuse what is no finite matrix of floating-point numbers of a shape; None: square."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise StateTypeError(
            problem=f"{name} is {got}.", expected="a floating-point tensor.", fix=fix
        )
    is_square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not is_square if shape is None else matrix.shape != shape:
        raise StateShapeError(
            problem=f"{name} has shape {tuple(matrix.shape)}.",
            expected="(n, n), n at least 1." if shape is None else f"{shape}, one column a weight.",
            fix=fix,
        )
    if not is_finite(matrix):
        raise OptionError(
            problem=f"{name} has entries that are not finite.", expected="finite numbers.", fix=fix
        )


def check_weights(weights: Tensor) -> Tensor:
    """Return the weights of a bespoke solver, detached, if they are those of a method."""
    fix = 'tdh.BespokeSolver.classical("rk4", 8)'
    check_matrix("weights", weights, fix)
    weights = weights.detach().clone()
    if weights.is_meta:
        return weights
    if bool(weights.triu(1).any()):
        raise OptionError(
            problem="weights has entries above its diagonal.",
            expected="zeros there: a state is made of the derivatives known before it.",
            fix=fix,
        )
    times = torch.cat([stage_times(weights), weights[-1:].sum(1)])
    is_rising = bool((times.diff() >= -SLACK).all())
    if not is_rising or abs(float(times[-1]) - 1) > SLACK:
        raise OptionError(
            problem=f"the rows of weights add up to {[round(t, 6) for t in times[1:].tolist()]}.",
            expected="times that never decrease, from 0 on, the last one 1: each sum is the share "
            "of the span passed.",
            fix=fix,
        )
    return weights


def violation(weights: Tensor) -> Tensor:
    """Return by how much a matrix misses what a method's weights satisfy, 0-d."""
    sums = weights.sum(1)
    missed = (weights.triu(1), _passed(sums).clamp(max=0), sums[-1:] - 1)
    return torch.stack([part.abs().amax() for part in missed]).amax()


def _is_small(violation: Tensor, weights: Tensor) -> Tensor:
    """Return whether sums of so many weights of that dtype may miss by as much, 0-d."""
    return violation <= max(SLACK, len(weights) * torch.finfo(weights.dtype).eps)


def is_method(weights: Tensor) -> bool:
    """Return whether a matrix holds a method's weights; True where values cannot be seen."""
    if weights.is_meta:
        return True
    try:
        return bool(_is_small(violation(weights), weights))
    except RuntimeError:  # fake tensors
        return True


def consistent(weights: Tensor) -> Tensor:
    r"""Return the weights of a method for any finite matrix (n, n), differentiable in it.

    What lies above the diagonal is dropped. The time from one call to the next is the
    absolute value of what the row sums say, over the sum of all of these (equal times where
    all are 0). Each row is then shifted by one number to have its time as its sum.
    """
    lower = weights.tril()
    passed = _passed(sums := lower.sum(1))
    # Not clamped: a time that became negative could then never grow again.
    passed = torch.where(passed < 0, -passed, passed)
    total = passed.sum()
    is_moving = total > 0
    shares = passed / torch.where(is_moving, total, 1)
    times = torch.where(is_moving, shares, 1 / len(weights)).cumsum(0)
    counts = torch.arange(1, len(weights) + 1, dtype=weights.dtype, device=weights.device)
    return (lower + ((times - sums) / counts)[:, None]).tril()


def _passed(sums: Tensor) -> Tensor:
    """Return the share of the span that passes before each row's end."""
    return torch.cat([sums[:1], sums.diff()])


def selected(weights: Tensor) -> Tensor:
    """Return a method's weights as they are, any other matrix made `consistent`.

    Decided without looking at values: for compiled solves.
    """
    return torch.where(_is_small(violation(weights), weights), weights, consistent(weights))


class WeightCache:
    """The weights in use of a parameter, cached as long as its values are the same.

    ``is_fixed`` says that the parameter was never seen to require a gradient. A compiled solve,
    which cannot see versions, may then use it as it is; this is a guard of its graph.
    """

    def __init__(self, *, is_fixed: bool = True) -> None:
        self.is_fixed = is_fixed
        # Parameter, its version and the weights in use: in one tuple, as threads see all or none.
        self._cached: tuple[Tensor, int, Tensor] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """Return the weights in use: the parameter itself where it is a method's."""
        self.watch(parameter)
        is_compiling = torch.compiler.is_compiling()
        if is_differentiated(parameter) or (is_compiling and parameter.requires_grad):
            return consistent(parameter)
        if is_compiling:
            return parameter if self.is_fixed else selected(parameter)
        is_capturing = parameter.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_capturing or parameter.is_inference():  # no look at values; no version
            return selected(parameter)
        cached = self._cached
        version = parameter._version  # noqa: SLF001 - of the values, counted by autograd
        if cached is not None and cached[0] is parameter and cached[1] == version:
            return cached[2]
        # Whatever the mode, what is cached is to serve in all of them.
        with torch.inference_mode(mode=False), torch.no_grad():
            weights = parameter if is_method(parameter) else consistent(parameter)
        self._cached = (parameter, version, weights)
        return weights

    def watch(self, parameter: Tensor) -> None:
        """Note whether an optimizer may change a parameter from now on."""
        if parameter.requires_grad:
            self.is_fixed = False

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle as one that keeps nothing yet."""
        return {"is_fixed": self.is_fixed, "_cached": None}


# The rows of the stages after the first, then the row of the step's end.
_ROWS: dict[str, tuple[tuple[float, ...], ...]] = {
    "euler": ((1.0,),),
    "midpoint": ((1 / 2,), (0.0, 1.0)),
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "heun3": ((1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4)),
    "rk4": ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
_BY_CALLS = {1: "euler", 2: "midpoint", 3: "heun3"}


def classical(method: str, calls: int) -> Tensor:
    """Return the weights of as many equal steps of a method as its ``calls`` allow.

    Where they do not come out even, a shorter method takes the calls that are left, and
    each step is as long as the calls it has: 10 calls are two steps of rk4 over two
    fifths of the span each and one of midpoint over the last fifth. (calls, calls), float64.

    Example:
        >>> from torchdiffeq_hyper.solvers.bespoke import classical
        >>> classical("midpoint", 4)
        tensor([[0.2500, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.2500, 0.0000],
                [0.0000, 0.5000, 0.0000, 0.5000]], dtype=torch.float64)
    """
    if method not in _ROWS or len(_ROWS[method]) > calls:
        raise OptionError(
            problem=f"{method!r} in {calls} calls of func is none of the classical methods.",
            expected="one of " + ", ".join(f'"{name}"' for name in _ROWS) + ", with enough calls.",
            fix=f'classical("{closest(method, list(_ROWS))}", {max(4, calls)})',
        )
    steps = [_ROWS[method]] * (calls // len(_ROWS[method]))
    if left := calls % len(_ROWS[method]):
        steps.append(_ROWS[_BY_CALLS[left]])
    weights = torch.zeros(calls, calls, dtype=torch.float64)
    done, first = weights[0].clone(), 0
    for rows in steps:
        size = len(rows) / calls
        for i, row in enumerate(rows):
            own = slice(first, first + len(row))
            weights[first + i] = done
            weights[first + i, own] = size * torch.tensor(row, dtype=torch.float64)
        first += len(rows)
        done = weights[first - 1]
    return weights


def compositions(calls: int) -> dict[str, Tensor]:
    """Return the weights of all classical methods with that many calls of func, by name."""
    names = [name for name, rows in _ROWS.items() if len(rows) <= calls]
    return {name: classical(name, calls) for name in names}
