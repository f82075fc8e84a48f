"""The package's files: safetensors with a JSON description; reading runs no code."""

from torchdiffeq_hyper._files._bespoke import (
    describe_bespoke,
    read_bespoke,
    rebuild_bespoke,
    write_bespoke,
)
from torchdiffeq_hyper._files._container import (
    damage_reported,
    read,
    read_metadata,
    write,
    write_bytes,
)
from torchdiffeq_hyper._files._hypersolver import (
    describe_hypersolver,
    read_hypersolver,
    rebuild_hypersolver,
    write_hypersolver,
)

__all__ = [
    "damage_reported",
    "describe_bespoke",
    "describe_hypersolver",
    "read",
    "read_bespoke",
    "read_hypersolver",
    "read_metadata",
    "rebuild_bespoke",
    "rebuild_hypersolver",
    "write",
    "write_bespoke",
    "write_bytes",
    "write_hypersolver",
]
