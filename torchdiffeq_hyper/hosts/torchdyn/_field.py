"""The user's vector field inside torchdyn's calls and models, as torchdyn would have called it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from torchdiffeq_hyper._fields import ModelField, can_restrict, look_through, restrict
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import StateTypeError
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.hosts.torchdyn._upstream import Held, held_by


@dataclass(frozen=True)
class HostCall:
    """One call of torchdyn, seen through the wrapper that negates time and derivative.

    Attributes:
        func: the field as it was given to `odeint`.
        t: the true times, decreasing in reverse time.
        negated: whether there is such a wrapper.
    """

    func: Callable[..., Any]
    t: Tensor
    negated: bool

    @classmethod
    def of(cls, func: Any, t: Tensor) -> HostCall:
        """Look through the wrapper that `odeint` may have put around ``func``."""
        inner = _upstream.unreversed(func)
        negated = inner is not None
        return cls(func if inner is None else inner, -t if negated else t, negated)


def with_args(func: VectorField, args: Any) -> VectorField:
    """Return ``func`` of (t, y), called with the ``args`` of `odeint` if it takes them."""
    return Field(func, args) if _upstream.takes_args(func, args) else func


def of_samples(func: VectorField, args: Any, batch: int) -> VectorField:
    """Return `with_args`, with the method ``restrict`` if it holds something of every sample."""
    field = with_args(func, args)
    held = [] if can_restrict(func) else _upstream.sample_state(func, batch)
    # Depth alone is told anew at every call.
    is_held = any(value is not None for _, _, value in held)
    return HoldingField(field, held) if is_held else field


class Field:
    """A vector field called with ``args=args``."""

    def __init__(self, func: VectorField, args: Any) -> None:
        self.base_func = func
        self._args = args
        if can_restrict(func):
            self.restrict = lambda index: Field(restrict(func, index), args)

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        return self.base_func(t, y, args=self._args)


class HoldingField:
    """A vector field with layers that hold something of every sample during each call."""

    def __init__(self, func: VectorField, held: Sequence[Held]) -> None:
        self.base_func = func
        self._held = held

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        before = [getattr(module, name) for module, name, _ in self._held]
        try:
            for module, name, value in self._held:
                if value is not None:
                    setattr(module, name, value)
            return self.base_func(t, y)
        finally:
            for (module, name, _), value in zip(self._held, before, strict=True):
                setattr(module, name, value)

    def restrict(self, index: Tensor) -> HoldingField:
        """Return the field of the samples at ``index``; func and its weights are shared."""
        return HoldingField(self.base_func, held_by(self._held, index))


class NeuralODEField(ModelField):
    """A `NeuralODE`'s vector field as ``func(t, y)``; solvers attached to the model are found."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def of(cls, model: object) -> NeuralODEField | None:
        """Return the field of a `NeuralODE`, or another `ODEProblem`; None for other objects."""
        return cls(model) if _upstream.is_problem(model) else None

    @property
    def field(self) -> VectorField:
        """Torchdyn's wrapper of the user's field."""
        return cast("VectorField", self.model.vf)

    @property
    def has_noise(self) -> bool:
        """Whether a trace estimator draws noise at the start of each solve."""
        return _upstream.draws_noise(self.model)

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        field: Any = self.model.vf
        return field(t, y)

    def given(self, y0: State) -> StartedField:
        """Return the field of the solve that starts at ``y0``.

        Raises:
            StateTypeError: ``y0`` is a tuple.
        """
        if not isinstance(y0, Tensor):
            raise StateTypeError(
                problem=f"y0 is a {type(y0).__name__}, func is a {type(self.model).__name__}.",
                expected="one tensor: that is what torchdyn solves.",
                fix="y0 = torch.cat(y0, dim=1)",
            )
        return StartedField(self.model, _upstream.set_at_start(self.model, y0.detach()))

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Give the modules back what solves inside the block set on them."""
        before = _upstream.set_by_solves(self.model)
        try:
            yield
        finally:
            for part, name, value in before:
                setattr(part, name, value)


class StartedField(NeuralODEField):
    """A `NeuralODE`'s vector field for one start, which its layers may look at.

    Solves with different starts may be interleaved: what a `NeuralODE` sets once a solve
    is set at each call here. Noise is drawn once, the same for every batch of one size.
    """

    def __init__(self, model: nn.Module, held: Sequence[Held]) -> None:
        super().__init__(model)
        self._held = held

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        for part, name, value in self._held:
            setattr(part, name, value)
        return super().__call__(t, y)

    def restrict(self, index: Tensor) -> StartedField:
        """Return the field of the samples at ``index``; the module is shared."""
        return StartedField(self.model, held_by(self._held, index))


look_through(Field, "base_func")
look_through(HoldingField, "base_func")
look_through(NeuralODEField, "field")
look_through(StartedField, "field")
