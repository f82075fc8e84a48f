"""`HyperSolver.save` and `load`, and the file format under them."""

from __future__ import annotations

import copy
import errno
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from stubs import coupled, coupled_start, damped_wave
from torchdiffeq_hyper._files import FORMAT_VERSION, read, read_metadata, write
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    FileFormatError,
    FileWriteError,
    StateShapeError,
    StateTypeError,
)
from torchdiffeq_hyper.hypernets import MLP, ConcatHypernet, Conv, Linear, ready
from torchdiffeq_hyper.solvers._fit_report import LossPoint
from torchdiffeq_hyper.tableaus import HEUN

TIMES = torch.tensor([0.0, 1.0])
DOMAIN = tdh.FitDomain((0.0, 1.0), 0.1, 1 / 3, (1, -1), ((2,), ()), True, "float64")
REPORT = tdh.FitReport(
    losses=(LossPoint(0, "residual", 1.5, 2.5), LossPoint(9, "trajectory", 0.1, float("nan"))),
    delta={"0.5": 0.1, "max": float("inf")},
    base_delta={"0.5": 1.0, "max": 2.0},
    validation=1 / 3,
    base_validation=1.0,
    noise_floor=1e-9,
    iterations=9,
    seconds=0.25,
    reference_seconds=0.125,
    reference_nfe=140,
    stopped="patience",
    seed=3,
    notes=("a note",),
)


class Own(nn.Module):
    """A net that the package does not know."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, step: tdh.StepInput) -> Tensor:
        out: Tensor = self.layer(step.y)
        return out


def randomised(net: Any) -> Any:
    """Give a net weights that are not zero."""
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 0.3)
    return net


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "solver.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    """A file with a ready net."""
    tdh.HyperSolver("euler", randomised(MLP(2)), steps=4).save(path)
    return path


def with_metadata(path: Path, change: dict[str, Any]) -> None:
    """Rewrite a file with other metadata, as another version or a vandal would."""
    tensors, metadata = read(path, "hypersolver")
    metadata.update(change)
    save_file(tensors, path, {"torchdiffeq_hyper": json.dumps(metadata)})


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Linear(2), (3, 2)),
        (lambda: MLP(2, hidden=(8,), inputs=("y", "stages", "t"), n_stages=2), (3, 2)),
        (lambda: Conv(2, hidden=4), (3, 2, 5, 5)),
    ],
    ids=["linear", "mlp", "conv"],
)
def test_loaded_solver_solves_bitwise_as_the_saved_one(
    path: Path, make: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    solver = tdh.HyperSolver("heun", randomised(make()).to(dtype), steps=5)
    solver.save(path)
    loaded = tdh.HyperSolver.load(path)
    y0, t = torch.randn(shape, dtype=dtype), TIMES.to(dtype)
    assert torch.equal(loaded.solve(damped_wave, y0, t), solver.solve(damped_wave, y0, t))
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, solver.state_dict()[name])


def test_solver_of_a_tuple_state_comes_back(path: Path) -> None:
    y0 = coupled_start()
    solver = tdh.HyperSolver("heun", randomised(ready(y0, HEUN)), steps=3)
    solver.save(path)
    expected = solver.solve(coupled, y0, TIMES.double())
    got = tdh.HyperSolver.load(path).solve(coupled, y0, TIMES.double())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("steps", [None, 7, (4, 16)])
@pytest.mark.parametrize(
    ("base", "alpha"),
    [("euler", None), ("midpoint", None), ("heun", None), ("rk4", None), ("alpha", 2 / 3)],
)
def test_everything_but_the_net_comes_back(
    path: Path, base: str, alpha: float | None, steps: Any
) -> None:
    solver = tdh.HyperSolver(base, MLP(2), steps, alpha=alpha, domain=DOMAIN, report=REPORT)
    solver.save(path)
    loaded = tdh.HyperSolver.load(path)
    assert (loaded.base, loaded.alpha, loaded.steps) == (base, alpha, steps)
    assert loaded.domain == DOMAIN
    assert repr(loaded.report) == repr(REPORT)  # nan differs from itself


def test_solver_without_a_fit_comes_back_without_one(saved: Path) -> None:
    loaded = tdh.HyperSolver.load(saved)
    assert loaded.domain is None
    assert loaded.report is None


def test_loaded_solver_is_frozen_in_evaluation_mode_on_the_cpu(path: Path) -> None:
    solver = tdh.HyperSolver("euler", MLP(2))
    assert solver.training
    solver.save(path)
    with torch.device("meta"):
        loaded = tdh.HyperSolver.load(path)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    loaded.requires_grad_()
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_and_loading_leave_the_solver_and_random_numbers_alone(path: Path) -> None:
    solver = tdh.HyperSolver("euler", MLP(2))
    before, mode = torch.random.get_rng_state(), solver.training
    solver.save(path)
    tdh.HyperSolver.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert solver.training is mode
    assert all(parameter.requires_grad for parameter in solver.parameters())


def test_paths_may_be_strings(path: Path) -> None:
    tdh.HyperSolver("euler", MLP(2)).save(str(path))
    assert tdh.HyperSolver.load(str(path)).base == "euler"


def test_loaded_weights_do_not_change_with_the_file(saved: Path) -> None:
    loaded = tdh.HyperSolver.load(saved)
    before = copy.deepcopy(loaded.state_dict())
    size = saved.stat().st_size
    with saved.open("r+b") as file:
        file.write(b"\xff" * size)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())


def test_tied_and_strided_weights_are_saved(path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.register_buffer("strided", torch.randn(4, 3).t())
            self.register_buffer("expanded", torch.randn(3, 1).expand(3, 2))
            self.register_buffer("view", self.one.weight.detach()[1:])

        def forward(self, step: tdh.StepInput) -> Tensor:
            out: Tensor = self.two(self.one(step.y))
            return out

    net = Tied()
    tdh.HyperSolver("euler", net).save(path)
    other = Tied()
    other.expanded = other.expanded.clone()  # torch cannot copy into an expanded tensor
    tdh.HyperSolver.load(path, hypernet=other)
    assert other.one.weight is other.two.weight
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_compiled_hypernet_is_saved_as_what_it_wraps(path: Path) -> None:
    net = randomised(MLP(2))
    tdh.HyperSolver("euler", torch.compile(net, backend="eager")).save(path)
    loaded = tdh.HyperSolver.load(path)
    assert isinstance(loaded.hypernet, MLP)
    assert torch.equal(loaded.hypernet.net.layers[0].weight, net.net.layers[0].weight)


def test_no_code_is_in_the_file(saved: Path) -> None:
    assert b"pickle" not in saved.read_bytes()
    assert not saved.read_bytes().startswith(b"PK")


# Nets of one's own


def test_own_net_is_loaded_into_the_instance_given(path: Path) -> None:
    net = randomised(Own())
    net.calls += 5
    solver = tdh.HyperSolver("euler", net, steps=3)
    solver.save(path)
    instance = Own()
    loaded = tdh.HyperSolver.load(path, hypernet=instance)
    assert loaded.hypernet is instance
    assert instance.calls == 5
    y0 = torch.randn(3, 2)
    assert torch.equal(loaded.solve(damped_wave, y0, TIMES), solver.solve(damped_wave, y0, TIMES))


def test_ready_net_may_be_loaded_into_an_instance_too(saved: Path) -> None:
    instance = MLP(2)
    loaded = tdh.HyperSolver.load(saved, hypernet=instance)
    assert loaded.hypernet is instance
    for name, tensor in tdh.HyperSolver.load(saved).hypernet.state_dict().items():
        assert torch.equal(instance.state_dict()[name], tensor)


def test_lazy_instance_takes_the_shapes_of_the_file(path: Path) -> None:
    tdh.HyperSolver("euler", concat(("y", "f0"))).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls lazy modules a new feature
        instance = ConcatHypernet(nn.LazyLinear(2), inputs=("y", "f0"))
    tdh.HyperSolver.load(path, hypernet=instance)
    assert instance.net.weight.shape == (2, 4)


def test_own_net_without_an_instance_is_refused_with_the_call_to_make(path: Path) -> None:
    tdh.HyperSolver("euler", Own()).save(path)
    with pytest.raises(FileFormatError, match="a net of your own") as caught:
        tdh.HyperSolver.load(path)
    assert f"HyperSolver.load({str(path)!r}, hypernet=Own())" in str(caught.value)


def test_own_net_in_a_concat_hypernet_is_refused_with_its_inputs(path: Path) -> None:
    g = ConcatHypernet(nn.Linear(4, 2), inputs=("y", "y0"))
    tdh.HyperSolver("euler", g).save(path)
    with pytest.raises(FileFormatError) as caught:
        tdh.HyperSolver.load(path)
    assert "hypernet=tdh.ConcatHypernet(net, inputs=('y', 'y0'))" in str(caught.value)


def test_ready_net_with_exchanged_layers_counts_as_ones_own(path: Path) -> None:
    net = MLP(2)
    net.net.layers[1] = nn.Tanh()
    tdh.HyperSolver("euler", net).save(path)
    with pytest.raises(FileFormatError, match="a net of your own"):
        tdh.HyperSolver.load(path)


def test_subclass_of_a_ready_net_counts_as_ones_own(path: Path) -> None:
    class Negated(MLP):
        def forward(self, step: tdh.StepInput) -> Any:
            return -super().forward(step)

    tdh.HyperSolver("euler", Negated(2)).save(path)
    with pytest.raises(FileFormatError, match="a net of your own"):
        tdh.HyperSolver.load(path)


def concat(inputs: tuple[str, ...]) -> ConcatHypernet:
    """Return a net of one's own on four channels."""
    return ConcatHypernet(nn.Linear(4, 2), inputs=inputs)


@pytest.mark.parametrize(
    ("net", "instance", "error", "named"),
    [
        (Own(), nn.Linear(2, 2), BaseMismatchError, "another net's"),
        (Own(), Own(3), StateShapeError, "'layer.weight' has shape (2, 2)"),
        (Own().double(), Own(), StateTypeError, "torch.float64"),
        (concat(("y", "f0")), concat(("f0", "y")), BaseMismatchError, "inputs"),
        (concat(("y", "f0")), Own(), BaseMismatchError, "inputs"),
        (MLP(2), MLP(2, inputs=("f0", "y", "dt")), BaseMismatchError, "inputs"),
        (MLP(2), Linear(2), BaseMismatchError, "kind 'mlp'"),
        (MLP(2), Own(), BaseMismatchError, "kind 'mlp'"),
    ],
    ids=["names", "shapes", "dtypes", "order", "class", "ready order", "kind", "ready or own"],
)
def test_instance_that_does_not_match_is_refused_and_left_alone(
    path: Path, net: nn.Module, instance: nn.Module, error: type[Exception], named: str
) -> None:
    tdh.HyperSolver("euler", randomised(net)).save(path)
    before = copy.deepcopy(instance.state_dict())
    with pytest.raises(error) as caught:
        tdh.HyperSolver.load(path, hypernet=instance)
    assert named in str(caught.value)
    assert instance.training
    assert all(parameter.requires_grad for parameter in instance.parameters())
    assert all(torch.equal(before[name], value) for name, value in instance.state_dict().items())


def test_instance_is_left_alone_when_the_base_is_unknown(path: Path) -> None:
    tdh.HyperSolver("euler", randomised(Own())).save(path)
    with_metadata(path, {"base": "leapfrog"})
    instance = Own()
    before = copy.deepcopy(instance.state_dict())
    with pytest.raises(FileFormatError, match="leapfrog"):
        tdh.HyperSolver.load(path, hypernet=instance)
    assert all(torch.equal(before[name], value) for name, value in instance.state_dict().items())
    assert instance.training


# What cannot be saved


def test_plain_function_cannot_be_saved(path: Path) -> None:
    with pytest.raises(StateTypeError, match="no weights"):
        tdh.HyperSolver("euler", lambda step: step.y).save(path)
    assert not path.exists()


def test_state_that_is_no_tensor_cannot_be_saved(path: Path) -> None:
    class Extra(Own):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(StateTypeError, match="_extra_state"):
        tdh.HyperSolver("euler", Extra()).save(path)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_net_that_never_ran_cannot_be_saved(path: Path) -> None:
    with pytest.raises(StateTypeError, match="run a net with lazy layers once"):
        tdh.HyperSolver("euler", ConcatHypernet(nn.LazyLinear(2))).save(path)


# Files that cannot be read


def test_missing_file_is_reported_as_missing(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"solver\.safetensors"):
        tdh.HyperSolver.load(path)


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.5, 0.999])
def test_truncated_file_is_reported_as_truncated(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileFormatError, match="is truncated or damaged"):
        tdh.HyperSolver.load(saved)


@pytest.mark.parametrize("size", range(1, 32))
def test_file_cut_in_its_header_is_reported_as_truncated(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(FileFormatError, match="is truncated or damaged"):
        tdh.HyperSolver.load(saved)


def test_pickled_solver_is_not_taken_for_a_saved_one(path: Path) -> None:
    torch.save(tdh.HyperSolver("euler", MLP(2)).state_dict(), path)
    with pytest.raises(FileFormatError, match="is not a safetensors file"):
        tdh.HyperSolver.load(path)


def test_safetensors_file_of_another_program_is_refused(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(FileFormatError, match="of another program"):
        tdh.HyperSolver.load(path)


def test_file_of_another_kind_is_refused(path: Path) -> None:
    write(path, {"weight": torch.ones(2)}, "dise", {})
    with pytest.raises(FileFormatError, match="holds a 'dise'"):
        tdh.HyperSolver.load(path)


def test_file_of_a_newer_format_is_refused(saved: Path) -> None:
    with_metadata(saved, {"format_version": FORMAT_VERSION + 1})
    with pytest.raises(FileFormatError, match=f"has format {FORMAT_VERSION + 1}"):
        tdh.HyperSolver.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"base": "leapfrog"},
        {"base": None},
        {"alpha": 0.5},
        {"steps": 0},
        {"steps": [1, 2, 3]},
        {"domain": {"span": [0.0]}},
        {"report": {"losses": 3}},
        {"hypernet": None},
        {"format_version": "one"},
    ],
    ids=str,
)
def test_damaged_description_is_refused(saved: Path, change: dict[str, Any]) -> None:
    with_metadata(saved, change)
    with pytest.raises(FileFormatError, match="cannot be used"):
        tdh.HyperSolver.load(saved)


def test_description_that_is_not_json_is_refused(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path, {"torchdiffeq_hyper": "{"})
    with pytest.raises(FileFormatError, match="cannot be used"):
        tdh.HyperSolver.load(path)


def test_weights_that_contradict_the_description_are_refused(saved: Path) -> None:
    huge = {**MLP(2).architecture, "hidden": [10**9]}  # refused before memory is taken
    with_metadata(saved, {"hypernet": huge})
    with pytest.raises(FileFormatError, match=r"hypernet\.hidden is \[1000000000\]"):
        tdh.HyperSolver.load(saved)


def test_ready_net_of_a_later_version_is_refused(saved: Path) -> None:
    with_metadata(saved, {"hypernet": {"kind": "transformer"}})
    with pytest.raises(FileFormatError, match="hypernet.kind is 'transformer'"):
        tdh.HyperSolver.load(saved)


def test_header_longer_than_the_file_is_refused(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 10**9) + b'{"a": 1}')
    with pytest.raises(FileFormatError, match="is truncated or damaged"):
        tdh.HyperSolver.load(path)


def test_metadata_of_any_kind_can_be_looked_at(saved: Path) -> None:
    metadata = read_metadata(saved)
    assert (metadata["kind"], metadata["format_version"]) == ("hypersolver", FORMAT_VERSION)
    assert metadata["hypernet"] == MLP(2).architecture


# Files that cannot be written


def files_under(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileWriteError, match="makedirs") as caught:
        tdh.HyperSolver("euler", MLP(2)).save(tmp_path / "missing" / "solver.safetensors")
    assert isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []


def test_target_that_is_a_folder_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "solver.safetensors"
    folder.mkdir()
    with pytest.raises(FileWriteError, match="cannot be written"):
        tdh.HyperSolver("euler", MLP(2)).save(folder)
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FileWriteError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "interrupt"],
)
def test_failure_in_the_middle_keeps_the_old_file(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    failure: BaseException,
    error: type[BaseException],
) -> None:
    before = saved.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise failure

    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (Path, "replace")), fail)
    with pytest.raises(error):
        tdh.HyperSolver("rk4", MLP(3)).save(saved)
    assert saved.read_bytes() == before
    assert files_under(saved.parent) == {saved.name}


def test_saving_again_replaces_the_file(saved: Path) -> None:
    tdh.HyperSolver("rk4", MLP(3)).save(saved)
    assert tdh.HyperSolver.load(saved).base == "rk4"
    assert files_under(saved.parent) == {saved.name}


def test_saving_through_a_link_keeps_the_link(saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved.name)
    tdh.HyperSolver("rk4", MLP(3)).save(link)
    assert link.is_symlink()
    assert tdh.HyperSolver.load(saved).base == "rk4"


def test_file_has_the_permissions_of_any_new_file(saved: Path) -> None:
    other = saved.parent / "other"
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode
