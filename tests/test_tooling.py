"""The package as it is installed: version, pins, imports, public names."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import typing
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import torchdiffeq_hyper as tdh

REQUIRED = [Requirement(line) for line in metadata.requires("torchdiffeq_hyper") or ()]
PUBLIC = [(name, getattr(tdh, name)) for name in tdh.__all__]


def test_version_is_the_installed_one() -> None:
    assert tdh.__version__ == metadata.version("torchdiffeq_hyper")


def test_every_direct_requirement_is_pinned_within_its_range(repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    wanted = {r.name: r.specifier for r in REQUIRED if r.name != "torchdiffeq_hyper"}
    assert wanted.keys() <= {pin.name for pin in pins}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert pin.name not in wanted or wanted[pin.name].contains(exact.version)


def test_no_name_of_a_package_hides_a_module_in_it() -> None:
    found = pkgutil.walk_packages(tdh.__path__, f"{tdh.__name__}.")
    for name in [module.name for module in found if not module.name.endswith("__main__")]:
        module = importlib.import_module(name)
        package, _, leaf = name.rpartition(".")
        assert getattr(sys.modules[package], leaf) is module


def test_import_pulls_in_no_optional_package() -> None:
    script = "import json, sys, torchdiffeq_hyper; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"matplotlib", "sklearn", "torchdyn", "pytorch_lightning"}


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=tdh.__all__)
def test_public_name_is_documented_and_its_annotations_resolve(name: str, thing: object) -> None:
    assert inspect.getdoc(thing), f"tdh.{name} has no docstring"
    if isinstance(thing, type) or inspect.isroutine(thing):
        target = thing.__init__ if isinstance(thing, type) else thing  # type: ignore[misc]
        typing.get_type_hints(target)
