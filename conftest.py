"""No test and no doctest may leave a trace in the libraries that the package patches."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_hyper.methods import _registry


def _traces() -> dict[str, object]:
    return {
        # `install` makes the learned classes anew, equal by their entries.
        "torchdiffeq's SOLVERS": [(name, getattr(s, "entry", s)) for name, s in SOLVERS.items()],
        "the registry": list(_registry.methods().items()),
        "the default dtype": torch.get_default_dtype(),
        "the gradient mode": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    before = _traces()
    yield
    if _traces() != before:
        gc.collect()  # an overridden name is given back when the last graph that used it dies
    after = _traces()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"the test changed {' and '.join(changed)}"
