"""Whether anything is differentiated by a tensor, and a start that follows its time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchdiffeq_hyper.tableaus import StageCall


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a tensor carries a gradient or a tangent, in reverse or forward mode.

    Under vmap, which hides that, it may.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_batchedtensor(tensor):  # noqa: SLF001 - there is no public way
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def following(call: StageCall, t: Tensor, start: float, y: Tensor) -> Tensor:
    r"""Return the state at a fitted start, as a function of the time ``t[0]`` of ``y``.

    .. math:: y - (t_0 - s) f(s, y)

    The weights belong to the span and stay where they are; instead the solution is followed
    back to its start s, to first order: :math:`t_0 - s` is 0 to rounding, but its derivative is
    1. Costs one call of func.

    Args:
        call: evaluates func.
        t: the times of the solve, differentiated.
        start: the fitted start s.
        y: flat state at ``t[0]``.
    """
    t_dtype = y.dtype.to_real() if y.dtype.is_complex else y.dtype
    time = torch.full((), start, dtype=t.dtype, device=t.device)
    return y - (t[0] - time).to(t_dtype) * call(time.to(t_dtype), y)
