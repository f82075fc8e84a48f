"""Counting FLOPs without looking at modules."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.flop_counter import FlopCounterMode


class FlopCounter(FlopCounterMode):
    """torch's FLOP counter, its total only.

    torch's own counts per module too, by hooks on the modules' inputs; those end the
    `torch.autograd.grad` of such an input, as in every likelihood's divergence, with
    "A leaf node was passed to _will_engine_execute_node" (torch 2.13).
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoTracker()


class _NoTracker:
    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *_: object) -> None:
        """Track nothing."""
