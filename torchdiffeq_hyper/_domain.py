"""What a solver was fitted for: span, step sizes, direction and kind of state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.errors import StateShapeError, StateTypeError, explain


@dataclass(frozen=True)
class FitDomain:
    """What a solver was fitted for.

    Attributes:
        span: (start, end) in the time unit of the problem, as passed to `fit`.
        dt_min: smallest fitted step size |dt|.
        dt_max: largest fitted step size |dt|.
        directions: signs of dt that were fitted: 1 (time grows), -1 (time falls).
        shapes: shape of each part of the state without its batch dimension.
        is_tuple: whether the state was a tuple of tensors.
        dtype: the state's dtype, e.g. "float32".

    Example:
        >>> from torchdiffeq_hyper import FitDomain
        >>> domain = FitDomain((0.0, 1.0), 0.1, 0.1, (1,), ((2,),), False, "float32")
        >>> domain.covers(0.1), domain.covers(-0.1), domain.covers(0.5)
        (True, False, False)
    """

    span: tuple[float, float]
    dt_min: float
    dt_max: float
    directions: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_tuple: bool
    dtype: str

    def covers(self, dt: float) -> bool:
        """Return whether a signed step size lies in the fitted range and direction."""
        slack = 1e-3  # grids in float32 have steps that differ in their last digits
        sign = 1 if dt >= 0 else -1
        return sign in self.directions and self.dt_min * (1 - slack) <= abs(dt) <= self.dt_max * (
            1 + slack
        )

    def outside(self, dt: Tensor, sign: int = 1) -> dict[str, str]:
        """Return what to warn of for step sizes ``sign * dt``: texts by "direction" or "dt"."""
        try:
            sizes = [sign * size for size in dt.tolist()]
        except RuntimeError:  # no values to look at: vmap, fake and meta tensors
            return {}
        texts: dict[str, str] = {}
        for size in (min(sizes), max(sizes)) if sizes else ():  # one point in t: no step
            if self.covers(size):
                continue
            fitted = " and ".join("forward" if sign > 0 else "reverse" for sign in self.directions)
            kind = "dt" if (1 if size >= 0 else -1) in self.directions else "direction"
            texts.setdefault(
                kind,
                f"dt = {size:.4g} is outside what this solver was fitted for: {fitted}, |dt| from "
                f"{self.dt_min:.4g} to {self.dt_max:.4g}. The solve goes on; measure it with "
                "tdh.evaluate, or fit with direction='both' or steps=(low, high).",
            )
        return texts

    def corrected_part(self, y0: State) -> int | None:
        """Return which part of a tuple state a tensor-fitted solver corrects.

        None means that the hypernet gets the state as it is.

        Raises:
            StateShapeError: no part, or more than one, has the fitted trailing shape.
            StateTypeError: a tuple-fitted solver is given another kind of state.
        """
        if isinstance(y0, Tensor):
            if self.is_tuple:
                raise StateTypeError(
                    explain(
                        "the solver was fitted on a tuple state, y0 is one tensor.",
                        f"a tuple of {len(self.shapes)} tensors with trailing shapes "
                        f"{self.shapes}.",
                        "odeint(func, (y0, ...), t, ...)",
                    )
                )
            return None
        if self.is_tuple:
            if len(y0) != len(self.shapes):
                raise StateShapeError(
                    explain(
                        f"y0 is a tuple of {len(y0)} tensors.",
                        f"{len(self.shapes)} tensors, as the solver was fitted.",
                        "tdh.fit(func, y0, ...) on states of this structure",
                    )
                )
            return None
        matching = [i for i, part in enumerate(y0) if tuple(part.shape[1:]) == self.shapes[0]]
        if len(matching) != 1:
            shapes = [tuple(part.shape) for part in y0]
            raise StateShapeError(
                explain(
                    f"y0 is a tuple with shapes {shapes}; {len(matching)} of its parts have the "
                    f"trailing shape {self.shapes[0]} that the solver was fitted on.",
                    "exactly one such part: it is corrected, the others take the plain base.",
                    "tdh.fit(func, y0, ...) with the whole tuple as y0",
                )
            )
        return matching[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {
            "span": list(self.span),
            "dt_min": self.dt_min,
            "dt_max": self.dt_max,
            "directions": list(self.directions),
            "shapes": [list(shape) for shape in self.shapes],
            "is_tuple": self.is_tuple,
            "dtype": self.dtype,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FitDomain:
        """Rebuild from `to_dict`'s values."""
        start, end = data["span"]
        smallest, largest = float(data["dt_min"]), float(data["dt_max"])
        if not 0 < smallest <= largest < float("inf") or not data["directions"]:
            message = f"impossible step sizes {smallest} to {largest}"
            raise ValueError(message)
        return cls(
            span=(float(start), float(end)),
            dt_min=smallest,
            dt_max=largest,
            directions=tuple(int(sign) for sign in data["directions"]),
            shapes=tuple(tuple(int(n) for n in shape) for shape in data["shapes"]),
            is_tuple=bool(data["is_tuple"]),
            dtype=str(data["dtype"]),
        )
