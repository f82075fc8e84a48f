"""Puts the registry's methods among torchdiffeq's, and takes them away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchdiffeq_hyper.errors import StateTypeError, UnknownMethodError, unknown_method
from torchdiffeq_hyper.hosts._host import Host
from torchdiffeq_hyper.hosts.torchdiffeq import _patches
from torchdiffeq_hyper.hosts.torchdiffeq._solver import HyperGridSolver
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import (
    SOLVERS,
    FixedGridODESolver,
    HostCall,
    options_of,
)
from torchdiffeq_hyper.hosts.torchdiffeq._whole import WholeProblemSolver
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method, ReadyMethod, SteppingMethod, WholeMethod
from torchdiffeq_hyper.solvers._binding import Fitted, FittedT
from torchdiffeq_hyper.solvers._solver import Solver

_PUBLISHED = "register_method"


class Torchdiffeq(Host):
    """torchdiffeq's dict `SOLVERS`."""

    name = "torchdiffeq"
    noun = "method"

    def entries(self) -> dict[str, Any]:
        """Return `SOLVERS`."""
        solvers: dict[str, Any] = SOLVERS
        return solvers

    def step_by_step(self, method: SteppingMethod) -> Any:
        """Return the host's fixed-grid solver with a step of the method's."""
        name = f"Hyper{method.tableau.name.capitalize()}"
        return type(name, (HyperGridSolver,), {"entry": method, "order": method.order})

    def all_at_once(self, method: WholeMethod) -> Any:
        """Return what hands the whole problem to the method's part."""
        return type(method.kind.__name__, (WholeProblemSolver,), {"entry": method})

    def ready_made(self, method: ReadyMethod) -> Any:
        """Return the plugin's own class."""
        return method.solver

    def follow(self) -> None:
        """Make `SOLVERS` hold what the registry holds and what open scopes put there."""
        with _registry.lock:
            own = {n: _patches.unpatched(cls) for n, cls in SOLVERS.items() if n not in self.added}
            bases = {name: getattr(cls, "__mro__", ()) for name, cls in own.items()}
            _registry.reserve({n: FixedGridODESolver in b for n, b in bases.items()}, self.name)
            try:
                super().follow()
            finally:
                _patches.follow()


host = Torchdiffeq()


def _published(name: str, solver: Fitted, owner: str) -> Method:
    """Return a method that carries its fitted solver."""
    entry = _registry.method_for(solver)
    if entry is None and isinstance(solver, Solver):
        _registry.method_of(solver.base)  # its base has no method any more
    if entry is None or entry.option is None:
        raise StateTypeError(
            problem=f"solver is a {type(solver).__name__}.",
            expected="a fitted solver: a HyperSolver, or a Dise.",
            fix='tdh.HyperSolver(base="euler", hypernet=g, steps=10)',
        )
    return entry.published(name, solver, owner)


def register_method(name: str, solver: Fitted) -> None:
    """Publish a fitted solver under a method name of its own.

    For callers that let a user pass only ``method``.

    Args:
        name: the method string; must be new.
        solver: the fitted solver behind it.

    Raises:
        DuplicateMethodError: the name is taken; names both owners.
        StateTypeError: ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> tdh.register_method("decay-fast", tdh.HyperSolver("euler", lambda s: s.y / 2, steps=10))
        >>> t = torch.tensor([0.0, 1.0])
        >>> odeint(lambda t, y: -y, torch.ones(1), t, method="decay-fast")[-1]
        tensor([0.3685])
        >>> tdh.unregister_method("decay-fast")
    """
    with _registry.changing():
        _registry.add(_published(name, solver, _PUBLISHED))


def unregister_method(name: str) -> None:
    """Take back a name that `register_method` published.

    Raises:
        UnknownMethodError: no such name was published.
    """
    with _registry.changing():
        method = _registry.methods().get(name)
        if method is None or method.owner != _PUBLISHED:
            raise UnknownMethodError(
                problem=f"{name!r} is not a published name.",
                expected="a name given to tdh.register_method.",
                fix=f'tdh.register_method("{name}", solver) first',
            )
        _registry.remove(name)


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
    if method not in SOLVERS:
        raise unknown_method(method, SOLVERS, 'tdh.override("{}", solver)')
    original = _patches.unpatched(SOLVERS[method])
    served = _published(method, solver, "override").build(host)
    served.also_accepted = options_of(original)

    def build(func: Any, y0: Any, rtol: Any, atol: Any, **options: Any) -> Any:
        call = HostCall.of(func)
        if call.is_adjoint_forward:
            _patches.serve_backward(method, call.carrier)
        return served(func=func, y0=y0, rtol=rtol, atol=atol, **options)

    with _patches.replaced(method, build):
        yield solver
