"""Methods that solve the whole problem at once ("bns", "dise"), as torchdiffeq calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._fields import look_through
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.hosts._host import warn_if_untrained
from torchdiffeq_hyper.hosts.torchdiffeq._patches import no_overrides
from torchdiffeq_hyper.hosts.torchdiffeq._upstream import (
    HostCall,
    dopri5_solver,
    is_default_norm,
    known_options,
)
from torchdiffeq_hyper.methods._method import WholeMethod, base_of


class WholeProblemSolver:
    """Gives the user's own problem (func, true time, parts of the state) to the method's part.

    Subclasses, one a method, set ``entry``.
    """

    entry: ClassVar[WholeMethod]
    also_accepted: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, func: Any, y0: Tensor, rtol: Any, atol: Any, **options: Any) -> None:
        self._call = HostCall.of(func)
        self._backward: Any = None
        if self._call.is_adjoint_backward:
            self._backward = dopri5_solver(func, y0, rtol, atol, **options)
            return
        self._y0 = y0
        layout = self._call.layout
        self._tolerances = {
            # The host flattened a tensor of tolerances with the state.
            name: layout.split(value) if isinstance(value, Tensor) and value.dim() else value
            for name, value in (("rtol", rtol), ("atol", atol))
        }
        norm = options.pop("norm", None)
        if not is_default_norm(norm):
            options["norm"] = norm
        self._options = known_options(
            options, self.entry.options, self.entry.name, self.also_accepted
        )

    def integrate(self, t: Tensor) -> Tensor:
        """Return the state at every point of ``t``, flat as the host wants it."""
        if self._backward is not None:
            backward: Tensor = self._backward.integrate(t)
            return backward
        layout, call = self._call.layout, self._call
        part = call.find_part(self.entry, t, self._options)
        if call.is_adjoint_forward and base_of(part) is not None:
            warn_if_untrained(part, "solver", "odeint_adjoint", "odeint")
        # A part may call the very method that it stands in for.
        with no_overrides(), recording.handed_over(part) as draft:
            func = call.func
            if draft is not None and base_of(part) is not None:
                func = _Counted(func, draft)  # other parts tell the record themselves
            solution: State = part.solve(
                func,
                layout.split(self._y0),
                -t if call.negated else t,
                **self._tolerances,
            )
        if isinstance(solution, Tensor):
            return solution
        return torch.cat([part.reshape(len(t), -1) for part in solution], dim=1)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[..., Any]) -> NoReturn:
        """Refuse: samples would stop at different times."""
        entry, fix = self.entry, 'odeint_event(..., method="dopri5")'
        if entry.owner == "override":
            fix = "the call outside of the block of tdh.override"
        raise OptionError(
            problem=f'method "{entry.name}" of {entry.owner} does not look for events.',
            expected="a method that takes the whole batch along, up to one event.",
            fix=f'{fix}\nsolver = tdh.fit(func, y0, (0.0, 1.0), base="heun", steps=10)',
        )

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """Return no names: the samples do not step together."""
        return set()


class _Counted:
    """A vector field whose calls are counted in a record: the host's wrapper is not called."""

    def __init__(self, func: VectorField, draft: recording.Draft) -> None:
        self.base_func = func
        self._draft = draft

    def __call__(self, t: Tensor, y: State) -> State:
        self._draft.nfe += 1
        derivative: State = self.base_func(t, y)
        return derivative


look_through(_Counted, "base_func")
