"""Makes the call that was drawn, by the entry that was drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint, odeint_event

import torchdiffeq_hyper as tdh
from fuzz.drawn import Draw
from fuzz.fields import State


@contextmanager
def mode_of(drawn: Draw) -> Iterator[None]:
    """Run the block with or without autograd, as drawn."""
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with modes.get(drawn.mode, torch.enable_grad)():
        yield


def event_of(drawn: Draw) -> tuple[Callable[[Any, Any], Any], Tensor]:
    """Return a function that is zero some time after the start, and the start (1,)."""
    t0 = drawn.t[:1]
    sign = -1.0 if drawn.solved_by["reverse"] else 1.0
    at = float(t0) + sign * drawn.solved_by["after"]
    return lambda t, y: t - at, t0


def call(drawn: Draw, y0: State, t: Tensor) -> Any:
    """Return what the entry answers: a solution, or (time, solution) of an event."""
    with ExitStack() as stack:
        name = _bound(drawn, stack)
        return _ENTRIES.get(drawn.entry, _odeint)(drawn, y0, t, name)


def _bound(drawn: Draw, stack: ExitStack) -> str:
    """Bind the fitted part as drawn; return the method's name for the call."""
    if drawn.entry == "attach":
        tdh.attach(drawn.func, drawn.part)
        stack.callback(tdh.detach, drawn.func)
    elif drawn.entry == "using":
        stack.enter_context(tdh.using(drawn.part))
    elif drawn.entry == "override":
        name: str = drawn.options["override"]
        stack.enter_context(tdh.override(name, drawn.part))
        return name
    elif drawn.entry == "published":
        tdh.register_method("fuzz-published", drawn.part)
        stack.callback(tdh.unregister_method, "fuzz-published")
        return "fuzz-published"
    return drawn.method.name


def _settings(drawn: Draw) -> dict[str, Any]:
    options = {name: value for name, value in drawn.options.items() if name != "override"}
    is_option = drawn.entry in ("odeint", "adjoint", "event") and "hypernet" not in options
    if drawn.part is not None and is_option:
        options[drawn.method.option or ""] = drawn.part
    return {"rtol": drawn.rtol, "atol": drawn.atol, "options": options}


def _odeint(drawn: Draw, y0: State, t: Tensor, name: str) -> Any:
    return odeint(drawn.func, y0, t, method=name, **_settings(drawn))


def _adjoint(drawn: Draw, y0: State, t: Tensor, name: str) -> Any:
    params = tuple(drawn.func.parameters())
    settings = _settings(drawn)
    return odeint_adjoint(drawn.func, y0, t, method=name, adjoint_params=params, **settings)


def _solve(drawn: Draw, y0: State, t: Tensor, name: str) -> Any:
    if isinstance(drawn.part, tdh.Dise):
        return drawn.part.solve(drawn.func, y0, t, rtol=drawn.rtol, atol=drawn.atol)
    return drawn.part.solve(drawn.func, y0, t)


def _event(drawn: Draw, y0: State, t: Tensor, name: str) -> Any:
    event, t0 = event_of(drawn)
    settings = {**_settings(drawn), "atol": 1e-9}
    if drawn.solved_by["adjoint"]:
        params = tuple(drawn.func.parameters())
        settings |= {"odeint_interface": odeint_adjoint, "adjoint_params": params}
    return odeint_event(
        drawn.func,
        y0,
        t0,
        event_fn=event,
        reverse_time=drawn.solved_by["reverse"],
        method=name,
        **settings,
    )


def _torchdyn(drawn: Draw, y0: State, t: Tensor, name: str) -> Any:
    from torchdyn.core import NeuralODE
    from torchdyn.numerics import odeint as torchdyn_odeint

    solver: Any = name if drawn.part is None else drawn.part
    # Where the method has no use for tolerances, torchdyn warns of them.
    tolerances = {"rtol": drawn.rtol, "atol": drawn.atol} if drawn.part is None else {}
    if drawn.entry == "torchdyn":
        return torchdyn_odeint(drawn.func, y0, t, solver, **tolerances)[1]
    return NeuralODE(drawn.func, solver=solver, **tolerances)(y0, t)[1]


_ENTRIES: dict[str, Callable[[Draw, State, Tensor, str], Any]] = {
    "adjoint": _adjoint,
    "solve": _solve,
    "event": _event,
    "torchdyn": _torchdyn,
    "NeuralODE": _torchdyn,
}
