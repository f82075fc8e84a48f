"""Puts the registry's methods among torchdyn's (1.0.6), and takes the calls of our solvers.

Whichever package is imported first; nothing here imports torchdyn.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torchdiffeq_hyper.errors import DuplicateMethodError, PluginWarning
from torchdiffeq_hyper.hosts._host import Host
from torchdiffeq_hyper.hosts.torchdyn._field import ODEINT, PROBLEMS, imported
from torchdiffeq_hyper.hosts.torchdyn._stepper import (
    SENSITIVITY,
    AdjointStepper,
    Stepper,
    checked_function,
    part_classes,
)
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.methods._method import Method

_ENTRANCES = (ODEINT, SENSITIVITY, PROBLEMS)
"""The modules that whoever uses torchdyn's numerics, adjoints or models imports first."""

_HOSTS_OWN = "_torchdiffeq_hyper_hosts_own"
_added: list[tuple[type[Any], str]] = []  # attributes given to classes


class ImportHook(MetaPathFinder):
    """Has `host` follow each import of a module through which torchdyn is used."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return what the other finders find; its loader has `host` follow, once."""
        if fullname not in _ENTRANCES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        finds = [finder.find_spec for finder in others if hasattr(finder, "find_spec")]
        spec = next(filter(None, (find(fullname, path, target) for find in finds)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            _watch(spec.loader)
        return spec


def _watch(loader: Any) -> None:
    run = loader.exec_module

    def run_then_follow(module: ModuleType) -> None:
        # The loader is the file's own again before its code can look at it.
        del loader.exec_module
        run(module)
        try:
            host.follow()
        except DuplicateMethodError as error:  # no name of ours may break an import
            warnings.warn(f"{error}", PluginWarning, stacklevel=2)

    loader.exec_module = run_then_follow


_hook = ImportHook()


class Torchdyn(Host):
    """torchdyn's dict `SOLVER_DICT`."""

    name = "torchdyn"

    def entries(self) -> Any:
        found = imported("torchdyn.numerics.solvers.ode", "SOLVER_DICT")
        return found if ODEINT in sys.modules else None

    def step_by_step(self, method: Method) -> Any:
        """Return what torchdyn calls with a dtype to get a solver object."""
        return lambda dtype=torch.float32: Stepper(method)

    all_at_once = step_by_step

    def ready_made(self, method: Method) -> None:
        """Return None: torchdyn cannot run solver classes of torchdiffeq's kind."""

    def follow(self) -> None:
        """Make torchdyn, if imported, hold what the registry holds; wait for its import if not."""
        with _registry.lock:
            if self.is_installed and _hook not in sys.meta_path:
                sys.meta_path.insert(0, _hook)
            elif not self.is_installed and _hook in sys.meta_path:
                sys.meta_path.remove(_hook)
            if self.entries() is not None:
                (_patch if self.is_installed else _unpatch)()
            super().follow()


host = Torchdyn()


def _patch() -> None:
    """Let torchdyn, as far as it is imported, give our solvers their calls; again: no change."""
    for module, name, wrap in _wrapped():
        own = getattr(module, name)
        if not hasattr(own, _HOSTS_OWN):
            wrapper = wraps(own)(wrap(own))
            setattr(wrapper, _HOSTS_OWN, own)
            setattr(module, name, wrapper)
    model = imported(PROBLEMS, "ODEProblem")
    if model is not None and "_apply" not in vars(model):
        _give(model, _without_solvers(model))
    for kind in part_classes():
        _give(kind, {name: value for name, value in _PROTOCOL.items() if not hasattr(kind, name)})


def _give(kind: type[Any], attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(kind, name, value)
        _added.append((kind, name))


def _unpatch() -> None:
    """Leave torchdyn, and our classes, as `_patch` found them; models keep what they hold."""
    for module, name, _ in _wrapped():
        own = getattr(module, name)
        setattr(module, name, getattr(own, _HOSTS_OWN, own))
    while _added:
        delattr(*_added.pop())


def _wrapped() -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
    """Yield the imported modules, their functions that are wrapped, and what wraps these."""
    for module_name, (name, wrap) in itertools.product(_ENTRANCES, _WRAPPERS.items()):
        if imported(module_name, name) is not None:
            yield sys.modules[module_name], name, wrap


def _loop(own: Callable[..., Any], *, is_adaptive: bool) -> Callable[..., Any]:
    """Return a loop over fixed or adaptive steps that gives our solvers the whole problem."""
    signature = inspect.signature(own)

    def loop(*positional: Any, **named: Any) -> Any:
        call = signature.bind(*positional, **named)
        stepper = Stepper.of(call.arguments["solver"])
        if stepper is None:
            return own(*positional, **named)
        call.apply_defaults()
        given = call.arguments
        # odeint_symplectic has no args, and gives the adaptive loop something else in their place.
        has_args = not is_adaptive or isinstance(given["args"], dict)
        save_at, args = given.get("save_at", ()), given["args"] if has_args else None
        tolerances = (given["rtol"], given["atol"]) if is_adaptive else None
        return stepper.run(given["f"], given["x"], given["t_span"], save_at, args, tolerances)

    return loop


def _adjoint(own: Callable[..., Any], *, is_interpolated: bool) -> Callable[..., Any]:
    """Return what gives each call under an adjoint solver objects of its own, if ours."""
    signature = inspect.signature(own)

    def gather(*positional: Any, **named: Any) -> Any:
        call = signature.bind(*positional, **named)
        given = call.arguments
        solver, solver_adjoint = given["solver"], given["solver_adjoint"]
        forward, backward = Stepper.of(solver), Stepper.of(solver_adjoint)
        tolerances = given["rtol_adjoint"], given["atol_adjoint"]
        for_call = partial(AdjointStepper, tolerances, is_interpolated=is_interpolated)
        if forward is not None:
            given["solver"] = for_call(forward)
        if backward is not None and backward.is_whole and not is_interpolated:
            # Nothing of ours is left to do there, and the host's loop knows of seminorms.
            given["solver_adjoint"] = "dopri5"
        elif backward is not None and solver_adjoint is solver:
            given["solver_adjoint"] = given["solver"]
        elif backward is not None:
            given["solver_adjoint"] = for_call(backward)
        function = own(*call.args, **call.kwargs)
        if forward is None:
            return function
        return checked_function(function, forward if forward.part is None else forward.part)

    return gather


def _without_solvers(kind: type[Any]) -> dict[str, Any]:
    """Return what torchdyn's class of models is given to hold solvers as plain attributes.

    As submodules their weights would be the model's, whose checkpoints would load with the same
    solver only. They follow the model to other devices and dtypes.
    """
    names = ("solver", "solver_adjoint")

    def set_attribute(model: Any, name: str, value: Any) -> None:
        if name in names and isinstance(value, nn.Module) and isinstance(value, part_classes()):
            model._modules.pop(name, None)
            object.__setattr__(model, name, value)
        else:
            super(kind, model).__setattr__(name, value)

    def apply(model: Any, *positional: Any, **named: Any) -> Any:
        applied = super(kind, model)._apply(*positional, **named)
        held = [vars(model).get(name) for name in names]
        for solver in {solver for solver in held if isinstance(solver, nn.Module)}:
            solver._apply(*positional, **named)
        return applied

    return {"__setattr__": set_attribute, "_apply": apply}


_WRAPPERS = {
    "_fixed_odeint": partial(_loop, is_adaptive=False),
    "_adaptive_odeint": partial(_loop, is_adaptive=True),
    "_gather_odefunc_adjoint": partial(_adjoint, is_interpolated=False),
    "_gather_odefunc_interp_adjoint": partial(_adjoint, is_interpolated=True),
}


def _answer(name: str) -> Any:
    return property(lambda solver: getattr(Stepper.of_part(solver), name))


_PROTOCOL = {
    name: _answer(name) for name in ("stepping_class", "order", "sync_device_dtype", "step")
}
"""What torchdyn asks of an object given as ``solver=``; such objects are ours only here."""
