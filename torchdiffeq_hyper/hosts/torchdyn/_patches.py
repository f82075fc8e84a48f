"""Where torchdyn's calls come to us: four functions, its models, and what it asks of solvers.

torchdyn (1.0.6) assigns ``solver=`` to an attribute of a model, and torch makes a submodule
of every module assigned to another: a fitted solver's weights would be the model's
parameters, and checkpoints of the model would load with this solver only. Ours stay plain
attributes. They follow the model to other devices and dtypes; train and evaluation mode
are their own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchdiffeq_hyper.errors import HostWarning
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.hosts.torchdyn._adjoint import CheckedFunction
from torchdiffeq_hyper.hosts.torchdyn._stepper import Stepper, part_classes

_HOSTS_OWN = "_torchdiffeq_hyper_hosts_own"
_added: list[tuple[type[Any], str]] = []


def put() -> None:
    """Let torchdyn, as far as it is imported, give our solvers their calls; again: no change."""
    for name, wrap in _WRAPPERS.items():
        for module in _upstream.holders(name):
            own = getattr(module, name)
            if not hasattr(own, _HOSTS_OWN):
                wrapper = functools.wraps(own)(wrap(own))
                setattr(wrapper, _HOSTS_OWN, own)
                setattr(module, name, wrapper)
    for kind, names in _upstream.holders_of_solvers():
        _give(kind, {n: f for n, f in _without_solvers(kind, names).items() if n not in vars(kind)})
    for kind in part_classes():
        _give(kind, {name: value for name, value in _PROTOCOL.items() if not hasattr(kind, name)})


def _give(kind: type[Any], attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(kind, name, value)
        _added.append((kind, name))


def take_back() -> None:
    """Leave torchdyn, and our classes, as `put` found them; models keep what they hold."""
    for name in _WRAPPERS:
        for module in _upstream.holders(name):
            setattr(module, name, getattr(getattr(module, name), _HOSTS_OWN, getattr(module, name)))
    while _added:
        delattr(*_added.pop())


def _loop(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loop over fixed or adaptive steps that gives our solvers the whole problem."""
    signature = inspect.signature(own)
    is_adaptive = own.__name__ == _upstream.ADAPTIVE_LOOP

    def loop(*positional: Any, **named: Any) -> Any:
        call = signature.bind(*positional, **named)
        stepper = Stepper.of(call.arguments["solver"])
        if stepper is None:
            return own(*positional, **named)
        call.apply_defaults()
        given = call.arguments
        # odeint_symplectic has no args, and gives the adaptive loop something else in their place.
        has_args = not is_adaptive or isinstance(given["args"], dict)
        return stepper.run(
            given["f"],
            given["x"],
            given["t_span"],
            save_at=given.get("save_at", ()),
            args=given["args"] if has_args else None,
            tolerances=(given["rtol"], given["atol"]) if is_adaptive else None,
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


def _without_solvers(kind: type[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return what a class of torchdyn's is given to hold solvers under these names."""

    def set_attribute(model: Any, name: str, value: Any) -> None:
        if name in names and _is_ours(value):
            model._modules.pop(name, None)
            object.__setattr__(model, name, value)
        else:
            super(kind, model).__setattr__(name, value)

    def apply(model: Any, *positional: Any, **named: Any) -> Any:
        applied = super(kind, model)._apply(*positional, **named)
        for solver in dict.fromkeys(_held(model, names)):
            solver._apply(*positional, **named)
        return applied

    def load(
        model: Any, state: dict[str, Any], prefix: str, metadata: Any, *others: Any, **named: Any
    ) -> None:
        _take_out_solvers(model, names, state, prefix, metadata)
        super(kind, model)._load_from_state_dict(state, prefix, metadata, *others, **named)

    def set_state(model: Any, state: dict[str, Any]) -> None:
        super(kind, model).__setstate__(state)
        for name in names:  # whole models saved while the solver was part of them
            if _is_ours(model._modules.get(name)):
                set_attribute(model, name, model._modules[name])

    return {
        "__setattr__": set_attribute,
        "__setstate__": set_state,
        "_apply": apply,
        "_load_from_state_dict": load,
    }


def _is_ours(value: object) -> bool:
    return isinstance(value, nn.Module) and isinstance(value, part_classes())


def _held(model: Any, names: Sequence[str]) -> Iterator[nn.Module]:
    for name in names:
        solver = vars(model).get(name)
        if isinstance(solver, nn.Module):
            yield solver


def _take_out_solvers(
    model: Any, names: Sequence[str], state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Take a solver's weights, which older checkpoints hold, out of a model's ``state``.

    The model's own solver gets them if they are such a solver's, as it did when it was
    part of the model.
    """
    left_out = []
    for name in names:
        if name in model._modules and model._modules[name].state_dict():
            continue  # one of torchdyn's own, with weights
        start = f"{prefix}{name}."
        weights = {key: state.pop(key) for key in list(state) if key.startswith(start)}
        own = {key.removeprefix(start): value for key, value in weights.items()}
        solver = vars(model).get(name)
        is_assigned = bool(metadata.get("assign_to_params_buffers", False))
        if own and not (isinstance(solver, nn.Module) and _load(solver, own, assign=is_assigned)):
            left_out += list(weights)
    if left_out:
        warnings.warn(
            f"the checkpoint holds weights of a solver, {left_out[0]} and others, which this "
            "model's solver cannot take: they are left out. A solver is no part of a NeuralODE; "
            "solver.save(path) and tdh.HyperSolver.load(path) keep it.",
            HostWarning,
            stacklevel=2,
        )


def _load(solver: nn.Module, weights: dict[str, Any], *, assign: bool) -> bool:
    try:
        # A load that fails halfway has changed what came before.
        copy.deepcopy(solver).load_state_dict(weights, assign=assign)
    except RuntimeError:
        return False
    solver.load_state_dict(weights, assign=assign)
    return True


_WRAPPERS = {
    _upstream.FIXED_LOOP: _loop,
    _upstream.ADAPTIVE_LOOP: _loop,
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
