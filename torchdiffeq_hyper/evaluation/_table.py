"""What `evaluate` returns."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torchdiffeq_hyper import plotting
from torchdiffeq_hyper.evaluation._row import EvaluationRow
from torchdiffeq_hyper.evaluation._text import markdown, write_csv


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
        """Draw error against NFE and against ms, side by side; see `plotting.pareto`.

        Args:
            path: file to write; its suffix chooses the format (png, pdf, svg).

        Raises:
            MissingExtraError: matplotlib is not installed.
            OptionError: the suffix names no format.
            FileWriteError: the file cannot be written.
        """
        plotting.pareto(self.rows, path, caption=self.measured)
