"""The vector field inside a torchdyn `NeuralODE`, told by its shape: torchdyn is not imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchdiffeq_hyper._fields import look_through
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import OptionError, StateTypeError, explain
from torchdiffeq_hyper.fitting._guard import own_random_state

# What torchdyn 1.0.6 sets on modules while it solves: the count of calls, the time of
# time-dependent layers, the start that data control sees, a trace estimator's noise.
SET_BY_SOLVES = ("nfe", "t", "_control", "noise")


class NeuralODEField:
    """A `NeuralODE`'s vector field as ``func(t, y)``.

    Args:
        neural_ode: the module; solvers attached to it are found.
    """

    def __init__(self, neural_ode: nn.Module) -> None:
        self.vf = neural_ode

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        """Return dy/dt."""
        assert isinstance(self.vf.vf, nn.Module)
        return self.vf.vf(t, y)

    @property
    def has_noise(self) -> bool:
        """Whether a trace estimator draws noise at the start of each solve."""
        return any(getattr(part, "noise_dist", None) is not None for part in self.vf.modules())

    def given(self, y0: State) -> ConditionedField:
        """Return the field of the solve that starts at ``y0``.

        Raises:
            StateTypeError: ``y0`` is a tuple.
        """
        if not isinstance(y0, Tensor):
            raise StateTypeError(
                explain(
                    f"y0 is a {type(y0).__name__}, func is a {type(self.vf).__name__}.",
                    "one tensor: that is what torchdyn solves.",
                    "y0 = torch.cat(y0, dim=1)",
                )
            )
        return ConditionedField(self.vf, list(_conditions(self.vf, y0.detach())))


class ConditionedField(NeuralODEField):
    """A `NeuralODE`'s vector field for one start, which its layers may look at.

    Solves with different starts may be interleaved: what a `NeuralODE` sets once a solve
    is set at each call here. Noise is drawn once, the same for every batch of one size.

    Args:
        neural_ode: the module.
        values: modules in it, names of their attributes, and what these are set to.
    """

    def __init__(
        self, neural_ode: nn.Module, values: Sequence[tuple[nn.Module, str, Tensor]]
    ) -> None:
        super().__init__(neural_ode)
        self._values = values

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        """Return dy/dt."""
        for part, name, value in self._values:
            setattr(part, name, value)
        return super().__call__(t, y)

    def restrict(self, index: Tensor) -> ConditionedField:
        """Return the field of the samples at ``index``; the module is shared."""
        values = [(part, name, value[index.to(value.device)]) for part, name, value in self._values]
        return ConditionedField(self.vf, values)


look_through(NeuralODEField, "vf")
look_through(ConditionedField, "vf")


def _conditions(neural_ode: nn.Module, y0: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield what torchdyn sets on modules at the start of a solve."""
    # An integral loss and each log-density come before the state proper.
    has_integral = getattr(neural_ode, "integral_loss", None) is not None
    excess = int(has_integral and getattr(neural_ode, "sensitivity", "") == "autograd")
    assert isinstance(neural_ode.vf, nn.Module)
    for part in neural_ode.vf.modules():
        if hasattr(part, "trace_estimator"):
            noise_dist: Any = getattr(part, "noise_dist", None)
            if noise_dist is not None:
                with own_random_state(0):
                    yield part, "noise", noise_dist.sample((len(y0),)).to(y0)
            excess += 1
        if hasattr(part, "_control"):
            yield part, "_control", y0[:, excess:]


def vector_field(func: VectorField) -> VectorField:
    """Return func, or the field inside it where func is a `NeuralODE`.

    That is a module that holds a module ``vf`` and is called as ``func(x, t_span)``.
    """
    if not isinstance(func, nn.Module) or not isinstance(getattr(func, "vf", None), nn.Module):
        return func
    is_whole = "t_span" in inspect.signature(func.forward).parameters
    return NeuralODEField(func) if is_whole else func


def check_shareable(func: VectorField, n_processes: int) -> None:
    """Refuse to share noise among processes: each would draw its own.

    Raises:
        OptionError: func is a `NeuralODE` with a noisy trace estimator.
    """
    if n_processes > 1 and isinstance(func, NeuralODEField) and func.has_noise:
        raise OptionError(
            explain(
                f"func estimates a trace from noise, and {n_processes} processes fit together.",
                "an exact trace, or a fit in one process.",
                "CNF(net, trace_estimator=autograd_trace)",
            )
        )


@contextmanager
def attributes_kept(func: object) -> Iterator[None]:
    """Give a `NeuralODE`'s modules back what its solves set on them."""
    parts = list(func.vf.modules()) if isinstance(func, NeuralODEField) else []
    kept = [(p, name, vars(p)[name]) for p in parts for name in SET_BY_SOLVES if name in vars(p)]
    try:
        yield
    finally:
        for part, name, value in kept:
            setattr(part, name, value)


def check_call(func: VectorField, n_context: int = 0) -> VectorField:
    """Return func after checking that it can be called as ``func(t, y, *context)``.

    Raises:
        StateTypeError: it cannot.
    """
    if not callable(func):
        raise StateTypeError(
            explain(f"func is a {type(func).__name__}.", "a callable func(t, y).", "func=model")
        )
    called = func.forward if isinstance(func, nn.Module) else func
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # built-in and scripted functions do not tell
        return func
    try:
        signature.bind("t", "y", *["context"] * n_context)
    except TypeError as error:
        what = f"func takes {signature} and cannot be called as func(t, y"
        if n_context:
            raise StateTypeError(
                explain(
                    f"{what}, *context) with {n_context} tensor{'s' * (n_context > 1)} of context: "
                    f"{error}.",
                    "a vector field that takes the context after t and y.",
                    "func = lambda t, y, labels: model(y, labels)",
                )
            ) from error
        raise StateTypeError(
            explain(
                f"{what}): {error}.",
                "a vector field func(t, y), or a torchdyn NeuralODE; what else it takes of each "
                "sample is its context.",
                "func = lambda t, y: model(y)\n"
                "or func = tdh.Conditioned(func, labels)   # calls func(t, y, labels)",
            )
        ) from error
    return func
