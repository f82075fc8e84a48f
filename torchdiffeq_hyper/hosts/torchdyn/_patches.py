"""Where torchdyn's calls come to us: four functions, and what it asks of solver objects."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from torchdiffeq_hyper.hosts.torchdyn import _models, _upstream
from torchdiffeq_hyper.hosts.torchdyn._adjoint import CheckedFunction
from torchdiffeq_hyper.hosts.torchdyn._stepper import Stepper, part_classes

_HOSTS_OWN = "_torchdiffeq_hyper_hosts_own"
_given: list[tuple[type[Any], str]] = []


def put() -> None:
    """Let torchdyn, as far as it is imported, give our solvers their calls; again: no change."""
    for name, wrap in _WRAPPERS.items():
        for module in _upstream.holders(name):
            own = getattr(module, name)
            if not hasattr(own, _HOSTS_OWN):
                wrapper = functools.wraps(own)(wrap(own))
                setattr(wrapper, _HOSTS_OWN, own)
                setattr(module, name, wrapper)
    _models.put()
    for kind in part_classes():
        for name, value in _PROTOCOL.items():
            if not hasattr(kind, name):
                setattr(kind, name, value)
                _given.append((kind, name))


def take_back() -> None:
    """Leave torchdyn, and our classes, as `put` found them."""
    for name in _WRAPPERS:
        for module in _upstream.holders(name):
            setattr(module, name, getattr(getattr(module, name), _HOSTS_OWN, getattr(module, name)))
    _models.take_back()
    while _given:
        delattr(*_given.pop())


def _fixed_loop(own: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(own)

    def loop(*positional: Any, **named: Any) -> Any:
        given = signature.bind(*positional, **named).arguments
        stepper = Stepper.of(given["solver"])
        if stepper is None:
            return own(*positional, **named)
        return stepper.run(
            given["f"],
            given["x"],
            given["t_span"],
            save_at=given.get("save_at", ()),
            args=given.get("args"),
        )

    return loop


def _adaptive_loop(own: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(own)

    def loop(*positional: Any, **named: Any) -> Any:
        call = signature.bind(*positional, **named)
        stepper = Stepper.of(call.arguments["solver"])
        if stepper is None:
            return own(*positional, **named)
        call.apply_defaults()
        given = call.arguments
        return stepper.run(
            given["f"],
            given["x"],
            given["t_span"],
            # odeint_symplectic has no args, and gives something else in their place.
            args=given["args"] if isinstance(given["args"], dict) else None,
            tolerances=(given["rtol"], given["atol"]),
        )

    return loop


def _adjoint(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return what gives each call under an adjoint solver objects of its own, if ours."""
    signature = inspect.signature(own)
    is_interpolated = own.__name__ == _upstream.INTERPOLATED_ADJOINT

    def gather(*positional: Any, **named: Any) -> Any:
        call = signature.bind(*positional, **named)
        given = call.arguments
        solver, solver_adjoint = given["solver"], given["solver_adjoint"]
        forward, backward = Stepper.of(solver), Stepper.of(solver_adjoint)
        ours = forward or backward
        if ours is None:
            return own(*positional, **named)
        tolerances = given["rtol_adjoint"], given["atol_adjoint"]
        for_call = ours.for_adjoint(
            tolerances,
            # The host's Function switches gradients off.
            is_trained=forward is not None and torch.is_grad_enabled(),
            is_interpolated=is_interpolated,
        )
        if forward is not None:
            given["solver"] = for_call
        if backward is not None:
            shares = forward is None or solver_adjoint is solver
            own_backward = for_call if shares else backward
            # Nothing of ours is left to do there, and the host's loop knows of seminorms.
            to_dopri5 = backward.is_whole and not is_interpolated
            dtype = given["vf_params"].dtype
            given["solver_adjoint"] = _upstream.dopri5(dtype) if to_dopri5 else own_backward
        function = own(*call.args, **call.kwargs)
        return function if forward is None else CheckedFunction(function, forward.who)

    return gather


def _step(solver: Any, *positional: Any, **named: Any) -> Any:
    return Stepper.of_part(solver).step(*positional, **named)


def _sync_device_dtype(solver: Any, x: Any, t_span: Any) -> Any:
    return Stepper.of_part(solver).sync_device_dtype(x, t_span)


_WRAPPERS = {
    _upstream.FIXED_LOOP: _fixed_loop,
    _upstream.ADAPTIVE_LOOP: _adaptive_loop,
    _upstream.ADJOINT: _adjoint,
    _upstream.INTERPOLATED_ADJOINT: _adjoint,
}

_PROTOCOL: dict[str, Any] = {
    "stepping_class": property(lambda solver: Stepper.of_part(solver).stepping_class),
    "order": property(lambda solver: Stepper.of_part(solver).order),
    "sync_device_dtype": _sync_device_dtype,
    "step": _step,
}
"""What torchdyn asks of an object given as ``solver=``; such objects are ours only here."""
