"""torchdyn's `NeuralODE` as a vector field: for fits, evaluation, dise and attached solvers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchdiffeq_hyper._fields._models import ModelField
from torchdiffeq_hyper._fields._wrappers import look_through
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import StateTypeError, explain
from torchdiffeq_hyper.hosts.torchdyn import _upstream
from torchdiffeq_hyper.hosts.torchdyn._upstream import Held


class NeuralODEField(ModelField):
    """A `NeuralODE`'s vector field as ``func(t, y)``.

    Args:
        model: the module; solvers attached to it are found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def of(cls, model: object) -> NeuralODEField | None:
        """Return the field of a `NeuralODE`, or another `ODEProblem`; None for other objects."""
        return cls(model) if _upstream.is_problem(model) else None

    @property
    def field(self) -> VectorField:
        """Torchdyn's wrapper of the user's field."""
        return _upstream.field_of(self.model)

    @property
    def has_noise(self) -> bool:
        """Whether a trace estimator draws noise at the start of each solve."""
        return _upstream.draws_noise(self.model)

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        """Return dy/dt."""
        field: Any = self.model.vf
        return field(t, y)

    def given(self, y0: State) -> StartedField:
        """Return the field of the solve that starts at ``y0``.

        Raises:
            StateTypeError: ``y0`` is a tuple.
        """
        if not isinstance(y0, Tensor):
            raise StateTypeError(
                explain(
                    f"y0 is a {type(y0).__name__}, func is a {type(self.model).__name__}.",
                    "one tensor: that is what torchdyn solves.",
                    "y0 = torch.cat(y0, dim=1)",
                )
            )
        return StartedField(self.model, _upstream.set_at_start(self.model, y0.detach()))

    @contextmanager
    def attributes_kept(self) -> Iterator[None]:
        """Give the modules back what their solves set on them."""
        kept = _upstream.set_by_solves(self.model)
        try:
            yield
        finally:
            for part, name, value in kept:
                setattr(part, name, value)


class StartedField(NeuralODEField):
    """A `NeuralODE`'s vector field for one start, which its layers may look at.

    Solves with different starts may be interleaved: what a `NeuralODE` sets once a solve
    is set at each call here. Noise is drawn once, the same for every batch of one size.

    Args:
        model: the module.
        held: modules in it, names of their attributes, and what these are set to.
    """

    def __init__(self, model: nn.Module, held: list[Held]) -> None:
        super().__init__(model)
        self._held = held

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        """Return dy/dt."""
        for part, name, value in self._held:
            setattr(part, name, value)
        return super().__call__(t, y)

    def restrict(self, index: Tensor) -> StartedField:
        """Return the field of the samples at ``index``; the module is shared."""
        return StartedField(self.model, _upstream.held_by(self._held, index))


look_through(NeuralODEField, "field")
look_through(StartedField, "field")
