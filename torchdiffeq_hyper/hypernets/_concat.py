"""The paper's hypernet layout: any net on the concatenation of a step's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._rules import Choice, Items, checked_arguments
from torchdiffeq_hyper._state import State, StepInput, how_to_batch, parts_of
from torchdiffeq_hyper.errors import StateShapeError, StateTypeError, check_callable, closest

SCALARS = ("dt", "t")
NAMES = ("y", "f0", "stages", "y0", "context", *SCALARS)
NAMES_OF_INPUTS = Items(Choice(*NAMES), least=1, most=1000)


class ConcatHypernet(nn.Module):
    r"""Feed any net the concatenation of a step's inputs along dim 1: g(step) = net(cat(inputs)).

    The layout of Poli et al., "Hypersolvers: Toward Fast Continuous-Depth Models", NeurIPS
    2020, appendix B, https://arxiv.org/abs/2007.09601: state, derivative and step size as
    channels.

    Works on states (batch, channels, \*spatial) with any number of spatial dimensions;
    (batch,) and 0-d states become one channel and come back in their shape, tuple states
    are joined and split (see `join_channels`, `split_channels`).

    The concatenation is cast to the dtype of the net's parameters, so that a float32 net
    serves a float64 state; its output then promotes. Costs one concatenation and one call
    of ``net``.

    Args:
        net: maps (batch, channels of all inputs, \*spatial) to (batch, channels,
            \*spatial).
        inputs: names in the order of the channels: "y" the state, "f0" func(t, y),
            "stages" all stage derivatives of the base in order (the first is f0), "y0"
            the state at the solve's start, "context" the inputs of the samples' `Conditioned`
            func (as numbers; repeated over the state's dimensions that they lack), "dt" and
            "t" one constant channel each.

    Raises:
        OptionError: ``inputs`` is empty or holds an unknown name.
        StateTypeError: ``net`` is not callable, or (when called) the state or the context is
            complex, or the net asks for the context and func has none.
        StateShapeError: (when called) the net takes another number of channels, or the
            parts of a tuple state, or the context, cannot be concatenated.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3 + 3 + 1, 16, 3, padding=1),
        ...     torch.nn.PReLU(),
        ...     torch.nn.Conv2d(16, 3, 3, padding=1),
        ... )
        >>> solver = tdh.HyperSolver("euler", tdh.ConcatHypernet(net), steps=4)
        >>> solver.solve(lambda t, y: -y, torch.ones(2, 3, 8, 8), torch.linspace(0, 1, 2)).shape
        torch.Size([2, 2, 3, 8, 8])
    """

    def __init__(
        self, net: Callable[[Tensor], Tensor], inputs: Sequence[str] = ("y", "f0", "dt")
    ) -> None:
        super().__init__()
        self.inputs = check_inputs(inputs)
        expected = "a module or function of one tensor (batch, channels, *spatial)."
        check_callable("net", net, "tdh.ConcatHypernet(torch.nn.Sequential(...))", expected)
        self.net = net

    def extra_repr(self) -> str:
        """Return what ``repr`` shows besides the net."""
        return f"inputs={self.inputs!r}"

    def forward(self, step: StepInput) -> State:
        """Return ``net(self.concat(step))`` as a state like ``step.y``."""
        joined = self.concat(step)
        out: Any
        try:
            out = self.net(joined)
        except RuntimeError as error:
            self._explain_channels(step, joined, error)
            raise
        return split_channels(out, step.y) if isinstance(out, Tensor) else out

    def concat(self, step: StepInput) -> Tensor:
        r"""Return the net's input: the named parts of ``step`` along dim 1.

        (batch, channels of all inputs, \*spatial), in the dtype of the net's parameters (of the
        state, if it has none). Raises what calling the hypernet raises.

        Example:
            >>> import torch, torchdiffeq_hyper as tdh
            >>> y = torch.ones(3, 2)
            >>> step = tdh.StepInput(torch.tensor(0.1), torch.tensor(0.0), y, -y, (-y,), y)
            >>> tdh.ConcatHypernet(torch.nn.Linear(5, 2)).concat(step)[0]
            tensor([ 1.0000,  1.0000, -1.0000, -1.0000,  0.1000])
        """
        # Then `join_channels` would return states as they are: this runs at every step.
        is_joined = isinstance(step.y, Tensor) and step.y.dim() > 1
        y: Any = step.y if is_joined else join_channels(step.y)
        refuse_complex(y)
        scalar = (y.shape[0], 1, *y.shape[2:])
        columns: list[Tensor] = []
        for name in self.inputs:
            value: Any = getattr(step, name)
            if name in SCALARS:
                columns.append(value.expand(scalar))
            elif name == "context":
                columns.extend(_context_columns(value, y))
            else:
                states = value if name == "stages" else (value,)
                columns.extend(states if is_joined else map(join_channels, states))
        joined = torch.cat(columns, dim=1)
        return joined.to(_dtype_of(self.net) or y.dtype)

    def _explain_channels(self, step: StepInput, joined: Tensor, error: RuntimeError) -> None:
        """Raise a better error if the number of channels can be why the net failed."""
        got = joined.shape[1]
        for layer in self.net.modules() if isinstance(self.net, nn.Module) else ():
            wanted = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
            if isinstance(wanted, int) and wanted:
                break
        else:
            return
        if wanted == got:
            return
        first = f"the net's first layer, a {type(layer).__name__},"

        def counts(channels: int) -> list[int]:
            n_context = sum(map(_n_channels, step.context))
            return channel_counts(self.inputs, channels, len(step.stages), n_context)

        if (
            sum(counts(sum(part.shape[0] if part.dim() else 1 for part in parts_of(step.y))))
            == wanted
        ):
            shape = tuple(step.y.shape) if isinstance(step.y, Tensor) else "a tuple"
            raise StateShapeError(
                problem=f"the state ({shape}) has no batch dimension: dim 0 was taken for the "
                f"samples, and {first} got {got} channels in place of {wanted}.",
                expected="the samples along dim 0, the channels along dim 1.",
                fix=how_to_batch(step.y),
            ) from error
        sizes = zip(self.inputs, counts(join_channels(step.y).shape[1]), strict=True)
        raise StateShapeError(
            problem=f"{first} takes {wanted} channels; the inputs have {got} along dim 1: "
            + ", ".join(f'"{name}" {n}' for name, n in sizes)
            + ".",
            expected="as many input channels as the inputs have together.",
            fix=f"a first layer with {got} input channels, or other inputs than {self.inputs}",
        ) from error


def channel_counts(
    inputs: Sequence[str], channels: int, n_stages: int, n_context: int
) -> list[int]:
    """Return the number of channels of each input, for a state of so many channels."""
    sizes = {"stages": n_stages * channels, "context": n_context, **dict.fromkeys(SCALARS, 1)}
    return [sizes.get(name, channels) for name in inputs]


def _context_columns(context: tuple[Tensor, ...], y: Tensor) -> Iterator[Tensor]:
    """Yield the context's tensors as channels beside a joined state."""
    if not context:
        raise StateTypeError(
            problem='the hypernet asks for "context", and func has none.',
            expected="a func that says what belongs to each sample, as the one it was fitted on.",
            fix="func = tdh.Conditioned(func, labels)   # calls func(t, y, labels)",
        )
    for part in context:
        refuse_complex(part)
        yield _column(part.to(y.dtype), y, context)


def _column(part: Tensor, like: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return one of some parts as channels, repeated over the dimensions that others have."""
    batch, spatial = like.shape[0], like.shape[2:]
    has_batch, has_spatial = part.dim() > 0, part.dim() > 2
    if (has_batch and part.shape[0] != batch) or (has_spatial and part.shape[2:] != spatial):
        raise StateShapeError(
            problem=f"parts of shapes {[tuple(part.shape) for part in parts]} cannot be "
            "concatenated along dim 1.",
            expected=f"the same samples along dim 0, {batch}; behind the channels the dimensions "
            f"{tuple(spatial)}, or none.",
            fix="a hypernet of your own, called as g(step), that reads step.y and step.context",
        )
    column = part.reshape(*part.shape, *(1,) * (2 + len(spatial) - part.dim()))
    return column.expand(batch, _n_channels(part), *spatial)


def _n_channels(part: Tensor) -> int:
    return part.shape[1] if part.dim() > 1 else 1


def _dtype_of(net: object) -> torch.dtype | None:
    """Return the dtype of a net's first parameter of floating-point numbers.

    At every call: the net may be cast between two. By hand: the generators of
    `nn.Module.parameters` take longer than a small net.
    """
    pending: list[nn.Module | None] = [net] if isinstance(net, nn.Module) else []
    while pending:
        module = pending.pop()
        if module is None:
            continue
        for parameter in module._parameters.values():  # noqa: SLF001
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
        pending += reversed(module._modules.values())  # noqa: SLF001
    return None


def check_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a hypernet's inputs as a tuple."""
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs) or ("y",)
    likely = tuple(name if name in NAMES else closest(name, NAMES) for name in names)
    rules = {"inputs": NAMES_OF_INPUTS}
    return tuple(checked_arguments(rules, {"inputs": inputs}, f"inputs={likely!r}")["inputs"])


def refuse_complex(y: Tensor) -> None:
    """Refuse complex states: nets take real channels."""
    if y.is_complex():
        raise StateTypeError(
            problem=f"the state is complex ({y.dtype}), nets take real channels.",
            expected="a real state, or a hypernet of your own that handles complex numbers.",
            fix="a func on torch.view_as_real(y), real and imaginary parts being channels",
        )


def join_channels(state: State) -> Tensor:
    r"""Return a state as one tensor of shape (batch, channels, \*spatial).

    A tensor of two or more dimensions is returned as it is; (batch,) becomes one
    channel, a 0-d tensor one sample of one channel. The parts of a tuple state are
    concatenated along dim 1, after repeating a part over the dimensions that only the
    others have. Costs at most one copy of the state.

    Raises:
        StateShapeError: parts of different batch or spatial sizes.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.hypernets import join_channels
        >>> image, log_density = torch.zeros(8, 3, 28, 28), torch.zeros(8)
        >>> join_channels((image, log_density)).shape
        torch.Size([8, 4, 28, 28])
    """
    if isinstance(state, Tensor):
        return state if state.dim() > 1 else state.reshape(-1, 1)
    dims = [part.dim() for part in state]
    widest = join_channels(state[dims.index(max(dims))])
    return torch.cat([_column(part, widest, state) for part in state], dim=1)


def split_channels(joined: Tensor, like: State) -> State:
    r"""Return what lies in ``joined`` as a state shaped like ``like``.

    The inverse of `join_channels`, except that a part gets the mean over the dimensions
    that only the others have.

    Args:
        joined: (batch, channels, \*spatial), as a net returns it.
        like: the state whose structure is wanted.

    Raises:
        StateShapeError: the number of channels is not that of the parts together.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.hypernets import split_channels
        >>> like = torch.zeros(8, 3, 28, 28), torch.zeros(8)
        >>> [part.shape for part in split_channels(torch.zeros(8, 4, 28, 28), like)]
        [torch.Size([8, 3, 28, 28]), torch.Size([8])]
    """
    if isinstance(like, Tensor):
        return joined if like.dim() > 1 else _drop_channel(joined, like)
    channels = [_n_channels(part) for part in like]
    if joined.dim() < 2 or joined.shape[1] != sum(channels):
        raise StateShapeError(
            problem=f"the net returned shape {tuple(joined.shape)} for a tuple state of "
            f"{sum(channels)} channels ({' + '.join(map(str, channels))}).",
            expected=f"{sum(channels)} channels along dim 1, which are split back into the parts.",
            fix=f"a net whose last layer has {sum(channels)} output channels",
        )
    parts = torch.split(joined, channels, dim=1)
    return tuple(_average(part, wanted) for part, wanted in zip(parts, like, strict=True))


def _average(joined: Tensor, like: Tensor) -> Tensor:
    """Return a part with the mean over the dimensions that it was repeated over."""
    if like.dim() < 3 <= joined.dim():
        joined = joined.flatten(2).mean(2)
    return joined.mean() if like.dim() == 0 else _drop_channel(joined, like)


def _drop_channel(joined: Tensor, like: Tensor) -> Tensor:
    """Return (n, 1) as the 1-D or 0-d tensor it stands for; other shapes as they are."""
    if like.dim() < 2 and joined.shape == (like.numel(), 1):
        return joined.reshape(like.shape)
    return joined
