"""A fitted solver that goes wrong a little further out is told by its report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.fitting._break_even import FIXED
from torchdiffeq_hyper.fitting._errors import Comparison
from torchdiffeq_hyper.fitting._report import FURTHER, starts_further_out

Y0 = torch.randn(60, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
RK4 = FIXED["rk4"].with_steps("rk4", 8).run


def batch(y0: Any = Y0) -> Any:
    from torchdiffeq_hyper.fitting._batches import Batches
    from torchdiffeq_hyper.fitting._budget import Budget
    from torchdiffeq_hyper.fitting._data import Data, References
    from torchdiffeq_hyper.fitting._distributed import ProcessGroup
    from torchdiffeq_hyper.fitting._field import Units
    from torchdiffeq_hyper.fitting._reference import Plan, Tolerances
    from torchdiffeq_hyper.tableaus import EULER

    return Data(
        References(
            damped_wave if isinstance(y0, Tensor) else waves,
            Plan.of((0.0, 1.0), 2, "forward"),
            Tolerances("dopri5", 1e-6, 1e-6),
            Units(),
            EULER,
        ),
        Batches(y0, tdh.FitConfig(batch_size=64)),
        Budget(1e9),
        ProcessGroup(),
    ).first


def waves(t: Tensor, state: Any) -> Any:
    return tuple(damped_wave(t, part) for part in state)


def fails_beyond(limit: float, how: str) -> Any:
    """Return a solver that is right up to a distance from zero, and wrong beyond."""

    def run(func: Any, y0: Any, t: Tensor) -> Any:
        solution = RK4(func, y0, t)
        first = y0 if isinstance(y0, Tensor) else y0[0]
        beyond = first.abs().amax(1) > limit
        if how == "raises" and bool(beyond.any()):
            message = "inf"
            raise ArithmeticError(message)
        whole = solution if isinstance(solution, Tensor) else solution[0]
        whole[-1, beyond] *= 50.0
        return solution

    return run


def note_on(run: Any, y0: Any = Y0) -> str:
    func = damped_wave if isinstance(y0, Tensor) else waves
    return starts_further_out(Comparison(run, RK4, "rk4", 8, 0), func, batch(y0))


@pytest.mark.parametrize("y0", [Y0, (Y0, Y0[:, 0].clone())], ids=["tensor", "tuple"])
@pytest.mark.parametrize("how", ["raises", "is far off"])
def test_what_goes_wrong_further_out_is_said(y0: Any, how: str) -> None:
    first = batch(y0).start(0)
    furthest = float((first if isinstance(first, Tensor) else first[0]).abs().max())
    note = note_on(fails_beyond(1.01 * furthest, how), y0)
    assert "starts unlike those fitted on may go wrong" in note
    assert f"{FURTHER:g} times" in note


def test_nothing_is_said_where_all_is_well_or_the_base_is_no_better() -> None:
    assert note_on(RK4) == ""
    broken = fails_beyond(0.0, "raises")
    assert starts_further_out(Comparison(RK4, broken, "rk4", 8, 0), damped_wave, batch()) == ""
