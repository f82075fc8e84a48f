"""What `evaluate` returns."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchdiffeq_hyper.errors import unwritable
from torchdiffeq_hyper.evaluation import _plotting


@dataclass(frozen=True)
class EvaluationRow:
    """What one method at one setting costs, and how far off it ends.

    Attributes:
        method: the method's label.
        steps: number of equal steps, None for methods that choose their own.
        tolerance: rtol = atol of such a method, else None.
        nfe: calls of func in one solve of the whole batch, the choice of a first step
            and rejected steps included.
        macs_func: multiply-accumulates per sample of one solve, inside func.
        macs_g: the same inside the hypernet; 0 for methods that have none.
        ms: median wall time of one solve of the whole batch, in ms.
        mape: mean absolute percentage error of the final state, in percent; |y_ref|
            counts as at least 1e-3 of its root mean square.
        relative_l2: mean over samples of |y - y_ref| / |y_ref|, the norms over all parts
            of a sample together; |y_ref| counts as at least 1e-3 of its root mean square.
        worst_relative_l2: the largest of these.
        metric: the task metric of the final state, None where none was asked for.
        is_learned: whether the method corrects its base with a hypernet.
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


def markdown(rows: Sequence[EvaluationRow], metric_name: str, footer: str) -> str:
    """Return the rows as an aligned Markdown table, with a line of text below it."""
    has_metric = any(row.metric is not None for row in rows)
    head = ["method", "steps", "NFE", "MACs func", "MACs g", "ms"]
    head += ["MAPE %", "rel. L2", "worst", "along", *([metric_name] if has_metric else [])]
    body = [_cells(row) + [_metric(row)] * has_metric for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_aligned(line, widths) for line in (head, rule, *body)]
    return "\n".join([*lines, "", footer])


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"


def _cells(row: EvaluationRow) -> list[str]:
    cost = [with_suffix(row.macs_func), with_suffix(row.macs_g), significant(row.ms)]
    errors = [row.mape, row.relative_l2, row.worst_relative_l2, row.along]
    shown = ["failed"] * 4 if row.failed else [significant(error) for error in errors]
    return [row.method, row.setting, str(row.nfe), *cost, *shown]


def _metric(row: EvaluationRow) -> str:
    return "-" if row.metric is None else significant(row.metric, digits=4)


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


def write_csv(
    rows: Sequence[EvaluationRow], metric_name: str, path: str | os.PathLike[str]
) -> None:
    """Write the rows in full precision, one a line; empty cells for None and nan.

    Raises:
        FileWriteError: the file cannot be written.
    """
    names = ["method", "steps", "tolerance", "nfe", "macs_func", "macs_g", "ms"]
    names += ["mape", "relative_l2", "worst_relative_l2", "along", "metric"]
    has_metric = any(row.metric is not None for row in rows)
    if not has_metric:
        names.remove("metric")
    head = [metric_name if name == "metric" else name for name in names]
    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            for row in rows:
                writer.writerow([_csv_cell(getattr(row, name)) for name in names])
    except OSError as error:
        raise unwritable(path, error) from error


def _csv_cell(value: object) -> object:
    return "" if value is None or value != value else value  # noqa: PLR0124 - nan


@dataclass(frozen=True)
class EvaluationTable:
    """Rows of `evaluate`, and where they were measured.

    Attributes:
        rows: one row a method and setting, in the order asked for.
        metric_name: heading of the task metric.
        measured: the machine, the batch and the reference, in words: times mean
            nothing without them.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> table = tdh.evaluate(lambda t, y: -y, torch.ones(4, 2), (0.0, 1.0), ["euler"],
        ...                      steps=[10], progress=False)
        >>> table.rows[0].nfe, round(table.rows[0].relative_l2, 3)
        (10, 0.052)
    """

    rows: tuple[EvaluationRow, ...]
    metric_name: str
    measured: str

    def __str__(self) -> str:
        """Same as `to_markdown`."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return a Markdown table in three significant digits, the machine below it.

        NFE are calls of func; MACs are per sample and count products of matrices,
        convolutions and attention (k, M, G: thousands, millions, billions); ms are for
        the whole batch; "worst" is the largest relative L2 error of one sample, "along" the
        mean one over the points of the method's grid.
        """
        return markdown(self.rows, self.metric_name, self.measured)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a CSV file, in full precision; columns are `EvaluationRow`'s.

        Raises:
            FileWriteError: the file cannot be written.
        """
        write_csv(self.rows, self.metric_name, path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error against NFE and against ms, side by side; see `_plotting.pareto`.

        Args:
            path: file to write; its suffix chooses the format (png, pdf, svg).

        Raises:
            MissingExtraError: matplotlib is not installed.
            OptionError: the suffix names no format.
            FileWriteError: the file cannot be written.
        """
        _plotting.pareto(self.rows, path, caption=self.measured)
