"""Makes drawn calls and compares their answers with what they must be."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl import rk_common

import torchdiffeq_hyper as tdh
from fuzz.calls import call, mode_of
from fuzz.drawn import Draw
from fuzz.expected import Expected, expected, may_refuse, size_of
from fuzz.gradients import compare_gradients
from fuzz.reference import Parts


def check(drawn: Draw) -> str | None:
    """Make the call; return what is wrong with the answer, or None."""
    want = expected(drawn)
    y0 = tuple(part.clone().requires_grad_(drawn.wants_gradient) for part in drawn.y0)
    t = drawn.t.clone().requires_grad_(drawn.wants_gradient)
    try:
        answer = _answer(drawn, y0, t)
    except tdh.HyperError as error:
        if want is None or may_refuse(drawn) or not _is_representable(want, drawn):
            return None
        return f"refused: {type(error).__name__}: {_line(error)}"
    except Exception as error:  # noqa: BLE001 - which is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        is_hosts = drawn.key[0] == "dise" and _is_of_the_host(place.filename, error)
        return None if is_hosts else f"raw {type(error).__name__} at {where}: {_line(error)}"
    if want is None:
        return "answered what the method cannot do"
    wrong = _compare_call(drawn, (y0, t), want) or _compare(drawn, answer, want)
    if wrong is None and drawn.wants_gradient:
        return compare_gradients(drawn, answer, (y0, t))
    return wrong


def _compare_call(drawn: Draw, given: tuple[Parts, Tensor], want: Expected) -> str | None:
    """Return what is wrong with what the call did to its arguments and to func."""
    y0, t = given
    if not all(map(torch.equal, y0, drawn.y0)) or not torch.equal(t, drawn.t):
        return "the start or the times were written to"
    # torchdyn makes calls of its own; beside wider times a 0-d state is widened by the host.
    is_hosts = drawn.entry in ("torchdyn", "NeuralODE") or any(p.dim() == 0 for p in y0)
    if drawn.field.complaints and not is_hosts:
        return "; ".join(sorted(drawn.field.complaints))
    if want.calls is not None and drawn.field.calls != want.calls:
        return f"{drawn.field.calls} calls of func instead of {want.calls}"
    return None


def _is_of_the_host(file: str, error: Exception) -> bool:
    """Return whether the host's own solver, a candidate of dise, gives up as it does alone."""
    return "underflow in dt" in str(error) and Path(file) == Path(rk_common.__file__)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _answer(drawn: Draw, y0: Parts, t: Tensor) -> Any:
    with warnings.catch_warnings(), mode_of(drawn):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", tdh.errors.HyperWarning)
        if drawn.mode == "inference":
            y0 = tuple(part.clone() for part in y0)
        drawn.field.calls = 0
        return call(drawn, y0 if drawn.is_tuple else y0[0], t)


def _is_representable(want: Expected, drawn: Draw) -> bool:
    """Return whether all that is wanted fits well into the dtype."""
    are_finite = all(bool(torch.isfinite(part).all()) for y in want.states for part in y)
    return (
        are_finite
        and want.stays_finite
        and size_of(want.states) < 0.9 * torch.finfo(drawn.dtype).max
    )


def _compare(drawn: Draw, answer: Any, want: Expected) -> str | None:
    """Return what is wrong with the numbers, shapes and dtypes."""
    slack = want.slack
    if want.time is not None:
        time, answer = float(answer[0].detach()), answer[1]
        late = slack / (1 + size_of(want.states)) + 1e-6 + 1e-6 * abs(want.time)
        late += 4 * torch.finfo(drawn.t.dtype).eps * abs(want.time)
        if not abs(time - want.time) <= late:
            return f"event at {time:.8g} instead of {want.time:.8g} (slack {late:.2g})"
        slack += late * 3 * (1 + size_of(want.states))
    parts = answer if drawn.is_tuple else (answer,)
    if not isinstance(parts, tuple) or len(parts) != len(drawn.y0):
        return f"returned a {type(answer).__name__}"
    for index, (part, start) in enumerate(zip(parts, drawn.y0, strict=True)):
        states = torch.stack([y[index] for y in want.states])
        wrong = _compare_part(part, states, start, slack)
        if wrong is not None:
            return f"part {index} {wrong}, size {size_of(want.states):.3g}"
    return None


def _compare_part(part: Any, states: Tensor, start: Tensor, slack: float) -> str | None:
    """Return what is wrong with a part; nan in ``states`` stands for what is not defined."""
    if not isinstance(part, Tensor) or part.shape != states.shape:
        return f"has shape {getattr(part, 'shape', None)} instead of {tuple(states.shape)}"
    if part.dtype != start.dtype or part.device != start.device:
        return f"is {part.dtype} on {part.device}"
    got = part.detach().to(states.dtype)
    if got.isnan().any() or bool((got.isinf() & ~states.isnan()).any()):
        return "holds inf or nan"
    off = torch.where(states.isnan(), 0, got - states).abs()
    if not part.numel() or float(off.max()) <= slack:
        return None
    at = int(off.reshape(len(states), -1).amax(1).argmax())
    return f"is off by {float(off.max()):.3g} at point {at} of {len(states)} (slack {slack:.2g})"
