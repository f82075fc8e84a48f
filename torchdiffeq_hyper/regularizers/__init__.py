"""Terms for a training loss that make a vector field easy to integrate."""

from torchdiffeq_hyper.regularizers._energy import Energies, EnergyField
from torchdiffeq_hyper.regularizers._penalties import (
    LossTerms,
    add_penalties,
    error_dt_penalty,
    error_penalty,
    l1,
    l2,
    local_error_penalty,
    stiffness_penalty,
)

__all__ = [
    "Energies",
    "EnergyField",
    "LossTerms",
    "add_penalties",
    "error_dt_penalty",
    "error_penalty",
    "l1",
    "l2",
    "local_error_penalty",
    "stiffness_penalty",
]
