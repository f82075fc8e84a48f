"""Every impossible value of `FitConfig` is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from torchdiffeq_hyper import FitConfig
from torchdiffeq_hyper.errors import OptionError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0),
        ("iterations", 2.5),
        ("iterations", True),
        ("max_seconds", 0.0),
        ("max_seconds", float("inf")),
        ("max_seconds", None),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("weight_decay", -1.0),
        ("pretrain_iterations", -1),
        ("swap_every", 0),
        ("batch_size", 0),
        ("rtol", 0.0),
        ("atol", -1e-6),
        ("method", None),
        ("validation", 0.0),
        ("validation", 1.0),
        ("patience", 0),
        ("seed", -1),
        ("seed", 0.5),
        ("checkpoint", 3),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^{name} is {value!r}\.") as caught:
        FitConfig(**{name: value})
    assert f"FitConfig({name}=" in str(caught.value)


def test_a_config_cannot_be_changed_after_its_check() -> None:
    with pytest.raises(AttributeError):
        FitConfig().lr = -1.0  # type: ignore[misc]
