"""The one hook through which methods are added, by us and by third parties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pluggy

from torchdiffeq_hyper.methods._method import WholeSolve
from torchdiffeq_hyper.tableaus import Tableau

PROJECT = "torchdiffeq_hyper"
"""Name of the pluggy project, and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """Adds one method; see `register_solvers`."""

    def __call__(
        self,
        name: str,
        solver: Tableau | WholeSolve | Callable[..., Any],
        *,
        order: int | None = None,
        calls_per_step: int | None = None,
        follows_grid: bool = True,
    ) -> None:
        """Add a method called ``name``."""
        ...


@hookspec
def register_solvers(register: Register) -> None:
    """Add solver methods by calling ``register``, once a method.

    ``solver`` is a `Tableau`, of which every host makes a learned method (order and
    calls a step are the tableau's), a `WholeSolve`, whose part solves the whole problem,
    or a solver class of torchdiffeq's kind: called as
    ``solver(func=..., y0=..., rtol=..., atol=..., **options)``, with ``integrate(t)``,
    usually a subclass of torchdiffeq's own. For the last two ``order`` and
    ``calls_per_step`` must be declared; ``follows_grid`` says whether the method steps
    along the points of ``t``.

    Example:
        >>> import torchdiffeq_hyper as tdh
        >>> @tdh.hookimpl
        ... def register_solvers(register):
        ...     register("my-ralston", MyRalston, order=2, calls_per_step=2)
    """
