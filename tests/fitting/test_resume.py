"""An interrupted fit, taken up again, ends bitwise where it would have ended."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from stubs import Counted, damped_wave
from torchdiffeq_hyper.errors import FileFormatError, FileWriteError, OptionError
from torchdiffeq_hyper.fitting._checkpoint import Store

Y0 = torch.randn(60, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CONFIG = tdh.FitConfig(
    iterations=120, pretrain_iterations=10, swap_every=3, batch_size=10, max_seconds=1e6
)


class Fragile:
    """`damped_wave`, interrupted at some call."""

    def __init__(self, at: float = float("inf")) -> None:
        self.at = at
        self._calls: list[None] = []  # in place: a fit gives counters back as they were

    @property
    def calls(self) -> int:
        return len(self._calls)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self._calls.append(None)
        if self.calls == self.at:
            raise KeyboardInterrupt
        return damped_wave(t, y)


def dropout_net() -> nn.Module:
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 2))
    return tdh.ConcatHypernet(net.double())


def fit(func: Any = damped_wave, y0: Any = Y0, **arguments: Any) -> tdh.HyperSolver:
    given = {"base": "heun", "steps": (3, 4), "progress": False, "config": CONFIG, **arguments}
    return tdh.fit(func, y0, (0.0, 1.0), **given)


def assert_same(first: tdh.HyperSolver, second: tdh.HyperSolver) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.report is not None
    assert second.report is not None
    assert first.report.losses == second.report.losses
    assert first.report.delta == second.report.delta
    assert first.report.stopped == second.report.stopped


@pytest.fixture(scope="module", params=["ready", "dropout"])
def straight(request: pytest.FixtureRequest) -> tuple[tdh.HyperSolver, Any, list[int]]:
    """Return an uninterrupted fit, how to make its net, and the calls of func at each save."""
    make_net = dropout_net if request.param == "dropout" else lambda: None
    func, saves, write = Fragile(), list[int](), Store.write

    def noted(self: Store, state: Any) -> None:
        saves.append(func.calls)
        write(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", noted)
        return fit(func, hypernet=make_net()), make_net, saves


@pytest.mark.parametrize("moment", [0.35, 0.6, 0.97])
def test_resumed_fits_end_bitwise_as_uninterrupted_ones(
    moment: float, straight: tuple[tdh.HyperSolver, Any, list[int]], tmp_path: Path
) -> None:
    expected, make_net, saves = straight
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    at = saves[round(moment * (len(saves) - 2))] + 3  # within an iteration
    with pytest.raises(KeyboardInterrupt):
        fit(Fragile(at), hypernet=make_net(), config=config)
    saved = torch.load(tmp_path / "fit.pt", weights_only=True)["state"]
    assert 0 < saved["iteration"] < CONFIG.iterations
    assert_same(fit(hypernet=make_net(), config=config), expected)


@pytest.mark.parametrize("objective", ["residual", "trajectory"])
def test_every_save_is_a_place_to_go_on_from(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, iterations=6, checkpoint=tmp_path / "fit.pt")
    straight = fit(objective=objective, config=replace(config, checkpoint=None))
    write = Store.write

    def write_and_stop(self: Store, state: Any) -> None:
        write(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", write_and_stop)
    interruptions = 0
    while True:
        try:
            solver = fit(objective=objective, config=config)
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions == 1 + 6 + 1  # before the first iteration, after each, at the end
    assert_same(solver, straight)


def test_batches_of_an_iterable_are_pulled_again(tmp_path: Path) -> None:
    def source() -> Iterator[Tensor]:
        yield from Y0.split(20)

    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    func = Fragile()
    straight = fit(func, y0=source())
    with pytest.raises(KeyboardInterrupt):
        fit(Fragile(round(0.8 * func.calls)), y0=source(), config=config)
    assert_same(fit(y0=source(), config=config), straight)


def test_a_checkpoint_changes_nothing_in_the_result(tmp_path: Path) -> None:
    assert_same(fit(config=replace(CONFIG, checkpoint=tmp_path / "fit.pt")), fit())


def test_a_finished_fit_is_returned_without_a_solve(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    finished = fit(config=config)
    func = Counted(damped_wave)
    again = fit(func, config=config)
    assert func.calls == 10  # the checks that it can be fitted, and that it is the same func
    assert again.report == finished.report
    assert again.domain == finished.domain
    assert_same(again, finished)


def test_nothing_but_the_checkpoint_is_left(tmp_path: Path) -> None:
    fit(config=replace(CONFIG, checkpoint=str(tmp_path / "fit.pt")))
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]


def test_max_seconds_may_differ(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    finished = fit(config=config)
    assert_same(fit(config=replace(config, max_seconds=1e5)), finished)


def slower(t: Tensor, y: Tensor) -> Tensor:
    return 0.9 * damped_wave(t, y)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base": "euler"}, "base"),
        ({"steps": (3, 5)}, "steps"),
        ({"direction": "both"}, "direction"),
        ({"objective": "residual"}, "objective"),
        ({"config": {"lr": 0.5}}, "lr"),
        ({"config": {"seed": 8}}, "seed"),
        ({"config": {"rtol": 1e-7}}, "rtol"),
        ({"func": slower}, "func"),
        ({"y0": Y0 + 1}, "y0"),
        ({"y0": Y0.float()}, "dtype"),
        ({"hypernet": dropout_net()}, "hypernet"),
    ],
)
def test_the_checkpoint_of_another_fit_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, iterations=2, checkpoint=tmp_path / "fit.pt")
    fit(config=config)
    changed = {**change, "config": replace(config, **change.get("config", {}))}
    with pytest.raises(OptionError, match=f"belongs to another fit: .*{named}"):
        fit(**changed)


@pytest.mark.parametrize("damage", ["cut", "text", "other", "empty"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    config = replace(CONFIG, iterations=2, checkpoint=path)
    fit(config=config)
    if damage == "other":
        torch.save({"weights": torch.ones(3)}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "text": b"no", "empty": b""}[damage])
    with pytest.raises(FileFormatError, match="not a checkpoint of a fit"):
        fit(config=config)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), tmp_path / "fit.pt")
    with pytest.raises(FileFormatError):
        fit(config=replace(CONFIG, checkpoint=tmp_path / "fit.pt"))
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_that_cannot_be_written_is_reported_before_the_work(tmp_path: Path) -> None:
    func = Counted(damped_wave)
    with pytest.raises(FileWriteError, match="no such folder"):
        fit(func, config=replace(CONFIG, checkpoint=tmp_path / "missing" / "fit.pt"))
    assert func.calls == 10


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileWriteError, match="cannot be written"):
        fit(config=replace(CONFIG, checkpoint=tmp_path / "fit.pt"))
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fit.pt").mkdir()
    with pytest.raises((FileFormatError, FileWriteError)):
        fit(config=replace(CONFIG, checkpoint=tmp_path / "fit.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]
