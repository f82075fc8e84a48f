"""What func takes of each sample beside its state goes with the sample, everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.errors import (
    CoupledSamplesError,
    NoisyFieldError,
    OptionError,
    StateShapeError,
    StateTypeError,
)
from torchdiffeq_hyper.fitting import _break_even
from torchdiffeq_hyper.fitting._batches import Batches, checked_batch, n_samples

SPAN = (0.0, 2.0)
Y0 = torch.randn(90, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(3, (90,), generator=torch.Generator().manual_seed(2))
SHIFT = torch.randn(90, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RATES = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=30, batch_size=16, pretrain_iterations=5, swap_every=5)


def by_label(t: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """A rate for each label, an index: y' = -rate cos(t) y + sin(y)."""
    return -RATES.to(y.dtype)[labels].unsqueeze(1) * torch.cos(t) * y + torch.sin(y) / 2


def shifted(t: Tensor, y: Tensor, labels: Tensor, shift: Tensor) -> Tensor:
    return by_label(t, y, labels) + torch.sin(t) * shift


def fit(func: Any = by_label, y0: Any = Y0, **arguments: Any) -> tdh.HyperSolver:
    given = {"base": "euler", "steps": 4, "config": CONFIG, "progress": False, **arguments}
    return tdh.fit(func, y0, SPAN, **given)


def assert_same(first: tdh.HyperSolver, second: tdh.HyperSolver) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.report is not None
    assert second.report is not None
    assert first.report.losses == second.report.losses


@pytest.mark.parametrize("base", ["euler", "midpoint", "heun", "alpha", "rk4", "bns"])
def test_a_conditioned_func_means_the_same_as_its_context(base: str) -> None:
    first = fit(shifted, base=base, context=(LABELS, SHIFT))
    assert_same(first, fit(tdh.Conditioned(shifted, LABELS, SHIFT), base=base))


def held_out() -> tuple[Tensor, Tensor]:
    """Return the held-out starts and their labels, found by their place in ``Y0``."""
    order = torch.randperm(len(Y0), generator=torch.Generator().manual_seed(CONFIG.seed))
    chosen = order[: round(CONFIG.validation * len(Y0))]
    return Y0[chosen], LABELS[chosen]


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("base", ["euler", "heun"])
def test_errors_are_those_of_the_samples_own_rows(base: str, direction: str) -> None:
    solver = fit(base=base, direction=direction, context=LABELS)
    y0, labels = held_out()
    func = tdh.Conditioned(by_label, labels)
    t = torch.linspace(*SPAN, 5, dtype=torch.float64)
    exact = odeint(func, y0, t, rtol=1e-11, atol=1e-11)
    grids = {"forward": [(t, exact)], "reverse": [(t.flip(0), exact.flip(0))]}
    grids["both"] = grids["forward"] + grids["reverse"]
    means = []
    for times, states in grids[direction]:
        rolled = solver.solve(func, states[0], times)
        sizes = states.norm(dim=-1)
        sizes = sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))
        means.append(float(((rolled - states).norm(dim=-1) / sizes)[1:].mean()))
    assert solver.report is not None
    assert solver.report.validation == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert solver.report.validation <= solver.report.base_validation


@pytest.mark.parametrize("objective", ["residual", "trajectory"])
def test_every_objective_takes_context(objective: str) -> None:
    report = fit(objective=objective, context=LABELS).report
    assert report is not None
    assert report.validation < report.base_validation


def test_a_fitted_bespoke_solver_serves_other_samples_with_other_context() -> None:
    solver = fit(base="bns", steps=6, context=LABELS)
    labels = torch.tensor([2, 0, 1, 1])
    func, y0 = tdh.Conditioned(by_label, labels), Y0[:4] / 2
    t = torch.tensor(SPAN, dtype=torch.float64)
    exact = odeint(func, y0, t, rtol=1e-10, atol=1e-10)[-1]
    found = odeint(func, y0, t, method="bns", options={"solver": solver})[-1]
    classical = odeint(func, y0, t, method="heun2", options={"step_size": 2 / 3})[-1]
    assert (found - exact).norm() < (classical - exact).norm() / 10


def batches_of(size: int) -> list[list[Tensor]]:
    return [list(batch) for batch in zip(Y0.split(size), LABELS.split(size), strict=True)]


@pytest.mark.parametrize("base", ["heun", "bns"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_batches_bring_their_own_context(base: str, kind: Callable[[Any], Any]) -> None:
    batches = [kind(batch) for batch in batches_of(45)]
    # Without a generator of its own a loader takes a number from the fit's.
    loader = DataLoader(TensorDataset(Y0, LABELS), 45, generator=torch.Generator())
    first = fit(y0=batches, base=base, context="batch")
    assert_same(first, fit(y0=loader, base=base, context="batch"))
    report = first.report
    assert report is not None
    assert report.validation < report.base_validation


def test_the_state_of_a_batch_may_be_a_tuple() -> None:
    def pair(t: Tensor, state: tuple[Tensor, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        x, z = state
        return by_label(t, x, labels), torch.cos(t) * x.mean(1) - z

    batches = [((y, y[:, 0]), labels) for y, labels in batches_of(45)]
    lists = [[[y, y[:, 0]], labels] for y, labels in batches_of(45)]
    first = fit(pair, batches, context="batch")
    assert_same(first, fit(pair, lists, context="batch"))
    assert first.domain is not None
    assert first.domain.is_tuple


@pytest.mark.parametrize("kind", ["tensor", "tuple", "batches"])
def test_rows_of_the_context_stay_with_their_samples(kind: str) -> None:
    count = torch.arange(40)
    x = count.unsqueeze(1) * torch.tensor([1.0, 100.0])
    state: Any = (x, x[:, 0]) if kind == "tuple" else x
    config = tdh.FitConfig(batch_size=7, validation=0.3)
    if kind == "batches":
        source = [(part, count[: len(part)] + int(part[0, 0])) for part in x.split(16)]
        batches = Batches(source, config, "batch")
    else:
        batches = Batches(state, config, (count, count.bool()))
    seen = 0
    for starts in (batches.held_out, *(batches[i] for i in range(2))):
        first = starts.y0[0] if isinstance(starts.y0, tuple) else starts.y0
        assert torch.equal(first[:, 0].long(), starts.context[0])
        assert starts.context[0].dtype == torch.int64
        seen += n_samples(starts)
    assert seen > 20


def test_func_is_called_with_the_context_itself_not_copies_of_it() -> None:
    places: dict[int, set[int]] = {}

    def watched(t: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        places.setdefault(len(y), set()).add(labels.data_ptr())
        return by_label(t, y, labels)

    batches = Batches(Y0, CONFIG, (LABELS,))
    field = batches[0]
    bound = tdh.Conditioned(watched, *field.context)
    odeint(bound, field.y0, torch.tensor(SPAN, dtype=torch.float64))
    assert places == {n_samples(field): {field.context[0].data_ptr()}}


def test_an_interrupted_fit_with_context_goes_on_bitwise(tmp_path: Path) -> None:
    calls = 0

    def fragile(t: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()  # of roll-outs that train
        if calls == 100:
            raise KeyboardInterrupt
        return by_label(t, y, labels)

    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt", max_seconds=1e6)
    given = {"config": config, "base": "heun", "objective": "trajectory"}
    with pytest.raises(KeyboardInterrupt):
        fit(fragile, context=LABELS, **given)
    assert (tmp_path / "fit.pt").exists()
    resumed = fit(context=LABELS, **given)
    straight = fit(context=LABELS, **{**given, "config": replace(config, checkpoint=None)})
    assert_same(straight, resumed)


@pytest.mark.parametrize("base", ["euler", "bns"])
def test_a_checkpoint_of_a_fit_with_another_context_is_refused(base: str, tmp_path: Path) -> None:
    def either(t: Tensor, y: Tensor, *context: Tensor) -> Tensor:
        return torch.sin(t) - y

    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    fit(either, base=base, context=LABELS, config=config)
    for other in (LABELS.double(), LABELS.unsqueeze(1), (LABELS, LABELS), None):
        with pytest.raises(OptionError, match="another fit: context is"):
            fit(either, base=base, context=other, config=config)


def test_break_even_is_measured_on_the_samples_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_break_even, "LEAST_SECONDS", 60.0)
    config = replace(CONFIG, iterations=200, patience=400)
    report = fit(objective="residual", context=LABELS, config=config).report
    assert report is not None
    assert report.break_even is not None
    assert report.break_even.samples == len(held_out()[0])


def test_the_modules_behind_a_conditioned_func_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.modes: set[bool] = set()

        def rates(self, t: Tensor, y: Tensor, labels: Tensor) -> Tensor:
            self.modes.add(self.training)
            return self.drop(by_label(t, y, labels))

    for wrapped in (lambda net: net.rates, lambda net: partial(Net.rates, net)):
        net = Net()
        fit(tdh.Conditioned(wrapped(net), LABELS))
        assert net.modes == {False}
        assert net.training


def lookup(context: Any = None) -> Callable[..., Tensor]:
    """A field that holds labels in a closure."""
    return lambda t, y: by_label(t, y, LABELS if context is None else context)


def first_rows(t: Tensor, y: Tensor) -> Tensor:
    """A field that holds a shift of every sample, and takes the first rows for any of them."""
    return torch.sin(t + 1) * SHIFT[: len(y)] - y


def diffusion(t: Tensor, y: Tensor) -> Tensor:
    """One system, whose points lie along dim 0."""
    return y.roll(1, 0) + y.roll(-1, 0) - 2 * y


@pytest.mark.parametrize("base", ["euler", "bns"])
@pytest.mark.parametrize(
    ("func", "error"),
    [
        (lookup(), StateShapeError),
        (lambda t, y: -y * RATES[LABELS].unsqueeze(1), StateShapeError),
        (lambda t, y: y @ torch.eye(2).double() + SHIFT, StateShapeError),
        (first_rows, CoupledSamplesError),
        (diffusion, CoupledSamplesError),
    ],
)
def test_what_a_closure_holds_of_every_sample_is_found(
    func: Any, error: type[Exception], base: str
) -> None:
    with pytest.raises(error, match=r"tdh\.fit\(tdh\.Conditioned\(func, labels\)"):
        fit(func, base=base)


def test_a_row_that_would_broadcast_is_found() -> None:
    rates = torch.rand(8, 1).double()
    config = replace(CONFIG, validation=0.1)  # one sample is held out
    with pytest.raises(StateShapeError, match="Conditioned"):
        fit(lambda t, y: -rates * y, Y0[:8, :1], config=config)


def test_what_batches_of_one_size_hide_is_found() -> None:
    with pytest.raises(StateShapeError, match='context="batch"'):
        fit(lookup(LABELS[:45]), [Y0[:45], Y0[45:]])


def test_a_second_thing_held_is_named_beside_the_context_there_is() -> None:
    with pytest.raises(StateShapeError, match=r"Conditioned\(func, known0, labels\)"):
        fit(lambda t, y, shift: lookup()(t, y) + shift, context=SHIFT)


def test_samples_that_depend_on_each_other_but_not_on_their_order_are_fitted() -> None:
    report = fit(lambda t, y: y.mean(0) - y + torch.sin(t)).report
    assert report is not None
    assert report.iterations == CONFIG.iterations


def test_errors_of_func_itself_are_raised_as_they_are() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return y @ torch.ones(3, 3).double()

    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        fit(broken)
    assert not isinstance(caught.value, tdh.HyperError)
    with pytest.raises(StateShapeError, match="own shape"):
        fit(lambda t, y: y[:, :1])
    with pytest.raises(NoisyFieldError, match="fresh noise"):
        fit(lambda t, y: y + torch.randn_like(y))


def rows(count: int) -> Iterator[Any]:
    yield Y0[:count], LABELS[:count]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"context": LABELS[:9]}, StateShapeError, r"shape \(9,\), and y0 has 90 samples"),
        ({"context": (LABELS, SHIFT[:9]), "func": shifted}, StateShapeError, r"\(90,\), \(9, 2\)"),
        ({"context": torch.tensor(1)}, StateShapeError, r"shape \(\)"),
        ({"context": "rows"}, OptionError, 'context="batch"'),
        ({"context": ()}, StateTypeError, "is empty"),
        ({"context": [1, 2]}, StateTypeError, "holds a int"),
        ({"context": {"label": LABELS}}, StateTypeError, "holds a dict"),
        ({"context": (LABELS, SHIFT)}, StateTypeError, "2 tensors of context"),
        ({}, StateTypeError, r"tdh\.Conditioned\(func, labels\)"),
        (
            {"func": tdh.Conditioned(by_label, LABELS), "context": LABELS},
            OptionError,
            "they mean the same",
        ),
        ({"context": "batch"}, OptionError, "y0 is one state"),
        ({"y0": (Y0, LABELS), "context": "batch"}, OptionError, "a tuple: a tuple state"),
        ({"y0": batches_of(45), "context": LABELS}, OptionError, 'context="batch" with batches'),
        (
            {"func": tdh.Conditioned(by_label, LABELS), "y0": batches_of(45)},
            OptionError,
            "which rows",
        ),
        ({"y0": [[Y0]], "context": "batch"}, StateTypeError, "a list of Tensor"),
        ({"y0": [Y0], "context": "batch"}, StateTypeError, "a Tensor of"),
        ({"y0": [[]], "context": "batch"}, StateTypeError, "nothing"),
        ({"y0": [(Y0, 3)], "context": "batch"}, StateTypeError, "Tensor, int"),
        ({"y0": [(Y0, LABELS[:5])], "context": "batch"}, StateShapeError, "90 samples"),
        ({"y0": [(Y0, LABELS, LABELS)], "context": "batch"}, StateTypeError, "2 tensors"),
    ],
)
def test_context_that_does_not_fit_is_refused(
    given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fit(**given)


@pytest.mark.parametrize("other", [LABELS.double(), LABELS.unsqueeze(1)])
def test_later_batches_must_have_the_context_of_the_first(other: Tensor) -> None:
    batches = Batches([(Y0, LABELS), (Y0, other)], CONFIG, "batch")
    with pytest.raises(StateShapeError, match="as the first batch"):
        batches[1]


def test_a_batch_with_context_takes_part_under_inference_mode() -> None:
    with torch.inference_mode():
        batch = (torch.ones(3, 2), torch.ones(3))
    starts = checked_batch(batch, has_context=True)
    assert not starts.context[0].is_inference()
    solver = fit(context=LABELS)
    with torch.inference_mode():
        labels = LABELS.clone()
        assert_same(solver, fit(context=labels))
