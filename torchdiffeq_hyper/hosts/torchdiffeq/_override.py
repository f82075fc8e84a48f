"""Scopes in which an existing method name is served by a fitted solver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchdiffeq_hyper._binding import FittedT
from torchdiffeq_hyper.errors import UnknownMethodError, closest, explain
from torchdiffeq_hyper.hosts.torchdiffeq import _patches
from torchdiffeq_hyper.hosts.torchdiffeq._call import HostCall
from torchdiffeq_hyper.hosts.torchdiffeq._methods import published, solver_class
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import SOLVERS, options_of


@contextmanager
def override(method: str, solver: FittedT) -> Iterator[FittedT]:
    """Let calls with ``method`` inside the block be served by ``solver``.

    For callers that hard-code an existing method such as "dopri5". Options valid for
    that method are accepted; those without meaning on a time grid are ignored. Other
    threads are not affected unless they copy the context. The backward solves of
    `odeint_adjoint` run the host's own dopri5 at the adjoint tolerances. torchdyn, which
    takes solver objects, is not affected.

    Args:
        method: an existing method name.
        solver: the fitted solver to use instead.

    Raises:
        UnknownMethodError: torchdiffeq has no such method.
        StateTypeError: ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> t = torch.tensor([0.0, 1.0])
        >>> with tdh.override("dopri5", tdh.HyperSolver("euler", lambda s: s.y / 2, steps=10)):
        ...     odeint(lambda t, y: -y, torch.ones(1), t, method="dopri5")[-1]
        tensor([0.3685])
    """
    known = dict(SOLVERS)
    if method not in known:
        raise UnknownMethodError(
            explain(
                f"torchdiffeq has no method {method!r} to override.",
                "one of " + ", ".join(f'"{name}"' for name in known) + ".",
                f'tdh.override("{closest(method, known)}", solver)',
            )
        )
    original = _patches.unpatched(known[method])
    served = solver_class(published(method, solver, "override"), options_of(original))

    def build(func: Any, y0: Any, rtol: Any, atol: Any, **options: Any) -> Any:
        call = HostCall.of(func)
        if call.is_adjoint_forward:
            _patches.serve_backward(method, call.carrier)
        return served(func=func, y0=y0, rtol=rtol, atol=atol, **options)

    with _patches.replaced(method, build):
        yield solver
