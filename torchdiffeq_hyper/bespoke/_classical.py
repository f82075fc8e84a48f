r"""Classical methods over a whole span, as the weights of one method of n stages.

Some steps of an explicit Runge-Kutta method are one explicit method with all their
stages. Row i of its weights w gives the state after i + 1 calls of func,

.. math:: x_{i+1} = y_0 + T \sum_{j \le i} w_{ij} k_j, \qquad k_j = f(t_0 + c_j T, x_j)

with T the span and :math:`c_{i+1} = \sum_j w_{ij}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_hyper.errors import OptionError, closest, explain

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
        >>> from torchdiffeq_hyper.bespoke import classical
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
