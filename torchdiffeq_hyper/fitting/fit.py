"""Fitting the correction of a hypersolver to a vector field."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, closing

import torch
from torch import Tensor, nn

from torchdiffeq_hyper import _registry
from torchdiffeq_hyper._grid import Steps
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.errors import StateTypeError, explain
from torchdiffeq_hyper.fitting.config import FitConfig
from torchdiffeq_hyper.fitting.guard import left_as_found, own_random_state
from torchdiffeq_hyper.fitting.phases import OBJECTIVES
from torchdiffeq_hyper.fitting.problem import Problem
from torchdiffeq_hyper.fitting.progress import Progress
from torchdiffeq_hyper.fitting.routes import Plan, check_choice, check_span
from torchdiffeq_hyper.fitting.session import run
from torchdiffeq_hyper.hypersolver import HyperSolver


def fit(
    func: VectorField,
    y0: State | Iterable[object],
    t_span: tuple[float, float] | Tensor,
    *,
    base: str,
    steps: Steps,
    hypernet: nn.Module | None = None,
    alpha: float | None = None,
    objective: str = "combined",
    direction: str = "forward",
    config: FitConfig | None = None,
    progress: bool = True,
) -> HyperSolver:
    r"""Fit the correction g of a hypersolver to a vector field, in about two minutes.

    Reference solutions are computed once a batch, at tight tolerances and in float64, for
    as many batches as fit into 1 GiB and 30 % of the time. They show the residuals
    ([H] eq. 5)

    .. math:: R_n = (y(t_{n+1}) - y(t_n) - dt\,\psi(t_n, y(t_n))) / dt^{p+1}

    The residual phase minimises the mean over n of :math:`|R_n - g|_2`, which costs calls
    of g only; the trajectory phase minimises :math:`\sum_n |y(t_n) - y_n|_2` of the
    solver's own roll-out, with gradients through func. A part of the samples is held out;
    the state with the smallest held-out error is returned, be it the unfitted one.

    func is fitted in evaluation mode. Its modules come back as found (mode,
    ``requires_grad``, gradients, buffers), on errors, too: func itself, the instance of a
    bound method, what a `functools.partial` holds. What a closure hides is neither put in
    evaluation mode nor restored: call ``model.eval()`` yourself there. The global random
    state is not touched.

    Args:
        func: the vector field ``func(t, y)``, the same answer at each call.
        y0: states at ``t_span[0]``, with the samples along dim 0: a tensor, a tuple of
            tensors (one tuple state), or an iterable of batches, pulled once and lazily.
            A batch that is a list counts as its elements' state, as `DataLoader` yields.
            Fit on starts like those the solver will meet, better hundreds than dozens.
        t_span: start and end, in the time unit of func; decreasing is fine.
        base: "euler", "midpoint", "heun", "alpha" or "rk4".
        steps: equal steps over the span; a (low, high) range fits one net for all of them.
        hypernet: a net g(step) to be trained in place, None for a ready one.
        alpha: parameter of the base "alpha" (default 0.5).
        objective: "residual", "trajectory", or "combined": the one, then the other.
        direction: "forward" along ``t_span``, "reverse" along the same trajectories from
            their ends back, or "both" with one net.
        config: lengths, rates, tolerances, seed, checkpoint.
        progress: whether to show a progress bar.

    Returns:
        The solver in evaluation mode, its parameters frozen (``solver.requires_grad_()``
        thaws them), with ``domain`` and ``report`` filled in.

    Raises:
        OptionError: an argument or option is impossible, too few samples, or a checkpoint
            of another fit.
        StateTypeError: ``y0`` is of integers or complex, or ``hypernet`` no trainable module.
        StateShapeError: func returned another shape, or parts of ``y0`` do not match.
        NonFiniteError: func or the reference solution is not finite.
        NoisyFieldError: func answers differently twice at one point.
        NoiseFloorError: the base is already exact to this dtype.
        FitDivergedError: loss or gradient turned non-finite; ``hypernet`` is as before.
        FileFormatError: the checkpoint is damaged.
        FileWriteError: the checkpoint cannot be written.

    Example:
        >>> import torch
        >>> import torchdiffeq_hyper as tdh
        >>> config = tdh.FitConfig(iterations=200)
        >>> solver = tdh.fit(
        ...     lambda t, y: torch.sin(t) - y,
        ...     torch.linspace(-1, 1, 64).unsqueeze(1),
        ...     (0.0, 1.0),
        ...     base="euler",
        ...     steps=4,
        ...     config=config,
        ...     progress=False,
        ... )
        >>> solver.report.validation < solver.report.base_validation / 5
        True
    """
    span = check_span(t_span)
    problem = Problem(
        func=_check_func(func),
        span=span,
        steps=steps,
        plan=Plan.of(span, steps, direction),
        tableau=_registry.find_tableau(base, alpha),
        direction=direction,
        objective=check_choice("objective", objective, OBJECTIVES),
        config=FitConfig() if config is None else config,
    )
    _check_hypernet(hypernet)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # noqa: FBT003
        stack.enter_context(torch.enable_grad())
        stack.enter_context(own_random_state(problem.config.seed))
        stack.enter_context(left_as_found(func))
        bar = stack.enter_context(
            closing(Progress(f"fit {problem.method}", problem.config.iterations, shown=progress))
        )
        return run(problem, y0, hypernet, bar)


def _check_func(func: VectorField) -> VectorField:
    if not callable(func):
        raise StateTypeError(
            explain(f"func is a {type(func).__name__}.", "a callable func(t, y).", "func=model")
        )
    return func


def _check_hypernet(hypernet: object) -> None:
    if hypernet is None:
        return
    if not isinstance(hypernet, nn.Module):
        raise StateTypeError(
            explain(
                f"hypernet is a {type(hypernet).__name__}: it has no parameters to fit.",
                "a torch.nn.Module called as g(step), or None for a ready net.",
                "hypernet=tdh.ConcatHypernet(net)",
            )
        )
    if not any(parameter.requires_grad for parameter in hypernet.parameters()):
        raise StateTypeError(
            explain(
                "hypernet has no parameter that requires a gradient: nothing can be fitted.",
                "at least one (a fitted net is frozen).",
                "hypernet.requires_grad_()",
            )
        )
