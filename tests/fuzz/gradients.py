"""Compares gradients of drawn calls with autograd through the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from fuzz.drawn import Draw
from fuzz.expected import Reference, size_of, time_slack
from fuzz.reference import Parts


def compare_gradients(drawn: Draw, answer: Any, leaves: tuple[Parts, Tensor]) -> str | None:
    """Return what is wrong with the gradients to the start, the times and the parameters."""
    y0, t = leaves
    parameters = dict(drawn.field.named_parameters())
    is_adjoint = drawn.entry == "adjoint"
    if is_adjoint and drawn.key[0] == "bns" and (len(drawn.t) > 2 or drawn.domain_span):
        return None  # the backward solve starts from states that are read off, not solved
    try:
        parts = answer if drawn.is_tuple else (answer,)
        got = _grad(_loss(drawn, parts), [*y0, t, *parameters.values()])
    except tdh.HyperError as error:
        return f"gradient refused: {' '.join(str(error).split())[:200]}"
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        return f"gradient: raw {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    names = [*(f"y0[{i}]" for i in range(len(y0))), "t", *parameters]
    want = _reference_gradients(drawn)
    # An adjoint is that of the true solution: as near as the method is to that. So are the
    # gradients to the times of a bespoke solver, whose weights stay where they were fitted.
    is_fitted = drawn.domain_span is not None
    fine = _reference_gradients(drawn, refine=4) if is_adjoint or is_fitted else want
    size = size_of([tuple(want)])
    distance = size_of([tuple(one - two for one, two in zip(want, fine, strict=True))])
    for name, one, two in zip(names, got, want, strict=True):
        if not one.numel() or (name == "t" and is_fitted and drawn.solved_by["knots"]):
            continue  # knots drawn at random have no slopes of a solution
        slack = _slack(drawn, size, drawn.t.dtype if name == "t" else torch.float64)
        if drawn.tells_samples_apart and name == "t":
            slack += 30 * size * drawn.rtol**0.75  # a derivative of the interpolant
        if is_adjoint or (is_fitted and name == "t"):
            slack += 30 * distance + 1e-5 * size
        off = float((one - two).abs().max())
        if not off <= slack:
            return f"gradient to {name} is off by {off:.3g} (slack {slack:.2g}, size {size:.3g})"
    return None


def _slack(drawn: Draw, size: float, dtype: torch.dtype) -> float:
    # What is read off inside a step depends on times as shares of it.
    has_steps = not {"step_size", "grid_constructor"}.isdisjoint(drawn.options)
    slack = 1e-10 + size * (1e-8 + (5000 if has_steps else 100) * time_slack(drawn))
    slack += 16 * size * torch.finfo(dtype).eps
    if drawn.tells_samples_apart:
        start = size_of([drawn.y0]) or 1.0
        slack += 300 * size * (drawn.rtol + drawn.atol / min(start, 1.0))
    if isinstance(drawn.net, nn.Module):
        slack += 100 * size * torch.finfo(next(drawn.net.parameters()).dtype).eps
    return slack


def _reference_gradients(drawn: Draw, refine: int = 1) -> list[Tensor]:
    own = Reference(drawn, refine)
    own.y0 = tuple(part.requires_grad_() for part in own.y0)
    own.t = own.t.requires_grad_()
    states, _ = own.solve()
    parts = tuple(torch.stack([y[i] for y in states]) for i in range(len(own.y0)))
    return _grad(_loss(drawn, parts), [*own.y0, own.t, *own.leaves])


def _loss(drawn: Draw, parts: Parts) -> Tensor:
    """Return a weighted sum of all numbers of a solution that the method defines."""
    total: Any = 0.0
    for index, part in enumerate(parts):
        chosen = part
        if drawn.key[0] == "bns" and drawn.solved_by["knots"] is None:
            end = float(drawn.t[-1]) if drawn.domain_span is None else drawn.domain_span[1]
            misses = abs(float(drawn.t[-1]) - end)
            is_end = misses <= 1e-6 * abs(end - float(drawn.t[0]))
            chosen = part[[0, -1]] if is_end else part[:1]
        flat = torch.view_as_real(chosen) if chosen.is_complex() else chosen
        weights = torch.cos(torch.arange(flat.numel(), dtype=flat.dtype) + index)
        total = total + (flat.reshape(-1) * weights).sum()
    return total


def _grad(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return [torch.zeros_like(leaf) if grad is None else grad.detach() for leaf, grad in pairs]
