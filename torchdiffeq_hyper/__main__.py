"""Command line: list the registered methods, look into a saved solver.

python -m torchdiffeq_hyper                 # the methods
python -m torchdiffeq_hyper inspect FILE    # what a file holds
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchdiffeq_hyper.errors import HyperError
from torchdiffeq_hyper.hypernets._files import UNSEEN
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._solver import Solver


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m torchdiffeq_hyper", description="Learned solvers for torchdiffeq."
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("methods", help="list the registered methods (the default)")
    inspect = commands.add_parser("inspect", help="show what a saved solver is and was fitted for")
    inspect.add_argument("file", help="a file that HyperSolver.save wrote")
    chosen = parser.parse_args(arguments)
    try:
        text = _describe(chosen.file) if chosen.command == "inspect" else _methods()
    except HyperError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{chosen.file!r} cannot be read: {error}\n")
        return 2
    sys.stdout.write(f"{text}\n")
    return 0


def _methods() -> str:
    lines = [("method", "order", "calls per step", "follows grid", "learned", "owner")]
    for m in _registry.methods().values():
        flags = m.follows_grid, m.option is not None
        follows, learned = ("yes" if flag else "no" for flag in flags)
        lines.append((m.name, str(m.order), str(m.calls_per_step), follows, learned, m.owner))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _describe(path: str) -> str:
    """Return what a saved solver's file says, one fact a line, after the checks of `load`."""
    owner, tensors, metadata = Solver.read(path)
    solver, _ = owner.rebuild(metadata, tensors, UNSEEN, path)
    facts = _facts(tensors, metadata, solver)
    width = max(map(len, facts))
    return "\n".join(
        f"{name if i == 0 else '':{width}}  {line}"
        for name, text in facts.items()
        for i, line in enumerate(text.splitlines())
    )


def _facts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], solver: Solver
) -> dict[str, str]:
    method, domain = _registry.find(solver.method), solver.domain
    alpha, steps, net = metadata["alpha"], metadata["steps"], dict(metadata["hypernet"] or {})
    low, high = steps if isinstance(steps, list) else (steps, steps)
    weights = sum(tensor.numel() for tensor in tensors.values())
    kind, described = net.pop("kind", "none"), ", ".join(f"{key} {net[key]}" for key in net)
    facts = {
        "base": solver.base + ("" if alpha is None else f", alpha {alpha:g}"),
        "method": f"{method.name}, order {method.order}, calls per step {method.calls_per_step}",
        "steps": "as the caller's time grid" if low is None else _range(low, high),
        "hypernet": f"{kind}: {described}" if net else kind,
        "weights": f"{weights:,} numbers in {len(tensors)} tensors",
    }
    if domain is not None:
        start, end = domain.span
        ways = " and ".join("forward" if sign > 0 else "reverse" for sign in domain.directions)
        shapes = " and ".join(str(("batch", *shape)) for shape in domain.shapes).replace("'", "")
        facts["fitted on"] = f"t from {start:g} to {end:g}, {ways}"
        facts["|dt|"] = _range(f"{domain.dt_min:.4g}", f"{domain.dt_max:.4g}")
        facts["state"] = f"{'tuple of ' * domain.is_tuple}{shapes}, {domain.dtype}"
    if solver.report is not None:
        facts["report"] = str(solver.report)
    return facts


def _range(low: object, high: object) -> str:
    return str(low) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
