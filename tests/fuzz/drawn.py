"""One random call: everything that it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fuzz.fields import State
from torchdiffeq_hyper.methods._method import Method


@dataclass
class Draw:
    """One random call.

    Attributes:
        key: method, seed and number: what it is drawn again by.
        method: the method's entry in the registry.
        entry: how the solver is reached.
        dtype: the state's.
        shape: the state's name in `draw.SHAPES`.
        field: the vector field.
        func: what is solved: the field, or what gives it its context.
        is_tuple: whether the state is a tuple.
        y0: the parts of the start.
        t: the times.
        part: the fitted part: a hypersolver, a bespoke solver or a Dise; None for none.
        net: g; None for none.
        steps: equal steps between two points; None follows t.
        alpha: parameter of the base, where it has one.
        domain_span: start and end that a bespoke solver was fitted for; None for any.
        options: options of the call, without the fitted part; "override": the name that the
            part stands in for.
        solved_by: what the reference needs to know beside.
        rtol: relative tolerance.
        atol: absolute tolerance.
        wants_gradient: whether gradients are compared.
        mode: "grad", "no_grad" or "inference".
        notes: what else there is to say of the call.
    """

    key: tuple[str, int, int]
    method: Method
    entry: str
    dtype: torch.dtype
    shape: str
    field: Any
    func: Any
    is_tuple: bool
    y0: tuple[Tensor, ...]
    t: Tensor
    part: Any = None
    net: Any = None
    steps: int | None = None
    alpha: float | None = None
    domain_span: tuple[float, float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    solved_by: dict[str, Any] = field(default_factory=dict)
    rtol: float = 1e-7
    atol: float = 1e-9
    wants_gradient: bool = False
    mode: str = "grad"
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        """The start as the call takes it."""
        return self.y0 if self.is_tuple else self.y0[0]

    @property
    def is_whole(self) -> bool:
        """Whether the fitted part solves the whole problem."""
        return self.method.kind is not None

    @property
    def is_plugins(self) -> bool:
        """Whether the method is a plugin's own solver class, with nothing of ours in it."""
        return not self.method.corrects_base and self.method.kind is None

    @property
    def tells_samples_apart(self) -> bool:
        """Whether the method steps sample by sample."""
        return self.key[0] in ("dopri5_per_sample", "dise")

    @property
    def is_empty(self) -> bool:
        """Whether the state has no numbers."""
        return not any(part.numel() for part in self.y0)

    @property
    def is_half(self) -> bool:
        """Whether the state is in half precision."""
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def real(self) -> torch.dtype:
        """The dtype of the state's real and imaginary parts."""
        return self.dtype.to_real() if self.dtype.is_complex else self.dtype

    def __str__(self) -> str:
        method, seed, number = self.key
        t = [round(float(s), 4) for s in self.t[:6]]
        said = [
            self.entry,
            str(self.dtype)[6:],
            self.shape,
            f"field {self.field_kind}",
            f"t {t}{'...' * (len(self.t) > 6)} {str(self.t.dtype)[6:]}",
            *self.notes,
            self.mode,
        ]
        said += ["gradients"] if self.wants_gradient else []
        return f'--fuzz-only "{method} {seed} {number}": ' + ", ".join(said)

    @property
    def field_kind(self) -> str:
        """The field's name in `FIELDS`, or "context"."""
        return str(getattr(self.field, "kind", "context"))

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's derivative depends on the other samples."""
        if any(part.dim() == 0 for part in self.y0):
            return True
        if self.field_kind == "mean":
            return len(self.y0[0]) != 1
        if self.field_kind == "rotation":
            return any(part.dim() == 1 and len(part) > 1 for part in self.y0)
        return False
