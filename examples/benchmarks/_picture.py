"""The benchmark's tables as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdiffeq_hyper.evaluation import EvaluationRow

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

LARGEST_ERROR = 2.0
LEARNED = {
    "bns": ("#d62728", "o"),
    "hypereuler": ("#1f77b4", "s"),
    "hypermidpoint": ("#2ca02c", "D"),
    "hyperheun": ("#ff7f0e", "^"),
    "torchdyn HyperEuler": ("#9467bd", "v"),
}
OTHERS = {
    "euler": ("#9a9a9a", "o"),
    "midpoint": ("#5f5f5f", "s"),
    "heun2": ("#b5a17a", "D"),
    "heun3": ("#7d8fa8", "^"),
    "rk4": ("#b0808e", "v"),
    "dopri5": ("#404040", "P"),
    "torchdyn tsit5": ("#8aa08a", "*"),
    "torchode dopri5": ("#9a8ab0", "X"),
    "torchode tsit5": ("#7fa0a8", "p"),
}


def draw(models: Mapping[str, Sequence[EvaluationRow]], path: Path) -> None:
    """Draw error against wall time, one panel a model; learned solvers in colour."""
    from matplotlib.figure import Figure

    columns = min(3, len(models) + 1)
    n_rows = math.ceil((len(models) + 1) / columns)  # the legend takes a panel
    figure = Figure(figsize=(4.2 * columns, 3.9 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, columns, squeeze=False).flatten().tolist()
    entries: dict[str, Artist] = {}
    for axes, (model, rows) in zip(panels, models.items(), strict=False):
        _draw_panel(axes, rows)
        axes.set_title(model)
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    legend = panels[len(models)]
    legend.legend(list(entries.values()), list(entries), loc="center", frameon=False)
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Axes, rows: Sequence[EvaluationRow]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for method in dict.fromkeys(row.method for row in rows):
        line = sorted((row for row in rows if row.method == method), key=lambda row: row.nfe)
        drawn = [row for row in line if 0 < row.relative_l2 < LARGEST_ERROR]
        xs, ys = [row.ms for row in drawn], [row.relative_l2 for row in drawn]
        axes.plot(xs, ys, label=method, **_style(method, is_learned=line[0].is_learned))
    axes.set(xscale="log", yscale="log", xlabel="wall time, ms", ylabel="relative L2 error")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _style(method: str, *, is_learned: bool) -> dict[str, Any]:
    """Return a method's looks: the same in every panel."""
    colour, marker = (LEARNED if is_learned else OTHERS)[method]
    if is_learned:
        return {"color": colour, "marker": marker, "linewidth": 2.2, "zorder": 3}
    plain = {"linewidth": 1.0, "linestyle": "--", "markerfacecolor": "white"}
    return {"color": colour, "marker": marker, **plain}
