"""The package's files: safetensors with a JSON description; reading runs no code."""

from torchdiffeq_hyper._files._container import damage_reported, read, read_metadata, write
from torchdiffeq_hyper._files._hypersolver import (
    describe_hypersolver,
    read_hypersolver,
    rebuild_hypersolver,
    write_hypersolver,
)

__all__ = [
    "damage_reported",
    "describe_hypersolver",
    "read",
    "read_hypersolver",
    "read_metadata",
    "rebuild_hypersolver",
    "write",
    "write_hypersolver",
]
