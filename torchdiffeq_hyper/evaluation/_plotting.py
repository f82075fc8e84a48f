"""Pictures of what solvers cost and how far off they end."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torchdiffeq_hyper.errors import MissingExtraError, OptionError, explain, unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".pdf", ".svg")
_MARKERS = "osD^vP*X"
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")
_GREYS = ("#9a9a9a", "#5f5f5f", "#b5a17a", "#7d8fa8", "#b0808e")


class Point(Protocol):
    """What a picture needs of a row; `evaluation.EvaluationRow` has it."""

    @property
    def method(self) -> str:
        """Label of the line that the point belongs to."""
        ...

    @property
    def nfe(self) -> int:
        """Calls of func."""
        ...

    @property
    def ms(self) -> float:
        """Wall time in ms."""
        ...

    @property
    def relative_l2(self) -> float:
        """Relative error."""
        ...

    @property
    def is_learned(self) -> bool:
        """Whether to stress the line."""
        ...


def pareto(points: Sequence[Point], path: str | os.PathLike[str], *, caption: str = "") -> None:
    """Draw relative L2 error against calls of func and against ms, side by side.

    One line a method, through its settings; learned methods in colour, the others in
    grey. Further down and to the left is better. All axes are logarithmic, so points
    with an error of 0, inf or nan are left out.

    Args:
        points: rows of an evaluation, e.g. ``table.rows``.
        path: file to write; its suffix chooses the format (png, pdf, svg).
        caption: small print below, e.g. the machine.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the suffix names no format.
        FileWriteError: the file cannot be written.

    Example:
        >>> import tempfile, torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq_hyper.plotting import pareto
        >>> table = tdh.evaluate(lambda t, y: -y, torch.ones(4, 2), (0.0, 1.0), ["euler", "rk4"],
        ...                      steps=[2, 4], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pareto(table.rows, f"{folder}/pareto.png")
    """
    _check_format(path)
    figure = _new_figure()
    by_nfe, by_ms = figure.subplots(1, 2, sharey=True)
    _draw(by_nfe, points, "nfe")
    _draw(by_ms, points, "ms")
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


def _draw(axes: Axes, points: Sequence[Point], cost: str) -> None:
    """Draw one line a method: error against ``cost``, an attribute of the points."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    learned, plain = count(), count()
    for method in dict.fromkeys(point.method for point in points):
        line = sorted((p for p in points if p.method == method), key=lambda p: p.nfe)
        style = _learned(next(learned)) if line[0].is_learned else _plain(next(plain))
        xy = [(getattr(p, cost), p.relative_l2) for p in line]
        drawn = [pair for pair in xy if all(0 < value < math.inf for value in pair)]
        axes.plot([x for x, _ in drawn], [y for _, y in drawn], label=method, **style)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _learned(i: int) -> dict[str, Any]:
    marker, colour = _MARKERS[i % len(_MARKERS)], _COLOURS[i % len(_COLOURS)]
    return {"color": colour, "marker": marker, "markersize": 8, "linewidth": 2.5, "zorder": 3}


def _plain(i: int) -> dict[str, Any]:
    marker, colour = _MARKERS[i % len(_MARKERS)], _GREYS[i % len(_GREYS)]
    return {
        "color": colour,
        "marker": marker,
        "markersize": 6,
        "markerfacecolor": "white",
        "linewidth": 1.2,
        "linestyle": "--",
    }
