"""The fitted part of a random call: a hypersolver, a bespoke solver or a Dise."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from fuzz.drawn import Draw
from fuzz.fields import NETS, State
from torchdiffeq_hyper.solvers.bespoke import classical
from torchdiffeq_hyper.tableaus import Tableau


def draw_part(rng: random.Random, drawn: Draw) -> None:
    """Give the call the fitted part that its method needs, and its tolerances."""
    tableau = drawn.method.tableau
    if tableau is not None:
        _hypersolver(rng, drawn, tableau)
        return
    if not drawn.is_whole:
        return
    small = {torch.float64: 1e-8, torch.complex128: 1e-8}.get(drawn.dtype, 1e-4)
    drawn.rtol = 1e-2 if drawn.is_half else rng.choice([1e-4, small, small])
    drawn.atol = drawn.rtol * rng.choice([1.0, 0.1])
    if drawn.key[0] == "bns":
        _bespoke(rng, drawn)
    elif drawn.key[0] == "dise":
        _dise(rng, drawn)
    elif drawn.key[0] == "dopri5_per_sample":
        _step_control(rng, drawn)


def _step_control(rng: random.Random, drawn: Draw) -> None:
    if rng.random() < 0.5:
        drawn.options["time"] = rng.choice(["vmap", "vector", "loop"])
    if rng.random() < 0.2:
        drawn.options |= rng.choice([{"first_step": 0.05}, {"max_step": 0.2}, {"safety": 0.7}])
    if drawn.field_kind == "burst" and rng.random() < 0.5:
        drawn.options["min_step"] = 0.01
    if drawn.field_kind in ("burst", "strong"):
        drawn.options["max_num_steps"] = 1000  # at the edge of the dtype steps may never end
    drawn.notes += [f"{name}={value}" for name, value in drawn.options.items()]


def _net(rng: random.Random, drawn: Draw, *, of_part: int | None = None) -> tuple[Any, str]:
    y = drawn.y0 if of_part is None else (drawn.y0[of_part],)
    kind = rng.choice([*NETS, "zero", "concat"])
    if kind != "concat":
        return NETS[kind], kind
    channels = sum(part.shape[1] if part.dim() > 1 else 1 for part in y)
    is_flat = all(part.dim() < 3 for part in y) and len({part.shape[:1] for part in y}) == 1
    if not is_flat or not channels:
        return NETS["linear"], "linear"
    wide = drawn.real if drawn.real != torch.float64 else rng.choice([torch.float32, torch.float64])
    dtype = torch.float32 if drawn.is_half else wide
    inner = nn.Linear(2 * channels + 1, channels, dtype=dtype)
    with torch.no_grad():  # few digits, so that a lower precision holds the same weights
        for parameter in inner.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(0.2 * 64).round() / 64)
    return tdh.ConcatHypernet(inner), "concat"


def _hypersolver(rng: random.Random, drawn: Draw, tableau: Tableau) -> None:
    part = None
    domain = None
    unlike = [p.shape[1:] for p in drawn.y0]
    if drawn.is_tuple and rng.random() < 0.25:
        part = rng.randrange(len(drawn.y0))
        if drawn.y0[part].dim() == 0 or unlike.count(drawn.y0[part].shape[1:]) > 1:
            part = None
    drawn.net, name = _net(rng, drawn, of_part=part)
    drawn.solved_by["part"] = part
    drawn.steps = rng.choice([None, 1, 2, 3, 5, 8])
    if tableau.name == "alpha":
        drawn.alpha = rng.choice([None, 0.5, 2 / 3, 0.8, 1.0])
    if part is not None or rng.random() < 0.2:
        domain = _domain(drawn, part)
        drawn.notes.append("domain" if part is None else f"fitted on part {part}")
    drawn.part = tdh.HyperSolver(
        tableau.name, drawn.net, drawn.steps, alpha=drawn.alpha, domain=domain
    ).requires_grad_(requires_grad=False)
    drawn.notes.append(f"net {name} steps={drawn.steps} alpha={drawn.alpha}")


def _domain(drawn: Draw, part: int | None, span: tuple[float, float] | None = None) -> Any:
    ends = float(drawn.t[0]), float(drawn.t[-1])
    span = ends if span is None else span
    if span[0] == span[1]:
        span = span[0], span[0] + 1
    sign = 1 if span[1] > span[0] else -1
    return tdh.FitDomain(
        span=span,
        dt_min=abs(span[1] - span[0]) / 20,
        dt_max=abs(span[1] - span[0]),
        directions=(sign,),
        shapes=tuple(tuple(p.shape[1:]) for p in (drawn.y0 if part is None else [drawn.y0[part]])),
        is_tuple=drawn.is_tuple and part is None,
        dtype=str(drawn.dtype)[6:],
    )


def _bespoke(rng: random.Random, drawn: Draw) -> None:
    calls = rng.choice([1, 2, 3, 4, 6, 8, 10])
    names = ["euler", *["midpoint", "heun"] * (calls > 1), *["rk4"] * (calls > 3)]
    name = rng.choice(names)
    weights, knots, is_classical = classical(name, calls), None, True
    if rng.random() < 0.6:
        noise = 0.1 * torch.randn_like(weights).tril() / calls
        # Rows keep their sums: the times passed.
        weights = (
            weights
            + noise
            - noise.sum(1, keepdim=True)
            / torch.arange(1, calls + 1).unsqueeze(1)
            * torch.ones_like(weights).tril()
        )
        is_classical = False
    if rng.random() < 0.4:
        knots = torch.randn(calls - 1, calls).double(), torch.randn(calls + 1, calls).double()
    drawn.net, kind = _net(rng, drawn) if rng.random() < 0.3 else (None, "none")
    domain, start = None, float(drawn.t[0])
    if rng.random() < 0.5 and len(drawn.t) > 1:
        length = float(drawn.t[-1]) - start
        drawn.domain_span = start, start + length * rng.choice([1.0, 1.0, 1.5])
        domain = _domain(drawn, None, drawn.domain_span)
        drawn.notes.append(f"span {drawn.domain_span}")
    drawn.part = tdh.BespokeSolver(weights, hypernet=drawn.net, knots=knots, domain=domain)
    drawn.part.requires_grad_(requires_grad=False)
    drawn.solved_by = {"weights": weights, "knots": knots, "classical": is_classical, "part": None}
    drawn.notes.append(
        f"{calls} calls {name}{'' if is_classical else ' perturbed'} "
        f"knots={'given' if knots else None} net {kind}"
    )


def _dise(rng: random.Random, drawn: Draw) -> None:
    tolerances = {"rtol": drawn.rtol, "atol": drawn.atol}
    pool: list[tuple[str, dict[str, Any]]] = [
        ("euler", {"steps": rng.choice([None, 1, 3])}),
        ("midpoint", {"steps": rng.choice([1, 4])}),
        ("heun2", {"steps": 2}),
        ("rk4", {"steps": rng.choice([1, 2])}),
        ("dopri5", tolerances),
        ("dopri5_per_sample", tolerances),
        ("solver", {"steps": rng.choice([None, 2, 4])}),
    ]
    chosen = rng.sample(pool, rng.choice([1, 2, 3]))
    candidates = []
    for name, settings in chosen:
        if name == "solver":
            net = NETS[rng.choice(["zero", "linear", "timed"])]
            solver = tdh.HyperSolver("heun", net, settings["steps"])
            settings["net"] = net
            candidates.append(tdh.Candidate(solver))
        else:
            candidates.append(tdh.Candidate(name, **settings))
    drawn.solved_by = {"candidates": chosen, "selector": _selector(len(chosen))}
    drawn.part = tdh.Dise(candidates, drawn.solved_by["selector"])
    drawn.notes.append(" + ".join(name for name, _ in chosen))


def _selector(n: int) -> Callable[[State], Tensor]:
    def costs(y0: State) -> Tensor:
        first = y0 if isinstance(y0, Tensor) else y0[0]
        rows = first.real if first.is_complex() else first
        sums = rows.detach().double().reshape(len(rows), rows[:1].numel()).sum(1)
        choice = (sums * 3).floor().long() % n
        return 1 - torch.nn.functional.one_hot(choice, n).double()

    return costs
