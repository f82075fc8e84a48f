r"""Ready hypernets: zero until fitted, conditioned by `calibrate`, described by JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._state import State, StepInput
from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.hypernets._concat import SCALARS, ConcatHypernet, check_inputs
from torchdiffeq_hyper.hypernets._scaled import Scaled

TIME_UNIT = "time_unit"
"""Name of the time unit and the order in a ready net's ``state_dict()``, where it is not 1."""


class ReadyHypernet(ConcatHypernet):
    """Base of the ready nets: a `ConcatHypernet` that is zero until it is fitted.

    The last layer starts at zero, so an unfitted hypersolver is its base method. The
    input is normalised and the output scaled per channel by buffers that `calibrate`
    sets; they start as the identity and are part of ``state_dict()``.

    """

    kind: ClassVar[str]
    net: Scaled

    def __init__(
        self,
        layers: nn.Sequential,
        channels: int,
        inputs: Sequence[str],
        n_stages: int,
        n_context: int,
        **arguments: Any,
    ) -> None:
        n_in = sum(channel_counts(channels, inputs, n_stages, n_context))
        super().__init__(Scaled(layers, n_in, channels, arguments.get("n_spatial")), inputs)
        self.channels = channels
        self.n_stages = n_stages
        self.time_unit = 1.0
        self.order = 0
        self.n_context = n_context
        self._arguments = arguments

    @property
    def architecture(self) -> dict[str, Any]:
        """JSON-ready description from which `from_architecture` rebuilds the net."""
        return {
            "kind": self.kind,
            "channels": self.channels,
            **self._arguments,
            "inputs": list(self.inputs),
            "n_stages": self.n_stages,
            # Only where they count, so that earlier versions read all other nets.
            **({"n_context": self.n_context} if self.n_context else {}),
            **({"time_unit": self.time_unit, "order": self.order} if self.time_unit != 1 else {}),
        }

    @property
    def is_zero(self) -> bool:
        """Whether the net still is as it was made: its last layer is zero."""
        return not any(bool(p.any()) for p in self.net.layers[-1].parameters())

    @torch.no_grad()
    def reset(self) -> None:
        """Make the net zero again: that of the base method."""
        for parameter in self.net.layers[-1].parameters():
            parameter.zero_()

    def measure_time_in(self, time_unit: float, order: int) -> None:
        """Let what the layers return be the residual of a time unit of this length.

        `forward` returns R in true units all the same. A solver multiplies what `scaled`
        returns by (dt / time_unit)^(p+1) instead: the power of a dt in nanoseconds or in
        years would leave the range of float32, and so would R.

        Args:
            time_unit: its length, above 0.
            order: order p of the base.
        """
        self.time_unit, self.order = float(time_unit), order

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: Any) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.time_unit != 1:  # not a buffer: a cast of the net must not round it
            unit = torch.tensor([self.time_unit, self.order], dtype=torch.float64)
            destination[prefix + TIME_UNIT] = unit

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Taken out, so that it counts as expected; torch hands over a copy of the dictionary.
        unit = state_dict.pop(prefix + TIME_UNIT, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        time_unit, order = (1.0, 0) if unit is None else unit.tolist()
        self.measure_time_in(time_unit, int(order))

    def forward(self, step: StepInput) -> State:
        """Return g, like ``step.y``."""
        out = self.scaled(step)
        for _ in range(self.order + 1 if self.time_unit != 1 else 0):
            out = _divided(out, self.time_unit)
        return out

    def scaled(self, step: StepInput) -> State:
        """Return time_unit^(p+1) g, like ``step.y``."""
        return super().forward(step)

    def calibrate(self, inputs: Tensor, residual: Tensor, unit: float = 1.0) -> None:
        r"""Set the normalisation, so that the layers see and return numbers of order one.

        Input channels are shifted to mean 0 and scaled to standard deviation 1; a
        constant channel, such as dt with one step size, becomes 0. Output channels are
        scaled by the root mean square of the residual. This changes what a fitted net
        computes: call it before fitting.

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
        counts = channel_counts(self.channels, self.inputs, self.n_stages, self.n_context)
        steady: list[float] = []
        for name, count in zip(self.inputs, counts, strict=True):
            # Steps cut from one float32 grid differ in their last digits, yet are one size.
            steady += [1e-3 if name == "dt" else 1e-5] * count
        self.net.calibrate(inputs, residual, steady, unit)


def _divided(state: State, divisor: float) -> State:
    if isinstance(state, Tensor):
        return state / divisor
    return tuple(part / divisor for part in state)


class Linear(ReadyHypernet):
    r"""One linear map of the input channels, the same at every point of space.

    Costs channels_in * channels multiply-adds a point.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        inputs: see `ConcatHypernet`.
        n_stages: stages of the base method; matters if ``inputs`` has "stages".
        n_context: channels of the context, all its tensors together; if ``inputs`` has
            "context".

    Raises:
        OptionError: an argument is impossible.

    Example:
        >>> import torch
        >>> import torchdiffeq_hyper as tdh
        >>> solver = tdh.HyperSolver("euler", tdh.hypernets.Linear(channels=2), steps=2)
        >>> y = solver.solve(lambda t, y: -y, torch.ones(1, 2), torch.tensor([0.0, 1.0]))
        >>> y[-1].detach()  # unfitted: the base method
        tensor([[0.2500, 0.2500]])
    """

    kind = "linear"

    def __init__(
        self,
        channels: int,
        *,
        inputs: Sequence[str] = ("y", "f0", "dt"),
        n_stages: int = 1,
        n_context: int = 0,
    ) -> None:
        n_in = sum(channel_counts(channels, inputs, n_stages, n_context))
        layers = nn.Sequential(nn.Linear(n_in, channels))
        super().__init__(layers, channels, inputs, n_stages, n_context)


class MLP(ReadyHypernet):
    r"""A perceptron with SiLU activations on the channels, the same at every point of space.

    For states without spatial dimensions; where there are some, no points are coupled.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        hidden: widths of the hidden layers.
        inputs: see `ConcatHypernet`.
        n_stages: stages of the base method; matters if ``inputs`` has "stages".
        n_context: channels of the context, all its tensors together; if ``inputs`` has
            "context".

    Raises:
        OptionError: an argument is impossible.

    Example:
        >>> from torchdiffeq_hyper.hypernets import MLP
        >>> MLP(channels=2, hidden=(32,)).architecture["hidden"]
        [32]
    """

    kind = "mlp"

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64),
        *,
        inputs: Sequence[str] = ("y", "f0", "dt"),
        n_stages: int = 1,
        n_context: int = 0,
    ) -> None:
        widths = [sum(channel_counts(channels, inputs, n_stages, n_context))]
        layers: list[nn.Module] = []
        for width in check_widths(hidden):
            # SiLU is smooth, and several times cheaper than tanh on CPUs.
            layers += [nn.Linear(widths[-1], width), nn.SiLU()]
            widths.append(width)
        layers.append(nn.Linear(widths[-1], channels))
        net, hidden = nn.Sequential(*layers), widths[1:]
        super().__init__(net, channels, inputs, n_stages, n_context, hidden=hidden)


def channel_counts(
    channels: int, inputs: Sequence[str], n_stages: int, n_context: int = 0
) -> list[int]:
    """Return the number of channels of each input.

    Raises:
        OptionError: an argument is impossible.
    """
    check_count("channels", channels)
    check_count("n_stages", n_stages)
    names = check_inputs(inputs)
    if "context" in names:
        check_count("n_context", n_context)
    elif n_context != 0:
        raise OptionError(
            explain(
                f'n_context is {n_context!r}, and the inputs are {names!r}, without "context".',
                "both or neither.",
                f"inputs={(*names, 'context')!r}",
            )
        )
    sizes = {"stages": n_stages * channels, "context": n_context, **dict.fromkeys(SCALARS, 1)}
    return [sizes.get(name, channels) for name in names]


def check_count(name: str, value: object) -> None:
    """Refuse what is not an int of at least 1.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(
            explain(f"{name} is {value!r}.", "an int of at least 1.", "1, or a larger int")
        )


def check_widths(hidden: object) -> Sequence[int]:
    """Return the widths of hidden layers.

    Raises:
        OptionError: not a sequence of ints of at least 1.
    """
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise OptionError(
            explain(f"hidden is {hidden!r}.", "a sequence of ints.", f"hidden=({hidden},)")
        )
    for width in hidden:
        check_count("a width in hidden", width)
    return hidden
