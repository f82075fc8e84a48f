"""The error of a solver along its span."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State, VectorField

FLOOR = 0.1
"""Smallest size of a state to divide its error by, as a share of the root mean square."""


class Solver(Protocol):
    """What solves a problem without a host."""

    def solve(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Return the state at every point of ``t``."""
        ...


def knot_times(start: float, end: float, calls: int, like: Tensor) -> Tensor:
    """Return n + 1 equidistant times from start to end, in the dtype and device of a tensor."""
    t_dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
    return torch.linspace(start, end, calls + 1, dtype=t_dtype, device=like.device)


@torch.no_grad()
def error_along(solver: Solver, func: VectorField, y0: State, t: Tensor, exact: State) -> Tensor:
    r"""Return the relative error of each sample at each of some times.

    .. math:: e_{ib} = \frac{|y_b(t_i) - x_b(t_i)|_2}{\max(|x_b(t_i)|_2,\ 0.1\,r_i)},
        \qquad r_i^2 = \text{mean}_b |x_b(t_i)|_2^2

    with y from one solve over all of ``t``, as a user reads it off, and x the solution. The
    parts of a tuple state count together. At the end this is the error that a fit minimises.

    Args:
        solver: anything with ``solve(func, y0, t)``.
        func: the vector field.
        y0: the starts, samples along dim 0.
        t: (m,) times from the start on: the n + 1 knots (`knot_times`), or any others.
        exact: the solution there, like ``y0`` with m in front.

    Returns:
        (m, batch), 0 at the start; inf where a state on the way is not finite.

    Raises:
        NonFiniteError: the solve ended in inf or nan.

    Example:
        >>> import torch
        >>> import torchdiffeq_hyper as tdh
        >>> from torchdiffeq_hyper.bespoke import error_along, knot_times
        >>> y0 = torch.ones(3, 1)
        >>> t = knot_times(0.0, 1.0, 8, y0)
        >>> exact = torch.exp(-t)[:, None, None] * y0
        >>> solver = tdh.BespokeSolver.classical("rk4", 8)
        >>> error_along(solver, lambda t, y: -y, y0, t, exact).mean(1).amax() < 1e-3
        tensor(True)
    """
    found, wanted = _parts(solver.solve(func, y0, t)), _parts(exact)
    errors = _norms([a - b.to(a) for a, b in zip(found, wanted, strict=True)])
    sizes = _norms(wanted).to(errors)
    floor = FLOOR * sizes.square().mean(1, keepdim=True).sqrt()
    relative = errors / torch.maximum(sizes, floor).clamp_min(torch.finfo(sizes.dtype).tiny)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _parts(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _norms(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Return the 2-norms over all dimensions but the first two, of all parts together."""
    norms = [torch.linalg.vector_norm(p.reshape(*p.shape[:2], -1), dim=-1) for p in parts]
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joint
