"""Checkpoints: the field they belong to, and what is left of damaged ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from mutations import mutated
from stubs import damped_wave, spiral
from torchdiffeq_hyper.errors import FileFormatError, HyperError, NonFiniteError, OptionError
from torchdiffeq_hyper.fitting._batches import Starts
from torchdiffeq_hyper.fitting._budget import Budget
from torchdiffeq_hyper.fitting._checkpoint import Store
from torchdiffeq_hyper.fitting._field import Field, check_field, check_repeatable, size_of
from torchdiffeq_hyper.fitting._signature import (
    check_same_call,
    check_same_field,
    differing,
    fingerprint,
    signs_of_field,
)

Y0 = torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CONFIG = tdh.FitConfig(iterations=6, batch_size=10, max_seconds=1e6)
QUARTER = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
MUTATIONS = 40


def fit(func: Any = damped_wave, y0: Tensor = Y0, **given: Any) -> tdh.HyperSolver:
    arguments = {"base": "heun", "steps": 3, "config": CONFIG, **given}
    return tdh.fit(func, y0, (0.0, 1.0), progress=False, **arguments)


def signs(func: Any, y0: Tensor = Y0, span: tuple[float, float] = (0.0, 1.0)) -> dict[str, Any]:
    field = Field(func, Starts(y0), Budget(float("inf")))
    return signs_of_field((y0, *check_field(field, span, y0)))


# Which field it is


def turned(t: Tensor, y: Tensor) -> Tensor:
    return y @ QUARTER.to(y)


PAIRS = {
    "the other way round": (turned, lambda t, y: -turned(t, y)),
    "axes exchanged": (turned, lambda t, y: turned(t, y).flip(1)),
    "samples exchanged": (turned, lambda t, y: turned(t, y).roll(1, 0)),
    "later": (turned, lambda t, y: turned(t, y) * (1 + torch.relu(t - 0.7))),
    "at the end": (turned, lambda t, y: turned(t, y) * (1 + (t > 0.99))),
    "another frequency": (spiral, lambda t, y: spiral(1.001 * t, y)),
    "elsewhere": (turned, lambda t, y: turned(t, y) + torch.relu(y - Y0.to(y).max() - 1e-3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_fields_of_equal_norms_are_told_apart(name: str) -> None:
    one, other = PAIRS[name]
    assert differing(signs(one)["func(t, y)"], signs(one)["func(t, y)"]) is None
    assert differing(signs(other)["func(t, y)"], signs(one)["func(t, y)"]) is not None


@pytest.mark.parametrize("base", ["euler", "bns"])
@pytest.mark.parametrize("name", ["the other way round", "later"])
def test_the_checkpoint_of_a_field_of_equal_norm_is_refused(
    name: str, base: str, tmp_path: Path
) -> None:
    one, other = PAIRS[name]
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    steps = 4 if base == "bns" else 3
    fit(one, base=base, steps=steps, config=config)
    with pytest.raises(OptionError, match=r"belongs to another fit: func\(t, y\) has other values"):
        fit(other, base=base, steps=steps, config=config)


@pytest.mark.parametrize("unit", [1e-150, 1e-20, 1.0, 1e20, 1e150])
@pytest.mark.parametrize("clock", [1e-9, 1.0, 1e9])
def test_fields_are_told_apart_in_any_units(unit: float, clock: float) -> None:
    def one(t: Tensor, y: Tensor) -> Tensor:
        return turned(t, y) / clock

    y0, span = Y0 * unit, (0.0, clock)
    wanted = signs(one, y0, span)
    assert all(one["size"] > 0 for one in wanted["func(t, y)"])
    again = signs(lambda t, y: (y * (1 + 1e-9)) @ QUARTER / clock, y0, span)
    assert differing(again["func(t, y)"], wanted["func(t, y)"]) is None
    other = signs(lambda t, y: 1.001 * one(t, y), y0, span)
    assert differing(other["func(t, y)"], wanted["func(t, y)"]) is not None
    check_same_call([wanted, again])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_does_not_make_another_field(dtype: torch.dtype) -> None:
    y0 = Y0.to(dtype)
    eps = torch.finfo(dtype).eps

    def rounded(t: Tensor, y: Tensor) -> Tensor:
        noise = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) - 0.5
        return (damped_wave(t, y).double() * (1 + 2 * eps * noise)).to(dtype)

    assert differing(signs(rounded, y0)["func(t, y)"], signs(damped_wave, y0)["func(t, y)"]) is None


def test_what_is_left_where_terms_cancel_does_not_make_another_field() -> None:
    y0 = torch.ones(8, 2)

    def at_rest(t: Tensor, y: Tensor, rounding: float = 0.0) -> Tensor:
        return (y - 1) + rounding

    for rounding in (1e-7, -1e-7):
        other = signs(lambda t, y, r=rounding: at_rest(t, y, r), y0)
        assert differing(other["func(t, y)"], signs(at_rest, y0)["func(t, y)"]) is None


def test_a_field_that_is_not_finite_somewhere_else_is_the_same_as_itself() -> None:
    def singular(t: Tensor, y: Tensor) -> Tensor:
        return (1 - y) / (1 - t)  # not finite at the end of the span

    wanted = signs(singular)
    assert wanted["func(t, y)"][3] is None
    check_same_call([wanted, signs(singular)])
    assert differing(signs(turned)["func(t, y)"], wanted["func(t, y)"]) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_field_that_is_not_finite_at_the_start_is_refused_with_that_reason(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="func returned inf or nan at t = 0"):
        fit(lambda t, y: y * bad)


def test_a_process_never_makes_another_call_than_itself() -> None:
    odd = {"lr": float("nan"), "y0": [None], "func(t, y)": [None]}
    check_same_call([odd])
    check_same_call([odd, dict(odd)])
    with pytest.raises(OptionError, match="process 1 of this fit makes another call"):
        check_same_call([odd, {**odd, "lr": 1.0}])
    y0 = signs(damped_wave, Y0 + 1)["y0"]
    with pytest.raises(OptionError, match="y0 has other values there than in process 0"):
        check_same_call([signs(damped_wave), {**signs(damped_wave), "y0": y0}])


def test_fingerprints_leave_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    signs(damped_wave)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_complex_and_empty_values_have_fingerprints() -> None:
    value = torch.tensor([1 + 2j, 3 - 1j])
    (one,), (other,) = (
        fingerprint([value], torch.float32),
        fingerprint([value.conj()], torch.float32),
    )
    assert differing([one], [one]) is None
    assert differing([one], [other]) == 0
    assert size_of(torch.zeros(0)) == 0.0
    assert fingerprint([torch.zeros(0)], torch.float32)[0]["size"] == 0.0


@pytest.mark.parametrize("found", [None, 3, [], [3], [{"size": "a"}], [{"size": 1.0}]])
def test_damaged_fingerprints_are_of_another_field(found: Any) -> None:
    wanted = fingerprint([Y0], torch.float64)
    assert differing(found, wanted) == 0


def test_noise_is_found_in_any_unit() -> None:
    for unit in (1e-200, 1e-20, 1.0, 1e30):
        y = Y0 * unit
        check_repeatable(y, y, torch.float64, 0.0)
        with pytest.raises(tdh.errors.NoisyFieldError):
            check_repeatable(y, 1.1 * y, torch.float64, 0.0)


def test_another_field_is_only_named_from_the_same_starts() -> None:
    wanted = signs(damped_wave)
    check_same_field(None, wanted)
    check_same_field(signs(turned, Y0 + 1), wanted)
    with pytest.raises(OptionError, match=r"another field: func\(t, y\)"):
        check_same_field(signs(turned), wanted)


# What is left of damaged ones


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, when: Callable[[Any], bool]) -> Iterator[None]:
    """Break off the fit inside the block once a state for which ``when`` holds is stored."""
    write = Store.write

    def write_and_stop(self: Store, state: Any) -> None:
        write(self, state)
        if when(state):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("kind", ["running", "finished", "chosen", "bns", "net"])
def test_a_damaged_checkpoint_goes_on_or_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit.pt"
    config = replace(CONFIG, checkpoint=path)
    given: dict[str, Any] = {"config": config}
    if kind == "bns":
        given |= {"base": "bns", "steps": 3}
    make_net = lambda: None  # noqa: E731
    if kind == "chosen":
        make_net = lambda: "auto"  # noqa: E731
    if kind == "net":
        make_net = lambda: tdh.ConcatHypernet(nn.Linear(5, 2).double())  # noqa: E731
    if kind in {"running", "bns", "net"}:
        with interrupted(monkeypatch, lambda state: state.iteration == 3):
            fit(hypernet=make_net(), **given)
    else:
        fit(hypernet=make_net(), **given)
    content = torch.load(path, weights_only=True)
    draw = random.Random(kind)
    for number in range(MUTATIONS if kind != "chosen" else 20):
        damaged, what = mutated(content["state"], draw)
        torch.save({**content, "state": damaged}, path)
        try:
            fit(hypernet=make_net(), **given)
        except HyperError:
            continue
        except Exception as error:  # noqa: BLE001 - what must not happen
            pytest.fail(f"{number}: {what}: {error!r}")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"best_error": "0"}, "state.best_error is '0'"),
        ({"seconds": -1.0}, r"state.seconds is -1.0"),
        ({"more": 1}, "state.more is a field"),
        ({"history": None}, "state.history is None"),
        ({"net": {}}, "state.net.net.* is missing"),
        ({"phase": 9}, "state.phase is 9"),
        ({"phase_start": 9}, "state.phase_start is 9"),
        ({"random": [torch.zeros(5056, dtype=torch.uint8)[:7]]}, r"state.random\[0\]"),
        ({"training": {"kind": "adamw", "planned": 1}}, "state.training.best_error"),
        ({"training": {"kind": "sgd"}}, "state.training.kind is 'sgd'"),
        ({"report": {}}, "state.report.* is missing"),
    ],
    ids=str,
)
def test_an_impossible_field_of_a_state_is_named(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    fit(config=config)
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    content["state"].update(change)
    torch.save(content, tmp_path / "fit.pt")
    with pytest.raises(FileFormatError, match=problem):
        fit(config=config)


def _change_moments(state: dict[str, Any]) -> None:
    state["training"]["moments"][0]["exp_avg"] = torch.zeros(7, dtype=torch.float64)


def _change_memory(state: dict[str, Any]) -> None:
    curvature, gradient = state["training"]["memory"]
    state["training"]["memory"] = curvature[:-1, :-1].clone(), gradient[:-1].clone()


@pytest.mark.parametrize(
    ("base", "phase", "change", "problem"),
    [
        ("heun", 0, lambda s: s["training"]["moments"].pop(), "state.training.moments is"),
        ("heun", 0, _change_moments, r"state.training.moments\[0\].exp_avg"),
        ("bns", 0, _change_memory, "state.training.memory"),
        ("bns", 1, lambda s: s.update(phase=0), "state.training.kind is 'adamw'"),
        ("bns", 0, lambda s: s.update(phase=1), "state.training.kind is 'levenberg-marquardt'"),
        ("bns", 0, lambda s: s.update(phase=2), "state.training.kind is 'levenberg-marquardt'"),
    ],
)
def test_the_state_of_an_optimizer_that_is_not_this_fits_is_named(  # noqa: PLR0917
    base: str,
    phase: int,
    change: Callable[[dict[str, Any]], object],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "fit.pt"

    def run() -> None:
        net = tdh.ConcatHypernet(nn.Linear(5, 2).double(), inputs=("y", "f0", "dt"))
        fit(base=base, hypernet=net, config=replace(CONFIG, iterations=20, checkpoint=path))

    def when(state: Any) -> bool:
        return state.phase == phase and state.training is not None and state.iteration > 1

    with interrupted(monkeypatch, when):
        run()
    content = torch.load(path, weights_only=True)
    change(content["state"])
    torch.save(content, path)
    with pytest.raises(FileFormatError, match=problem):
        run()


def test_a_state_without_one_of_its_fields_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    fit(config=config)
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    for name in content["state"]:
        state = {key: value for key, value in content["state"].items() if key != name}
        torch.save({**content, "state": state}, tmp_path / "fit.pt")
        with pytest.raises(FileFormatError, match=f"state.{name} is missing"):
            fit(config=config)


@pytest.mark.parametrize("format_", ["torchdiffeq_hyper fit 1", 7, None])
def test_the_checkpoint_of_another_version_is_refused(format_: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint=tmp_path / "fit.pt")
    fit(config=config)
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    torch.save({**content, "format": format_}, tmp_path / "fit.pt")
    with pytest.raises(FileFormatError, match="its format is"):
        fit(config=config)
