"""A fitted solve as a file that runs without this package."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import write_bytes
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.errors import ExportError, HyperError, explain

Solve = Callable[[VectorField, State, Tensor], State]


def export_solve(
    path: str | os.PathLike[str],
    solve: Solve,
    modules: tuple[object, ...],
    example: tuple[State, Tensor],
    *,
    dynamic_batch: bool,
) -> None:
    """Write ``(y0, t) -> solve(func, y0, t)`` to ``path`` by `torch.export`.

    Args:
        path: the file, replaced in one step or left as it was.
        solve: ``solve(func, y0, t)``.
        modules: func, then the modules with the weights that ``solve`` uses.
        example: (y0, t) of the shapes and dtypes to export for; run once.
        dynamic_batch: whether dim 0 of the state may have any size.

    Raises:
        ExportError: func or a net is not made of tensor operations alone, or fixes the
            batch size; nothing was written.
        FileWriteError: the file cannot be written; nothing half-written is left.
    """
    y0, t = example
    with torch.no_grad():
        solve(modules[0], y0, t)  # type: ignore[arg-type]  # what is wrong without export says so
    shapes: Any = None
    if dynamic_batch:
        y0, batch_dims = _example(y0)
        shapes = (batch_dims, {})
    try:
        program = torch.export.export(
            _Solve(solve, modules), (y0, t), dynamic_shapes=shapes, strict=False
        )
        file = io.BytesIO()
        torch.export.save(program, file)
    except HyperError:
        raise
    except Exception as error:  # torch gives its reasons under a dozen types
        raise _explained(error, dynamic_batch=dynamic_batch) from error
    write_bytes(path, file.getvalue())


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
    parts = (y0,) if isinstance(y0, Tensor) else y0
    sizes = [part.shape[0] for part in parts if part.dim() > 0]
    batch = torch.export.Dim("batch")
    examples: list[Tensor] = []
    dims: list[dict[int, Any]] = []
    for part in parts:
        is_batched = part.dim() > 0 and part.shape[0] == sizes[0]
        dims.append({0: batch} if is_batched else {})
        # A batch of 0 or 1 would be taken for a constant.
        is_alone = is_batched and sizes[0] < 2
        examples.append(part.new_zeros(2, *part.shape[1:]) if is_alone else part)
    if isinstance(y0, Tensor):
        return examples[0], dims[0]
    return tuple(examples), tuple(dims)


def _explained(error: Exception, *, dynamic_batch: bool) -> ExportError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    problem = f"the solve cannot be exported: {type(error).__name__}: {reason}"
    if dynamic_batch and "Constraints violated" in reason:
        return ExportError(
            explain(
                f"{problem}\n  func or the hypernet works for one batch size only.",
                "operations that take any batch size.",
                "y.shape[0] in place of a number or len(y), or dynamic_batch=False",
            )
        )
    return ExportError(
        explain(
            problem,
            "a func and a hypernet of tensor operations: no if on values, no float(t), no numpy.",
            "torch.where(condition, a, b) in place of if; t in place of float(t)",
        )
    )
