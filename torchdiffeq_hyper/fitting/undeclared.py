"""Fields that hold something of every sample, such as noise in a closure, and do not say so.

A fit calls func on some of the samples: such a field fails there, or answers for others.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from torchdiffeq_hyper._layout import StateLayout
from torchdiffeq_hyper._restrict import SHAPE_CLASHES
from torchdiffeq_hyper.errors import CoupledSamplesError, StateShapeError, explain, first_line
from torchdiffeq_hyper.fitting.batches import n_samples, select
from torchdiffeq_hyper.fitting.context import Starts
from torchdiffeq_hyper.fitting.field import Field, wide_dtype
from torchdiffeq_hyper.fitting.neural_ode import NeuralODEField, check_call

SOME = 8
"""Samples that func is called on."""
CHANGE = 1e-2
"""Relative change of the derivatives that is not rounding."""
NOISE = 1e-2
"""Change at a second call, as a share of the change in another order, that is noise."""


@torch.no_grad()
def check_samples(field: Field, count: int, span: tuple[float, float]) -> None:
    """Refuse a field that holds something of each of ``count`` samples without saying so.

    Costs two calls on eight samples: a sample's derivative must not depend on its place in
    the batch. Where func fails on eight, one more call tells whether it takes ``count``
    samples, and these only.

    Args:
        field: the field of some samples, with their context.
        count: samples there are in all.
        span: start and end.

    Raises:
        StateTypeError: func cannot be called with the context.
        StateShapeError: func takes ``count`` samples only.
        CoupledSamplesError: a sample's derivative depends on its place in the batch.
    """
    check_call(field.func, len(field.starts.context))
    # Any number but theirs: a func that holds something of each fails on no other.
    some = torch.arange(SOME if count != SOME else SOME - 1)
    turn = (3 * some + 1) % len(some)  # no symmetry of a line or a ring of points
    t = span[0] + (span[1] - span[0]) / 10  # what is held may not count at the very start
    try:
        k = _derivative(field, some, t)
        # A trace estimator's noise is drawn by places.
        if not isinstance(field.func, NeuralODEField):
            _check_order(field, k, (some, turn), t)
    except CoupledSamplesError:
        raise
    except SHAPE_CLASHES as error:
        if _takes(field, count, t):
            _refuse_size(field, count, len(some), error)
        raise


def _check_order(field: Field, k: Tensor, orders: tuple[Tensor, Tensor], t: float) -> None:
    """Refuse derivatives that depend on the order of the samples."""
    some, turn = orders
    layout = StateLayout.of(_rows(field, some).y0)
    expected = layout.join(select(layout.split(k), turn))
    change = (_derivative(field, turn, t) - expected).norm()
    if not bool(change > CHANGE * expected.norm()):
        return
    # One that answers otherwise at each call is refused by a check of its own.
    if bool((_derivative(field, some, t) - k).norm() > NOISE * change):
        return
    raise CoupledSamplesError(
        explain(
            f"func gives the same samples other derivatives at t = {t:.6g} where their order is "
            "another: it holds something of every sample (labels, controls, noise), or dim 0 of y0 "
            "is not that of samples.",
            "a derivative of each sample that does not depend on its place in the batch.",
            _fix(field),
        )
    )


def _refuse_size(field: Field, count: int, some: int, error: Exception) -> NoReturn:
    reason = first_line(error)
    raise StateShapeError(
        explain(
            f"func takes all {count} samples and fails on {some} ({reason}): it holds something "
            "of every sample (labels, controls, noise) and does not say which row is whose.",
            "a func of any of the samples, called with the rows that are theirs.",
            _fix(field),
        )
    ) from error


def _fix(field: Field) -> str:
    known = "".join(f"known{i}, " for i in range(len(field.starts.context)))
    return (
        f"tdh.fit(tdh.Conditioned(func, {known}labels), y0, t_span, ...)"
        f"   # calls func(t, y, {known}labels)\n"
        'or, for batches (state, labels): tdh.fit(func, loader, t_span, ..., context="batch")\n'
        "or, if dim 0 is one system's (a grid, a graph): y0 = y0.unsqueeze(0), with a func for it"
    )


def _takes(field: Field, count: int, t: float) -> bool:
    """Return whether func takes ``count`` samples."""
    try:
        _derivative(field, torch.arange(count), t)
    except SHAPE_CLASHES:
        return False
    return True


def _derivative(field: Field, order: Tensor, t: float) -> Tensor:
    """Return the flat derivative of some of the field's samples, in an order."""
    rows = _rows(field, order)
    y = StateLayout.of(rows.y0).join(rows.y0)
    wide = wide_dtype(y.device)
    time = torch.tensor(t, dtype=wide, device=y.device)
    return Field(field.func, rows, field.budget)(time, y.to(wide))


def _rows(field: Field, order: Tensor) -> Starts:
    return select(field.starts, order % n_samples(field.starts))
