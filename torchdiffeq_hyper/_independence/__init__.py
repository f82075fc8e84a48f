"""Whether the samples along dim 0 are independent, found out before they are solved apart."""

from torchdiffeq_hyper._independence._check import Coupling, check_independence, find_coupling
from torchdiffeq_hyper._independence._parts import cannot_take_part, is_probing

__all__ = [
    "Coupling",
    "cannot_take_part",
    "check_independence",
    "find_coupling",
    "is_probing",
]
