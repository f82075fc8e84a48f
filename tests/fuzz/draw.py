"""Random calls: which method, how it is reached, on what state, times and options."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import torchdiffeq_hyper as tdh
from fuzz.drawn import Draw
from fuzz.fields import ContextField, Field
from fuzz.parts import draw_part
from torchdiffeq_hyper.methods import _registry

METHODS = tuple(name for name, m in _registry.methods().items() if m.fitted is None)

DTYPES = (
    *[torch.float64] * 4,
    *[torch.float32] * 4,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
)
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "0-d": ((),),
    "vector": ((3,),),
    "batch": ((4, 3),),
    "one sample": ((1, 2),),
    "images": ((2, 3, 4, 4),),
    "empty batch": ((0, 3),),
    "empty samples": ((3, 0),),
    "tuple": ((4, 3), (4,)),
    "tuple of images": ((2, 3, 4, 4), (2, 5), (2,)),
    "tuple of unlike parts": ((2, 3), (4,), ()),
    "tuple of one": ((3, 2),),
    "large": ((2**18 + 1, 1),),
}
USUAL = [name for name in SHAPES if name != "large"]


def draw(name: str, seed: int, number: int) -> Draw:
    """Return the call with that number: the same every time."""
    rng = random.Random(f"{name} {seed} {number}")
    torch.manual_seed(rng.getrandbits(32))
    method = _registry.find(name)
    is_ours = method.corrects_base or method.kind is not None
    # A plugin's own solver class is as good in half precision as the plugin makes it.
    dtype = rng.choice(DTYPES if is_ours else DTYPES[:8])
    shape = "large" if rng.random() < (0.02 if name == "bns" else 0.002) else rng.choice(USUAL)
    shapes = SHAPES[shape]
    is_tuple = shape.startswith("tuple")
    scale = rng.choice([1.0] * 6 + [1e-3, 30.0])
    y0 = tuple(_start(rng, size, dtype, scale) for size in shapes)
    vector_field = _field(rng, dtype, shapes, is_tuple=is_tuple)
    if not is_ours and getattr(vector_field, "kind", "") in ("burst", "strong", "buffer"):
        vector_field.kind = "decay"
    func = vector_field
    if isinstance(vector_field, ContextField):
        rate = torch.rand(len(y0[0]), *[1] * (y0[0].dim() - 1), dtype=torch.float64) + 0.2
        func = tdh.Conditioned(vector_field, rate.to(y0[0].real.dtype))
    drawn = Draw(
        key=(name, seed, number),
        method=method,
        entry="",
        dtype=dtype,
        shape=shape,
        field=vector_field,
        func=func,
        is_tuple=is_tuple,
        y0=y0,
        t=_times(rng, dtype, any_dtype=is_ours),
        mode=rng.choice(["grad", "grad", "no_grad", "inference"]),
    )
    if drawn.field_kind == "buffer" and name == "dise":
        vector_field.kind = "decay"  # the host's own methods mix up what lies in one buffer
    if drawn.field_kind == "buffer":
        drawn.mode = rng.choice(["no_grad", "inference"])
    draw_part(rng, drawn)
    _entry(rng, drawn)
    can_differ = drawn.mode == "grad" and dtype in (torch.float64, torch.complex128)
    can_differ &= shape != "large" and not (drawn.entry == "adjoint" and drawn.is_empty)
    can_differ &= drawn.entry != "event" and drawn.field_kind != "burst"
    if can_differ and (drawn.entry == "adjoint" or rng.random() < 0.5):
        drawn.wants_gradient = not (dtype.is_complex and drawn.entry == "adjoint")
    return drawn


def _start(rng: random.Random, size: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    y = (torch.randn(size, dtype=wide) * scale).to(dtype)
    if len(size) > 1 and rng.random() < 0.2:  # as a transposed tensor lies in memory
        y = y.transpose(0, -1).contiguous().transpose(0, -1)
    return y


def _field(
    rng: random.Random, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], *, is_tuple: bool
) -> Any:
    kinds = ["decay", "driven", "driven"]
    kinds += [] if dtype.is_complex else ["wave", "wave", "net"]  # these have poles or grow
    if not any(size == () for size in shapes):
        kinds += ["rotation", "mean"]
        kinds += [] if is_tuple else ["context"]
    if not is_tuple:
        kinds.append("buffer")
    kind = rng.choice(kinds)
    chance = rng.random()
    if chance < 0.01:
        kind = "burst"
    elif chance < 0.02 or (dtype == torch.float16 and chance < 0.08):
        kind = "strong"
    if kind == "context":
        return ContextField(dtype)
    return Field(kind, dtype, (rng.uniform(0.2, 1), rng.uniform(-1, 1), rng.uniform(0.1, 1)))


def _times(rng: random.Random, dtype: torch.dtype, *, any_dtype: bool) -> Tensor:
    n = rng.choice([1, 2, 2, 2, 2, 2, 3, 5, 9])
    span = rng.choice([0.3, 1.0, 1.0, 2.0])
    start = rng.choice([0.0, 0.0, 0.0, 0.5, -1.3, -0.5, 100.0, 3e4])
    inner = sorted(rng.random() for _ in range(max(n - 2, 0)))
    points = [start + span * share for share in [0.0, *inner, 1.0][:n]]
    if rng.random() < 0.4:
        points.reverse()
    real = dtype.to_real() if dtype.is_complex else dtype
    others = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    t_dtype = rng.choice([real, real, *others]) if any_dtype else real
    t = torch.tensor(points, dtype=torch.float64)
    cast = t.to(t_dtype)
    # Distinct after the cast, or in double precision.
    gaps = cast.double().diff().abs()
    if n > 1 and not bool(torch.isfinite(cast).all() and (gaps > 0.01 * span).all()):
        gaps = t.diff().abs()
        cast = t if bool((gaps > 1e-4 * span).all()) else t[[0, -1]]
    return cast


ENTRIES = ("odeint", "odeint", "attach", "using", "published", "override", "adjoint", "solve")


def _entry(rng: random.Random, drawn: Draw) -> None:
    entries = ["odeint", "adjoint"] if drawn.part is None else [*ENTRIES]
    # torchdyn knows no tuples, and no solver classes of torchdiffeq.
    is_limited = "max_num_steps" in drawn.options  # which torchdyn has no place for
    if len(drawn.t) > 1 and not (drawn.is_tuple or drawn.is_plugins or is_limited):
        entries += ["torchdyn", "NeuralODE"] if drawn.field_kind != "context" else []
    entries += [] if drawn.is_whole else ["event", "event"]
    if rng.random() < 0.02:
        entries = ["event"]
    drawn.entry = rng.choice(entries)
    if drawn.entry in ("torchdyn", "NeuralODE"):
        drawn.options.clear()  # there are none
    if drawn.entry == "override":
        drawn.options["override"] = rng.choice(["dopri5", "rk4", "euler"])
    if drawn.entry == "event":
        _event(rng, drawn)
    elif not drawn.is_whole and drawn.entry in ("odeint", "attach", "using", "adjoint"):
        _grid_options(rng, drawn)


def _grid_options(rng: random.Random, drawn: Draw) -> None:
    takes_net = drawn.part is not None and drawn.entry in ("odeint", "adjoint")
    if takes_net and drawn.solved_by["part"] is None and rng.random() < 0.3:
        drawn.options["hypernet"] = drawn.net
        drawn.steps = None
        drawn.notes.append("bare net")
    if rng.random() < 0.15 and drawn.method.tableau and drawn.method.tableau.alpha is not None:
        drawn.options["alpha"] = drawn.alpha = rng.choice([0.5, 0.7, 1.0])
        drawn.notes.append(f"option alpha={drawn.alpha}")
    elif "hypernet" in drawn.options:
        drawn.alpha = None
    if len(drawn.t) < 2:
        return
    kind = rng.choice(["none", "none", "step_size", "grid_constructor"])
    if kind == "step_size":
        # No whole number of steps, so that rounding cannot add one.
        length = abs(float(drawn.t[-1]) - float(drawn.t[0]))
        drawn.options["step_size"] = length / (rng.choice([1, 3, 6, 12]) - 0.4)
    elif kind == "grid_constructor":
        power, n = rng.choice([1, 2]), rng.choice([1, 4, 7])
        drawn.options["grid_constructor"] = lambda func, y0, t: torch.cat(
            [
                t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, n + 1, dtype=t.dtype)[:-1] ** power,
                t[-1:],
            ]
        )
    if rng.random() < 0.4:
        drawn.options["interp"] = rng.choice(["linear", "cubic"])
    if rng.random() < 0.15:
        drawn.options["perturb"] = True
    drawn.notes += [f"{k}={v}" for k, v in drawn.options.items() if isinstance(v, float | str)]
    drawn.notes += [name for name in ("grid_constructor", "perturb") if name in drawn.options]


def _event(rng: random.Random, drawn: Draw) -> None:
    if abs(float(drawn.t[0])) > 50:  # the host adds 1 to the start
        drawn.t = torch.tensor([rng.choice([0.0, 0.5, -1.25])], dtype=drawn.t.dtype)
    how = {"step_size": rng.choice([0.11, 0.23, 0.5]), "interp": rng.choice(["linear", "cubic"])}
    if not drawn.is_whole:
        drawn.options |= how
    drawn.solved_by["after"] = rng.uniform(0.2, 1.9)
    drawn.solved_by["reverse"] = rng.random() < 0.4
    drawn.solved_by["adjoint"] = rng.random() < 0.3
    drawn.notes.append(
        f"step_size={how['step_size']} {how['interp']} reverse={drawn.solved_by['reverse']} "
        f"adjoint={drawn.solved_by['adjoint']}"
    )
