"""One fit in several processes, through torch.distributed's default process group."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchdiffeq_hyper import errors
from torchdiffeq_hyper._state import wide_dtype
from torchdiffeq_hyper.errors import HyperError, HyperWarning, RankError
from torchdiffeq_hyper.fitting._field import OutOfTimeError

T = TypeVar("T")

_COLLECTIVES = ("begin", "gradients", "gather", "from_first", "end")


class ProcessGroup:
    """The processes that fit one net together: one, or all of the default process group.

    All do the same, each on its share of a batch; rank 0 decides by what it measures. Before
    every collective call an ``all_reduce`` tells the others whether this process failed, which
    call it means, and rank 0's clock: nobody waits for a process that broke off.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.now = 0.0  # rank 0's clock at the last collective call, in seconds
        self._is_heard = True

    @classmethod
    def current(cls) -> ProcessGroup:
        """Return the default process group's processes, or this one alone."""
        if not dist.is_available():
            return cls()
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if dist.is_torchelastic_launched() and os.environ.get("WORLD_SIZE", "1") != "1":
            warnings.warn(
                "torchrun launched this process, but there is no process group: it fits alone. "
                "For one fit by all, call torch.distributed.init_process_group() first.",
                HyperWarning,
                stacklevel=4,
            )
        return cls()

    @property
    def clock(self) -> Callable[[], float] | None:
        """Rank 0's clock in seconds, by which all processes decide; None for one process."""
        return None if self.size == 1 else lambda: self.now

    @property
    def is_first(self) -> bool:
        """Whether this process shows, writes and decides."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Begin with the others; an error in one process is raised in all, with its text."""
        try:
            self._meet("begin")
            yield
        except BaseException as error:
            if self._is_heard:
                with suppress(RuntimeError):  # the others are gone: this error says more
                    self._meet("end", error)
            raise

    def finish(self) -> None:
        """Wait until nothing can go wrong in any process any more."""
        self._meet("end")

    def share(self, count: int) -> tuple[slice, float]:
        """Return this process's part of ``count`` samples, and its weight in their mean.

        Where there are too few it is the first sample, with weight 0.

        >>> ProcessGroup(rank=1, size=3).share(7), ProcessGroup(rank=0, size=2).share(1)
        ((slice(2, 4, None), 0.2857142857142857), (slice(0, 1, None), 0.0))
        """
        low, high = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        if low == high:
            return slice(0, 1), 0.0
        return slice(low, high), (high - low) / count

    def average(self, loss: Tensor, parameters: Sequence[nn.Parameter], weight: float) -> Tensor:
        """Return the weighted sum of all processes' losses, and so add up the gradients.

        In float64 where the device has it; a parameter without ``.grad`` in all gets none.
        """
        loss = loss.detach()
        if self.size == 1:
            return loss
        self._meet("gradients")
        device = _collective_device(loss.device)
        parts = [loss.reshape(1), loss.new_tensor([float(p.grad is not None) for p in parameters])]
        parts += [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        flat = weight * torch.cat([part.detach().to(device, wide_dtype(device)) for part in parts])
        self._collect(dist.all_reduce, flat)
        total, are_used, *grads = flat.split([part.numel() for part in parts])
        for p, is_used, grad in zip(parameters, are_used.tolist(), grads, strict=True):
            p.grad = grad.reshape(p.shape).to(p.device, p.dtype) if is_used > 0 else None
        mean: Tensor = total[0].to(loss.device, loss.dtype)
        return mean

    def gather(self, value: T, device: torch.device | str = "cpu") -> list[T]:
        """Return every process's value, its tensors on ``device``, in the order of ranks."""
        if self.size == 1:
            return [value]
        self._meet("gather")
        return self._gather(value, device)

    def gather_in_time(
        self, measure: Callable[[], T], device: torch.device | str = "cpu"
    ) -> list[T]:
        """Return what each process measures; `OutOfTimeError` in all where one has no time."""
        value = None
        with suppress(OutOfTimeError):
            value = measure()
        found = [each for each in self.gather(value, device) if each is not None]
        if len(found) < self.size:
            raise OutOfTimeError
        return found

    def from_first(self, measure: Callable[[], T]) -> T:
        """Return what ``measure`` returns in rank 0, its tensors on the CPU elsewhere."""
        if self.size == 1:
            return measure()
        value = measure() if self.is_first else None
        self._meet("from_first")
        packed = [_pack(value)]
        self._collect(dist.broadcast_object_list, packed, src=0)
        return value if value is not None else _unpack(packed[0], "cpu")

    def _meet(self, collective: str, error: BaseException | None = None) -> None:
        """Tell the others what comes next, or what went wrong here."""
        if self.size == 1:
            return
        kind = float(_COLLECTIVES.index(collective))
        clock = time.perf_counter() if self.is_first else 0.0
        device = _collective_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        values = [error is not None, kind, kind**2, clock]
        status = torch.tensor(values, dtype=wide_dtype(device), device=device)
        self._collect(dist.all_reduce, status)
        failed, sum_of_kinds, sum_of_squares, self.now = status.tolist()
        if failed:
            told = None if error is None else (type(error).__name__, str(error))
            reports = self._gather(told, "cpu")
            self._is_heard = False
            if error is None:
                raise _error_of_first(reports)
        elif sum_of_kinds**2 != self.size * sum_of_squares:  # unless all are equal
            self._is_heard = False
            raise RankError(
                problem=f"the {self.size} processes of this fit went different ways.",
                expected="the same call in every process, with the same y0, which fit shares out.",
                fix="torch.manual_seed(0)   # before y0 or its DataLoader; no DistributedSampler",
            )

    def _gather(self, value: T, device: torch.device | str) -> list[T]:
        gathered: list[Any] = [None] * self.size
        self._collect(dist.all_gather_object, gathered, _pack(value))
        return [_unpack(packed, device) for packed in gathered]

    def _collect(self, collective: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        self._is_heard = False  # should it break off, nobody would listen any more
        collective(*args, **kwargs)
        self._is_heard = True


def _error_of_first(reports: Sequence[tuple[str, str] | None]) -> HyperError:
    """Return the error of the first process that failed, for those that did not."""
    rank, (name, text) = next((rank, told) for rank, told in enumerate(reports) if told)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, HyperError):
        with suppress(TypeError):  # an error that takes more than a text
            return kind(f"in process {rank}: {text}")
    return RankError(f"process {rank} of this fit failed: {name}: {text}")


def _collective_device(wanted: torch.device) -> torch.device:
    """Return the device on which the group exchanges tensors: ``wanted`` if it can."""
    backend = str(dist.get_backend())
    if wanted.type == "cuda" and "nccl" in backend:
        return wanted
    only_nccl = "nccl" in backend and "gloo" not in backend
    return torch.device("cuda", torch.cuda.current_device()) if only_nccl else torch.device("cpu")


def _pack(value: object) -> bytes:
    # torch's collectives of objects would keep tensors on the device that they come from.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes, device: torch.device | str) -> Any:
    # Pickles, as torch's own exchanges of objects: one's own processes are trusted.
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=False)
