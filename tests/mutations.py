"""Damage to plain values and tensors, drawn at random; what a reader has to survive."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

VALUES = (
    None,
    True,
    False,
    "",
    "2",
    "mlp",
    "\ud800",
    -1,
    0,
    1,
    1.5,
    -2.5,
    2**62,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [[]],
    [1, 2, 3],
    [1] * 5000,
    {},
    {"a": 1},
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Return every container in a tree with each of its keys."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def mutated(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """Return a copy of a tree with one value changed, missing or added, and what was done."""
    tree = copy.deepcopy(tree)
    sites = list(places(tree))
    # Short lists and dictionaries have the fields; a long history is one of them.
    node, key = draw.choice(sites) if draw.random() < 0.3 else draw.choice(sites[:120])
    what = draw.random()
    if what < 0.1:
        del node[key]
        return tree, f"without {key}"
    if what < 0.2:
        value = draw.choice(VALUES)
        if isinstance(node, dict):
            node["extra"] = value
        else:
            node.append(value)
        return tree, f"one more beside {key}"
    value = draw.choice(VALUES)
    if isinstance(node[key], Tensor):
        value = draw.choice((value, *broken(node[key])))
    node[key] = value
    return tree, f"{key} = {str(value)[:80]}"


def broken(tensor: Tensor) -> list[Tensor]:
    """Return a tensor in other shapes, dtypes and values."""
    bad = [
        tensor.flatten()[:0],
        tensor.unsqueeze(0).clone(),
        torch.cat([tensor.flatten(), tensor.flatten()]),
        torch.zeros(()),
        tensor.bool(),
        tensor.double().to(torch.int64),
        tensor.to(torch.float16),
        tensor.double(),
        tensor.to(torch.complex64),
        torch.full_like(tensor, 100),
    ]
    if tensor.is_floating_point():
        bad += [torch.full_like(tensor, value) for value in (math.nan, math.inf, -1e30)]
    return bad


def mutated_tensors(tensors: dict[str, Tensor], draw: random.Random) -> tuple[Any, str]:
    """Return tensors with one changed, missing, renamed or added, and what was done."""
    tensors = dict(tensors)
    name = draw.choice(list(tensors))
    what = draw.random()
    if what < 0.1:
        del tensors[name]
    elif what < 0.2:
        tensors["extra"] = torch.ones(2)
    elif what < 0.3:
        tensors[name + ".more"] = tensors.pop(name)
    else:
        tensors[name] = draw.choice(broken(tensors[name]))
        return tensors, f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}"
    return tensors, f"{name}, {what:.2f}"
