"""func with the integrals of its own size and slope carried in the state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields._wrappers import look_through, restrict
from torchdiffeq_hyper._state import (
    State,
    StateLayout,
    VectorField,
    check_part,
    check_samples_first,
    parts_of,
    shapes_of,
)
from torchdiffeq_hyper.errors import OptionError, StateShapeError

Parts = tuple[Tensor, ...]


class Energies(NamedTuple):
    """The integrals of `EnergyField` from t[0] on, (len(t), batch); None if not carried."""

    kinetic: Tensor | None
    jacobian: Tensor | None


class EnergyField(nn.Module):
    r"""A vector field that carries its kinetic energy and Jacobian norm in the state.

    Beside y it integrates, for each sample,

        K = int |f(t, y)|^2 dt,        J = int |e^T df/dy|^2 dt,

    the two terms of RNODE, which make trajectories straight (Finlay, Jacobsen, Nurbekyan
    and Oberman, How to train your neural ODE: the world of Jacobian and kinetic
    regularization, ICML 2020, arXiv 2002.02798; there divided by the number of dimensions).
    e is Gaussian noise drawn once a solve: J is an unbiased estimate of the integral of the
    squared Frobenius norm (samples must not influence each other through func).

    Works with any method, `odeint_adjoint` and tuple states; adaptive methods control the
    integrals' errors too. Both are 0 or above in reverse time as well. J adds one
    vector-Jacobian product to each call of func. A solver attached to ``func`` serves too.

    Args:
        func: ``func(t, y)``.
        kinetic, jacobian: whether to carry K, and J; `OptionError` for neither.
        part: the part of a tuple state that counts; None for all that have dimensions,
            which then share their leading one, the batch.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> field = tdh.regularizers.EnergyField(lambda t, y: 2 * torch.ones_like(y))
        >>> solution = odeint(field, field.start(torch.zeros(3, 5)), torch.tensor([0.0, 1.0]))
        >>> y, energies = field.finish(solution)
        >>> y.shape, energies.kinetic[-1]
        (torch.Size([2, 3, 5]), tensor([20., 20., 20.]))
    """

    def __init__(
        self,
        func: VectorField,
        *,
        kinetic: bool = True,
        jacobian: bool = True,
        part: int | None = None,
    ) -> None:
        super().__init__()
        if not (kinetic or jacobian):
            raise OptionError(
                problem="neither kinetic nor jacobian is asked for.",
                expected="at least one of the two.",
                fix="EnergyField(func, kinetic=True, jacobian=False)",
            )
        self.base_func, self.part = func, part
        self.kinetic, self.jacobian = kinetic, jacobian
        self._noise: Parts = ()
        self._is_tuple: bool | None = None

    def start(
        self, y0: State, *, noise: State | None = None, generator: torch.Generator | None = None
    ) -> Parts:
        """Return the state to solve from: the parts of ``y0``, then zeros for the integrals.

        The ``noise`` e is like the part(s) that count; by default drawn with ``generator``.
        `OptionError` if there is no such part, `StateTypeError` for integers, `StateShapeError`
        if the parts that count have no common batch, or the noise has another shape.
        """
        StateLayout.of(y0)
        self._is_tuple, parts = isinstance(y0, tuple), parts_of(y0)
        counted = self._counted(parts)
        check_samples_first(counted, "EnergyField(func, part=0)")
        if self.jacobian:
            drawn = (
                torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
                for p in counted
            )
            self._noise = tuple(drawn) if noise is None else _parts(noise)
            self._check_noise(counted)
        zeros = counted[0].detach().abs().new_zeros(len(counted[0]))
        return (*parts, *[zeros] * (self.kinetic + self.jacobian))

    def forward(self, t: Tensor, state: Parts) -> Parts:
        """Return the derivatives; `StateShapeError` for a state that `start` did not return."""
        parts = state[: len(state) - self.kinetic - self.jacobian]
        if self._is_tuple is None or not parts:
            raise StateShapeError(
                problem="the state carries no integrals.",
                expected="the state that start returned.",
                fix="odeint(field, field.start(y0), t)",
            )
        if not self.jacobian:
            k = self._call(t, parts)
            return (*k, _squares(self._counted(k)))
        self._check_noise(self._counted(parts))
        k, slopes = self._differentiate(t, parts)
        energy = (_squares(self._counted(k)),) if self.kinetic else ()
        return (*k, *energy, _squares(slopes))

    def _call(self, t: Tensor, parts: Parts) -> Parts:
        return _parts(self.base_func(t, parts if self._is_tuple else parts[0]))

    def _differentiate(self, t: Tensor, parts: Parts) -> tuple[Parts, Parts]:
        """Return func's answer and e^T df/dy, with gradients where the caller has them on."""
        has_grad = torch.is_grad_enabled()
        with torch.enable_grad():
            parts = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in parts)
            k = self._call(t, parts)
            y = self._counted(parts)
            pairs = zip(self._counted(k), self._noise, strict=True)
            outputs = [(f, e) for f, e in pairs if f.requires_grad]
            slopes: Parts = tuple(map(torch.zeros_like, y))
            if outputs:
                needed = {"allow_unused": True, "materialize_grads": True}
                f, e = zip(*outputs, strict=True)
                slopes = torch.autograd.grad(f, y, e, create_graph=has_grad, **needed)
        return (k, slopes) if has_grad else (tuple(f.detach() for f in k), slopes)

    def finish(self, solution: Parts) -> tuple[State, Energies]:
        """Return what `odeint` returned for the state of `start`: solution and integrals."""
        n_parts = len(solution) - self.kinetic - self.jacobian
        # In reverse time dt is negative, and what was integrated is not.
        integrals = [integral.abs() for integral in solution[n_parts:]]
        kinetic = integrals[0] if self.kinetic else None
        jacobian = integrals[-1] if self.jacobian else None
        y = solution[:n_parts] if self._is_tuple else solution[0]
        return y, Energies(kinetic, jacobian)

    def restrict(self, index: Tensor) -> EnergyField:
        """Return the field of the samples at ``index``, with their noise."""
        func, kinetic, jacobian = restrict(self.base_func, index), self.kinetic, self.jacobian
        restricted = EnergyField(func, kinetic=kinetic, jacobian=jacobian, part=self.part)
        restricted._is_tuple = self._is_tuple
        restricted._noise = tuple(e[index.to(e.device)] for e in self._noise)
        return restricted

    def _counted(self, parts: Parts) -> Parts:
        if self.part is None:
            return tuple(part for part in parts if part.dim()) or parts
        check_part(self.part, len(parts))
        return (parts[self.part],)

    def _check_noise(self, counted: Parts) -> None:
        got, expected = shapes_of(self._noise)[1], shapes_of(counted)[1]
        if expected != got:
            raise StateShapeError(
                problem=f"the noise has shapes {got}, the parts that count {expected}.",
                expected="noise drawn for this very state.",
                fix="odeint(field, field.start(y0), t)   # start before every solve",
            )


# It adds integrals to the state, and leaves the field of the other parts as it is.
look_through(EnergyField, "base_func")


def _parts(k: State | list[Tensor]) -> Parts:
    return (k,) if isinstance(k, Tensor) else tuple(k)


def _squares(parts: Parts) -> Tensor:
    """Return, for each sample, the sum of squares of all its entries in all parts."""
    sums = [part.abs().square().reshape(len(part), -1).sum(1) for part in parts]
    return torch.stack(sums).sum(0)
