"""How a table's rows look as text."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

from torchdiffeq_hyper.errors import FileWriteError, explain
from torchdiffeq_hyper.evaluation._row import EvaluationRow


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


def unwritable(path: str | os.PathLike[str], error: OSError) -> FileWriteError:
    """Return the error for a file that the system refuses to write."""
    return FileWriteError(
        explain(
            f"{os.fspath(path)!r} cannot be written: {error.strerror or error}.",
            "a path in a folder that exists and may be written to.",
            "Path(path).parent.mkdir(parents=True, exist_ok=True)",
        )
    )
