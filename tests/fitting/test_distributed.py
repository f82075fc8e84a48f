"""Two processes fit what one fits, and no process waits for one that broke off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.fitting._distributed import ProcessGroup

SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what every scenario ended in, rank by rank; one launch runs them all."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={SIZE}"]
    command += ["--standalone", str(Path(ranks.__file__)), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("scenario", ranks.ALIKE)
def test_two_processes_find_the_weights_of_one(
    scenario: str, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = ranks.outcome(ranks.ALIKE[scenario](tmp_path))
    for result in results:
        together = result[scenario]
        torch.testing.assert_close(together["weights"], alone["weights"], rtol=0, atol=1e-10)
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        assert together["calls"] >= alone["calls"]  # batches are measured ahead


def test_a_whole_fit_ends_in_the_same_error(results: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = ranks.outcome(ranks.full(tmp_path))
    for result in results:
        assert result["full"]["validation"] == pytest.approx(alone["validation"], rel=0.05)


def test_context_of_batches_is_shared_out_with_them(
    results: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = ranks.outcome(ranks.context_of_batches(tmp_path))
    for result in results:
        found = result["context_of_batches"]["validation"]
        assert found == pytest.approx(alone["validation"], rel=0.05)


@pytest.mark.parametrize(
    "scenario",
    [
        *ranks.ALIKE,
        "full",
        "context_of_batches",
        "other_weights",
        "resumed",
        "other_clocks",
        "out_of_time_in_one",
        "auto",
        "generator",
    ],
)
def test_all_processes_return_the_same_bits(scenario: str, results: list[dict[str, Any]]) -> None:
    first, second = (result[scenario] for result in results)
    assert torch.equal(first["weights"], second["weights"])
    assert {**first, "weights": 0} == {**second, "weights": 0}


@pytest.mark.parametrize("scenario", ["other_clocks", "out_of_time_in_one"])
def test_time_that_is_up_in_one_process_is_up_in_all(
    scenario: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        assert result[scenario]["stopped"] == "max_seconds"
        assert result[scenario]["iterations"] > 0


def test_an_interrupted_fit_goes_on_in_all_processes(results: list[dict[str, Any]]) -> None:
    for result in results:
        resumed, straight = result["resumed"], result["in_one_go"]
        assert torch.equal(resumed["weights"], straight["weights"])
        assert resumed["losses"] == straight["losses"]


@pytest.mark.parametrize(
    ("scenario", "failing"),
    [("fails_in_a_reference", 1), ("fails_in_a_roll_out", 1), ("fails_in_rank_0", 0)],
)
def test_an_error_in_one_process_is_raised_in_all(
    scenario: str, failing: int, results: list[dict[str, Any]]
) -> None:
    assert results[failing][scenario] == {"error": "ZeroDivisionError", "text": "by zero"}
    other = results[1 - failing][scenario]
    assert other["error"] == "RankError"
    assert f"process {failing} of this fit failed: ZeroDivisionError: by zero" in other["text"]


@pytest.mark.parametrize("scenario", ["diverges_in_one", "loss_diverges_in_one"])
def test_a_divergence_in_one_process_is_one_in_all(
    scenario: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        assert result[scenario]["error"] == "FitDivergedError"
        assert "turned non-finite at iteration" in result[scenario]["text"]


def test_processes_with_other_starts_are_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["other_starts"]["error"] == "OptionError"
        assert "process 1 of this fit makes another call" in result["other_starts"]["text"]
        assert "fit shares y0 out" in result["other_starts"]["text"]


def test_iterables_of_other_lengths_are_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["other_lengths"]["error"] == "RankError"
        assert "went different ways" in result["other_lengths"]["text"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_in_all(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        assert result["unwritable"]["error"] == "FileWriteError"
    assert results[1]["unwritable"]["text"].startswith("in process 0: ")


def test_only_the_first_process_shows_progress(results: list[dict[str, Any]]) -> None:
    assert "20/20" in results[0]["shown"]
    assert results[1]["shown"] == ""


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_a_batch_once(count: int, size: int) -> None:
    samples = torch.arange(count)
    shares = [ProcessGroup(rank, size).share(count) for rank in range(size)]
    assert torch.equal(torch.cat([samples[part] for part, weight in shares if weight]), samples)
    assert sum(weight for _, weight in shares) == pytest.approx(1.0)
    assert all(len(samples[part]) for part, _ in shares)


def test_torchrun_without_a_process_group_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(tdh.HyperWarning, match="init_process_group"):
        solver = ranks.fit()
    assert solver.report is not None
