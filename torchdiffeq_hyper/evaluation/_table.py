"""What `evaluate` returns: rows, as text, CSV or a picture."""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdiffeq_hyper.errors import MissingExtraError, OptionError, unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EvaluationRow:
    """What one method at one setting costs, and how far off it ends.

    Attributes:
        method: the method's label.
        steps, tolerance: number of equal steps, or rtol = atol; the other is None.
        nfe: calls of func in one solve of the whole batch, all included.
        macs_func, macs_g: multiply-accumulates per sample of one solve, inside func and inside
            the hypernet: those of products of matrices, convolutions and attention.
        ms: median wall time of one solve of the whole batch, in ms.
        mape: mean absolute percentage error of the final state, in percent.
        relative_l2: mean over samples of |y - y_ref| / |y_ref|, the norms over all parts
            of a sample together; here and above |y_ref| is at least 1e-3 of its root mean square.
        worst_relative_l2: the largest of these.
        metric: the task metric of the final state, None where none was asked for.
        is_learned: whether it is a fitted solver.
        along: mean relative L2 error over samples and the points of the method's own grid (at
            most 16; eight equidistant ones where it has none); nan where not measured.
    """

    method: str
    steps: int | None
    tolerance: float | None
    nfe: int
    macs_func: float
    macs_g: float
    ms: float
    mape: float
    relative_l2: float
    worst_relative_l2: float
    metric: float | None
    is_learned: bool
    along: float = math.nan

    @property
    def failed(self) -> bool:
        """Whether the solve broke off or ended in inf or nan; its errors are inf then."""
        return not math.isfinite(self.relative_l2)

    @property
    def setting(self) -> str:
        """The number of steps, or the tolerance, as text; "own" where the fit has chosen."""
        if self.steps is None and self.tolerance is None:
            return "own"
        return str(self.steps) if self.steps is not None else f"tol {self.tolerance:g}"


@dataclass(frozen=True)
class EvaluationTable:
    """The rows of `evaluate` in the order asked for; ``measured`` says where and against what."""

    rows: tuple[EvaluationRow, ...]
    metric_name: str
    measured: str

    def __str__(self) -> str:
        """Same as `to_markdown`."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return a Markdown table of `EvaluationRow`'s columns, the machine below it.

        In three significant digits; k, M and G stand for thousands, millions and billions.
        """
        head = ["method", "steps", "NFE", "MACs func", "MACs g", "ms"]
        head += ["MAPE %", "rel. L2", "worst", "along", self.metric_name]
        lines = [head, *map(_cells, self.rows)]
        if not self._has_metric:
            lines = [line[:-1] for line in lines]
        return f"{markdown(lines)}\n\n{self.measured}"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a CSV file, in full precision; columns are `EvaluationRow`'s.

        Cells of None and nan are empty. `FileWriteError` if the file cannot be written.
        """
        names = [each.name for each in fields(EvaluationRow)]
        heads = {name: name for name in names if name not in {"metric", "is_learned"}}
        if self._has_metric:  # last, and under its own name
            heads["metric"] = self.metric_name
        lines = [[getattr(row, name) for name in heads] for row in self.rows]
        lines = [["" if x is None or x != x else x for x in line] for line in lines]  # noqa: PLR0124
        try:
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([heads.values(), *lines])
        except OSError as error:
            raise unwritable(path, error) from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw relative L2 error against calls of func and against ms, side by side.

        One line a method, through its settings; learned methods in colour, the others in
        grey. All axes are logarithmic, so points with an error of 0, inf or nan are left out.
        The suffix of ``path`` chooses the format (png, pdf, svg). `MissingExtraError` without
        matplotlib, `OptionError` for another suffix, `FileWriteError` as in `to_csv`.
        """
        if Path(path).suffix.lower() not in _FORMATS:
            raise OptionError(
                problem=f"{os.fspath(path)!r} names no format of picture.",
                expected="a file name that ends in " + " or ".join(_FORMATS) + ".",
                fix=f'table.plot("{Path(path).with_suffix(".png")}")',
            )
        figure = _new_figure()
        by_nfe, by_ms = figure.subplots(1, 2, sharey=True)
        _draw(by_nfe, self.rows, "nfe", "calls of func (NFE)")
        _draw(by_ms, self.rows, "ms", "wall time, ms")
        by_nfe.set(ylabel="relative L2 error")
        handles = by_nfe.get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", frameon=False)
        figure.supxlabel(textwrap.fill(self.measured, 150), fontsize=8, color="0.4")
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise unwritable(path, error) from error

    @property
    def _has_metric(self) -> bool:
        return any(row.metric is not None for row in self.rows)


def _cells(row: EvaluationRow) -> list[str]:
    cost = [with_suffix(row.macs_func), with_suffix(row.macs_g), significant(row.ms)]
    errors = [row.mape, row.relative_l2, row.worst_relative_l2, row.along]
    shown = ["failed"] * 4 if row.failed else [significant(error) for error in errors]
    metric = "-" if row.metric is None else significant(row.metric, digits=4)
    return [row.method, row.setting, str(row.nfe), *cost, *shown, metric]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of a head and rows.

    >>> print(markdown([("method", "NFE"), ("rk4", "40")]))
    | method | NFE |
    | :----- | --: |
    | rk4    |  40 |
    """
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    rule = [":" + "-" * (first - 1), *("-" * (width - 1) + ":" for width in others)]
    row = "| " + " | ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)]) + " |"
    return "\n".join(row.format(*line) for line in (lines[0], rule, *lines[1:]))


def distinct(label: str, taken: Collection[str]) -> str:
    """Return a label, numbered where it is taken."""
    names = (label if i == 1 else f"{label} #{i}" for i in count(1))
    return next(name for name in names if name not in taken)


def significant(value: float, digits: int = 3) -> str:
    """Return a number in ``digits`` significant digits; "-" for nan.

    >>> significant(0.012345), significant(1234.5), significant(1.5e-7)
    ('0.0123', '1234', '1.50e-07')
    """
    if math.isnan(value):
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent <= 5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def with_suffix(value: float) -> str:
    """Return a count with a suffix for its thousands.

    >>> with_suffix(8448), with_suffix(1.25e6), with_suffix(0)
    ('8.45k', '1.25M', '0')
    """
    if math.isnan(value):
        return "-"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


_FORMATS = (".png", ".pdf", ".svg")
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")
_MARKERS = "osD^vP*X"
_GREYS = ("#9a9a9a", "#5f5f5f", "#b5a17a", "#7d8fa8", "#b0808e")
_LEARNED: dict[str, Any] = {"markersize": 8, "linewidth": 2.5, "zorder": 3}
_PLAIN: dict[str, Any] = {"markersize": 6, "markerfacecolor": "white", "linewidth": 1.2, "ls": "--"}


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            problem="matplotlib is not installed.",
            expected="the extra for pictures.",
            fix='pip install "torchdiffeq_hyper[plot]"',
        ) from error
    # Not pyplot's: it would choose a backend and keep the figure in a global list.
    return Figure(figsize=(11, 4.8), layout="constrained")


def _draw(axes: Axes, rows: Sequence[EvaluationRow], cost: str, name: str) -> None:
    """Draw one line a method: error against ``cost``, an attribute of the rows."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    learned = zip(cycle(_COLOURS), cycle(_MARKERS))
    plain = zip(cycle(_GREYS), cycle(_MARKERS))
    for method in dict.fromkeys(row.method for row in rows):
        line = sorted((row for row in rows if row.method == method), key=lambda row: row.nfe)
        looks, style = (learned, _LEARNED) if line[0].is_learned else (plain, _PLAIN)
        colour, marker = next(looks)
        points = [(getattr(row, cost), row.relative_l2) for row in line]
        drawn = [point for point in points if all(0 < value < math.inf for value in point)]
        xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
        axes.plot(xs, ys, label=method, color=colour, marker=marker, **style)
    axes.set(xscale="log", yscale="log", xlabel=name)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
