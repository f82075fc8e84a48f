"""Puts the registry's methods among torchdiffeq's; hands whole problems to "bns" and "dise"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields._wrappers import look_through
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError, UnknownMethodError, unknown_method
from torchdiffeq_hyper.hosts._host import Host, warn_if_untrained
from torchdiffeq_hyper.hosts.torchdiffeq import _patches
from torchdiffeq_hyper.hosts.torchdiffeq._solver import HyperGridSolver
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import (
    SOLVERS,
    FixedGridODESolver,
    HostCall,
    dopri5_solver,
    is_default_norm,
    known_options,
    options_of,
)
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import (
    Method,
    ReadyMethod,
    SteppingMethod,
    WholeMethod,
    base_of,
)
from torchdiffeq_hyper.solvers._binding import Fitted, FittedT
from torchdiffeq_hyper.solvers._solver import Solver

_PUBLISHED = "register_method"


class WholeProblemSolver:
    """Gives the user's own problem (func, true time, parts of the state) to the method's part."""

    entry: ClassVar[WholeMethod]  # of a subclass, one a method
    also_accepted: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, func: Any, y0: Tensor, rtol: Any, atol: Any, **options: Any) -> None:
        self._call = call = HostCall.of(func)
        if call.is_adjoint_backward:
            own = dopri5_solver(func, y0, rtol, atol, **options)
            self.integrate = own.integrate  # type: ignore[method-assign]
            return
        self._y0 = y0
        self._tolerances = {
            # The host flattened a tensor of tolerances with the state.
            name: call.layout.split(value) if isinstance(value, Tensor) and value.dim() else value
            for name, value in (("rtol", rtol), ("atol", atol))
        }
        if is_default_norm(options.get("norm")):
            options.pop("norm", None)
        entry = self.entry
        self._options = known_options(options, entry.options, entry.name, self.also_accepted)

    def integrate(self, t: Tensor) -> Tensor:
        """Return the state at every point of ``t``, flat as the host wants it."""
        call, func = self._call, self._call.func
        part = call.find_part(self.entry, t, self._options)
        if call.is_adjoint_forward and base_of(part) is not None:
            warn_if_untrained(part, "solver", "odeint_adjoint", "odeint")
        # A part may call the very method that it stands in for.
        without_overrides = recording.assigned(_patches.overrides, _patches.NONE)
        with without_overrides, recording.handed_over(part) as draft:
            if draft is not None and base_of(part) is not None:
                func = _Counted(func, draft)  # other parts tell the record themselves
            y0, times = call.layout.split(self._y0), -t if call.negated else t
            solution: State = part.solve(func, y0, times, **self._tolerances)
        if isinstance(solution, Tensor):
            return solution
        return torch.cat([part.reshape(len(t), -1) for part in solution], dim=1)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[..., Any]) -> NoReturn:
        """Refuse: samples would stop at different times."""
        entry, fix = self.entry, 'odeint_event(..., method="dopri5")'
        who = f'method "{entry.name}" of {entry.owner}'
        if entry.owner == "override":
            served = getattr(entry.fitted, "method", type(entry.fitted).__name__)
            who = f'the solver that overrides "{entry.name}", of method "{served}",'
            fix = "the call outside of the block of tdh.override"
        raise OptionError(
            problem=f"{who} does not look for events.",
            expected="a method that takes the whole batch along, up to one event.",
            fix=f'{fix}\nsolver = tdh.fit(func, y0, (0.0, 1.0), base="heun", steps=10)',
        )

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return set()  # the samples do not step together


class _Counted:
    """A vector field whose calls are counted in a record: the host's wrapper is not called."""

    def __init__(self, func: VectorField, draft: recording.Draft) -> None:
        self.base_func = func
        self._draft = draft

    def __call__(self, t: Tensor, y: State) -> Any:
        self._draft.nfe += 1
        return self.base_func(t, y)


look_through(_Counted, "base_func")


class Torchdiffeq(Host):
    """torchdiffeq's dict `SOLVERS`."""

    name = "torchdiffeq"

    def entries(self) -> Any:
        return SOLVERS

    def step_by_step(self, method: SteppingMethod) -> Any:
        name = f"Hyper{method.tableau.name.capitalize()}"
        return type(name, (HyperGridSolver,), {"entry": method, "order": method.order})

    def all_at_once(self, method: WholeMethod) -> Any:
        return type(method.kind.__name__, (WholeProblemSolver,), {"entry": method})

    def ready_made(self, method: ReadyMethod) -> Any:
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
    """Publish a fitted solver under a new method name, for callers that pass on no more.

    Raises:
        DuplicateMethodError: the name is taken; names both owners.
        StateTypeError: ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq, torchdiffeq_hyper as tdh
        >>> tdh.register_method("decay-fast", tdh.HyperSolver("euler", lambda s: s.y / 2, steps=10))
        >>> t = torch.tensor([0.0, 1.0])
        >>> torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), t, method="decay-fast")[-1]
        tensor([0.3685])
        >>> tdh.unregister_method("decay-fast")
    """
    with _registry.changing():
        _registry.add(_published(name, solver, _PUBLISHED))


def unregister_method(name: str) -> None:
    """Take back a name that `register_method` published; `UnknownMethodError` for others."""
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
    """Let torchdiffeq's calls with ``method`` inside the block be served by a fitted ``solver``.

    For callers that hard-code a method such as "dopri5", whose options are accepted; those
    without meaning on a time grid are ignored. Other threads are not affected unless they
    copy the context. The backward solves of `odeint_adjoint` run the host's own dopri5.

    Raises:
        UnknownMethodError: torchdiffeq has no such method.
        StateTypeError: ``solver`` is not a fitted solver.

    Example:
        >>> import torch, torchdiffeq, torchdiffeq_hyper as tdh
        >>> t = torch.tensor([0.0, 1.0])
        >>> with tdh.override("dopri5", tdh.HyperSolver("euler", lambda s: s.y / 2, steps=10)):
        ...     torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), t, method="dopri5")[-1]
        tensor([0.3685])
    """
    if method not in SOLVERS:
        raise unknown_method(method, SOLVERS, 'tdh.override("{}", solver)')
    original = _patches.unpatched(SOLVERS[method])
    served = _published(method, solver, "override").build(host)
    served.also_accepted = options_of(original)

    def build(func: Any, **given: Any) -> Any:
        call = HostCall.of(func)
        if call.is_adjoint_forward:
            _patches.serve_backward(method, call.carrier)
        return served(func=func, **given)

    with _patches.replaced(method, build):
        yield solver
