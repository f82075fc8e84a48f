"""Files of the first version load; damaged ones are refused by the name of the field."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from mutations import mutated, mutated_tensors
from stubs import damped_wave, spiral
from torchdiffeq_hyper.__main__ import _describe as describe
from torchdiffeq_hyper.__main__ import main
from torchdiffeq_hyper._files import read
from torchdiffeq_hyper.errors import BaseMismatchError, FileFormatError, HyperError
from torchdiffeq_hyper.hypernets import MLP, ConcatHypernet, Linear, from_architecture

DATA = Path(__file__).parent / "data"
KINDS = ["hypersolver-1", "bespoke-1", "dise-1"]
MUTATIONS = 150


def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "expected-1.json").read_text())
    return found


def contents(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and description of a file of the first version."""
    path = DATA / f"{kind}.safetensors"
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["torchdiffeq_hyper"])


def write(path: Path, tensors: dict[str, Tensor], metadata: Any) -> Path:
    """Write a file as `save` does, whatever is in it."""
    save_file(tensors, path, {"torchdiffeq_hyper": json.dumps(metadata)})
    return path


def load(kind: str, path: Path) -> Any:
    return tdh.Dise.load(path) if kind == "dise-1" else tdh.HyperSolver.load(path)


def changed(folder: Path, kind: str, place: str, value: Any) -> Path:
    """Return a file with one entry of its description changed, e.g. "domain.span"."""
    tensors, metadata = contents(kind)
    node: Any = metadata
    *way, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in way:
        node = node[key]
    node[last] = value
    return write(folder / "changed.safetensors", tensors, metadata)


# Files of the first version


def test_a_hypersolver_of_the_first_version_gives_its_numbers() -> None:
    solver = tdh.HyperSolver.load(DATA / "hypersolver-1.safetensors")
    y0, t = torch.tensor(expected()["start"]).double(), torch.tensor([0.0, 1.0]).double()
    end = torch.tensor(expected()["hypersolver-1"], dtype=torch.float64)
    torch.testing.assert_close(solver.solve(damped_wave, y0, t)[-1], end, rtol=0, atol=1e-7)
    assert (solver.base, solver.steps) == ("heun", (3, 4))
    assert solver.domain is not None
    assert solver.domain.directions == (1, -1)
    assert solver.report is not None
    assert solver.report.validation == expected()["hs_validation"]
    assert solver.report.break_even is not None


def test_a_bespoke_solver_of_the_first_version_gives_its_numbers() -> None:
    solver = tdh.HyperSolver.load(DATA / "bespoke-1.safetensors")
    y0 = torch.tensor(expected()["start"])
    path = solver.solve(spiral, y0, torch.linspace(0, 1, 3))
    torch.testing.assert_close(path, torch.tensor(expected()["bespoke-1"]), rtol=0, atol=1e-5)
    assert solver.report is not None
    assert solver.report.validation == expected()["bns_validation"]
    assert isinstance(solver.hypernet, Linear)


def test_a_dise_of_the_first_version_gives_its_numbers() -> None:
    dise = tdh.Dise.load(DATA / "dise-1.safetensors")
    y0, t = torch.tensor(expected()["start"]), torch.tensor([0.0, 1.0])
    assert dise.select(y0).tolist() == expected()["selection"]
    end = torch.tensor(expected()["dise-1"])
    torch.testing.assert_close(dise.solve(spiral, y0, t)[-1], end, rtol=0, atol=1e-5)
    assert dise.report is not None
    assert dise.report.mean_nfe == expected()["dise_mean_nfe"]
    assert "oracle" in str(dise.report)


# Descriptions


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("format_version", 0, "format_version is 0"),
        ("format_version", -3, "format_version is -3"),
        ("format_version", True, "format_version is True"),
        ("format_version", 1.0, "format_version is 1.0"),
        ("kind", ["hypersolver"], "kind is ['hypersolver']"),
        ("base", "leapfrog", "leapfrog"),
        ("base", 2, "base is 2"),
        ("alpha", math.nan, "alpha is nan"),
        ("alpha", 10**400, "alpha is 1000"),
        ("alpha", 0.5, "alpha"),
        ("steps", 10**9, "steps is 1000000000"),
        ("steps", "4", "steps is '4'"),
        ("steps", [4, 3], "steps is [4, 3]"),
        ("steps", [1, 2, 3], "steps is [1, 2, 3]"),
        ("domain.span", [0.0, math.inf], "domain.span[1] is inf"),
        ("domain.span", [2.0, 2.0], "domain.span is [2.0, 2.0]"),
        ("domain.span", [-1.7e308, 1.7e308], "domain.span is"),
        ("domain.span", [1.0], "domain.span is [1.0]"),
        ("domain.dt_min", 0.0, "domain.dt_min is 0.0"),
        ("domain.dt_min", 0.9, "dt_min no larger than dt_max"),
        ("domain.directions", [1, 1], "domain.directions is [1, 1]"),
        ("domain.directions", [True], "domain.directions[0] is True"),
        ("domain.directions", [], "domain.directions is []"),
        ("domain.shapes", [[-1]], "domain.shapes[0][0] is -1"),
        ("domain.shapes", [[2], [2]], "one shape where the state is no tuple"),
        ("domain.dtype", "int64", "domain.dtype is 'int64'"),
        ("domain.is_tuple", 0, "domain.is_tuple is 0"),
        ("domain.colour", "red", "domain.colour is a field that this version does not know"),
        ("report.seconds", math.nan, "report.seconds is nan"),
        ("report.iterations", 2.5, "report.iterations is 2.5"),
        ("report.validation", -0.5, "report.validation is -0.5"),
        ("report.noise_floor", -math.inf, "report.noise_floor is -inf"),
        ("report.notes", "a note", "report.notes is 'a note'"),
        ("report.notes", ["\ud800"], "report.notes[0] is"),
        ("report.losses.0.train", None, "report.losses[0].train is None"),
        ("report.delta", {"max": 1.0}, "report.delta.0.5 is missing"),
        ("report.break_even.predictions", math.inf, "report.break_even.predictions is inf"),
        ("hypernet.kind", "transformer", "hypernet.kind is 'transformer'"),
        ("hypernet.hidden", [2**62], "hypernet.hidden is [4611686018427387904]"),
        ("hypernet.hidden", [1] * 999, "hypernet.hidden is"),
        ("hypernet.hidden", [1] * 100_000, "hypernet.hidden is"),
        ("hypernet.channels", 10**7, "hypernet.channels is 10000000"),
        ("hypernet.n_stages", 10**9, "hypernet.n_stages is"),
        ("hypernet.inputs", ["y", "y"], "do not fit its own description"),
        ("hypernet.inputs", ["q"], "hypernet.inputs[0] is 'q'"),
        ("hypernet.unit", 1.0, "hypernet.unit is a field that this version does not know"),
        ("hypernet", {"kind": "conv", "channels": 2, "kernel_size": 10**6 + 1}, "kernel_size"),
    ],
)
def test_an_impossible_field_is_named_in_one_error(
    place: str, value: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(tmp_path, "hypersolver-1", place, value)

    def refuse(*arguments: Any, **others: Any) -> NoReturn:
        raise AssertionError(arguments)

    if problem != "do not fit its own description":
        monkeypatch.setattr(nn.Linear, "__init__", refuse)  # refused before it is built
    with pytest.raises(FileFormatError, match=re.escape(problem)) as caught:
        tdh.HyperSolver.load(path)
    assert [line[:11] for line in str(caught.value).splitlines()][1:3] == [
        "  expected:",
        "  fix:     ",
    ]
    assert len(str(caught.value)) < 1500
    with pytest.raises(FileFormatError, match=re.escape(problem)):
        describe(str(path))


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("steps", 5, "weights is a tensor (4, 4)"),
        ("steps", [3, 4], "steps is [3, 4]"),
        ("alpha", 0.5, "alpha is 0.5"),
        ("base", "euler", "base is 'euler'"),
        ("hypernet", None, "hypernet.net.input_scale is a field"),
    ],
)
def test_an_impossible_field_of_a_bespoke_solver_is_named(
    place: str, value: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(FileFormatError, match=re.escape(problem)):
        tdh.HyperSolver.load(changed(tmp_path, "bespoke-1", place, value))


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("candidates", [], "candidates is []"),
        ("candidates.0.steps", "1", "candidates[0].steps is '1'"),
        ("candidates.0.steps", 10**9, "candidates[0].steps is 1000000000"),
        ("candidates.0.method", "euler-x", "euler-x"),
        ("candidates.1.method", "euler", "candidates[1].method is 'euler'"),
        ("candidates.1.solver.steps", 10**9, "candidates[1].solver.steps is 1000000000"),
        ("candidates.2.solver.hypernet.channels", 2**62, "candidates[2].solver.hypernet.channels"),
        ("candidates.2.solver.domain", 3, "candidates[2].solver.domain is 3"),
        ("candidates.2.solver", [], "candidates[2].solver is []"),
        ("candidates.2.solver", None, "belongs to nothing described"),
        ("candidates.3.rtol", math.nan, "candidates[3].rtol is nan"),
        ("candidates.3.options", {"safety": math.nan}, "candidates[3].options.safety is nan"),
        ("selector.kind", "forest", "selector.kind is 'forest'"),
        ("selector.hidden", [2**62], "selector.hidden is"),
        ("selector.n_candidates", 3, "selector.n_candidates is 3"),
        ("unit", [0.0, 0.0], "unit[1] is 0.0"),
        ("unit", [math.nan, 1.0], "unit[0] is nan"),
        ("report.alpha", -1.0, "report.alpha is -1.0"),
        ("report.penalty", 1e-9, "penalty M is 1e-09"),
        ("report.names", ["a"], "report.names is ['a']"),
    ],
)
def test_an_impossible_field_of_a_dise_is_named(
    place: str, value: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(FileFormatError, match=re.escape(problem)):
        tdh.Dise.load(changed(tmp_path, "dise-1", place, value))


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("hypersolver-1", "net.layers.0.weight", lambda w: w * math.nan),
        ("hypersolver-1", "net.output_scale", lambda w: w.float()),
        ("hypersolver-1", "net.layers.0.bias", lambda w: w.to(torch.int64)),
        ("bespoke-1", "weights", lambda w: w * math.inf),
        ("bespoke-1", "weights", lambda w: 2 * w),
        ("bespoke-1", "weights", lambda w: w.to(torch.int32)),
        ("bespoke-1", "knot_values", lambda w: w[:-1]),
        ("bespoke-1", "knot_slopes", lambda w: w.t().contiguous()),
        ("bespoke-1", "knot_slopes", lambda w: w.half()),
        ("bespoke-1", "knot_values", lambda w: w * math.nan),
        ("bespoke-1", "knot_values", None),
        ("bespoke-1", "hypernet.net.layers.0.weight", lambda w: w * math.nan),
        ("dise-1", "candidates.1.knot_values", lambda w: w.half()),
        ("dise-1", "selector.shift", lambda w: w * math.nan),
        ("dise-1", "selector.shift", lambda w: w[:1]),
        ("dise-1", "report.selection", lambda w: w + 7),
        ("dise-1", "report.held_out", lambda w: -1 - w),
        ("dise-1", "report.nfe", lambda w: w[:, :2].clone()),
        ("dise-1", "report.is_right", lambda w: w.float()),
    ],
)
def test_tensors_that_no_file_can_have_are_refused(
    kind: str, name: str, change: Any, tmp_path: Path
) -> None:
    tensors, metadata = contents(kind)
    tensors[name] = change(tensors[name]) if change is not None else tensors.pop(name)[:0]
    if change is None:
        del tensors[name]
    with pytest.raises(FileFormatError):
        load(kind, write(tmp_path / "changed.safetensors", tensors, metadata))


def test_a_description_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    save_file({"a": torch.ones(1)}, path, {"torchdiffeq_hyper": "[" * 100_000})
    with pytest.raises(FileFormatError, match="no JSON"):
        tdh.HyperSolver.load(path)
    tensors, metadata = contents("dise-1")
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    metadata["candidates"][3]["options"] = {"safety": deep}
    with pytest.raises(FileFormatError, match="options.safety"):
        tdh.Dise.load(write(path, tensors, metadata))


def test_what_may_be_missing_is_what_older_versions_did_not_write(tmp_path: Path) -> None:
    tensors, metadata = contents("hypersolver-1")
    del metadata["report"]["break_even"]
    del metadata["report"]["notes"]
    solver = tdh.HyperSolver.load(write(tmp_path / "older.safetensors", tensors, metadata))
    assert solver.report is not None
    assert (solver.report.break_even, solver.report.notes) == (None, ())


# Any damage at all


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_loads_or_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = contents(kind)
    draw = random.Random(kind)
    before = torch.random.get_rng_state()
    refused = 0
    for number in range(MUTATIONS):
        more, description = dict(tensors), metadata
        if draw.random() < 0.3:
            more, what = mutated_tensors(tensors, draw)
        else:
            description, what = mutated(metadata, draw)
        path = write(tmp_path / "mutated.safetensors", more, description)
        try:
            loaded = load(kind, path)
            text = repr(loaded) + str(loaded.report)
            assert text
        except HyperError:
            refused += 1
        except Exception as error:  # noqa: BLE001 - what must not happen
            pytest.fail(f"{number}: {what}: {error!r}")
        else:
            if kind != "dise-1":
                assert main(["inspect", str(path)]) == 0, what
                continue
        assert main(["inspect", str(path)]) == 2, what
    capsys.readouterr()
    assert refused > MUTATIONS / 2
    assert torch.equal(torch.random.get_rng_state(), before)


# What a load leaves behind


class Own(nn.Module):
    """A hypernet of one's own; a buffer may lie where nothing can be copied to."""

    def __init__(self, *, is_expanded: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        shared = torch.randn(1).expand(2)
        self.register_buffer("shared", shared if is_expanded else shared.clone())

    def forward(self, step: tdh.StepInput) -> Tensor:
        return step.y * self.weight


def test_an_instance_that_cannot_take_its_weights_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    tdh.HyperSolver("euler", Own(), steps=2).save(path)
    instance = Own(is_expanded=True)
    before = copy.deepcopy(instance.state_dict())
    with pytest.raises(BaseMismatchError, match="cannot take the weights"):
        tdh.HyperSolver.load(path, hypernet=instance)
    assert all(torch.equal(before[name], value) for name, value in instance.state_dict().items())
    assert instance.training


@pytest.mark.parametrize("damage", ["selector", "candidate", "twice", "weights"])
def test_instances_are_left_alone_when_another_part_of_a_dise_is_refused(
    damage: str, tmp_path: Path
) -> None:
    path = tmp_path / "dise.safetensors"
    first, second = (tdh.HyperSolver("euler", Own(), steps=n) for n in (2, 3))
    candidates = [tdh.Candidate(first), tdh.Candidate(second), tdh.Candidate("rk4", steps=1)]
    tdh.Dise(candidates, nn.Linear(2, 3)).save(path)
    tensors, metadata = read(path, "dise")
    if damage == "candidate":
        metadata["candidates"][2]["steps"] = -1
    if damage == "twice":
        metadata["candidates"].append(metadata["candidates"][2])
    write(path, tensors, metadata)
    hypernets = {0: Own(), 1: Own(is_expanded=damage == "weights")}
    selector = nn.Linear(2, 4 if damage == "selector" else 3)
    modules = [*hypernets.values(), selector]
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    with pytest.raises(HyperError):
        tdh.Dise.load(path, selector=selector, hypernets=hypernets)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        assert module.training
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_net_of_ones_own_may_hold_inf_and_integers(tmp_path: Path) -> None:
    class Masked(Own):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("calls", torch.tensor(3))

    path = tmp_path / "own.safetensors"
    tdh.HyperSolver("euler", Masked(), steps=2).save(path)
    loaded = tdh.HyperSolver.load(path, hypernet=Masked())
    assert torch.isinf(loaded.hypernet.mask[1])
    assert main(["inspect", str(path)]) == 0


def test_inspect_describes_a_bespoke_solver_with_a_net_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solver = tdh.BespokeSolver.classical("rk4", 4)
    path = tmp_path / "own.safetensors"
    solver.save(path)
    assert main(["inspect", str(path)]) == 0
    solver.hypernet = ConcatHypernet(nn.Linear(5, 2))
    solver.save(path)
    assert main(["inspect", str(path)]) == 0
    assert "custom" in capsys.readouterr().out
    with pytest.raises(FileFormatError, match="a net of your own"):
        tdh.HyperSolver.load(path)


@pytest.mark.parametrize(
    ("knots", "error"),
    [
        ((torch.zeros(2, 4), torch.zeros(5, 4)), tdh.errors.StateShapeError),
        ((torch.zeros(3, 4), torch.zeros(4, 5)), tdh.errors.StateShapeError),
        ((torch.zeros(3, 4, dtype=torch.int64), torch.zeros(5, 4)), tdh.errors.StateTypeError),
        (([[0.0]], torch.zeros(5, 4)), tdh.errors.StateTypeError),
        ((torch.zeros(3, 4), torch.full((5, 4), math.nan)), tdh.errors.OptionError),
    ],
)
def test_knots_that_do_not_match_the_weights_are_refused(
    knots: Any, error: type[Exception]
) -> None:
    weights = tdh.BespokeSolver.classical("rk4", 4).weights
    with pytest.raises(error, match="the knots'"):
        tdh.BespokeSolver(weights, knots=knots)


def test_generous_sizes_load(tmp_path: Path) -> None:
    net = MLP(3, hidden=(1,) * 60)
    path = tmp_path / "deep.safetensors"
    tdh.HyperSolver("euler", net, steps=100_000).save(path)
    loaded = tdh.HyperSolver.load(path)
    assert loaded.hypernet.architecture == net.architecture
    assert from_architecture(net.architecture).architecture == net.architecture
