"""A dise never returns inf or nan: candidates of the host do not look at what they return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import NonFiniteError


def burst(t: Tensor, y: Tensor) -> Tensor:
    return y * y


def dise(*methods: str) -> tdh.Dise:
    candidates = [tdh.Candidate(method, steps=2) for method in methods]

    def first(y0: Any) -> Tensor:
        return torch.zeros(len(y0 if isinstance(y0, Tensor) else y0[0]), len(candidates))

    return tdh.Dise(candidates, selector=first)


@pytest.mark.parametrize("method", ["rk4", "euler", "midpoint"])
@pytest.mark.parametrize("end", [2.0, -2.0])
def test_a_candidate_that_blows_up_is_named(method: str, end: float) -> None:
    y0, t = torch.full((3, 1), 1e20 if end > 0 else -1e20), torch.tensor([0.0, end])
    y0[:2] = 0.1 * y0[:2].sign()
    chosen = dise(method)
    with pytest.raises(NonFiniteError, match=rf"sample 2 by {method}.*inf or nan"):
        chosen.solve(burst, y0, t)
    with pytest.raises(NonFiniteError, match="sample 2"):
        odeint(burst, y0, t, method="dise", options={"dise": chosen})
    with pytest.raises(NonFiniteError, match="sample 2"):
        chosen.solve(lambda t, y: tuple(burst(t, part) for part in y), (y0, y0[:, 0]), t)
    assert torch.isfinite(chosen.solve(burst, y0[:2], t)).all()
