"""What func and a hypernet may be and return; derivatives in memory that func writes into again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._state import Hypernet, State, VectorField, parts_of
from torchdiffeq_hyper.errors import StateShapeError, StateTypeError, check_callable
from torchdiffeq_hyper.tableaus import Edge, StageCall


def check_call(func: VectorField, n_context: int = 0) -> VectorField:
    """Return func after checking that it can be called as ``func(t, y, *context)``."""
    check_callable("func", func, "func=model", "a callable func(t, y).")
    try:
        signature = inspect.signature(func.forward if isinstance(func, nn.Module) else func)
    except (TypeError, ValueError):  # built-in and scripted functions do not tell
        return func
    try:
        signature.bind("t", "y", *["context"] * n_context)
    except TypeError as error:
        tensors = f" with {n_context} tensor{'s' * (n_context > 1)} of context"
        called = f"func(t, y, *context){tensors}" if n_context else "func(t, y)"
        raise StateTypeError(
            problem=f"func takes {signature} and cannot be called as {called}: {error}.",
            expected="a vector field func(t, y), or a torchdyn NeuralODE; what else it takes of "
            "each sample is its context, after t and y.",
            fix="func = lambda t, y: model(y)   # or lambda t, y, labels: model(y, labels)\n"
            "or func = tdh.Conditioned(func, labels)   # calls func(t, y, labels)",
        ) from error
    return func


def check_hypernet_device(hypernet: Hypernet, y: Tensor) -> None:
    """Refuse a net that lies on another device than the state."""
    parameter = next(hypernet.parameters(), y) if isinstance(hypernet, nn.Module) else y
    if parameter.device != y.device:
        raise StateTypeError(
            problem=f"the hypernet is on {parameter.device}, y0 is on {y.device}.",
            expected="both on one device.",
            fix=f'hypernet.to("{y.device}")   # or solver.to("{y.device}")',
        )


def check_answer(k: object, state: State) -> None:
    """Refuse what func returned if it is not built as the state is."""
    if isinstance(k, Tensor) and isinstance(state, Tensor) and k.shape == state.shape:
        return  # without more: this runs at every step
    check_kind(k, state)
    is_tuple = isinstance(state, tuple)
    answers = k if isinstance(k, tuple | list) else (k,)
    for index, (part, like) in enumerate(zip(answers, parts_of(state), strict=True)):
        # Parts of a tuple need the right number of elements only: the host flattens them.
        if part.shape == like.shape or (is_tuple and part.numel() == like.numel()):
            continue
        what, at = (f"part {index} of the state,", f"[{index}]") if is_tuple else ("a state", "")
        raise StateShapeError(
            problem=f"func returned shape {tuple(part.shape)} for {what} of shape "
            f"{tuple(like.shape)}.",
            expected="a derivative of the state's own shape.",
            fix=f"check func(t[0], y0){at}.shape == y0{at}.shape",
        )


def check_kind(k: object, state: State) -> None:
    """Refuse what func returned if it is no tensor, or for a tuple state no tuple of as many."""
    is_tuple, wanted = isinstance(state, tuple), len(parts_of(state))
    parts = k if isinstance(k, tuple | list) else ()
    answers = parts if is_tuple else (k,)
    if len(answers) == wanted and all(isinstance(answer, Tensor) for answer in answers):
        return
    kinds = " of " + ", ".join(type(part).__name__ for part in parts) if parts else ""
    expected, fix = "a tensor of the state's shape.", "torch.as_tensor(derivative)"
    if k is None:
        fix = "derivative   # func ends without a return"
    elif isinstance(k, int | float | complex):
        fix = "torch.full_like(y, value)"
    elif parts:
        fix = "torch.stack(components, dim=1)   # or y0 = (...), if the state has parts"
    if is_tuple:
        expected = f"a tuple of {wanted} tensors, one derivative for each part of the state."
        fix = ", ".join(f"derivative_{i}" for i in range(wanted))
    problem = f"func returned a {type(k).__name__}{kinds}."
    raise StateTypeError(problem=problem, expected=expected, fix=f"return {fix}")


def check_correction(out: State, y: State, time_dtype: torch.dtype) -> None:
    """Refuse a correction that does not fit the state ``y`` that g has seen.

    A lower dtype is promoted. Products with dt, of dtype ``time_dtype``, take the wider of
    the two where the state is 0-d.
    """
    if isinstance(out, Tensor) and isinstance(y, Tensor):  # first: this runs at every step
        _check_part(out, y, time_dtype, "")
        return
    given, parts = parts_of(out), parts_of(y)
    is_alike = isinstance(out, tuple) == isinstance(y, tuple) and len(given) == len(parts)
    if not is_alike or not all(isinstance(part, Tensor) for part in given):
        got = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
        expected = f"a tuple of {len(y)} tensors" if isinstance(y, tuple) else "a tensor"
        raise StateTypeError(
            problem=f"the hypernet returned {got}.",
            expected=f"{expected}, like the state.",
            fix="return a correction shaped like step.y",
        )
    for index, (part, like) in enumerate(zip(given, parts, strict=True)):
        _check_part(part, like, time_dtype, f" for part {index}")


def _check_part(out: Tensor, y: Tensor, time_dtype: torch.dtype, where: str) -> None:
    if out.shape == y.shape and out.dtype == y.dtype and out.device == y.device:
        return
    if out.shape != y.shape:
        raise StateShapeError(
            problem=f"the hypernet returned shape {tuple(out.shape)}{where}.",
            expected=f"{tuple(y.shape)}, the shape of step.y.",
            fix="return a correction shaped like step.y; check the net's output channels",
        )
    widest = y.dtype if y.dim() else torch.promote_types(y.dtype, time_dtype)
    if torch.promote_types(out.dtype, widest) != widest or out.device != y.device:
        raise StateTypeError(
            problem=f"the hypernet returned a tensor on {out.device}, of {out.dtype}{where}.",
            expected=f"one on the state's device, {y.device}, that promotes to its {y.dtype}.",
            fix=f'hypernet.to("{y.device}", {y.dtype})   # or return out.to(step.y)',
        )


def share_memory(stages: Sequence[Tensor]) -> bool:
    """Return whether derivatives lie in the same memory, where func answers in one buffer."""
    last = stages[-1]
    # What autograd records and never changes in place needs no look: ``out=`` is refused there.
    if torch.compiler.is_compiling() or (last.requires_grad and last._version == 0):  # noqa: SLF001
        return False
    try:
        return len({k.data_ptr() for k in stages}) < len(stages) and last.numel() > 0
    except RuntimeError:  # no memory to look at: vmap, fake tensors
        return False


def own(k: Tensor) -> Tensor:
    """Return a derivative in memory that func does not write into."""
    return k if k.requires_grad else k.clone()


def owning(call: StageCall) -> StageCall:
    """Return ``call`` with answers of their own memory."""

    def call_and_copy(t: Tensor, y: Tensor, edge: Edge = Edge.INSIDE, /) -> Tensor:
        return call(t, y, edge).clone()

    return call_and_copy
