"""Ready hypernets that are layers on the concatenation of a step's inputs, normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from torchdiffeq_hyper._rules import Choice, checked_arguments
from torchdiffeq_hyper._state import State, StepInput
from torchdiffeq_hyper.errors import StateShapeError
from torchdiffeq_hyper.hypernets._concat import ConcatHypernet, channel_counts, check_inputs
from torchdiffeq_hyper.hypernets._ready import COUNT, ReadyHypernet, but_channels

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


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


class ReadyConcatHypernet(ReadyHypernet, ConcatHypernet):
    """Base of the ready nets that are layers on the concatenation of a step's inputs.

    The last layer starts at zero, so an unfitted hypersolver is its base method. The
    input is normalised and the output scaled per channel by buffers that `calibrate`
    sets; they start as the identity and are part of ``state_dict()``.

    Args:
        layers: makes the layers, given the number of input channels.
        channels, own, n_stages: see `ReadyHypernet`.
        inputs: see `ConcatHypernet`.
        n_context: channels of the context, all its tensors together; if ``inputs`` has
            "context".
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
        n_in = self.n_inputs = sum(channel_counts(self.inputs, channels, n_stages, n_context))
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

    def _set_scales(self, inputs: Tensor, residual: Tensor, unit: float) -> None:
        """Scale inputs to mean 0 and deviation 1, outputs by the residual's root mean square.

        A constant channel, such as dt with one step size, becomes 0.
        """
        net = self.net
        counts = channel_counts(self.inputs, self.channels, self.n_stages, self.n_context)
        steady: list[float] = []
        for name, count in zip(self.inputs, counts, strict=True):
            # Steps cut from one float32 grid differ in their last digits, yet are one size.
            steady += [1e-3 if name == "dt" else 1e-5] * count
        variance, mean = torch.var_mean(inputs, but_channels(inputs), correction=0)
        size = mean.abs()
        spread = variance.sqrt()
        spread = torch.where(spread > mean.new_tensor(steady) * size, spread, size)
        scale = torch.where(spread > 0, spread, 1.0).reciprocal()
        net.input_scale.copy_(scale.view_as(net.input_scale))
        net.input_shift.copy_((-mean * scale).view_as(net.input_shift))
        size = residual.square().mean(but_channels(residual)).sqrt()
        # A channel that happens to be exact in these samples keeps some room in others.
        size = torch.maximum(size, 1e-3 * size.max())
        size = torch.where(size > 0, size, 1.0) * unit
        net.output_scale.copy_(size.view_as(net.output_scale))
