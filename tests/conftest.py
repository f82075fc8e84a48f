"""Fixtures shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent

# The tests' tensors are small: more threads only add waiting, and other sums.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/fuzz."""
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-calls", type=int, default=1000, help="random calls in tests/fuzz")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of the random calls")
    group.addoption("--fuzz-only", help='one random call: "method seed number"')


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers that no other test draws from."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture
def data_dir() -> Path:
    """The folder of the large public data sets, where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data next to the repository")
    return folder
