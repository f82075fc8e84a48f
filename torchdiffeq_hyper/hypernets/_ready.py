"""The base of the ready hypernets: zero until fitted, with scales, described by JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._rules import Rule, Whole, checked_arguments
from torchdiffeq_hyper._state import State, StepInput, map_parts
from torchdiffeq_hyper.errors import StateShapeError

if TYPE_CHECKING:
    from torchdiffeq_hyper.hypernets._multistep import MultistepOnGrid

COUNT = Whole(1)
SIZES: dict[str, Rule] = {"channels": COUNT, "n_stages": Whole(1, 1000)}
"""What the arguments that all ready nets have may be; `ReadyHypernet.rules` is of the others."""

TIME_UNIT = "time_unit"
"""Name of the time unit and the order in a ready net's ``state_dict()``, where it is not 1."""


class ReadyHypernet(nn.Module, ABC):
    """Base of the ready nets: zero until fitted, in a time unit of its own, described by JSON.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        own: what the subclass was given besides, JSON-ready; its ``rules`` say what they may be.
        n_stages: stages of the base method.

    Raises:
        OptionError: an argument is impossible.
    """

    kind: ClassVar[str]
    rules: ClassVar[Mapping[str, Rule]] = {}
    is_scalable: ClassVar[bool] = False  # whether one fit serves many step sizes, by its form
    n_inputs: int  # channels of all inputs

    def __init__(self, channels: int, own: Mapping[str, Any], *, n_stages: int = 1) -> None:
        checked_arguments(SIZES, {"channels": channels, "n_stages": n_stages})
        arguments = checked_arguments(self.rules, own)
        nn.Module.__init__(self)  # not that of `ConcatHypernet`, where this is a base as well
        self._arguments = arguments
        self.channels = channels
        self.n_stages = n_stages
        self.time_unit = 1.0
        self.order = 0
        self.span: tuple[float, float] | None = None  # of the fit, for nets that change with time

    @property
    def architecture(self) -> dict[str, Any]:
        """JSON-ready description from which `from_architecture` rebuilds the net."""
        return {
            "kind": self.kind,
            "channels": self.channels,
            **self._arguments,
            "n_stages": self.n_stages,
            # Only where they count, so that earlier versions read all other nets.
            **({"time_unit": self.time_unit, "order": self.order} if self.time_unit != 1 else {}),
        }

    @abstractmethod
    def last_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are zero as long as the net is."""

    @abstractmethod
    def concat(self, step: StepInput) -> Tensor:
        r"""Return what the layers are given, (batch, channels of all inputs, \*spatial)."""

    @abstractmethod
    def scaled(self, step: StepInput) -> State:
        """Return time_unit^(p+1) g, like ``step.y``."""

    @abstractmethod
    def _set_scales(self, inputs: Tensor, residual: Tensor, unit: float) -> None:
        """Set the normalisation by checked float64 samples of `calibrate`'s shapes."""

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, residual: Tensor, unit: float = 1.0) -> None:
        r"""Set the normalisation, so that the layers see and return numbers of order one.

        This changes what a fitted net computes: call it before fitting.

        Args:
            inputs: (N, channels of all inputs, \*spatial), as `concat` returns it.
            residual: (N, channels, \*spatial), the values to be learned; for tuple
                states as `join_channels` returns them.
            unit: what these are to be multiplied by.

        Raises:
            StateShapeError: no samples, or another number of channels.

        Example:
            >>> import torch
            >>> from torchdiffeq_hyper.hypernets import MLP
            >>> g = MLP(channels=2)
            >>> g.calibrate(torch.randn(100, 5), torch.full((100, 2), 30.0))
            >>> g.net.output_scale
            tensor([30., 30.])
        """
        for name, given, n in (
            ("inputs", inputs, self.n_inputs),
            ("residual", residual, self.channels),
        ):
            if given.dim() < 2 or given.shape[1] != n or given.numel() == 0:
                raise StateShapeError(
                    problem=f"{name} has shape {tuple(given.shape)}.",
                    expected=f"at least one sample, and {n} channels along dim 1.",
                    fix="hypernet.calibrate(hypernet.concat(step), join_channels(residual))",
                )
        # In float64, where squares of large or small numbers stay in range.
        inputs, residual = (
            (x.cpu() if x.device.type == "mps" else x).double() for x in (inputs, residual)
        )
        self._set_scales(inputs, residual, unit)

    def check_base(self, order: int) -> None:
        """Refuse a base of another order, for nets that depend on it."""

    def on_grid(
        self, t: Tensor, dt: Tensor, y: Tensor, *, negated: bool = False
    ) -> MultistepOnGrid | None:
        r"""Return the net for all steps of a time grid, where it has such a form.

        Times at which steps start (n,) and their sizes are the true ones, ``y`` a state (batch,
        channels, \*spatial); ``negated`` is said where derivatives are given negated.
        """
        return None

    @property
    def is_zero(self) -> bool:
        """Whether the net still is as it was made: that of the base method."""
        return not any(bool(parameter.any()) for parameter in self.last_parameters())

    @torch.no_grad()
    def reset(self) -> None:
        """Make the net zero again: that of the base method."""
        for parameter in self.last_parameters():
            parameter.zero_()

    def classical_methods(self) -> Sequence[ReadyHypernet]:
        """Return such nets with which the base is another classical method, from which to start."""
        return ()

    def measure_time_in(
        self, time_unit: float, order: int, span: tuple[float, float] | None = None
    ) -> None:
        """Let what the layers return be the residual of a time unit, for a base of this order p.

        ``span`` is that of the fit, for nets that change with time: None leaves it as it is.

        `forward` returns R in true units all the same. A solver multiplies `scaled` by
        (dt / time_unit)^(p+1) instead: a power of nanoseconds or years leaves float32's range.
        """
        self.time_unit, self.order = float(time_unit), order
        if self.span is not None and span is not None:
            self.span = span

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: Any) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.time_unit != 1 or self.span is not None:
            # Not a buffer: a cast of the net must not round it.
            unit = torch.tensor(
                [self.time_unit, self.order, *(self.span or ())], dtype=torch.float64
            )
            destination[prefix + TIME_UNIT] = unit

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Taken out, so that it counts as expected; torch hands over a copy of the dictionary.
        unit = state_dict.pop(prefix + TIME_UNIT, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        time_unit, order, *span = (1.0, self.order) if unit is None else unit.tolist()
        self.measure_time_in(time_unit, int(order), tuple(span) or None)

    def forward(self, step: StepInput) -> State:
        """Return g, like ``step.y``."""
        out = self.scaled(step)
        for _ in range(self.order + 1 if self.time_unit != 1 else 0):
            out = map_parts(lambda part: part / self.time_unit, out)
        return out


def but_channels(x: Tensor) -> list[int]:
    """Return all dimensions of (batch, channels, ...) but that of the channels."""
    return [0, *range(2, x.dim())]
