"""The engine fits whatever is a target: here one number, by least squares in one iteration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting._checkpoint import FitState, PhaseState
from torchdiffeq_hyper.fitting._data import Batch, Data
from torchdiffeq_hyper.fitting._engine import Start, Target, run
from torchdiffeq_hyper.fitting._errors import Comparison
from torchdiffeq_hyper.fitting._objectives import delta_quantiles, no_correction
from torchdiffeq_hyper.fitting._phases import Phase
from torchdiffeq_hyper.fitting._problem import HypersolverProblem

Y0 = torch.randn(60, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    """A field whose residuals are multiples of it."""
    return -y


class Multiple(nn.Module):
    """g = w f0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, step: tdh.StepInput) -> Tensor:
        assert isinstance(step.f0, Tensor)
        return self.weight * step.f0


@dataclass
class SolvedState(PhaseState):
    kind: ClassVar[str] = "least squares"

    slope: float = 0.0


class LeastSquares(Phase):
    name = "residual"
    wanted = 1
    training: SolvedState

    def __init__(self, net: Multiple, data: Data) -> None:
        self.net, self.data = net, data

    def begin(self, saved: PhaseState | None, budget: Any) -> bool:
        self.training = saved if isinstance(saved, SolvedState) else SolvedState(self.wanted)
        self.pace = budget.start_phase(self.wanted, 1.0)
        return False

    @torch.no_grad()
    def iterate(self, number: int, done: int) -> float:
        samples = self.data.first.grids[0]
        (f0,) = samples.stages
        slope = (f0 * samples.residual).sum() / (f0 * f0).sum()
        self.net.weight.copy_(slope)
        self.training.slope = float(slope)
        return self.error()

    def error(self) -> float:
        return error_of(self.net, self.data.held_out)

    def validated(self, done: int) -> None: ...

    def has_converged(self, done: int) -> bool:
        return False


def error_of(net: Any, batch: Batch) -> float:
    return delta_quantiles(net, 1, batch)["0.5"]


class MultipleTarget(Target):
    """One number, for Euler's method."""

    method = "hypereuler"
    order = 1
    phase_states = (SolvedState,)
    problem: HypersolverProblem
    data: Data

    @classmethod
    def of(cls, func: Any, t_span: object, **given: Any) -> MultipleTarget:
        target = cls()
        target.problem = HypersolverProblem.of(
            func, t_span, alpha=None, objective="residual", direction="forward", **given
        )
        return target

    def open(self, y0: Any) -> None:
        self.net = self.module = Multiple()

    def signature(self) -> dict[str, Any]:
        return {"steps": self.problem.steps, "weights": {"weight": ["torch.float64"]}}

    def measure_noise(self, field: Any, y0: Any, tolerances: Any) -> float:
        return 1e-9

    def prepare(self, data: Data, choice: Any) -> None:
        self.data = data

    def start(self, noise: float | None, plan: Any) -> Start:
        error = error_of(self.module, self.data.held_out)
        return Start(error, error, noise or 0.0)

    def phases(self) -> list[Phase]:
        assert isinstance(self.module, Multiple)
        return [LeastSquares(self.module, self.data)]

    def comparison(self) -> Comparison:
        own, base = (self.problem.solver(g, 5) for g in (self.module, no_correction))
        return Comparison(own.solve, base.solve, "euler", 5, 10)

    def finish(self, state: FitState) -> list[str]:
        return ["one number"]

    def deltas(self) -> Any:
        pair = self.module, no_correction
        return tuple(delta_quantiles(g, 1, self.data.held_out) for g in pair)

    def restore(self, state: FitState) -> None:
        self.module.load_state_dict(state.best)

    def leave_unfitted(self) -> str:
        return "euler"

    def solver(self, y0: Any) -> tdh.HyperSolver:
        return self.problem.solver(self.module, self.problem.steps, domain=self.problem.domain(y0))


def fit(config: tdh.FitConfig, steps: int = 5) -> tdh.Solver:
    given: dict[str, Any] = {"base": "euler", "steps": steps, "config": config}
    return run(MultipleTarget.of(decay, (0.0, 1.0), **given), decay, Y0, shown=False)


def test_a_new_target_is_fitted_reported_and_resumed(tmp_path: Path) -> None:
    config = tdh.FitConfig(checkpoint=tmp_path / "fit.pt")
    solver = fit(config)
    report = solver.report
    assert report is not None
    assert (report.iterations, report.stopped) == (1, "iterations")
    assert report.validation < 0.5 * report.base_validation
    assert report.errors is not None
    assert report.base_errors is not None
    assert report.errors.mean < report.base_errors.mean
    assert "one number" in report.notes
    assert not any(p.requires_grad for p in solver.parameters())
    again = fit(config)
    assert again.report == report
    assert torch.equal(
        again.state_dict()["hypernet.weight"], solver.state_dict()["hypernet.weight"]
    )
    with pytest.raises(OptionError, match="belongs to another fit: steps is 5 there and 4 here"):
        fit(config, steps=4)


def test_no_time_for_references_leaves_a_target_unfitted() -> None:
    report = fit(tdh.FitConfig(max_seconds=1e-6)).report
    assert report is not None
    assert report.stopped == "max_seconds"
    assert "this is euler" in report.notes[0]
