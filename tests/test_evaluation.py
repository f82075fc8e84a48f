"""`evaluate`: what it counts, what it measures, what it leaves alone."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, MLPField
from torchdiffeq_hyper.errors import (
    FileWriteError,
    MissingHypernetError,
    NonFiniteError,
    OptionError,
    OutsideFitWarning,
    StateShapeError,
    StateTypeError,
    UnknownMethodError,
)
from torchdiffeq_hyper.evaluation import EvaluationRow, EvaluationTable, _measure
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.recording import median_seconds

SPAN = (0.0, 1.0)
LEARNED = [method for method in _registry.methods().values() if method.corrects_base]


def forced_decay(t: Tensor, y: Tensor) -> Tensor:
    """Linear, y' = -y + sin t, whose solution is known."""
    return -y + torch.sin(t)


def forced_decay_solution(y: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """Return y(t1) from y at t0."""

    def particular(t: Tensor) -> Tensor:
        return (torch.sin(t) - torch.cos(t)) / 2

    return (y - particular(t0)) * torch.exp(t0 - t1) + particular(t1)


def exact_correction(step: tdh.StepInput) -> Tensor:
    """The residual of Euler's method on `forced_decay`."""
    y1 = forced_decay_solution(step.y, step.t, step.t + step.dt)
    return (y1 - step.y - step.dt * step.f0) / step.dt**2


def start(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.5, 2.0, batch * 2, dtype=dtype).reshape(batch, 2)


def evaluate(
    func: Any = forced_decay, y0: Any = None, methods: Any = ("euler",), **options: Any
) -> EvaluationTable:
    options = {"t_span": SPAN, "repeats": 1, "progress": False, **options}
    return tdh.evaluate(func, start() if y0 is None else y0, methods=list(methods), **options)


def euler_by_hand(y: Tensor, t0: float, t1: float, n: int) -> Tensor:
    dt = (t1 - t0) / n
    for i in range(n):
        y = y + dt * forced_decay(torch.tensor(t0 + i * dt, dtype=y.dtype), y)
    return y


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.5, -0.5)], ids=["forward", "reverse"])
@pytest.mark.parametrize("n", [1, 7, 10])
def test_error_is_that_of_exactly_n_equal_steps(span: tuple[float, float], n: int) -> None:
    y = euler_by_hand(start(), *span, n)
    exact = forced_decay_solution(start(), *torch.tensor(span, dtype=y.dtype))
    relative = (y - exact).norm(dim=1) / exact.norm(dim=1)
    row = evaluate(t_span=span, steps=[n]).rows[0]
    assert row.relative_l2 == pytest.approx(float(relative.mean()), rel=1e-7)
    assert row.worst_relative_l2 == pytest.approx(float(relative.max()), rel=1e-7)
    assert row.mape == pytest.approx(100 * float(((y - exact) / exact).abs().mean()), rel=1e-7)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.5, -0.5)], ids=["forward", "reverse"])
def test_errors_along_the_span_are_those_at_the_grids_points(span: tuple[float, float]) -> None:
    y, errors = start(), []
    for k in range(5):
        ends = [span[0] + (span[1] - span[0]) * (k + i) / 5 for i in (0, 1)]
        y = euler_by_hand(y, *ends, 1)
        exact = forced_decay_solution(start(), *torch.tensor([span[0], ends[1]], dtype=y.dtype))
        errors.append(float(((y - exact).norm(dim=1) / exact.norm(dim=1)).mean()))
    row = evaluate(t_span=span, steps=[5]).rows[0]
    assert row.along == pytest.approx(sum(errors) / 5, rel=1e-6)


def test_points_along_the_span_are_those_of_the_grid_to_the_last_digits() -> None:
    # Between grid points the host interpolates: errors of the method would look like 1e-12.
    y0 = torch.ones(4, 1, dtype=torch.float64)
    given = {"steps": [1000], "repeats": 1, "progress": False, "rtol": 1e-13, "atol": 1e-13}
    table = tdh.evaluate(lambda t, y: -y, y0, (0.0, 1.0), ["rk4"], **given)
    assert table.rows[0].along < 2e-13


def test_fine_grids_are_looked_at_in_few_points_of_theirs() -> None:
    func = Counted(forced_decay)
    rows = evaluate(func, steps=[4, 50, 1000]).rows
    assert rows[0].along > rows[1].along > rows[2].along > 0
    assert rows[2].along == pytest.approx(rows[2].relative_l2, rel=0.9)


def test_a_dise_has_no_points_of_its_own_between_the_ends() -> None:
    dise = tdh.Dise(
        [tdh.Candidate("rk4", steps=2)], selector=lambda y: torch.zeros(len(y), 1, dtype=y.dtype)
    )
    tdh.register_method("a-dise", dise)
    try:
        row, plain = evaluate(methods=["a-dise", "rk4"], steps=[2]).rows
    finally:
        tdh.unregister_method("a-dise")
    assert row.relative_l2 == pytest.approx(plain.relative_l2)
    assert math.isnan(row.along)
    assert plain.along > 0


def test_a_bespoke_solver_is_looked_at_between_its_ends() -> None:
    solver = tdh.BespokeSolver.classical("rk4", 8)
    rows = evaluate(methods=[solver, "dopri5"], tolerances=[1e-5]).rows
    assert all(0 < row.along < 1e-2 for row in rows)


@pytest.mark.parametrize(("method", "calls"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_host_methods_are_counted_without_a_spurious_step(method: str, calls: int) -> None:
    rows = evaluate(methods=[method], steps=[3, 7, 10, 49]).rows
    assert [(row.steps, row.nfe) for row in rows] == [(n, n * calls) for n in (3, 7, 10, 49)]


def test_adaptive_nfe_includes_the_choice_of_the_first_step() -> None:
    rows = evaluate(methods=["dopri5"], tolerances=[1e-2, 1e-8]).rows
    for row, tolerance in zip(rows, (1e-2, 1e-8), strict=True):
        func = Counted(forced_decay)
        t = torch.tensor(SPAN, dtype=torch.float64)
        odeint(func, start(), t, method="dopri5", rtol=tolerance, atol=tolerance)
        assert row.nfe == func.calls
        assert (row.tolerance, row.steps) == (tolerance, None)
    assert rows[1].nfe > rows[0].nfe
    assert rows[1].relative_l2 < rows[0].relative_l2 / 100


def test_hypersolver_with_the_exact_correction_has_no_error() -> None:
    solver = tdh.HyperSolver("euler", exact_correction, steps=5)
    learned, plain = evaluate(methods=[solver, "euler"], steps=[5]).rows
    assert (learned.method, learned.nfe, learned.is_learned) == ("hypereuler", 5, True)
    assert learned.relative_l2 < 1e-9 < plain.relative_l2
    assert not plain.is_learned


def test_reverse_hypersolver_sees_true_time() -> None:
    solver = tdh.HyperSolver("euler", exact_correction, steps=5)
    assert evaluate(methods=[solver], t_span=(1.0, 0.0)).rows[0].relative_l2 < 1e-9


@pytest.mark.parametrize("method", LEARNED, ids=lambda method: method.name)
def test_learned_method_by_name_uses_what_is_bound_to_func(method: _registry.Method) -> None:
    field = MLPField()
    solver = tdh.HyperSolver(method.tableau.name, lambda step: 0.1 * step.f0, steps=9)
    tdh.attach(field, solver)
    named, given = evaluate(field, methods=[method.name, solver], steps=[3]).rows
    assert named.nfe == given.nfe == 3 * method.calls_per_step
    assert named.relative_l2 == given.relative_l2
    assert named.is_learned


def test_learned_method_by_name_without_a_solver_raises() -> None:
    with pytest.raises(MissingHypernetError, match=r"tdh\.attach"):
        evaluate(methods=["hypereuler"], steps=[3])


def test_without_steps_a_solver_takes_its_own() -> None:
    solvers = [tdh.HyperSolver("euler", zero, steps=n) for n in (6, (2, 8))]
    assert [row.steps for row in evaluate(methods=solvers).rows] == [6, 8]


def test_published_name_is_measured_as_its_solver_under_its_name() -> None:
    tdh.register_method("decay-fast", tdh.HyperSolver("euler", exact_correction, steps=4))
    try:
        row = evaluate(methods=["decay-fast"]).rows[0]
    finally:
        tdh.unregister_method("decay-fast")
    assert (row.method, row.steps, row.nfe, row.is_learned) == ("decay-fast", 4, 4, True)
    assert row.relative_l2 < 1e-9


def test_equal_labels_are_told_apart() -> None:
    solvers = [tdh.HyperSolver("euler", zero, steps=2), tdh.HyperSolver("euler", zero, steps=3)]
    labels = [row.method for row in evaluate(methods=[*solvers, "euler"], steps=[2]).rows]
    assert labels == ["hypereuler", "hypereuler #2", "euler"]


def test_alpha_is_in_the_label() -> None:
    solver = tdh.HyperSolver("alpha", zero, steps=2, alpha=2 / 3)
    assert evaluate(methods=[solver]).rows[0].method == "hyper2 (alpha 0.667)"


def test_tuple_state_is_judged_by_the_joint_norm_of_each_sample() -> None:
    def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, z = state
        return forced_decay(t, x), -2 * z

    x, z = start(), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    row = evaluate(pair, (x, z), steps=[4]).rows[0]
    x1, z1 = euler_by_hand(x, 0.0, 1.0, 4), z * 0.5**4
    x_exact = forced_decay_solution(x, *torch.tensor(SPAN, dtype=x.dtype))
    z_exact = z * math.exp(-2)
    off = torch.cat([x1 - x_exact, (z1 - z_exact)[:, None]], dim=1).norm(dim=1)
    size = torch.cat([x_exact, z_exact[:, None]], dim=1).norm(dim=1)
    assert row.relative_l2 == pytest.approx(float((off / size).mean()), rel=1e-7)
    assert row.nfe == 4


def test_complex_states_are_measured() -> None:
    y0 = torch.ones(2, 1, dtype=torch.complex128)
    row = evaluate(lambda t, y: 1j * y, y0, steps=[2]).rows[0]
    expected = abs((1 + 0.5j) ** 2 - complex(math.cos(1), math.sin(1)))
    assert row.relative_l2 == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_by_a_float32_reference(dtype: torch.dtype) -> None:
    solver = tdh.HyperSolver("rk4", zero, steps=8)
    row = evaluate(y0=start(dtype=dtype), methods=[solver]).rows[0]
    assert row.relative_l2 < 4 * torch.finfo(dtype).eps


def test_float32_reference_is_reached_on_a_stiff_problem() -> None:
    y0 = start(dtype=torch.float32)
    row = evaluate(lambda t, y: -200 * (y - torch.cos(t)), y0, methods=["rk4"], steps=[200]).rows[0]
    assert row.relative_l2 < 1e-4


def test_macs_are_split_between_func_and_hypernet() -> None:
    linear = nn.Linear(2, 2, dtype=torch.float64)
    net = tdh.ConcatHypernet(nn.Linear(5, 2, dtype=torch.float64))
    solver = tdh.HyperSolver("heun", net)
    methods = ["heun2", solver, "dopri5"]
    plain, learned, adaptive = evaluate(lambda t, y: linear(y), methods=methods, steps=[3]).rows
    assert (plain.macs_func, plain.macs_g) == (3 * 2 * 4, 0)
    assert (learned.macs_func, learned.macs_g) == (3 * 2 * 4, 3 * 10)
    assert (adaptive.macs_func, adaptive.macs_g) == (adaptive.nfe * 4, 0)


def test_metric_gets_the_final_state() -> None:
    seen: list[Tensor] = []

    def metric(y: Tensor) -> Tensor:
        seen.append(y)
        return y.mean()

    row = evaluate(steps=[3], metric=metric, metric_name="mean").rows[0]
    expected = euler_by_hand(start(), 0.0, 1.0, 3)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)
    assert row.metric == pytest.approx(float(expected.mean()))


def test_metric_that_is_no_number_is_refused() -> None:
    with pytest.raises(OptionError, match="metric returned"):
        evaluate(steps=[3], metric=lambda y: y)


CPU = torch.device("cpu")


def test_methods_are_timed_in_turn_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def solve(name: str, seconds: list[float]) -> Any:
        def run() -> None:
            order.append(name)
            clock[0] += seconds.pop(0)

        return run

    solves = [solve("a", [1.0, 9.0, 2.0]), solve("b", [3.0, 5.0, 4.0])]
    assert median_seconds(solves, CPU, 3) == [2.0, 4.0]
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_short_solves_are_repeated_within_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, runs = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def solve() -> None:
        runs.append(len(runs))
        clock[0] += 0.001

    assert median_seconds([solve], CPU, 1) == [pytest.approx(0.001)]
    assert len(runs) >= 10


def test_a_zero_reference_is_judged_on_the_scale_of_the_others() -> None:
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert _measure.errors(reference.clone(), reference) == (0.0, 0.0, 0.0)
    off = _measure.errors(torch.tensor([[0.001, 0.0], [3.0, 9.0]]), reference)
    assert off.worst_relative_l2 == pytest.approx(1.0)
    assert off.relative_l2 == pytest.approx((1.0 + 0.001 / (1e-3 * math.sqrt(25 / 2))) / 2)


def test_a_solution_that_is_zero_everywhere_has_no_error() -> None:
    assert _measure.errors(torch.zeros(2, 2), torch.zeros(2, 2)) == (0.0, 0.0, 0.0)


def test_mape_is_not_made_of_elements_near_zero() -> None:
    reference = torch.tensor([[1.0, 1.0, 1.0, 1e-12]])
    off = _measure.errors(reference + 0.001, reference)
    floor = 1e-3 * math.sqrt(3 / 4)
    assert off.mape == pytest.approx(100 * (3 * 0.001 + 0.001 / floor) / 4, rel=1e-4)


def exploding_for_big_steps(t: Tensor, y: Tensor) -> Tensor:
    return -2000 * (y - torch.cos(t))


def test_methods_that_fail_are_rows_and_do_not_stop_the_others() -> None:
    solver = tdh.HyperSolver("euler", zero, steps=20)
    seen: list[Tensor] = []
    table = evaluate(
        exploding_for_big_steps,
        start(dtype=torch.float32),
        ["euler", solver, "adaptive_heun"],
        steps=[20],
        tolerances=[1e-2],
        metric=lambda y: seen.append(y) or 1.0,
    )
    plain, learned, adaptive = table.rows
    assert [row.failed for row in table.rows] == [True, True, False]
    assert plain.relative_l2 == learned.relative_l2 == math.inf
    assert plain.nfe == 20
    assert math.isnan(learned.ms)
    assert plain.metric is learned.metric is None
    assert len(seen) == 1
    assert adaptive.ms > 0
    assert table.to_markdown().count("failed") == 8


def test_adaptive_method_that_runs_out_of_step_size_is_a_row() -> None:
    row = evaluate(y0=start(dtype=torch.float16), methods=["dopri5"], tolerances=[1e-5]).rows[0]
    assert row.failed
    assert row.nfe > 0


def test_per_sample_method_that_cannot_finish_is_a_row() -> None:
    y0 = start(dtype=torch.float32)
    (row,) = evaluate(y0=y0, methods=["dopri5_per_sample"], tolerances=[1e-30]).rows
    assert row.failed
    assert row.nfe > 0


def test_assertions_of_func_itself_are_raised() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        assert torch.is_grad_enabled(), "not without gradients"
        return y

    with pytest.raises(AssertionError, match="not without gradients"):
        evaluate(func, steps=[2])


def test_a_solution_that_blows_up_has_no_reference() -> None:
    with pytest.raises(NonFiniteError, match="dopri5 finds no reference"):
        evaluate(lambda t, y: y**2, 3 * start(), steps=[2])


def test_func_and_hypernet_are_left_as_found() -> None:
    func = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double().train()
    net = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)).double().train()
    before = {name: value.clone() for name, value in func.state_dict().items()}
    net_before = {name: value.clone() for name, value in net.state_dict().items()}
    solver = tdh.HyperSolver("euler", tdh.ConcatHypernet(net), steps=2)
    y0 = start().requires_grad_()

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = func

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.net(y)

    for field in (Field(), Field().forward):
        evaluate(field, y0, [solver])
        assert all(torch.equal(before[name], value) for name, value in func.state_dict().items())
    assert all(torch.equal(net_before[name], value) for name, value in net.state_dict().items())
    assert func.training
    assert net.training
    assert y0.grad is None
    assert all(p.grad is None and p.requires_grad for p in func.parameters())


def test_a_graph_made_before_can_be_differentiated_after() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.norm(y)

    func = Normed().eval()
    loss = func(torch.tensor(0.0), start()).sum()
    evaluate(func, steps=[2])
    loss.backward()  # the buffers it needs were not written to
    assert func.norm.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_parts_may_be_answered_in_a_list(dtype: torch.dtype) -> None:
    y0 = (start(dtype=dtype), start(dtype=dtype)[:, 0])
    listed = evaluate(lambda t, y: [-y[0], -2 * y[1]], y0, steps=[4]).rows[0]
    assert listed == replace(
        evaluate(lambda t, y: (-y[0], -2 * y[1]), y0, steps=[4]).rows[0], ms=listed.ms
    )


def test_use_outside_the_fit_is_not_warned_about_and_the_warning_not_used_up() -> None:
    domain = tdh.FitDomain(SPAN, 0.1, 0.1, (1,), ((2,),), is_tuple=False, dtype="float64")
    solver = tdh.HyperSolver("euler", zero, steps=10, domain=domain)
    evaluate(methods=[solver], steps=[2], t_span=(1.0, 0.0))
    with tdh.using(solver):
        evaluate(methods=[solver], steps=[2])
    with pytest.warns(OutsideFitWarning):
        solver.solve(forced_decay, start(), torch.tensor([0.0, 7.0], dtype=torch.float64))


def test_an_override_does_not_replace_the_reference() -> None:
    expected = evaluate(steps=[4]).rows[0].relative_l2
    with tdh.override("dopri5", tdh.HyperSolver("euler", zero, steps=2)):
        plain, overridden = evaluate(methods=["euler", "dopri5"], steps=[4]).rows
    assert plain.relative_l2 == expected
    assert overridden.nfe == 2


def test_markdown_names_settings_errors_and_the_machine() -> None:
    table = evaluate(
        methods=["euler", "dopri5"], steps=[10], metric=lambda y: 0.98765, metric_name="accuracy"
    )
    lines = table.to_markdown().splitlines()
    assert str(table) == table.to_markdown()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[0].split("|")[1].strip() == "method"
    assert lines[0].split("|")[-2].strip() == "accuracy"
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:3] == ["euler", "10", "10"]
    assert cells[-1] == "0.9877"
    assert "tol 0.001" in lines[3]
    assert f"torch {torch.__version__}" in lines[-1]
    assert "Batch 4, float64" in lines[-1]


def test_markdown_has_no_metric_column_without_a_metric() -> None:
    assert evaluate(steps=[2]).to_markdown().splitlines()[0].split("|")[-2].strip() == "along"


def test_csv_holds_the_rows_in_full_precision(tmp_path: Path) -> None:
    table = evaluate(
        methods=["euler", "dopri5"], steps=[3], metric=lambda y: 1 / 3, metric_name="third"
    )
    table.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2
    for text, row in zip(read, table.rows, strict=True):
        assert text["method"] == row.method
        assert text["steps"] == ("" if row.steps is None else str(row.steps))
        assert text["tolerance"] == ("" if row.tolerance is None else str(row.tolerance))
        assert int(text["nfe"]) == row.nfe
        for name in ("ms", "mape", "relative_l2", "worst_relative_l2", "along", "macs_func"):
            assert float(text[name]) == getattr(row, name)
        assert float(text["third"]) == 1 / 3


def test_csv_has_empty_cells_for_what_a_failed_row_lacks(tmp_path: Path) -> None:
    row = EvaluationRow(
        "euler", 2, None, 2, math.nan, 0.0, math.nan, math.inf, math.inf, math.inf, None, False
    )
    EvaluationTable((row,), "metric", "").to_csv(tmp_path / "table.csv")
    head, cells = (tmp_path / "table.csv").read_text().splitlines()
    assert "metric" not in head
    assert cells == "euler,2,,2,,0.0,,inf,inf,inf,"


def test_csv_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError, match="cannot be written"):
        evaluate(steps=[2]).to_csv(tmp_path / "missing" / "table.csv")


def test_progress_is_shown_only_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(steps=[2])
    assert capsys.readouterr().err == ""
    evaluate(steps=[2], progress=True)
    assert "solve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"methods": []}, OptionError, "methods is empty"),
        ({"methods": ["eulr"], "steps": [2]}, UnknownMethodError, r'methods=\["euler"\]'),
        ({"methods": [zero], "steps": [2]}, StateTypeError, "a method is a function"),
        ({"steps": None}, OptionError, '"euler" follows a time grid'),
        ({"methods": [tdh.HyperSolver("euler", zero)]}, OptionError, "steps is None"),
        ({"steps": 0}, OptionError, r"steps is 0(?s:.*)steps=\[2, 4, 8\]"),
        ({"steps": [2, 0]}, OptionError, "steps is 0"),
        ({"steps": [2.5]}, OptionError, "steps is 2.5"),
        ({"steps": []}, OptionError, r"steps is \[\](?s:.*)steps=\[2, 4, 8\]"),
        ({"methods": ["dopri5"], "tolerances": 0.0}, OptionError, "tolerances is 0.0"),
        ({"methods": ["dopri5"], "tolerances": []}, OptionError, r"tolerances is \[\]"),
        ({"steps": [2], "repeats": 0}, OptionError, "repeats is 0(?s:.*)repeats=5"),
        ({"steps": [2], "t_span": (1.0, 1.0)}, OptionError, "two distinct finite times"),
        ({"steps": [2], "t_span": (0.0, math.inf)}, OptionError, "two distinct finite times"),
        ({"steps": [2], "t_span": (0.0, 0.5, 1.0)}, OptionError, "two distinct finite times"),
        ({"steps": [2], "y0": torch.zeros(0, 2)}, StateShapeError, r"\(0, 2\)"),
        ({"steps": [2], "y0": torch.tensor(1.0)}, StateShapeError, "unsqueeze"),
        ({"steps": [2], "y0": (torch.ones(2, 1), torch.ones(3))}, StateShapeError, "every part"),
        ({"steps": [2], "y0": torch.ones(2, 1).long()}, StateTypeError, "int64"),
        ({"steps": [2], "y0": [[1.0]]}, StateTypeError, "y0 is a list"),
        ({"steps": [2], "func": lambda t, y: y[:1]}, StateShapeError, "func returned shape"),
        ({"steps": [2], "func": lambda t, y: (y,)}, StateTypeError, "func returned a tuple"),
    ],
)
def test_impossible_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        evaluate(**options)


def test_a_single_method_outside_a_list_is_refused() -> None:
    with pytest.raises(OptionError, match="a single method"):
        tdh.evaluate(forced_decay, start(), SPAN, "euler", steps=[2], progress=False)


def test_one_number_of_steps_and_one_tolerance_need_no_list() -> None:
    rows = evaluate(methods=["euler", "dopri5"], steps=3, tolerances=1e-2).rows
    assert [(row.steps, row.tolerance) for row in rows] == [(3, None), (None, 1e-2)]


def test_field_that_takes_gradients_through_a_module_is_counted_and_timed() -> None:
    net = nn.Linear(2, 2).requires_grad_(requires_grad=False)

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            u = t * net(x)
            (column,) = torch.autograd.grad(u[:, 0].sum(), x)
        return u.detach(), column[:, 0]

    start = (torch.ones(4, 2), torch.zeros(4))
    table = tdh.evaluate(flow, start, (0.0, 1.0), ["euler"], steps=2, repeats=1, progress=False)
    # Two calls, each a product with the 2 x 2 weights and one with its transpose.
    assert table.rows[0].macs_func == 2 * 2 * 4
