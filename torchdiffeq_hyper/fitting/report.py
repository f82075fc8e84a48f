"""What every fit says of itself, whatever was fitted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torchdiffeq_hyper._report import FitReport
from torchdiffeq_hyper.fitting.budget import Budget
from torchdiffeq_hyper.fitting.checkpoint import FitState
from torchdiffeq_hyper.fitting.config import FitConfig
from torchdiffeq_hyper.fitting.data import Data


def reported(
    config: FitConfig, data: Data, state: FitState, budget: Budget, **own: Any
) -> FitReport:
    """Return the report of a fit that ends.

    Args:
        config: of the fit.
        data: what was measured.
        state: where the fit ended.
        budget: the time there was.
        own: the fields that depend on what was fitted.
    """
    return FitReport(
        losses=tuple(state.history),
        validation=state.best_error,
        base_validation=state.base_error,
        noise_floor=state.noise,
        iterations=state.iteration,
        seconds=budget.seconds,
        reference_seconds=data.seconds,
        reference_nfe=data.calls,
        stopped=state.stopped,
        seed=config.seed,
        **own,
    )


def described(config: FitConfig) -> dict[str, Any]:
    """Return the configuration, but for what may differ when an interrupted fit goes on."""
    settings = asdict(config)
    for name in ("max_seconds", "checkpoint"):
        del settings[name]
    return settings
