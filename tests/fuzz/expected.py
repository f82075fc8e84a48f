"""What a drawn call must answer, and how near its dtype lets it come."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from fuzz import reference
from fuzz.calls import event_of
from fuzz.drawn import Draw
from fuzz.reference import Evaluate, Parts, Stepper


@dataclass
class Expected:
    """What a call must answer.

    Attributes:
        states: the parts of the state at every time, in double precision.
        slack: by how much a number may miss it.
        time: the time of an event, else None.
        calls: calls of func that the method costs; None where it is free to choose.
        stays_finite: whether func itself does, called in the state's dtype.
    """

    states: list[Parts]
    slack: float
    time: float | None = None
    calls: int | None = None
    stays_finite: bool = True


class Reference:
    """The independent evaluation of a drawn call.

    Args:
        drawn: the call.
        refine: how many times as many steps a method on a grid takes.
    """

    def __init__(self, drawn: Draw, refine: int = 1) -> None:
        self.drawn = drawn
        self.refine = refine
        wide = torch.complex128 if drawn.dtype.is_complex else torch.float64
        self.y0 = tuple(part.detach().to(wide).clone() for part in drawn.y0)
        self.t = drawn.t.detach().double()
        self.wide = wide
        self.leaves: list[Tensor] = []
        if drawn.field_kind == "context":
            inputs = [item.double() for item in drawn.func.inputs]
            inner = copy.deepcopy(drawn.field)
            inner.dtype = wide
            self.func: Any = lambda t, y: inner(t, y, *inputs)
        else:
            self.func = drawn.field.in_double()
            self.leaves = list(self.func.parameters())

    def _evaluate(self, *, rounded: bool) -> Evaluate:
        if not rounded:
            return Evaluate(self.func, is_tuple=self.drawn.is_tuple)
        func = copy.deepcopy(self.drawn.func)
        return Evaluate(func, is_tuple=self.drawn.is_tuple, rounded=self.drawn.dtype)

    def _stepper(self, evaluate: Evaluate) -> Stepper:
        drawn, tableau = self.drawn, self.drawn.method.tableau
        if tableau is None:
            return Stepper(evaluate, reference.TABLES[drawn.key[0]])
        table = reference.table_of(tableau.name, drawn.alpha)
        return Stepper(evaluate, table, self._net(), drawn.solved_by["part"])

    def _net(self) -> Any:
        net = self.drawn.net
        return copy.deepcopy(net).double() if isinstance(net, nn.Module) else net

    def _grid(self, t: Tensor) -> Tensor:
        options, grid = self.drawn.options, t
        if "step_size" in options:
            size = options["step_size"] * (1 if t[-1] > t[0] else -1)
            n = int(torch.ceil((t[-1] - t[0]).detach() / size))
            grid = torch.cat([t[0] + size * torch.arange(n, dtype=t.dtype), t[-1:]])
        elif "grid_constructor" in options:
            grid = options["grid_constructor"](None, None, t)
        elif len(t) == 2 and self.drawn.steps is not None:
            grid = _refined(t, self.drawn.steps)
        return _refined(grid, self.refine)

    def solve(self, *, rounded: bool = False) -> tuple[list[Parts], Evaluate]:
        """Return the states at the call's times, and what evaluated them."""
        drawn, t, evaluate = self.drawn, self.t, self._evaluate(rounded=rounded)
        name = drawn.key[0]
        if len(t) == 1 or drawn.is_empty:
            states = [self.y0] * len(t)
        elif name == "dopri5_per_sample" or (drawn.is_whole and self.refine > 1):
            states = reference.exact(evaluate, self.y0, t)
        elif name == "bns":
            states = self._bespoke(evaluate)
        elif name == "dise":
            states = self._dise(evaluate)
        else:
            interp = drawn.options.get("interp", "linear")
            states = self._stepper(evaluate).solve(self.y0, t, self._grid(t), interp)
        return states, evaluate

    def calls(self, evaluate: Evaluate) -> int | None:
        """Return the calls of func that a solve costs; None where that is not defined."""
        drawn = self.drawn
        if drawn.options.get("interp") != "cubic" or len(self.t) == 1:
            return evaluate.calls
        if drawn.is_plugins or "perturb" in drawn.options:
            return None
        # A step's slope at its end is the next one's at its start: one more call at the end.
        n_stages = len(self._stepper(evaluate).table[1])
        return n_stages * (len(self._grid(self.t)) - 1) + 1

    def _bespoke(self, evaluate: Evaluate) -> list[Parts]:
        drawn, t = self.drawn, self.t
        stepper = Stepper(evaluate, reference.TABLES["euler"], self._net())
        weights, knots = drawn.solved_by["weights"], drawn.solved_by["knots"]
        span = (t[0], t[-1])
        if drawn.domain_span is not None:
            end = torch.tensor(drawn.domain_span[1], dtype=torch.float64)
            misses = float((t[-1] - end).detach().abs())
            span = (t[0], t[-1] if misses <= 1e-6 * float((end - t[0]).detach().abs()) else end)
        solved = reference.bespoke(stepper, weights, self.y0, span)
        states = [self.y0]
        for at in t[1:]:
            if knots is None and bool((at - span[1]).abs() > 1e-6 * (span[1] - span[0]).abs()):
                states.append(tuple(torch.full_like(p, torch.nan) for p in self.y0))  # not defined
            elif knots is None:
                states.append(solved[0])
            else:
                length = span[1] - span[0]
                share = (at - span[0]) / length
                states.append(
                    reference.between(knots, weights, solved, self.y0, share=share, length=length)
                )
        return states

    def _dise(self, evaluate: Evaluate) -> list[Parts]:
        drawn, t = self.drawn, self.t
        y0 = self.y0 if drawn.is_tuple else self.y0[0]
        selection = drawn.solved_by["selector"](y0).argmin(1)
        solutions = []
        for name, settings in drawn.solved_by["candidates"]:
            if name.startswith("dopri5"):
                solutions.append(reference.exact(evaluate, self.y0, t))
                continue
            base, net, steps = {"heun2": "heun", "solver": "heun"}.get(name, name), None, 1
            if name == "solver":
                net = settings["net"]
                steps = settings["steps"] if len(t) == 2 and settings["steps"] else 1
            else:
                steps = settings["steps"] or 1
            stepper = Stepper(evaluate, reference.TABLES[base], net)
            solutions.append(stepper.solve(self.y0, t, _refined(t, steps)))
        rows = torch.arange(len(selection))
        return [
            tuple(
                torch.stack([solution[i][p] for solution in solutions])[selection, rows]
                for p in range(len(self.y0))
            )
            for i in range(len(t))
        ]

    def until(self, *, rounded: bool = False) -> tuple[Tensor, list[Parts], Evaluate]:
        """Return the event's time, the states at start and event, and what evaluated them."""
        drawn, evaluate = self.drawn, self._evaluate(rounded=rounded)
        event, t0 = event_of(drawn)
        size = drawn.options["step_size"] * (-1 if drawn.solved_by["reverse"] else 1)
        start = t0[0].double(), self.y0
        interp = drawn.options["interp"]
        time, state = self._stepper(evaluate).until(start, size, event, interp)
        return time, [self.y0, state], evaluate


def _refined(t: Tensor, n: int) -> Tensor:
    if n == 1 or len(t) < 2:
        return t
    inner = torch.arange(n, dtype=t.dtype) / n
    return torch.cat([torch.lerp(t[:-1, None], t[1:, None], inner).flatten(), t[-1:]])


def size_of(states: list[Parts]) -> float:
    """Return the largest number in some states."""
    sizes = [float(part.detach().abs().max()) for y in states for part in y if part.numel()]
    return max([0.0, *sizes])


def _distance(a: list[Parts], b: list[Parts]) -> float:
    pairs = [(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)]
    sizes = [float((p - q).abs().nan_to_num(0.0).max()) for p, q in pairs if p.numel()]
    return max([0.0, *sizes])


def time_slack(drawn: Draw) -> float:
    """Return how far a time may be off: times are added up in their own dtype, or float32."""
    narrow = torch.promote_types(drawn.t.dtype, torch.float32)
    if drawn.entry == "event" and drawn.real != torch.float64:
        narrow = torch.float32
    eps = torch.finfo(narrow).eps
    if "perturb" in drawn.options:  # to the next number of the state's dtype
        eps = max(eps, torch.finfo(drawn.real).eps)
    return eps * float(drawn.t.abs().max())


@torch.no_grad()
def expected(drawn: Draw) -> Expected | None:
    """Return what the call must answer, and by how much it may miss it; None: it must not."""
    if must_refuse(drawn):
        return None
    own, time = Reference(drawn), None
    if drawn.entry == "event":
        at, states, evaluate = own.until()
        _, rough, _ = own.until(rounded=True)
        time = float(at)
    else:
        states, evaluate = own.solve()
        rough, _ = own.solve(rounded=True)
    span = float((own.t[-1] - own.t[0]).abs()) if time is None else abs(time - float(own.t[0]))
    scale = size_of(states) + evaluate.largest * span
    slack = 20 * _distance(states, rough)
    slack += 8 * torch.finfo(drawn.dtype).eps * (1 + min(evaluate.calls, 30)) * scale
    if isinstance(drawn.net, nn.Module):
        slack += 20 * torch.finfo(next(drawn.net.parameters()).dtype).eps * scale
    slack += 30 * time_slack(drawn) * (evaluate.largest + scale)
    if "min_step" in drawn.options:
        slack = math.inf  # steps are accepted whatever their error
    if drawn.tells_samples_apart:
        slack += 30 * (drawn.rtol * scale + drawn.atol)
    # What finds a shared buffer, or gives a bespoke solver's times their gradients, may call.
    is_free = drawn.tells_samples_apart or drawn.is_empty or time is not None
    is_free |= drawn.key[0] == "bns" and drawn.wants_gradient
    is_free |= drawn.field_kind == "buffer" or drawn.entry in ("torchdyn", "NeuralODE", "adjoint")
    # nan stands for what a method does not define, inf for nothing.
    stays_finite = not any(
        bool((~p.isfinite() & ~q.isnan()).any())
        for x, y in zip(rough, states, strict=True)
        for p, q in zip(x, y, strict=True)
    )
    count = None if is_free else own.calls(evaluate)
    return Expected(states, slack, time, count, stays_finite)


def must_refuse(drawn: Draw) -> bool:
    """Return whether the method has no answer to the call."""
    if drawn.entry == "event" and drawn.is_whole:
        return True
    if drawn.tells_samples_apart:
        sizes = {part.shape[:1] for part in drawn.y0}
        if len(sizes) > 1 or not all(sizes):
            return True
    if drawn.entry != "event" and (drawn.is_empty or len(drawn.t) < 2):
        return False  # no step is taken
    return isinstance(drawn.net, tdh.ConcatHypernet) and drawn.dtype.is_complex


def may_refuse(drawn: Draw) -> bool:
    """Return whether the method may say that it cannot answer the call."""
    if drawn.field_kind == "burst" or (drawn.tells_samples_apart and drawn.couples_samples):
        return True
    names = [drawn.key[0], *(name for name, _ in drawn.solved_by.get("candidates", ()))]
    # vmap knows no given outputs; an error estimate in half precision may be all noise.
    return "dopri5_per_sample" in names and (drawn.is_half or drawn.field_kind == "buffer")
