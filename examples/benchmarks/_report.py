"""The benchmark's tables as text."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks._ratios import EqualAccuracy, EqualTime, Row, equal_accuracy, equal_time
from benchmarks._samples import MARGIN, Verdict

from torchdiffeq_hyper.evaluation import EvaluationRow

CALLS = (4, 8, 10, 16)
TOLERANCES = (1e-2, 1e-3, 1e-4)


def summary(models: Mapping[str, Sequence[Row]]) -> str:
    """Return one line a model: errors at equal time, then times at equal accuracy."""
    head = ["model", *(f"{calls} calls" for calls in CALLS)]
    head += [f"dopri5 {limit:g}" for limit in TOLERANCES]
    body = []
    for model, rows in models.items():
        times = [equal_time(rows, calls) for calls in CALLS]
        accuracies = [equal_accuracy(rows, limit) for limit in TOLERANCES]
        errors = [fraction(found.error_ratio if found else math.nan) for found in times]
        speedups = [factor(found.speedup if found else math.nan) for found in accuracies]
        body.append([model, *errors, *speedups])
    return (
        "The best learned solver's error over the best other solver's, at the time of a "
        "classical fixed-step solver of so many calls; and how many times sooner than dopri5 "
        f"it reaches dopri5's error at rtol = atol.\n\n{_table(head, body)}"
    )


def derived(rows: Sequence[Row]) -> str:
    """Return what the rows say at equal time and at equal accuracy, as two tables."""
    times = [equal_time(rows, calls) for calls in CALLS]
    accuracies = [equal_accuracy(rows, limit) for limit in TOLERANCES]
    return "\n\n".join(
        [
            "Equal time: the smallest errors within the time of a classical fixed-step solver.",
            _table(
                ("NFE", "ms", "classical", "error", "learned", "error", "ratio"),
                [_time_cells(found) for found in times if found],
            ),
            "Equal accuracy: the shortest times to dopri5's error at rtol = atol.",
            _table(
                (
                    *("tol", "error", "dopri5 ms", "fixed step", "ms", "learned", "ms"),
                    *("dopri5 / learned", "fixed step / learned"),
                ),
                [_accuracy_cells(found) for found in accuracies if found],
            ),
        ]
    )


def _time_cells(found: EqualTime) -> list[str]:
    learned = found.learned
    error = "-" if learned is None else f"{learned.relative_l2:.2g}"
    classical = [_label(found.classical), f"{found.classical.relative_l2:.2g}"]
    cells = [str(found.nfe), f"{found.ms:.3g}", *classical, _label(learned), error]
    return [*cells, fraction(found.error_ratio)]


def _accuracy_cells(found: EqualAccuracy) -> list[str]:
    cells = [f"{found.tolerance:g}", f"{found.dopri5.relative_l2:.2g}", f"{found.dopri5.ms:.3g}"]
    for row in (found.fixed_step, found.learned):
        cells += [_label(row), "-" if row is None else f"{row.ms:.3g}"]
    return [*cells, factor(found.speedup), factor(found.speedup_over_fixed_step)]


def factor(value: float) -> str:
    """Return how many times faster, - for nan."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def fraction(value: float) -> str:
    """Return a ratio as people compare it: 1/4.0 for 0.25, 4.0 for 4, - for nan."""
    if math.isnan(value):
        return "-"
    return f"1/{1 / value:.1f}" if 0 < value < 1 else f"{value:.1f}"


def _label(row: Row | None) -> str:
    if row is None:
        return "none"
    setting = f"{row.tolerance:g}" if row.tolerance is not None else f"{row.nfe} calls"
    return f"{row.method}, {setting}"


def sampling(verdicts: Sequence[Verdict], pairs: int, samples: int) -> str:
    """Return how far fast samples are from dopri5's, against dopri5's own spread."""
    head = ("sampler", "distance", "to dopri5", "dopri5 to dopri5", "ratio", "within")
    cells = (
        (
            *(v.sampler, v.measure, f"{v.mean:.4f}", f"{v.noise:.4f}"),
            *(f"{v.mean / v.noise:.3f}", "yes" if v.passed else "no"),
        )
        for v in verdicts
    )
    return (
        f"Sampling with 2 calls: distances between sets of {samples:,} samples, means over "
        f"{pairs} pairs of sets with noise of their own. Within: at most {MARGIN:g} times "
        f"dopri5's to itself, plus two standard errors.\n\n{_table(head, cells)}"
    )


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *map(list, body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def write_csv(models: Mapping[str, Sequence[EvaluationRow]], path: Path) -> None:
    """Write every model's rows to one CSV file, in full precision."""
    names = [field.name for field in fields(EvaluationRow) if field.name != "metric"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", *names])
        for model, rows in models.items():
            for row in rows:
                values = asdict(row)
                writer.writerow([model, *(values[name] for name in names)])
