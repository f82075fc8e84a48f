"""The package's files: safetensors with a JSON description; reading runs no code."""

from torchdiffeq_hyper._files._bespoke import (
    describe_bespoke,
    read_bespoke,
    rebuild_bespoke,
    write_bespoke,
)
from torchdiffeq_hyper._files._container import (
    damage_reported,
    described_in,
    read,
    read_metadata,
    tensors_under,
    write,
    write_bytes,
)
from torchdiffeq_hyper._files._hypersolver import (
    describe_hypersolver,
    read_hypersolver,
    rebuild_hypersolver,
    write_hypersolver,
)
from torchdiffeq_hyper._files._nets import UNSEEN, load_weights
from torchdiffeq_hyper._files._rules import REPORT

__all__ = [
    "REPORT",
    "UNSEEN",
    "damage_reported",
    "describe_bespoke",
    "describe_hypersolver",
    "described_in",
    "load_weights",
    "read",
    "read_bespoke",
    "read_hypersolver",
    "read_metadata",
    "rebuild_bespoke",
    "rebuild_hypersolver",
    "tensors_under",
    "write",
    "write_bespoke",
    "write_bytes",
    "write_hypersolver",
]
