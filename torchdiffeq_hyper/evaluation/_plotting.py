"""Pictures of what solvers cost and how far off they end."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdiffeq_hyper.errors import MissingExtraError, OptionError, explain, unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchdiffeq_hyper.evaluation._table import EvaluationRow

_FORMATS = (".png", ".pdf", ".svg")
_MARKERS = "osD^vP*X"
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")
_GREYS = ("#9a9a9a", "#5f5f5f", "#b5a17a", "#7d8fa8", "#b0808e")
_LEARNED: dict[str, Any] = {"markersize": 8, "linewidth": 2.5, "zorder": 3}
_PLAIN = {"markersize": 6, "markerfacecolor": "white", "linewidth": 1.2, "linestyle": "--"}


def pareto(rows: Sequence[EvaluationRow], path: str | os.PathLike[str], *, caption: str) -> None:
    """Draw the picture of `EvaluationTable.plot`, with a caption in small print below."""
    _check_format(path)
    figure = _new_figure()
    by_nfe, by_ms = figure.subplots(1, 2, sharey=True)
    _draw(by_nfe, rows, "nfe")
    _draw(by_ms, rows, "ms")
    by_nfe.set(xlabel="calls of func (NFE)", ylabel="relative L2 error")
    by_ms.set(xlabel="wall time, ms")
    figure.legend(*by_nfe.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.supxlabel(textwrap.fill(caption, 150), fontsize=8, color="0.4")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise unwritable(path, error) from error


def _check_format(path: str | os.PathLike[str]) -> None:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise OptionError(
            explain(
                f"{os.fspath(path)!r} names no format of picture.",
                "a file name that ends in " + " or ".join(_FORMATS) + ".",
                f'table.plot("{Path(path).with_suffix(".png")}")',
            )
        )


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            explain(
                "matplotlib is not installed.",
                "the extra for pictures.",
                'pip install "torchdiffeq_hyper[plot]"',
            )
        ) from error
    # Not pyplot's: it would choose a backend and keep the figure in a global list.
    return Figure(figsize=(11, 4.8), layout="constrained")


def _draw(axes: Axes, rows: Sequence[EvaluationRow], cost: str) -> None:
    """Draw one line a method: error against ``cost``, an attribute of the rows."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    numbers = {True: count(), False: count()}
    for method in dict.fromkeys(row.method for row in rows):
        line = sorted((row for row in rows if row.method == method), key=lambda row: row.nfe)
        is_learned = line[0].is_learned
        style = _style(next(numbers[is_learned]), is_learned=is_learned)
        points = [(getattr(row, cost), row.relative_l2) for row in line]
        drawn = [point for point in points if all(0 < value < math.inf for value in point)]
        axes.plot([x for x, _ in drawn], [y for _, y in drawn], label=method, **style)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _style(i: int, *, is_learned: bool) -> dict[str, Any]:
    """Return the looks of the i-th line of its kind."""
    colours = _COLOURS if is_learned else _GREYS
    looks = {"color": colours[i % len(colours)], "marker": _MARKERS[i % len(_MARKERS)]}
    return looks | (_LEARNED if is_learned else _PLAIN)
