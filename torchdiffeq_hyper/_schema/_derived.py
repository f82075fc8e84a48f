"""Rules read off the annotations of a dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from torch import Tensor

from torchdiffeq_hyper._schema._records import Default, Either, Items, Maybe, Record, Row, Table
from torchdiffeq_hyper._schema._rule import Rule
from torchdiffeq_hyper._schema._values import FLAG, Anything, Real, TensorOf, Text, Whole


def record_of(cls: type, *, is_complete: bool = False, **own: Rule) -> Record:
    """Return the rules that a dataclass's annotations give, fields with a default optional.

    Ints are counts, floats are measurements: of at least 0, and may be inf or nan.

    Args:
        cls: the dataclass.
        is_complete: whether fields with a default have to be there all the same.
        own: rules of some of its fields, in place of what the annotation gives.
    """
    hints = typing.get_type_hints(cls)
    fields: dict[str, Rule | Default] = {}
    for field in dataclasses.fields(cls):
        rule = own.get(field.name) or _rule_of(hints[field.name])
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        fields[field.name] = Default(rule) if has_default and not is_complete else rule
    return Record(fields)


def _rule_of(hint: Any) -> Rule:
    plain: dict[Any, Rule] = {
        int: Whole(),
        float: Real(low=0.0, is_finite=False),
        str: Text(),
        bool: FLAG,
        Any: Anything(),
        Tensor: TensorOf(),
    }
    if hint in plain:
        return plain[hint]
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return record_of(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        rules = tuple(_rule_of(kind) for kind in arguments if kind is not types.NoneType)
        rule = rules[0] if len(rules) == 1 else Either(rules)
        return Maybe(rule) if types.NoneType in arguments else rule
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return Items(_rule_of(arguments[0]))
    if origin is tuple:
        return Row(tuple(map(_rule_of, arguments)))
    assert origin is dict, f"no rule for {hint}"
    return Table(_rule_of(arguments[1]))
