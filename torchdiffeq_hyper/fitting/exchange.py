"""What processes tell each other: errors, and values as bytes, on which device."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import distributed as dist

from torchdiffeq_hyper import errors
from torchdiffeq_hyper.errors import HyperError, RankError


def from_another(reports: Sequence[bytes]) -> HyperError:
    """Return the error of the first process that failed, for those that did not."""
    told = [(rank, unpack(report, "cpu")) for rank, report in enumerate(reports)]
    rank, (name, text) = next((rank, found) for rank, found in told if found is not None)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, HyperError):
        with suppress(TypeError):  # an error that takes more than a text
            return kind(f"in process {rank}: {text}")
    return RankError(f"process {rank} of this fit failed: {name}: {text}")


def exchange_device(wanted: torch.device) -> torch.device:
    """Return the device on which the group exchanges tensors: ``wanted`` if it can."""
    backend = str(dist.get_backend())
    if wanted.type == "cuda" and "nccl" in backend:
        return wanted
    only_nccl = "nccl" in backend and "gloo" not in backend
    return torch.device("cuda", torch.cuda.current_device()) if only_nccl else torch.device("cpu")


def exchange_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def pack(value: object) -> bytes:
    """Return a value as bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(packed: bytes, device: torch.device | str) -> Any:
    """Return what `pack` was given, its tensors on ``device``."""
    # Pickles, as torch's own exchanges of objects: one's own processes are trusted.
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=False)
