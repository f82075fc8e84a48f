"""The command line ``python -m torchdiffeq_hyper``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torchdiffeq_hyper as tdh
from exact import zero
from torchdiffeq_hyper.__main__ import main
from torchdiffeq_hyper._files import write
from torchdiffeq_hyper.hypernets import MLP
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._fit_report import LossPoint

REPORT = tdh.FitReport(
    losses=(LossPoint(10, "residual", 0.5, 0.25),),
    delta={"0.5": 0.1, "0.9": 0.2, "0.99": 0.3, "max": 0.4},
    base_delta={"0.5": 1.0, "0.9": 2.0, "0.99": 3.0, "max": 4.0},
    validation=0.25,
    base_validation=2.0,
    noise_floor=1e-6,
    iterations=10,
    seconds=1.0,
    reference_seconds=0.5,
    reference_nfe=26,
    stopped="iterations",
    seed=0,
)


def fact(text: str, name: str) -> str:
    """Return what is printed for a name."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    assert len(lines) == 1, text
    return lines[0].removeprefix(name).strip()


@pytest.mark.parametrize("arguments", [[], ["methods"]], ids=["default", "methods"])
def test_every_registered_method_is_listed_with_what_it_declares(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tdh.register_method("decay-fast", tdh.HyperSolver("heun", zero, steps=4))
    try:
        assert main(arguments) == 0
        methods = _registry.methods()
    finally:
        tdh.unregister_method("decay-fast")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("method ")
    assert head.split()[-4:] == ["follows", "grid", "learned", "owner"]
    assert [line.split()[0] for line in lines] == list(methods)
    for line, method in zip(lines, methods.values(), strict=True):
        grid, learned = ("yes" if v else "no" for v in (method.follows_grid, method.option))
        declared = [str(method.order), str(method.calls_per_step), grid, learned, method.owner]
        assert line.split()[1:] == declared
    learned = {name for name, method in methods.items() if method.option}
    assert {"hypereuler", "bns", "dise", "decay-fast"} <= learned
    assert "dopri5_per_sample" not in learned


def test_module_runs_as_a_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "torchdiffeq_hyper"], capture_output=True, text=True, check=True
    )
    assert "hypereuler" in run.stdout
    assert run.stderr == ""


def test_fitted_solver_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain = tdh.FitDomain(
        (0.0, 2.0), 0.125, 0.5, (1, -1), ((2,), ()), is_tuple=True, dtype="float64"
    )
    solver = tdh.HyperSolver("euler", MLP(channels=3), (4, 16), domain=domain, report=REPORT)
    solver.save(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    text = capsys.readouterr().out
    assert fact(text, "base") == "euler"
    assert fact(text, "method") == "hypereuler, order 1, calls per step 1"
    assert fact(text, "steps") == "4 to 16"
    assert fact(text, "hypernet").startswith("mlp: channels 3")
    weights = solver.hypernet.state_dict().values()
    assert fact(text, "weights").startswith(f"{sum(w.numel() for w in weights):,} numbers")
    assert fact(text, "fitted on") == "t from 0 to 2, forward and reverse"
    assert fact(text, "|dt|") == "0.125 to 0.5"
    assert fact(text, "state") == "tuple of (batch, 2) and (batch,), float64"
    assert "held-out error 0.25" in fact(text, "report")
    assert "10 iterations in 1.0 s" in text


def test_net_of_ones_own_is_described_without_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tdh.ConcatHypernet(nn.Linear(5, 2))
    tdh.HyperSolver("alpha", net, alpha=2 / 3).save(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    text = capsys.readouterr().out
    assert fact(text, "base") == "alpha, alpha 0.666667"
    assert fact(text, "steps") == "as the caller's time grid"
    assert fact(text, "weights") == "12 numbers in 2 tensors"
    assert "ConcatHypernet" in fact(text, "hypernet")
    assert "fitted on" not in text


def write_foreign(path: Path) -> None:
    path.write_bytes(b"not a safetensors file at all")


def write_truncated(path: Path) -> None:
    tdh.HyperSolver("euler", MLP(channels=2)).save(path)
    path.write_bytes(path.read_bytes()[:-8])


def write_other_kind(path: Path) -> None:
    write(path, {"a": torch.ones(1)}, "something-else", {})


def write_without_base(path: Path) -> None:
    write(path, {"a": torch.ones(1)}, "hypersolver", {})


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (write_foreign, "not a safetensors file"),
        (write_truncated, "truncated"),
        (write_other_kind, "something-else"),
        (write_without_base, "description"),
        (lambda path: None, "No such file"),
        (Path.mkdir, "is a folder"),
    ],
    ids=["foreign", "truncated", "kind", "description", "missing", "folder"],
)
def test_bad_file_is_one_error_and_exit_code_2(
    write: Callable[[Path], None], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    assert main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in err
    assert "Traceback" not in err


def test_unknown_command_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["inspct"])
    assert exit_.value.code == 2
    assert "inspct" in capsys.readouterr().err
