"""Contexts that restore func, nets and the random state to what they were before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields._wrappers import Conditioned, model_field


@contextmanager
def left_as_found(func: object) -> Iterator[None]:
    """Put func's modules in evaluation mode without gradients, and back as by `as_found`."""
    with as_found(func):
        for module in modules_in(func):
            module.eval().requires_grad_(requires_grad=False)
        yield


@contextmanager
def as_found(func: object) -> Iterator[None]:
    """Give back what calls of func change: its modules, attributes, a host's model."""
    model = model_field(func.func if isinstance(func, Conditioned) else func)
    with attributes_as_found(func), ExitStack() as stack:
        for module in modules_in(func):
            stack.callback(_restoring(module))
        if model is not None:
            stack.enter_context(model.as_found())
        yield


@contextmanager
def attributes_as_found(func: object) -> Iterator[None]:
    """Undo what calls of func assign to attributes; what is changed in place stays changed."""
    # All of them, so that a cached value and the size that it was made for stay a pair.
    called = (c.modules() if isinstance(c, nn.Module) else (c,) for c in _called_in(func))
    owners = filter(_keeps_attributes, chain.from_iterable(called))
    before = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in before:
            now: dict[str, Any] = vars(owner)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)


def _keeps_attributes(called: object) -> bool:
    # torch's own modules count nothing, and some complete themselves at their first call.
    is_torch = type(called).__module__.startswith("torch.")
    has_own = isinstance(getattr(called, "__dict__", None), dict)
    return has_own and not is_torch and not isinstance(called, type | ModuleType)


def _called_in(func: object) -> Iterator[object]:
    """Yield what a call of func runs through: the object of a bound method, parts of a partial."""
    if isinstance(func, MethodType):
        yield from _called_in(func.__self__)
    elif isinstance(func, partial):
        for part in (func.func, *func.args, *func.keywords.values()):
            if callable(part):
                yield from _called_in(part)
    else:
        yield func
        if isinstance(func, Conditioned) and not isinstance(func.func, nn.Module):
            yield from _called_in(func.func)


def modules_in(func: object) -> list[nn.Module]:
    """Return the modules in func, in the object of a bound method or held by a partial."""
    return [called for called in _called_in(func) if isinstance(called, nn.Module)]


def _restoring(module: nn.Module, *, values: bool = False) -> Callable[[], None]:
    """Return what restores modes, ``requires_grad``, ``.grad``, buffers and parameters' values."""
    modes = [(part, part.training) for part in module.modules()]
    parameters = [
        (p, p.requires_grad, p.grad, p.detach().clone() if values else None)
        for p in module.parameters()
    ]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]

    @torch.no_grad()
    def restore() -> None:
        for part, mode in modes:
            part.training = mode
        for parameter, requires_grad, grad, value in parameters:
            if value is not None:
                parameter.copy_(value)
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for part, name, buffer, value in buffers:
            # A module may have bound a new tensor to the name, or written into the old one.
            part._buffers[name] = buffer  # noqa: SLF001
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    return restore


@contextmanager
def frozen_or_restored(hypernet: nn.Module) -> Iterator[None]:
    """Train a net in place: frozen in evaluation mode at the end, as before on any error."""
    restore = _restoring(hypernet, values=True)
    try:
        yield
    except BaseException:
        restore()
        raise
    hypernet.zero_grad()
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
