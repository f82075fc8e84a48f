"""What the fields of a file may hold, declared as rules; checked here for every kind of file.

A rule is a small object with ``expected``, for people, and ``check(value, name)``, which
returns the value or raises `Mismatch` with the name of the field that is wrong. `Record`
puts rules together, `record_of` reads them off a dataclass. A field that later versions
write and earlier ones did not is a `Default`::

    Record({"steps": Whole(1, MOST_STEPS), "unit": Default(Real(above=0.0), 1.0)})
"""

from torchdiffeq_hyper._files._nets import built, check_sizes
from torchdiffeq_hyper._files._records import (
    Default,
    Either,
    Items,
    Maybe,
    Record,
    Row,
    Such,
    Table,
    Tagged,
    record_of,
)
from torchdiffeq_hyper._files._schema import (
    FLAG,
    FLOATS,
    Anything,
    Choice,
    Mismatch,
    Real,
    Rule,
    TensorOf,
    Text,
    Whole,
    checked,
    mismatch,
    missing,
    refused,
    shown,
)

__all__ = [
    "FLAG",
    "FLOATS",
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
    "checked",
    "mismatch",
    "missing",
    "record_of",
    "refused",
    "shown",
]
