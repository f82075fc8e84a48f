"""Contexts that restore modules and the random state to what they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields import Conditioned, attributes_as_found


class ModuleState:
    """Mode, ``requires_grad``, ``.grad`` and buffers of a module; parameter values if asked for."""

    def __init__(self, module: nn.Module, *, values: bool = False) -> None:
        self._modes = [(part, part.training) for part in module.modules()]
        self._parameters = [
            (p, p.requires_grad, p.grad, p.detach().clone() if values else None)
            for p in module.parameters()
        ]
        self._buffers = [
            (part, name, buffer, None if buffer is None else buffer.detach().clone())
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back: same objects, same values."""
        for part, mode in self._modes:
            part.training = mode
        for parameter, requires_grad, grad, value in self._parameters:
            if value is not None:
                parameter.copy_(value)
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for part, name, buffer, value in self._buffers:
            # A module may have bound a new tensor to the name, or written into the old one.
            part._buffers[name] = buffer  # noqa: SLF001
            if value is not None and not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def left_as_found(func: object) -> Iterator[None]:
    """Put func's modules in evaluation mode without gradients, and back afterwards.

    What a closure or an object that is no module hides is not found. Attributes, such as
    a count of calls, come back too; see `attributes_as_found`.
    """
    with ExitStack() as stack:
        stack.enter_context(attributes_as_found(func))
        modules = modules_in(func)
        for module in modules:
            stack.callback(ModuleState(module).restore)
        for module in modules:
            module.eval().requires_grad_(requires_grad=False)
        yield


def modules_in(func: object) -> list[nn.Module]:
    """Return the modules in func, in the object of a bound method or held by a partial."""
    if isinstance(func, Conditioned):
        return modules_in(func.func)
    if isinstance(func, nn.Module):
        return [func]
    if isinstance(func, MethodType):
        return modules_in(func.__self__)
    if isinstance(func, partial):
        held = (func.func, *func.args, *func.keywords.values())
        return [module for part in held for module in modules_in(part)]
    return []


@contextmanager
def frozen_or_restored(hypernet: nn.Module) -> Iterator[None]:
    """Train a net in place: frozen in evaluation mode at the end, as before on any error."""
    before = ModuleState(hypernet, values=True)
    try:
        yield
    except BaseException:
        before.restore()
        raise
    for parameter in hypernet.parameters():
        parameter.grad = None
    hypernet.eval().requires_grad_(requires_grad=False)


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed torch's generators, and restore them afterwards."""
    # Not torch.manual_seed: it would also start CUDA, or seed generators not kept here.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def random_state() -> list[Tensor]:
    """Return the state of the generators that `own_random_state` seeds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: list[Tensor]) -> None:
    """Set what `random_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
