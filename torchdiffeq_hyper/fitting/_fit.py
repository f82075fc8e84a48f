"""`fit`: a learned solver for a vector field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from torchdiffeq_hyper._fields._wrappers import check_shareable
from torchdiffeq_hyper._state import State, VectorField
from torchdiffeq_hyper.errors import StateTypeError
from torchdiffeq_hyper.fitting._bespoke import BespokeTarget
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._distributed import ProcessGroup
from torchdiffeq_hyper.fitting._engine import Target, run
from torchdiffeq_hyper.fitting._hypersolver import HypersolverTarget
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._solver import Solver

TARGETS: dict[str, type[Target]] = {"bns": BespokeTarget}
"""What is fitted for a base, where it is not a hypersolver's net."""


def fit(
    func: VectorField,
    y0: State | Iterable[object],
    t_span: tuple[float, float] | Tensor,
    *,
    base: str,
    steps: Steps,
    hypernet: nn.Module | str | None = None,
    alpha: float | None = None,
    objective: str = "combined",
    direction: str = "forward",
    config: FitConfig | None = None,
    progress: bool = True,
    context: Tensor | tuple[Tensor, ...] | Literal["batch"] | None = None,
) -> Solver:
    r"""Fit the correction g of a hypersolver to a vector field, in about two minutes.

    Reference solutions are computed once a batch, at tight tolerances and in float64, for
    as many batches as fit into 1 GiB and 30 % of the time. They show the residuals

    .. math:: R_n = (y(t_{n+1}) - y(t_n) - dt\,\psi(t_n, y(t_n))) / dt^{p+1}

    The residual phase minimises the mean over n of :math:`|R_n - g|_2`, which costs calls
    of g only; the trajectory phase minimises :math:`\sum_n |y(t_n) - y_n|_2` of the
    solver's own roll-out, with gradients through func. A part of the samples is held out;
    the state with the smallest held-out error is returned, be it the unfitted one.

    With base="bns" the weights and times of a `BespokeSolver` are fitted instead. They
    start as the classical method that has the smallest held-out error with as many calls
    of func, and Levenberg-Marquardt steps minimise the mean of
    :math:`|y(T) - y_n|_2 / |y(T)|_2` at the span's end T; the held-out error is the same
    mean. Norms are over all parts of a tuple: scale func so that those that matter have
    numbers of like size. A step costs about n^3/6 calls of func on a few samples, and no
    gradient of func. Where steps bring no gain, they look at more samples; then the descent
    ends, and where there is time one from the next best classical method follows.
    ``hypernet=None`` means no correction; one that is given is fitted after the weights. The
    span, one direction and one number of calls belong to the result.

    func is fitted in evaluation mode. Its modules come back as found (mode,
    ``requires_grad``, gradients, buffers, attributes such as ``self.nfe``), on errors, too:
    func itself, the instance of a bound method, what a `functools.partial` holds. What a
    closure hides is neither put in evaluation mode nor restored: call ``model.eval()``
    yourself there. The global random state is not touched.

    Where ``torch.distributed.init_process_group`` was called (under torchrun, say), all
    its processes must call `fit`, with the same arguments. Each takes its share of every
    batch (an iterable yields the same whole batches everywhere), rank 0 shows, writes the
    checkpoint and decides by its clock, and all return the same solver, that of a single
    process but for rounding (for "bns" also for how samples are weighed: against the mean error of
    each process's share). An error in one is raised in all. Samples must not depend on each
    other, in func nor in the hypernet.

    Sources: Poli et al., "Hypersolvers: Toward Fast Continuous-Depth Models", NeurIPS 2020,
    https://arxiv.org/abs/2007.09601 (the residuals are its equation 5); Shaul et al.,
    "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models", 2024,
    https://arxiv.org/abs/2403.01329.

    Args:
        func: the vector field ``func(t, y)`` (with context ``func(t, y, *context)``), the same
            answer at each call, for any of the samples; or a torchdyn `NeuralODE`, whose field
            is taken with its order, data control and losses.
        y0: states at ``t_span[0]``, with the samples along dim 0: a tensor, a tuple of
            tensors (one tuple state), or an iterable of batches, pulled once and lazily.
            A batch that is a list counts as its elements' state, as `DataLoader` yields.
            Fit on starts like those the solver will meet, better hundreds than dozens.
        t_span: start and end, in the time unit of func; decreasing is fine.
        base: "euler", "midpoint", "heun", "alpha", "rk4", or "bns".
        steps: equal steps over the span; a (low, high) range fits one net for all of them.
            For "bns", its number of calls of func.
        hypernet: a net g(step) to be trained in place, None for a ready one, or "auto" for
            the ready one that leaves the smallest held-out residual at a cost of at most
            ``config.hypernet_budget`` of func's; ``report.notes`` say which and why.
        alpha: parameter of the base "alpha" (default 0.5).
        objective: "residual", "trajectory", or "combined": the one, then the other.
        direction: "forward" along ``t_span``, "reverse" along the same trajectories from
            their ends back, or "both" with one net.
        config: lengths, rates, tolerances, seed, checkpoint.
        progress: whether to show a progress bar.
        context: what else func is called with, a row for each sample: labels, controls,
            paths, noise. A tensor or a tuple of tensors of any dtype, with the samples of
            ``y0`` along dim 0; or "batch" where ``y0`` is an iterable of batches
            (state, *context). func is called ``func(t, y, *context)`` with the rows of its
            samples. `Conditioned` as func means the same. The solver is then used with
            ``tdh.Conditioned(func, *context)`` as func.

    Returns:
        The solver in evaluation mode, its parameters frozen (``solver.requires_grad_()``
        thaws them), with ``domain`` and ``report`` filled in.

    Raises:
        OptionError: an argument or option is impossible, too few samples, or a checkpoint
            of another fit; or ``context`` does not go with ``func`` or ``y0``.
        StateTypeError: ``y0`` is of integers or complex, ``hypernet`` no trainable module, or
            ``func`` cannot be called with the context.
        StateShapeError: func returned another shape, or holds something of each sample
            without saying so; or parts of ``y0``, or the context, do not match.
        NonFiniteError: func or the reference solution is not finite.
        NoisyFieldError: func answers differently twice at one point.
        NoiseFloorError: the base is already exact to this dtype.
        FitDivergedError: loss or gradient turned non-finite; ``hypernet`` is as before.
        FileFormatError: the checkpoint is damaged.
        FileWriteError: the checkpoint cannot be written.
        RankError: another process failed, or makes another call.

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
    if not isinstance(hypernet, str):
        check_hypernet(hypernet)
    _registry.check_base(base, [*_registry.bases(), *TARGETS])
    group = ProcessGroup.current()
    target = TARGETS.get(base, HypersolverTarget).of(
        func,
        t_span,
        base=base,
        steps=steps,
        hypernet=hypernet,
        alpha=alpha,
        objective=objective,
        direction=direction,
        config=config,
        group=group,
        context=context,
    )
    check_shareable(target.problem.func, group.size)
    return run(target, func, y0, shown=progress)


def check_hypernet(hypernet: object) -> None:
    """Refuse what is neither None nor a module with parameters to train."""
    parameters = hypernet.parameters() if isinstance(hypernet, nn.Module) else ()
    if hypernet is not None and not any(parameter.requires_grad for parameter in parameters):
        raise StateTypeError(
            problem=f"hypernet is a {type(hypernet).__name__} with no parameters to fit: it has no "
            "parameter that requires a gradient.",
            expected="a torch.nn.Module called as g(step), not frozen as a fitted one is; or None "
            "for a ready net.",
            fix="hypernet=tdh.ConcatHypernet(net)\nor hypernet.requires_grad_()",
        )
