"""What wraps a vector field, what it may answer, and whether its samples are independent."""

from torchdiffeq_hyper._fields._answers import (
    check_answer,
    check_correction,
    check_derivative,
    check_hypernet,
    check_hypernet_device,
    check_kind,
    own,
    owning,
    share_memory,
)
from torchdiffeq_hyper._fields._context import (
    HOW_TO_RESTRICT,
    SHAPE_CLASHES,
    Conditioned,
    can_restrict,
    cannot_take_part,
    context_of,
    restrict,
)
from torchdiffeq_hyper._fields._independence import check_independence, find_coupling, is_probing
from torchdiffeq_hyper._fields._wrappers import (
    Owner,
    attributes_as_found,
    look_through,
    look_through_by,
    owner_of,
    owners_in,
    stand_for_field,
)

__all__ = [
    "HOW_TO_RESTRICT",
    "SHAPE_CLASHES",
    "Conditioned",
    "Owner",
    "attributes_as_found",
    "can_restrict",
    "cannot_take_part",
    "check_answer",
    "check_correction",
    "check_derivative",
    "check_hypernet",
    "check_hypernet_device",
    "check_independence",
    "check_kind",
    "context_of",
    "find_coupling",
    "is_probing",
    "look_through",
    "look_through_by",
    "own",
    "owner_of",
    "owners_in",
    "owning",
    "restrict",
    "share_memory",
    "stand_for_field",
]
