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
from torchdiffeq_hyper._fields._models import (
    ModelField,
    add_models,
    check_call,
    check_shareable,
    model_as_found,
    vector_field,
)
from torchdiffeq_hyper._fields._wrappers import (
    Owner,
    attributes_as_found,
    look_through,
    look_through_by,
    owner_of,
    owners_in,
)

__all__ = [
    "HOW_TO_RESTRICT",
    "SHAPE_CLASHES",
    "Conditioned",
    "ModelField",
    "Owner",
    "add_models",
    "attributes_as_found",
    "can_restrict",
    "cannot_take_part",
    "check_answer",
    "check_call",
    "check_correction",
    "check_derivative",
    "check_hypernet",
    "check_hypernet_device",
    "check_independence",
    "check_kind",
    "check_shareable",
    "context_of",
    "find_coupling",
    "is_probing",
    "look_through",
    "look_through_by",
    "model_as_found",
    "own",
    "owner_of",
    "owners_in",
    "owning",
    "restrict",
    "share_memory",
    "vector_field",
]
