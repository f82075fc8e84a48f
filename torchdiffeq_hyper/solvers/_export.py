"""A fitted solve as a file that runs without this package."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchdiffeq_hyper._fields._restore import attributes_as_found
from torchdiffeq_hyper._files import write_bytes
from torchdiffeq_hyper._state import State, VectorField, map_parts, parts_of
from torchdiffeq_hyper.errors import ExportError, HyperError

Solve = Callable[[VectorField, State, Tensor], State]


def export_solve(
    path: str | os.PathLike[str],
    solve: Solve,
    modules: tuple[object, ...],
    example: tuple[State, Tensor],
    *,
    dynamic_batch: bool,
) -> None:
    """Write ``(y0, t) -> solve(func, y0, t)`` to ``path`` by `torch.export`; see `Solver.export`.

    ``modules`` are func, then those with the weights that ``solve`` uses.
    """
    y0, t = example
    module = _Solve(solve, modules)
    shapes: Any = None
    with attributes_as_found(modules[0]):  # counts of calls, or what tracing left there
        with torch.no_grad():
            module(y0, t)  # what is wrong without export says so
        if dynamic_batch:
            y0, batch_dims = _example(y0)
            shapes = (batch_dims, {})
        try:
            content = _saved(module, (y0, t), shapes)
        except HyperError:
            raise
        except Exception as error:  # torch gives its reasons under a dozen types
            traced = _saved_with_derivatives(module, y0, t, shapes)
            if traced is None:
                raise _explained(error, dynamic_batch=dynamic_batch) from error
            content = traced
    write_bytes(path, content)


def _saved(module: nn.Module, example: tuple[State, Tensor], shapes: Any) -> bytes:
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _saved_with_derivatives(module: nn.Module, y0: State, t: Tensor, shapes: Any) -> bytes | None:
    """Return the program of a func that differentiates, None if it still is none.

    `torch.export` follows no backward pass (``torch.autograd.grad``, ``torch.func.vjp``), as
    log-densities need. What it is given here has been traced to plain operations before.
    """
    if shapes is not None:
        y0 = _of_odd_size(y0, shapes[0])
    try:
        traced = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(y0, t)
        content = _saved(traced, (y0, t), shapes)
        program = torch.export.load(io.BytesIO(content)).module()
        with torch.no_grad():
            torch.testing.assert_close(program(y0, t), module(y0, t))
    except Exception:  # noqa: BLE001 - the reason to tell is that of the first attempt
        return None
    return content


def _of_odd_size(y0: State, dims: Any) -> State:
    """Return the example with a batch of a size that no other dimension has."""
    taken = {size for part in parts_of(y0) for size in part.shape}
    size = next(n for n in (3, 5, 7, 11, 13, 17, 19, 23) if n not in taken)

    def resized(part: Tensor, dim: Any) -> Tensor:
        return part[torch.arange(size, device=part.device) % len(part)] if dim else part

    return map_parts(resized, y0, dims)


class _Solve(nn.Module):
    """A solve as the module that `torch.export` asks for; as submodules, weights keep names."""

    def __init__(self, solve: Solve, modules: tuple[object, ...]) -> None:
        super().__init__()
        self._solve = solve
        self.func, *others = modules
        self.nets = nn.ModuleList([net for net in others if isinstance(net, nn.Module)])

    def forward(self, y0: State, t: Tensor) -> State:
        return self._solve(self.func, y0, t)  # type: ignore[arg-type]


def _example(y0: State) -> tuple[State, Any]:
    """Return an example state of several samples, and which of its dimensions is the batch's."""
    sizes = [len(part) for part in parts_of(y0) if part.dim()]
    batch = torch.export.Dim("batch")

    def dims_of(part: Tensor) -> Any:
        return {0: batch} if part.dim() and len(part) == sizes[0] else {}

    def of_several(part: Tensor) -> Tensor:
        # A batch of 0 or 1 would be taken for a constant.
        return part.new_zeros(2, *part.shape[1:]) if dims_of(part) and len(part) < 2 else part

    return map_parts(of_several, y0), map_parts(dims_of, y0)


def _explained(error: Exception, *, dynamic_batch: bool) -> ExportError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    problem = f"the solve cannot be exported: {type(error).__name__}: {reason}"
    if dynamic_batch and "Constraints violated" in reason:
        problem += "\n  func or the hypernet works for one batch size only."
        expected = "operations that take any batch size."
        fix = "y.shape[0] in place of a number or len(y), or dynamic_batch=False"
    elif dynamic_batch and "symbolic sizes" in reason:
        problem += "\n  torch traces forward derivatives (torch.func.jvp) for one batch size only."
        expected = "derivatives by torch.func.vjp or torch.autograd.grad, which export for any."
        fix = "torch.func.vjp(f, x)[1](v) in place of torch.func.jvp, or dynamic_batch=False"
    else:
        expected = (
            "a func and a hypernet of tensor operations: no if on values, no float(t), no numpy, "
            "no counters. Derivatives within func: by torch.autograd.grad or torch.func.vjp."
        )
        fix = "torch.where(condition, a, b) in place of if; t in place of float(t)\n"
        fix += "calls counted outside: tdh.record() in place of self.nfe += 1"
    return ExportError(problem, expected, fix)
