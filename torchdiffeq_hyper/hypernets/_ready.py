"""The base of the ready hypernets: zero until fitted, normalised, described by JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from torchdiffeq_hyper._rules import Choice, Rule, Whole, checked_arguments
from torchdiffeq_hyper._state import State, StepInput, map_parts
from torchdiffeq_hyper.errors import StateShapeError
from torchdiffeq_hyper.hypernets._concat import ConcatHypernet, channel_counts, check_inputs

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)

COUNT = Whole(1)
SIZES: dict[str, Rule] = {"channels": COUNT, "n_stages": Whole(1, 1000)}
"""What the arguments that all ready nets have may be; `ReadyHypernet.rules` is of the others."""

TIME_UNIT = "time_unit"
"""Name of the time unit and the order in a ready net's ``state_dict()``, where it is not 1."""


class Scaled(nn.Module):
    r"""``output_scale * layers(input_scale * x + input_shift)``, channel by channel.

    The last layer starts at zero and the scales as the identity. ``n_spatial`` is the number of
    spatial dimensions that the layers convolve over; None if they act on the last dimension,
    which then is the channels' at every point.
    """

    input_scale: Tensor
    input_shift: Tensor
    output_scale: Tensor

    def __init__(
        self, layers: nn.Sequential, n_in: int, n_out: int, n_spatial: int | None = None
    ) -> None:
        super().__init__()
        self.layers = layers
        self.n_spatial = n_spatial
        trailing = (1,) * (n_spatial or 0)
        self.register_buffer("input_scale", torch.ones(n_in, *trailing))
        self.register_buffer("input_shift", torch.zeros(n_in, *trailing))
        self.register_buffer("output_scale", torch.ones(n_out, *trailing))
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        r"""Map (batch, n_in, \*spatial) to (batch, n_out, \*spatial)."""
        if self.n_spatial is None:
            if x.dim() == 2:
                return self._evaluate(x)
            return self._evaluate(x.movedim(1, -1)).movedim(-1, 1)
        if x.dim() != self.n_spatial + 2:
            raise _wrong_dimensions(x.dim() - 2, self.n_spatial)
        first, last = self.layers[0], self.layers[-1]
        if isinstance(first, _ConvNd) and isinstance(last, _ConvNd) and first is not last:
            # Where the first one pads, its border would see another shift than the rest.
            is_pointwise = max(first.kernel_size) == 1
            return self._evaluate_folded(x, first, last) if is_pointwise else self._evaluate(x)
        return self._evaluate(x)

    def _evaluate(self, x: Tensor) -> Tensor:
        # One fused kernel in place of a subtraction and a division.
        normalised = torch.addcmul(self.input_shift, x, self.input_scale)
        out: Tensor = self.layers(normalised)
        return out * self.output_scale

    def _evaluate_folded(self, x: Tensor, first: _ConvNd, last: _ConvNd) -> Tensor:
        """Evaluate with the scales multiplied into the weights: these are small, x is not."""
        assert first.bias is not None
        assert last.bias is not None
        convolve = _FUNCTIONS[x.dim() - 3]
        weight = first.weight * self.input_scale
        bias = torch.addmv(first.bias, first.weight.flatten(1), self.input_shift.flatten())
        x = convolve(x, weight, bias)
        for layer in list(self.layers)[1:-1]:
            x = layer(x)
        weight = last.weight * self.output_scale.unsqueeze(1)
        return convolve(x, weight, last.bias * self.output_scale.flatten(), padding=last.padding)


def _wrong_dimensions(found: int, wanted: int) -> StateShapeError:
    fix = "tdh.hypernets.MLP(...), which takes any number of dimensions"
    if found in CONVOLUTIONS:
        fix = f"tdh.hypernets.Conv(..., n_spatial={found})"
    if found == wanted - 1:  # torch would take a missing dimension for an unbatched input
        fix = f"y0 = y0.unsqueeze(0)   # if the batch dimension is missing\n{fix}"
    return StateShapeError(
        problem=f"the hypernet convolves over n_spatial={wanted} dimensions, the state has "
        f"{found} after (batch, channels).",
        expected=f"a state of {wanted + 2} dimensions.",
        fix=fix,
    )


def perceptron(widths: Sequence[int], *between: nn.Module) -> nn.Sequential:
    """Return linear layers of these widths, with some modules between any two."""
    layers = [(nn.Linear(*pair), *between) for pair in pairwise(widths)]
    return nn.Sequential(*chain(*layers[:-1]), layers[-1][0])


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
        """

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


class ReadyConcatHypernet(ReadyHypernet, ConcatHypernet):
    """Base of the ready nets that are layers on the concatenation of a step's inputs.

    The last layer starts at zero, so an unfitted hypersolver is its base method. The
    input is normalised and the output scaled per channel by buffers that `calibrate`
    sets; they start as the identity and are part of ``state_dict()``.

    Args:
        layers: makes the layers, given the number of input channels.
        channels: channels of the state, all parts of a tuple state together.
        own: what the subclass was given besides, JSON-ready; its ``rules`` say what they may be.
        inputs: see `ConcatHypernet`.
        n_stages: stages of the base method; matters if ``inputs`` has "stages".
        n_context: channels of the context, all its tensors together; if ``inputs`` has
            "context".

    Raises:
        OptionError: an argument is impossible.
    """

    net: Scaled

    def __init__(
        self,
        layers: Callable[[int], nn.Sequential],
        channels: int,
        own: Mapping[str, Any],
        *,
        inputs: Sequence[str] = ("y", "f0", "dt"),
        n_stages: int = 1,
        n_context: int = 0,
    ) -> None:
        super().__init__(channels, own, n_stages=n_stages)
        self.inputs = check_inputs(inputs)
        has_context = "context" in self.inputs
        checked_arguments(
            {"n_context": COUNT if has_context else Choice(0)},
            {"n_context": n_context},
            "n_context=1" if has_context else f"inputs={(*self.inputs, 'context')!r}",
        )
        n_in = sum(channel_counts(self.inputs, channels, n_stages, n_context))
        self.net = Scaled(layers(n_in), n_in, channels, own.get("n_spatial"))
        self.n_context = n_context

    @property
    def architecture(self) -> dict[str, Any]:
        """JSON-ready description from which `from_architecture` rebuilds the net."""
        with_context = {"n_context": self.n_context} if self.n_context else {}
        return {**super().architecture, "inputs": list(self.inputs), **with_context}

    def last_parameters(self) -> Iterator[nn.Parameter]:
        """Yield those of the last layer."""
        return self.net.layers[-1].parameters()

    def concat(self, step: StepInput) -> Tensor:
        r"""Return the named parts of ``step`` along dim 1; see `ConcatHypernet.concat`."""
        return ConcatHypernet.concat(self, step)

    def scaled(self, step: StepInput) -> State:
        """Return time_unit^(p+1) g, like ``step.y``."""
        return ConcatHypernet.forward(self, step)

    @torch.no_grad()
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
        net = self.net
        for name, given, n in (
            ("inputs", inputs, len(net.input_scale)),
            ("residual", residual, len(net.output_scale)),
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
        counts = channel_counts(self.inputs, self.channels, self.n_stages, self.n_context)
        steady: list[float] = []
        for name, count in zip(self.inputs, counts, strict=True):
            # Steps cut from one float32 grid differ in their last digits, yet are one size.
            steady += [1e-3 if name == "dt" else 1e-5] * count
        variance, mean = torch.var_mean(inputs, _but_channels(inputs), correction=0)
        size = mean.abs()
        spread = variance.sqrt()
        spread = torch.where(spread > mean.new_tensor(steady) * size, spread, size)
        scale = torch.where(spread > 0, spread, 1.0).reciprocal()
        net.input_scale.copy_(scale.view_as(net.input_scale))
        net.input_shift.copy_((-mean * scale).view_as(net.input_shift))
        size = residual.square().mean(_but_channels(residual)).sqrt()
        # A channel that happens to be exact in these samples keeps some room in others.
        size = torch.maximum(size, 1e-3 * size.max())
        size = torch.where(size > 0, size, 1.0) * unit
        net.output_scale.copy_(size.view_as(net.output_scale))


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
