r"""Weights that stay those of a method, whatever an optimizer makes of the parameter.

A method's weights w are lower triangular; its times :math:`c_i = \sum_j w_{ij}` never
decrease, from 0 on, and the last one is 1. `consistent` maps any matrix to such weights, and
those of a method to themselves. It is what is used, and differentiated, while the
parameter may change; a frozen one that passes `violation` is used as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError, closest, explain
from torchdiffeq_hyper.solvers.bespoke._rollout import is_differentiated

SLACK = 1e-6
"""By which sums of weights may miss: those of float32 do."""


def slack_of_sums(weights: Tensor) -> float:
    """Return by how much the sums of a method's weights may miss in their dtype."""
    return max(SLACK, len(weights) * torch.finfo(weights.dtype).eps)


def violation(weights: Tensor) -> Tensor:
    """Return by how much a matrix misses what a method's weights satisfy, 0-d."""
    passed = _passed(sums := weights.sum(1))
    return torch.stack(
        [
            weights.triu(1).abs().amax(),
            passed.clamp(max=0).abs().amax(),
            (sums[-1] - 1).abs(),
        ]
    ).amax()


def consistent(weights: Tensor) -> Tensor:
    r"""Return the weights of a method for any matrix, differentiable in it.

    What lies above the diagonal is dropped. The time from one call to the next is the
    absolute value of what the row sums say, over the sum of all of these (equal times where
    all are 0). Each row is then shifted by one number to have its time as its sum.

    Args:
        weights: (n, n), any finite values.

    Returns:
        (n, n) lower triangular, with sums that never decrease and end at 1.
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


def selected(weights: Tensor) -> Tensor:
    """Return a method's weights as they are, any other matrix made `consistent`.

    Decided without looking at values: for compiled solves.
    """
    is_right = violation(weights) <= slack_of_sums(weights)
    return torch.where(is_right, weights, consistent(weights))


class KeptWeights:
    """The weights in use of a parameter, kept as long as its values are the same.

    Args:
        is_fixed: whether the parameter was never seen to require a gradient.
    """

    def __init__(self, *, is_fixed: bool = True) -> None:
        # A compiled solve cannot see versions. It may use a parameter as it is that nothing
        # can have trained; this is a guard of its graph.
        self.is_fixed = is_fixed
        # Parameter, its version and the weights in use: one tuple, so that a thread sees
        # all of it or nothing.
        self._kept: tuple[Tensor, int, Tensor] | None = None

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
        kept = self._kept
        version = parameter._version  # noqa: SLF001 - of the values, counted by autograd
        if kept is not None and kept[0] is parameter and kept[1] == version:
            return kept[2]
        # Whatever the mode, what is kept is to serve in all of them.
        with torch.inference_mode(mode=False), torch.no_grad():
            weights = parameter if is_method(parameter) else consistent(parameter)
        self._kept = (parameter, version, weights)
        return weights

    def watch(self, parameter: Tensor) -> None:
        """Note whether an optimizer may change a parameter from now on."""
        if parameter.requires_grad:
            self.is_fixed = False

    def __deepcopy__(self, memo: dict[int, object]) -> KeptWeights:
        """Copy as one that keeps nothing yet."""
        return KeptWeights(is_fixed=self.is_fixed)

    def __getstate__(self) -> dict[str, object]:
        """Pickle the same way."""
        return {"is_fixed": self.is_fixed, "_kept": None}


def is_method(weights: Tensor) -> bool:
    """Return whether a matrix holds a method's weights; True where values cannot be seen."""
    if weights.is_meta:
        return True
    try:
        return bool(violation(weights) <= slack_of_sums(weights))
    except RuntimeError:  # fake tensors
        return True


def _passed(sums: Tensor) -> Tensor:
    """Return the share of the span that passes before each row's end."""
    return torch.cat([sums[:1], sums.diff()])


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
    fifths of the span each and one of midpoint over the last fifth.

    Args:
        method: "euler", "midpoint", "heun", "heun3" or "rk4", torchdiffeq's variants.
        calls: calls of func over the span, n.

    Returns:
        (n, n) lower triangular, float64.

    Raises:
        OptionError: the method is unknown, or has more stages than there are calls.

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
            explain(
                f"{method!r} in {calls} calls of func is none of the classical methods.",
                "one of " + ", ".join(f'"{name}"' for name in _ROWS) + ", with enough calls.",
                f'classical("{closest(method, list(_ROWS))}", {max(4, calls)})',
            )
        )
    n_stages = len(_ROWS[method])
    names = [method] * (calls // n_stages)
    if calls % n_stages:
        names.append(_BY_CALLS[calls % n_stages])
    weights = torch.zeros(calls, calls, dtype=torch.float64)
    done = torch.zeros(calls, dtype=torch.float64)
    first = 0
    for name in names:
        size = len(_ROWS[name]) / calls
        for i, row in enumerate(_ROWS[name]):
            weights[first + i] = done
            weights[first + i, first : first + len(row)] = size * torch.tensor(
                row, dtype=torch.float64
            )
        first += len(_ROWS[name])
        done = weights[first - 1]
    return weights


def compositions(calls: int) -> dict[str, Tensor]:
    """Return the weights of all classical methods with that many calls of func, by name."""
    names = [name for name, rows in _ROWS.items() if len(rows) <= calls]
    return {name: classical(name, calls) for name in names}
