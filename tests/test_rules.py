"""Rules take what they say, and name what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from torchdiffeq_hyper._files import checked, refused
from torchdiffeq_hyper._rules import (
    FLAG,
    Choice,
    Items,
    Maybe,
    Mismatch,
    Real,
    Record,
    Row,
    Rule,
    Such,
    Table,
    Tagged,
    TensorOf,
    Text,
    Value,
    Whole,
    checked_arguments,
    record_of,
    shown,
)
from torchdiffeq_hyper.errors import FileFormatError, OptionError
from torchdiffeq_hyper.hypernets._files import check_sizes


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (Whole(1, 3), [1, 3], [0, 4, True, 1.0, "1", None]),
        (Real(low=0.0), [0.0, 2, 1e308], [-1e-9, math.nan, math.inf, 10**400, True, "0"]),
        (Real(low=0.0, is_finite=False), [math.nan, math.inf, 0], [-math.inf, -1.0]),
        (Real(above=0.0, high=1.0), [1e-300, 1.0], [0.0, 1.1]),
        (Text(3), ["", "abc"], ["abcd", "\ud800", b"a", 1]),
        (FLAG, [True, False], [0, 1, None]),
        (Choice(1, -1), [1, -1], [True, 1.0, 0]),
        (Maybe(Whole(1)), [None, 1], [0, "x"]),
        (Value(str.isdigit, "digits"), ["12"], ["1a"]),
        (Items(Whole(1), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], [0], 1, "1"]),
        (Row(Whole(1), Text()), [[1, "a"]], [[1], ["a", 1], 3]),
        (Table(Whole(1), ("a",)), [{"a": 1}, {"a": 1, "b": 2}], [{}, {"a": 0}, {1: 1}, []]),
        (Such(Whole(1), lambda n: n % 2 == 1, "odd"), [1, 3], [2, 0]),
        (TensorOf((torch.float32,), (2, None)), [torch.ones(2, 5)], [torch.ones(2), None, 3]),
        (TensorOf(), [torch.ones(1).bool(), torch.tensor(math.inf)], [torch.tensor(math.nan)]),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_rule_takes_what_it_says(rule: Rule, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        rule.check(value, "x")
    for value in wrong:
        with pytest.raises(Mismatch, match="^x") as caught:
            rule.check(value, "x")
        assert caught.value.expected


def test_an_optional_field_may_be_missing() -> None:
    rule = Record({"a": Whole(1)}, optional={"unit": Real(above=0.0), "b": Text()})
    assert rule.check({"a": 2}, "") == {"a": 2}
    assert rule.check({"a": 2, "unit": 3.0, "b": "x"}, "") == {"a": 2, "unit": 3.0, "b": "x"}
    with pytest.raises(Mismatch, match="a is missing"):
        rule.check({"unit": 3.0}, "")
    with pytest.raises(Mismatch, match="unit is 0.0"):
        rule.check({"a": 2, "unit": 0.0}, "")
    with pytest.raises(Mismatch, match="c is a field that this version does not know") as caught:
        rule.check({"a": 2, "c": 1}, "")
    assert "pip install -U" in caught.value.fix


def test_the_kind_says_which_fields_there_are() -> None:
    rule = Tagged({"one": Record({"a": Whole(1)}), "two": Record({})})
    assert rule.check({"kind": "one", "a": 1}, "") == {"kind": "one", "a": 1}
    for wrong in ({"kind": "two", "a": 1}, {"kind": "three"}, {"kind": ["one"]}, {}, 3):
        with pytest.raises(Mismatch):
            rule.check(wrong, "net")
    assert '"one", "two"' in rule.expected


def test_the_place_of_a_wrong_value_is_named() -> None:
    rule = Record({"a": Items(Record({"b": Row(Whole(1), Table(Whole(1)))}))})
    with pytest.raises(Mismatch, match=r"^a\[1\]\.b\[1\]\.key is -1\.\n"):
        rule.check({"a": [{"b": [1, {}]}, {"b": [1, {"key": -1}]}]}, "")
    with pytest.raises(Mismatch, match="^it is 3"):
        rule.check(3, "")


def test_conditions_see_all_fields() -> None:
    fields = Record({"low": Whole(), "high": Whole()})
    rule = Such(fields, lambda found: found["low"] <= found["high"], "low no larger than high")
    rule.check({"low": 1, "high": 1}, "x")
    with pytest.raises(Mismatch, match="low no larger than high"):
        rule.check({"low": 2, "high": 1}, "x")


@dataclass
class Inner:
    number: float
    name: str = ""


@dataclass
class Outer:
    count: int
    pair: tuple[int, str]
    inner: Inner
    weights: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[Inner, ...] = ()
    maybe: list[float] | None = None
    any: Any = None
    flag: bool = False


def test_a_dataclass_gives_its_rules() -> None:
    inner = {"number": math.nan}
    least = {"count": 1, "pair": [1, "a"], "inner": inner}
    rule = record_of(Outer)
    assert rule.check(least, "") == least
    rule.check({**least, "maybe": [1.0], "parts": [inner], "weights": {"w": torch.ones(1)}}, "")
    for name, wrong in {
        "count": 1.5,
        "pair": [1],
        "inner": {"name": "x"},
        "weights": {"w": 1},
        "parts": [{}],
        "maybe": ["x"],
        "flag": 1,
    }.items():
        with pytest.raises(Mismatch, match=f"^{name}"):
            rule.check({**least, name: wrong}, "")
    with pytest.raises(Mismatch, match="weights is missing"):
        record_of(Outer, is_complete=True).check(least, "")
    with pytest.raises(Mismatch, match="count is 3"):
        record_of(Outer, count=Whole(5)).check({**least, "count": 3}, "")


def test_impossible_arguments_are_refused_by_name() -> None:
    rules = {"hidden": Items(Whole(1)), "dropout": Real(low=0.0)}
    found = checked_arguments(rules, {"hidden": (3, 4), "dropout": 0, "other": None})
    assert found == {"hidden": [3, 4], "dropout": 0}
    with pytest.raises(OptionError, match=r"hidden is \(3, 0\)") as caught:
        checked_arguments(rules, {"hidden": (3, 0), "dropout": 0})
    assert "each an int of at least 1." in str(caught.value)


def test_sizes_are_held_against_the_tensors() -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    check_sizes({"width": 8, "hidden": [4, 4], "inputs": ["y"], "dropout": 0.5}, tensors, "net")
    check_sizes({"n_stages": 100}, tensors, "net", but=("n_stages",))
    for description in ({"width": 9}, {"hidden": [1, 9]}, {"hidden": [1, 1, 1]}):
        with pytest.raises(Mismatch, match="^net.(width|hidden) is"):
            check_sizes(description, tensors, "net")


def test_refusals_become_one_kind_of_error() -> None:
    with pytest.raises(FileFormatError, match="the file cannot be used: a is -1") as caught:
        checked(Record({"a": Whole()}), {"a": -1}, "the file")
    assert "expected: an int of at least 0." in str(caught.value)
    with (
        pytest.raises(FileFormatError, match="the file cannot be used: no.") as caught,
        refused("the file", "do this"),
    ):
        raise OptionError(problem="no.", expected="yes.", fix="other")
    assert str(caught.value).endswith("expected: yes.\n  fix:      do this")
    with pytest.raises(FileFormatError, match="^as it is$"), refused("the file"):
        raise FileFormatError("as it is")  # noqa: EM101, TRY003


def test_huge_values_are_shown_in_a_few_words() -> None:
    assert len(shown(list(range(10**6)))) < 100
    assert len(shown("x" * 10**6)) < 100
    assert len(shown(10**10_000)) < 100
    assert shown(torch.ones(2, 3)) == "a tensor (2, 3) of torch.float32"
