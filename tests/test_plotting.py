"""The Pareto picture."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from torchdiffeq_hyper.errors import FileWriteError, MissingExtraError, OptionError
from torchdiffeq_hyper.evaluation import EvaluationRow, EvaluationTable, _table


def row(method: str, nfe: int, error: float, *, is_learned: bool = False) -> EvaluationRow:
    return EvaluationRow(
        method=method,
        steps=nfe,
        tolerance=None,
        nfe=nfe,
        macs_func=1.0,
        macs_g=0.0,
        ms=0.1 * nfe,
        mape=error,
        relative_l2=error,
        worst_relative_l2=error,
        metric=None,
        is_learned=is_learned,
    )


ROWS = (
    row("euler", 8, 0.1),
    row("euler", 2, 0.5),
    row("rk4", 8, 1e-4),
    row("hypereuler", 2, 0.1, is_learned=True),
    row("hypereuler", 8, 0.01, is_learned=True),
)


def draw(rows: tuple[EvaluationRow, ...], path: Path) -> None:
    EvaluationTable(rows, "metric", "a machine").plot(path)


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that `plot` is going to draw on."""
    figure = _table._new_figure()
    monkeypatch.setattr(_table, "_new_figure", lambda: figure)
    return figure


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.SVG", b"<?xml")]
)
def test_suffix_chooses_the_format(tmp_path: Path, name: str, start: bytes) -> None:
    draw(ROWS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_every_method_is_one_line_by_rising_cost_in_both_panels(
    figure: Figure, tmp_path: Path
) -> None:
    draw(ROWS, tmp_path / "a.png")
    by_nfe, by_ms = figure.axes
    for axes, scale in ((by_nfe, 1.0), (by_ms, 0.1)):
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        assert list(lines) == ["euler", "rk4", "hypereuler"]
        assert list(lines["euler"].get_xdata()) == [2 * scale, 8 * scale]
        assert list(lines["euler"].get_ydata()) == [0.5, 0.1]
        assert lines["hypereuler"].get_linewidth() > lines["euler"].get_linewidth()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["euler", "rk4", "hypereuler"]
    assert figure.get_supxlabel() == "a machine"


def test_points_that_a_logarithm_cannot_show_are_left_out(figure: Figure, tmp_path: Path) -> None:
    bad = [row("euler", 4, error) for error in (0.0, math.inf, math.nan)]
    broken_off = replace(row("rk4", 4, math.inf), ms=math.nan)
    draw((*ROWS, *bad, broken_off), tmp_path / "a.png")
    for axes in figure.axes:
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 1, 2]


def test_many_methods_never_share_a_style(figure: Figure, tmp_path: Path) -> None:
    many = [row(f"method {i}", 2 + i, 0.1, is_learned=i % 2 == 0) for i in range(16)]
    draw(tuple(many), tmp_path / "a.png")
    styles = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
    assert len(styles) == 16


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.png or \.pdf or \.svg"):
        draw(ROWS, tmp_path / "a.bmp")


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError, match="cannot be written"):
        draw(ROWS, tmp_path / "missing" / "a.png")


def test_missing_matplotlib_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "torchdiffeq_hyper\[plot\]"'):
        draw(ROWS, tmp_path / "a.png")


def test_matplotlib_is_loaded_only_to_draw_and_pyplot_never(tmp_path: Path) -> None:
    code = f"""
import sys, torch, torchdiffeq_hyper as tdh
table = tdh.evaluate(lambda t, y: -y, torch.ones(2, 1), (0.0, 1.0), ["euler"],
                     steps=[2], repeats=1, progress=False)
assert "matplotlib" not in sys.modules
table.plot({str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
