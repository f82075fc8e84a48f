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
from torchdiffeq_hyper.solvers._domain import FitDomain
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
    lines += [
        (
            method.name,
            str(method.order),
            str(method.calls_per_step),
            _yes(method.follows_grid),
            _yes(method.is_learned),
            method.owner,
        )
        for method in _registry.methods().values()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _yes(value: bool) -> str:  # noqa: FBT001 - the value is what is shown
    return "yes" if value else "no"


def _describe(path: str) -> str:
    """Return what a saved solver's file says, one fact a line; needs no net's class.

    It goes through the checks of `HyperSolver.load`.
    """
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
    method = _registry.find(solver.method)
    alpha, steps, net = metadata["alpha"], metadata["steps"], dict(metadata["hypernet"] or {})
    low, high = steps if isinstance(steps, list) else (steps, steps)
    weights = sum(tensor.numel() for tensor in tensors.values())
    kind = net.pop("kind", "none")
    facts = {
        "base": solver.base + ("" if alpha is None else f", alpha {alpha:g}"),
        "method": f"{method.name}, order {method.order}, calls per step {method.calls_per_step}",
        "steps": "as the caller's time grid" if low is None else _range(low, high),
        "hypernet": f"{kind}: {', '.join(f'{key} {value}' for key, value in net.items())}"
        if net
        else kind,
        "weights": f"{weights:,} numbers in {len(tensors)} tensors",
    }
    if solver.domain is not None:
        facts |= _domain_facts(solver.domain)
    if solver.report is not None:
        facts["report"] = str(solver.report)
    return facts


def _domain_facts(domain: FitDomain) -> dict[str, str]:
    start, end = domain.span
    directions = " and ".join("forward" if sign > 0 else "reverse" for sign in domain.directions)
    shapes = " and ".join(str(("batch", *shape)).replace("'", "") for shape in domain.shapes)
    return {
        "fitted on": f"t from {start:g} to {end:g}, {directions}",
        "|dt|": _range(f"{domain.dt_min:.4g}", f"{domain.dt_max:.4g}"),
        "state": f"{'tuple of ' if domain.is_tuple else ''}{shapes}, {domain.dtype}",
    }


def _range(low: object, high: object) -> str:
    return str(low) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
