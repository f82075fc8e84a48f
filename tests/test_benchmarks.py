"""What the benchmark concludes from its measurements, and what it measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmarks import _cifar, _cnf, _contestants, _picture, _problem, _ratios, _report, _samples
from benchmarks._measure import measure

import torchdiffeq_hyper as tdh


@dataclass(frozen=True)
class Row:
    method: str
    nfe: int
    ms: float
    relative_l2: float
    steps: int | None = None
    tolerance: float | None = None
    is_learned: bool = False


EULER_8 = Row("euler", 8, 80.0, 0.3, steps=8)
MIDPOINT_8 = Row("midpoint", 8, 84.0, 0.1, steps=4)
RK4_16 = Row("rk4", 16, 160.0, 0.02, steps=4)
DOPRI5 = Row("dopri5", 32, 400.0, 0.03, tolerance=1e-2)
TSIT5 = Row("torchdyn tsit5", 30, 70.0, 0.04, tolerance=1e-2)
BNS_8 = Row("bns", 8, 85.0, 0.02, steps=8, is_learned=True)
BNS_10 = Row("bns", 10, 100.0, 0.01, steps=10, is_learned=True)
HYPEREULER = Row("hypereuler", 8, 81.0, 0.05, steps=8, is_learned=True)
ROWS = [EULER_8, MIDPOINT_8, RK4_16, DOPRI5, BNS_8, BNS_10, HYPEREULER]


def test_equal_time_takes_the_most_accurate_classical_solver_of_so_many_calls_as_timer() -> None:
    found = _ratios.equal_time(ROWS, 8)
    assert found is not None
    assert (found.ms, found.classical, found.learned) == (84.0, MIDPOINT_8, BNS_8)
    assert found.error_ratio == pytest.approx(0.2)


def test_equal_time_lets_no_row_win_that_takes_longer_than_the_slack() -> None:
    found = _ratios.equal_time(ROWS, 8, slack=0.0)
    assert found is not None
    assert found.learned == HYPEREULER


def test_equal_time_holds_the_best_classical_solver_of_any_kind_against_the_learned() -> None:
    found = _ratios.equal_time([*ROWS, TSIT5], 8)
    assert found is not None
    assert found.classical == TSIT5


def test_equal_time_says_where_no_learned_solver_is_fast_enough() -> None:
    found = _ratios.equal_time([MIDPOINT_8, BNS_10], 8)
    assert found is not None
    assert found.learned is None
    assert math.isnan(found.error_ratio)


def test_equal_time_needs_a_fixed_step_solver_of_so_many_calls() -> None:
    assert _ratios.equal_time(ROWS, 10) is None


def test_equal_time_leaves_out_solves_that_failed() -> None:
    failed = Row("rk4", 8, 70.0, math.inf, steps=2)
    unfinished = Row("heun2", 8, 70.0, math.nan, steps=4)
    found = _ratios.equal_time([failed, unfinished, *ROWS], 8)
    assert found is not None
    assert found.classical == MIDPOINT_8


def test_equal_accuracy_takes_the_fastest_that_reach_dopri5s_error() -> None:
    found = _ratios.equal_accuracy(ROWS, 1e-2)
    assert found is not None
    assert (found.fixed_step, found.learned) == (RK4_16, BNS_8)
    assert found.speedup == pytest.approx(400 / 85)
    assert found.speedup_over_fixed_step == pytest.approx(160 / 85)


def test_equal_accuracy_counts_no_learned_solver_that_is_less_accurate() -> None:
    found = _ratios.equal_accuracy([DOPRI5, RK4_16, HYPEREULER], 1e-2)
    assert found is not None
    assert found.learned is None
    assert math.isnan(found.speedup)


def test_equal_accuracy_without_a_fixed_step_solver_that_good_is_unbounded() -> None:
    found = _ratios.equal_accuracy([DOPRI5, EULER_8, BNS_8], 1e-2)
    assert found is not None
    assert found.speedup_over_fixed_step == math.inf


def test_equal_accuracy_needs_dopri5_at_that_tolerance() -> None:
    assert _ratios.equal_accuracy(ROWS, 1e-3) is None


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.25, "1/4.0"), (4.0, "4.0"), (0.0, "0.0"), (math.nan, "-")]
)
def test_error_ratios_below_one_are_written_as_fractions(ratio: float, text: str) -> None:
    assert _report.fraction(ratio) == text


def test_derived_tables_leave_out_what_was_not_measured() -> None:
    lines = _report.derived(ROWS).splitlines()
    body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert [line[0] for line in body] == ["NFE", "--:", "8", "16", "tol", "---:", "0.01"]
    assert body[2][-1] == "1/5.0"
    assert body[6][-2:] == ["4.71", "1.88"]


def test_the_summary_has_a_line_a_model() -> None:
    lines = _report.summary({"one": ROWS, "other": [EULER_8]}).splitlines()[-2:]
    one, other = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert one == ["one", "-", "1/5.0", "-", "1/2.0", "4.71", "-", "-"]
    assert other == ["other", *"-------"]


def test_sliced_wasserstein_of_a_shift_is_its_root_mean_square_projection() -> None:
    x = torch.randn(500, 2)
    far = _samples.sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]))
    assert far == pytest.approx(5 / math.sqrt(2), rel=0.1)
    assert _samples.sliced_wasserstein(x, x[torch.randperm(500)]) == pytest.approx(0, abs=1e-6)


def test_mmd_is_the_biased_estimate() -> None:
    x, y = torch.randn(300, 2), torch.randn(280, 2) + 1
    kernel = [
        torch.exp(-(torch.cdist(a, b) ** 2) / 2 / 0.7**2) for a, b in ((x, x), (y, y), (x, y))
    ]
    expected = (kernel[0].mean() + kernel[1].mean() - 2 * kernel[2].mean()).sqrt()
    assert _samples.mmd(x, y, bandwidth=0.7) == pytest.approx(float(expected), rel=1e-4)


def test_samples_of_the_exact_map_pass_and_shifted_ones_do_not() -> None:
    samplers = {"exact": torch.tanh, "shifted": lambda noise: torch.tanh(noise) + 0.3}
    found = _samples.compare(samplers, torch.tanh, 2, pairs=20, samples=200)
    assert {(v.sampler, v.measure): v.passed for v in found} == {
        ("exact", "sliced Wasserstein"): True,
        ("exact", "MMD"): True,
        ("shifted", "sliced Wasserstein"): False,
        ("shifted", "MMD"): False,
    }


def test_divergence_of_the_flow_is_the_trace_of_its_jacobian() -> None:
    field, t, y = _cnf.Field(width=8), torch.tensor(0.3), torch.randn(5, 2)
    k, divergence = field.with_divergence(t, (y, torch.zeros(5)))
    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: field(t, z[None])[0]))(y)
    torch.testing.assert_close(k, field(t, y))
    torch.testing.assert_close(divergence, jacobians.diagonal(dim1=1, dim2=2).sum(1))


def test_images_are_read_from_the_binary_files(tmp_path: Path) -> None:
    record = bytes([7]) + bytes(range(256)) * 12
    for name in _cifar.FILES:
        (tmp_path / name).write_bytes(record * 2)
    data = _cifar.load_cifar(tmp_path)
    assert (len(data.train_images), len(data.test_images)) == (8, 2)
    assert data.test_labels.tolist() == [7, 7]
    assert data.test_images[1, 0, 0, 3] == pytest.approx(3 / 127.5 - 1)
    assert data.test_images[1, 2, 31, 31] == 1


def test_a_missing_image_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_batch_1.bin is not there.*--data"):
        _cifar.load_cifar(tmp_path)


def test_a_truncated_image_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="3072 bytes, not a multiple of 3073"):
        _cifar.load_cifar(tmp_path)


def _rotation(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Time comes 0-d, or (batch, 1) from solvers that give every sample its own.
    return (1 + t) * torch.stack([y[:, 1], -y[:, 0]], 1)


def test_every_librarys_solver_is_measured_against_the_same_end_state() -> None:
    solver = tdh.HyperSolver("euler", lambda step: -step.y / 2, steps=10)
    starts = torch.randn(6, 2)
    benchmark = _problem.Benchmark(
        name="rotation",
        title="rotation",
        func=_rotation,
        fit_y0=starts,
        test_y0=starts,
        span=(0.0, 1.0),
        fit_seconds=1.0,
        hypernet=lambda: tdh.hypernets.MLP(2, inputs=("y", "t")),
    )
    contestants = [
        *_contestants.classical(quick=True),
        *(c for c in _contestants.other_libraries(quick=True) if "torchode" in c.method),
        *_contestants.learned([solver]),
    ]
    rows = measure(benchmark, contestants, repeats=1).rows
    assert [(row.steps, row.nfe) for row in rows if row.is_learned] == [(10, 10)]
    for row in rows:
        # 0.5: four steps of Euler; adaptive ones take what they are asked for.
        assert row.relative_l2 < (0.5 if row.steps else 2 * row.tolerance), row
        if row.steps and not row.is_learned:
            assert row.nfe == row.steps * _contestants.CALLS_A_STEP[row.method]


def test_every_measured_method_has_its_own_looks() -> None:
    looks = {**_picture.LEARNED, **_picture.OTHERS}
    assert len(set(looks.values())) == len(looks)
    solver = tdh.HyperSolver("euler", lambda step: step.y, steps=2)
    measured = [
        *_contestants.classical(),
        *_contestants.other_libraries(),
        *_contestants.learned([solver]),
        *_contestants.torchdyn_hypereuler(solver),
    ]
    assert {(c.method, c.is_learned) for c in measured} <= {
        *((method, True) for method in _picture.LEARNED),
        *((method, False) for method in _picture.OTHERS),
    }
