"""`fit(hypernet="auto")` takes the best ready net that the budget allows, and says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from stubs import MLPField, coupled, damped_wave
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.fitting import _auto
from torchdiffeq_hyper.recording import FlopCounter

GENERATOR = torch.Generator().manual_seed(5)
POINTS = torch.randn(60, 2, generator=GENERATOR)
IMAGES = torch.randn(16, 3, 5, 5, generator=GENERATOR)
CONFIG = tdh.FitConfig(iterations=4, seed=3)


@pytest.fixture(autouse=True)
def _short_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "full_rounds" not in request.fixturenames:
        monkeypatch.setattr(_auto, "ROUNDS", (10, 2))


@pytest.fixture
def full_rounds() -> None:
    """Have nets compared as users have them compared."""


class ConvField(nn.Module):
    """dy/dt of (batch, 3, 5, 5): two 3 x 3 convolutions, with time as a channel."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        clock = torch.sin(5 * t).to(y).expand(len(y), 1, *y.shape[2:])
        out: Tensor = self.leave(torch.tanh(2 * self.enter(torch.cat([y, clock], 1))))
        return out


def fit(func: Any, y0: Any, **arguments: Any) -> tdh.HyperSolver:
    given = {"base": "heun", "steps": 3, "config": CONFIG, "progress": False, **arguments}
    return tdh.fit(func, y0, (0.0, 1.0), hypernet="auto", **given)


def field_of(shape: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    if shape == "points":
        return MLPField(2, 128, torch.float32), POINTS
    return ConvField(), IMAGES


def macs(call: Any) -> float:
    with torch.no_grad(), FlopCounter() as counter:
        call()
    return counter.get_total_flops() / 2


def note_of(solver: tdh.HyperSolver) -> str:
    assert solver.report is not None
    (note,) = [line for line in solver.report.notes if line.startswith('hypernet="auto"')]
    return note


@pytest.mark.parametrize("budget", [0.02, 0.3])
@pytest.mark.parametrize("shape", ["points", "images"])
def test_the_net_chosen_costs_no_more_than_the_budget(shape: str, budget: float) -> None:
    func, y0 = field_of(shape)
    solver = fit(func, y0, config=replace(CONFIG, hypernet_budget=budget))
    in_step = 2 * macs(lambda: func(torch.tensor(0.0), y0))
    stages = (y0, y0)
    step = tdh.StepInput(torch.tensor(0.3), torch.tensor(0.0), y0, y0, stages, y0)
    assert 0 < macs(lambda: solver.hypernet(step)) <= budget * in_step


def test_more_budget_gives_wider_nets() -> None:
    func, y0 = field_of("images")
    sizes = [
        sum(p.numel() for p in fit(func, y0, config=config).hypernet.parameters())
        for config in (replace(CONFIG, hypernet_budget=share) for share in (0.03, 0.2))
    ]
    assert sizes[0] < sizes[1]


def test_a_budget_below_every_net_takes_the_cheapest_and_says_so() -> None:
    func, y0 = field_of("points")
    solver = fit(func, y0, config=replace(CONFIG, hypernet_budget=1e-6))
    assert solver.hypernet.kind == "linear"
    assert "no net is within the budget" in note_of(solver)


def test_a_field_without_multiply_adds_takes_the_cheapest() -> None:
    solver = fit(damped_wave, POINTS)
    assert solver.hypernet.kind == "linear"
    assert "no net is within the budget" in note_of(solver)


def test_the_note_names_the_choice_and_what_it_was_compared_to() -> None:
    func, y0 = field_of("images")
    note = note_of(fit(func, y0))
    assert note.count("Bottleneck(hidden=") == 2
    assert "Linear()" in note
    assert "compared with" in note
    assert "% of func's cost" in note
    assert "% of |R| left" in note


@pytest.mark.usefixtures("full_rounds")
def test_a_residual_that_couples_neighbours_takes_a_net_that_does() -> None:
    func, y0 = field_of("images")
    assert fit(func, y0, config=replace(CONFIG, hypernet_budget=0.3)).hypernet.kind in {
        "bottleneck",
        "conv",
    }


@pytest.mark.usefixtures("full_rounds")
def test_of_equal_nets_the_cheapest_is_taken() -> None:
    matrix = torch.tensor([[0.3, -2.0], [2.0, -0.4]])

    def linear(t: Tensor, y: Tensor) -> Tensor:
        return y @ matrix

    # Its residual is linear in the stages; one product of matrices a call sets the scale.
    solver = fit(linear, POINTS, config=replace(CONFIG, hypernet_budget=100.0))
    assert "MLP" in note_of(solver)
    assert solver.hypernet.kind == "linear"


def test_the_choice_depends_on_the_seed_alone() -> None:
    func, y0 = field_of("points")
    first, again = fit(func, y0), fit(func, y0)
    assert note_of(first) == note_of(again)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_global_random_state_is_not_touched() -> None:
    func, y0 = field_of("points")
    before = torch.get_rng_state()
    fit(func, y0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_time_to_compare_the_choice_is_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_auto, "SHARE_OF_TIME", 0.0)
    func, y0 = field_of("images")
    solver = fit(func, y0)
    assert solver.hypernet.kind == "bottleneck"
    assert "compared too briefly" in note_of(solver)


def test_an_interrupted_fit_keeps_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchdiffeq_hyper.fitting._checkpoint import Store

    func, y0 = field_of("points")
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    write, written = Store.write, []

    def interrupt(self: Store, state: Any) -> None:
        write(self, state)
        written.append(state)
        if len(written) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(func, y0, config=config)
    with monkeypatch.context() as patched:
        patched.setattr(_auto, "_compare", None)  # a new comparison would fail
        resumed = fit(func, y0, config=config)
        finished = fit(func, y0, config=config)
    whole = fit(func, y0)
    for solver in (resumed, finished):
        assert note_of(solver) == note_of(whole)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, solver.state_dict()[name])


def test_what_was_chosen_is_saved_and_loaded(tmp_path: Path) -> None:
    func, y0 = field_of("images")
    solver = fit(func, y0)
    solver.save(tmp_path / "solver.safetensors")
    loaded = tdh.HyperSolver.load(tmp_path / "solver.safetensors")
    t = torch.tensor([0.0, 1.0])
    assert torch.equal(loaded.solve(func, y0, t), solver.solve(func, y0, t))
    assert note_of(loaded) == note_of(solver)


def test_tuple_states_and_reverse_time_get_a_net_too() -> None:
    y0 = (torch.randn(30, 3), torch.randn(30))

    def field(t: Tensor, state: Any) -> Any:
        x, z, _ = coupled(t, (*state, torch.tensor(0.5)))
        return x, z

    solver = fit(field, y0, direction="both")
    assert solver.hypernet.channels == 4
    assert [part.shape for part in solver.solve(field, y0, torch.tensor([1.0, 0.0]))] == [
        (2, 30, 3),
        (2, 30),
    ]


def test_the_progress_bar_says_what_was_chosen(capfd: pytest.CaptureFixture[str]) -> None:
    func, y0 = field_of("points")
    solver = fit(func, y0, progress=True)
    assert note_of(solver) in capfd.readouterr().err
    fit(func, y0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["Auto", "mlp", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"^hypernet is {name!r}") as caught:
        tdh.fit(damped_wave, POINTS, (0.0, 1.0), base="euler", steps=2, hypernet=name)
    assert 'hypernet="auto"' in str(caught.value)


def test_bns_has_no_choice() -> None:
    with pytest.raises(OptionError, match='hypernet is "auto" and base is "bns"'):
        tdh.fit(damped_wave, POINTS, (0.0, 1.0), base="bns", steps=4, hypernet="auto")


@pytest.mark.parametrize("budget", [0.0, -0.1, float("inf"), float("nan"), "10 %"])
def test_impossible_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(OptionError, match=r"^hypernet_budget is"):
        tdh.FitConfig(hypernet_budget=budget)


def test_the_choice_is_json_ready() -> None:
    func, y0 = field_of("points")
    assert json.loads(json.dumps(fit(func, y0).hypernet.architecture))["kind"] in {"linear", "mlp"}
