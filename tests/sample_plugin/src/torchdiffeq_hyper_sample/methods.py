"""Two third-order methods for torchdiffeq: "hyperkutta3" and "ssprk3"."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.solvers import FixedGridODESolver

from torchdiffeq_hyper import hookimpl
from torchdiffeq_hyper.methods import Register
from torchdiffeq_hyper.tableaus import Edge, StageCall, Tableau


def _kutta3(
    call: StageCall, t0: Tensor, dt: Tensor, t1: Tensor, y: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    k1 = call(t0, y, Edge.START)
    k2 = call(t0 + dt / 2, y + dt * k1 / 2)
    k3 = call(t1, y + dt * (2 * k2 - k1), Edge.END)
    return dt * (k1 + 4 * k2 + k3) / 6, (k1, k2, k3)


KUTTA3 = Tableau("kutta3", order=3, calls=3, increment=_kutta3)
"""Kutta's third-order method: c = (0, 1/2, 1), b = (1, 4, 1)/6."""


class SSPRK3(FixedGridODESolver):  # type: ignore[misc]
    """The strong-stability-preserving method of Shu and Osher: c = (0, 1, 1/2)."""

    order = 3

    def _step_func(
        self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        k2 = func(t1, y0 + dt * f0, perturb=Perturb.PREV if self.perturb else Perturb.NONE)
        k3 = func(t0 + dt / 2, y0 + dt * (f0 + k2) / 4)
        return dt * (f0 + k2 + 4 * k3) / 6, f0


@hookimpl
def register_solvers(register: Register) -> None:
    """Register both methods."""
    register("hyperkutta3", KUTTA3)
    register("ssprk3", SSPRK3, order=3, calls_per_step=3)
