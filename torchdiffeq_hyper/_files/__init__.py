"""Files: how they are read and written, and rules for what their fields may hold.

A rule is a small object with ``expected``, for people, and ``check(value, name)``, which
returns the value or raises `Mismatch` with the name of the field that is wrong. `Record`
puts rules together, `record_of` reads them off a dataclass. A field that later versions
write and earlier ones did not is a `Default`::

    Record({"steps": Whole(1, MOST_STEPS), "unit": Default(Real(above=0.0), 1.0)})
"""

from torchdiffeq_hyper._files._container import (
    FORMAT_VERSION,
    HEADER,
    damage_reported,
    described_in,
    read,
    read_metadata,
    tensors_under,
    write,
    write_bytes,
)
from torchdiffeq_hyper._files._records import (
    Default,
    Either,
    Items,
    Maybe,
    Record,
    Row,
    Table,
    Tagged,
    built,
    check_sizes,
    check_weights,
    record_of,
)
from torchdiffeq_hyper._files._rules import (
    FLAG,
    FLOATS,
    Anything,
    Choice,
    Mismatch,
    Real,
    Rule,
    Such,
    TensorOf,
    Text,
    Whole,
    checked,
    mismatch,
    missing,
    refused,
    shown,
    under,
)

__all__ = [
    "FLAG",
    "FLOATS",
    "FORMAT_VERSION",
    "HEADER",
    "Anything",
    "Choice",
    "Default",
    "Either",
    "Items",
    "Maybe",
    "Mismatch",
    "Real",
    "Record",
    "Row",
    "Rule",
    "Such",
    "Table",
    "Tagged",
    "TensorOf",
    "Text",
    "Whole",
    "built",
    "check_sizes",
    "check_weights",
    "checked",
    "damage_reported",
    "described_in",
    "mismatch",
    "missing",
    "read",
    "read_metadata",
    "record_of",
    "refused",
    "shown",
    "tensors_under",
    "under",
    "write",
    "write_bytes",
]
