"""A saved Dise comes back whole; a wrong file is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from stubs import spiral
from torchdiffeq_hyper.dise import Candidate, Dise, RegressionCost, SelectorConfig, selectors
from torchdiffeq_hyper.errors import (
    BaseMismatchError,
    FileFormatError,
    FileWriteError,
    MissingHypernetError,
    StateTypeError,
)

Y0 = torch.linspace(-2.0, 2.0, 24).reshape(12, 2)
T = torch.tensor([0.0, 1.0])


def _randomised(net: nn.Module) -> Any:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def _dise(selector: Any = None) -> Dise:
    mlp = tdh.HyperSolver("heun", _randomised(tdh.hypernets.MLP(channels=2)), steps=4)
    return Dise(
        [
            Candidate("euler", steps=2),
            Candidate(mlp),
            Candidate("dopri5", rtol=1e-3, atol=1e-4, options={"safety": 0.8}),
        ],
        selector or _randomised(selectors.TanhMLP(2, 3)),
    )


class Steep(nn.Module):
    """A selector of one's own."""

    def __init__(self, n_candidates: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(2, n_candidates)

    def forward(self, y0: Tensor) -> Tensor:
        return self.head(y0)


class Correction(nn.Module):
    """A hypernet of one's own."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, step: tdh.StepInput) -> Tensor:
        return step.y * self.weight


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dise.safetensors"


def test_a_dise_comes_back_with_its_hypersolvers(path: Path) -> None:
    dise = _dise()
    dise.save(path)
    loaded = Dise.load(path)
    assert list(map(repr, loaded.candidates)) == list(map(repr, dise.candidates))
    assert torch.equal(loaded.predicted_costs(Y0), dise.predicted_costs(Y0))
    assert torch.equal(loaded.solve(spiral, Y0, T), dise.solve(spiral, Y0, T))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    assert loaded.candidates[1].solver in list(loaded.solvers)
    assert loaded.report is None


def test_the_report_and_the_unit_come_back(path: Path) -> None:
    end = odeint(spiral, Y0, T)[-1]
    cost = RegressionCost(lambda y, i: 1.0 + ((y - end[i]).norm(dim=1) > 1), 1, 0.5, 1e3)
    dise = Dise([Candidate("euler", steps=1), Candidate("rk4", steps=2)])
    dise.fit(
        spiral, Y0, T, cost=cost, config=SelectorConfig(iterations=200, lr=1e-2), progress=False
    )
    dise.save(path)
    loaded = Dise.load(path)
    assert loaded.unit == dise.unit
    assert loaded.report is not None
    assert str(loaded.report) == str(dise.report)
    assert torch.equal(loaded.report.selection, dise.select(Y0))


def test_modules_of_ones_own_come_back_into_instances(path: Path) -> None:
    solver = tdh.HyperSolver("euler", _randomised(Correction()), steps=3)
    dise = Dise([Candidate("euler"), Candidate(solver), Candidate("rk4")], _randomised(Steep()))
    dise.save(path)
    loaded = Dise.load(path, selector=Steep(), hypernets={1: Correction()})
    assert torch.equal(loaded.solve(spiral, Y0, T), dise.solve(spiral, Y0, T))
    with pytest.raises(FileFormatError, match=r"selector=MySelector\(\)"):
        Dise.load(path, hypernets={1: Correction()})
    with pytest.raises(FileFormatError, match=r"hypernets=\{1: net\}"):
        Dise.load(path, selector=Steep())
    with pytest.raises(BaseMismatchError, match="the instance given"):
        Dise.load(path, selector=Steep(4), hypernets={1: Correction()})


def test_what_cannot_be_written_is_refused(path: Path) -> None:
    with pytest.raises(MissingHypernetError, match="no selector"):
        Dise([Candidate("euler")]).save(path)
    with pytest.raises(StateTypeError, match="no weights"):
        Dise([Candidate("euler")], lambda y0: y0[:, :1]).save(path)
    grid = {"grid_constructor": lambda func, y0, t: t}
    with pytest.raises(StateTypeError, match="candidate 0 has options"):
        Dise([Candidate("euler", options=grid)], Steep(1)).save(path)
    plain = tdh.HyperSolver("euler", lambda step: step.y)
    with pytest.raises(StateTypeError, match="function"):
        Dise([Candidate(plain)], Steep(1)).save(path)
    with pytest.raises(FileWriteError):
        _dise().save(path / "nowhere" / "dise.safetensors")
    assert not path.exists()


def test_files_of_another_kind_and_truncated_files_are_named(path: Path) -> None:
    solver = tdh.HyperSolver("euler", tdh.hypernets.MLP(channels=2), steps=3)
    solver.save(path)
    with pytest.raises(FileFormatError, match="'hypersolver'"):
        Dise.load(path)
    _dise().save(path)
    with pytest.raises(FileFormatError, match="'dise'"):
        tdh.HyperSolver.load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match="truncated"):
        Dise.load(path)
    with pytest.raises(FileNotFoundError):
        Dise.load(path.with_name("nothing"))


def test_a_method_that_is_not_installed_is_named(path: Path) -> None:
    tdh.register_method("euler-of-a-plugin", tdh.HyperSolver("euler", Correction()))
    try:
        Dise([Candidate("euler-of-a-plugin")], Steep(1)).save(path)
    finally:
        tdh.unregister_method("euler-of-a-plugin")
    with pytest.raises(FileFormatError, match=r"euler-of-a-plugin(?s:.*)plugin"):
        Dise.load(path, selector=Steep(1))
