"""The cost of other tasks: calls of func times the error, a penalty if it is large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.costs import Verdict, check_callable, check_positive, check_settings
from torchdiffeq_hyper.dise.samples import last
from torchdiffeq_hyper.errors import OptionError, StateShapeError, explain


class RegressionCost:
    r"""Calls of func times the error where it is small enough, a penalty where it is not.

    .. math:: c = (\Delta\,\Gamma)^\alpha \text{ if } \Gamma \le \beta, \text{ else } M^\alpha

    with :math:`\Delta` the calls of func for the sample, solved alone ([D] eq. 5).

    Args:
        error: called as ``error(y, index)`` with the solution and the samples' positions
            ``index`` (batch,); returns Gamma (batch,), at least 0.
        threshold: beta, the largest error that counts as right.
        alpha: above 0; the larger, the less calls matter beside right answers.
        penalty: M, what a wrong answer costs; more than any right one.
        at: "all" gives ``error`` the solution at all points of t, (len(t), batch, ...),
            "end" the state at t[-1], (batch, ...). None gives it the first, and the second
            if its answer to that has not the shape (batch,).

    Raises:
        OptionError: ``threshold``, ``alpha`` or ``penalty`` is not a finite number above 0,
            or ``at`` is something else.
        StateTypeError: ``error`` is not callable.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> target = torch.tensor([1.0, 2.0])
        >>> cost = tdh.RegressionCost(
        ...     lambda y, index: (y - target[index]).abs(), 0.5, alpha=0.5, penalty=100.0
        ... )
        >>> cost.judge(torch.tensor([[0.0, 0.0], [1.1, 1.1]]), torch.arange(2)).is_right
        tensor([ True, False])
    """

    def __init__(
        self,
        error: Callable[[State, Tensor], Tensor],
        threshold: float,
        alpha: float,
        penalty: float,
        *,
        at: Literal["end", "all"] | None = None,
    ) -> None:
        check_callable("error", error, "error=lambda y, index: (y - x[index]).norm(dim=1)")
        if at not in ("end", "all", None):
            raise OptionError(explain(f"at is {at!r}.", '"end", "all" or None.', 'at="end"'))
        check_positive("threshold", threshold, "threshold=0.1")
        self.error = error
        self.at = at
        self.threshold = float(threshold)
        self.alpha, self.penalty = check_settings(alpha, penalty)

    def check(self, batch: int) -> None:
        """Accept any number of samples: ``error`` finds its targets by their positions."""

    def judge(self, solution: State, index: Tensor) -> Verdict:
        """Return which samples have a small enough error, and that error as their weight.

        Raises:
            StateShapeError: ``error`` returned another shape than (batch,).
        """
        gamma = self._gamma(solution, index)
        if not isinstance(gamma, Tensor) or gamma.shape != index.shape:
            got = tuple(gamma.shape) if isinstance(gamma, Tensor) else type(gamma).__name__
            raise StateShapeError(
                explain(
                    f"error returned {got} for {len(index)} samples (at={self.at!r}).",
                    "Gamma of shape (batch,).",
                    "error=lambda y, index: (y - x[index]).flatten(1).norm(dim=1)   # y(t[-1])\n"
                    'at="all"   # if error takes y at all points of t, (len(t), batch, ...)',
                )
            )
        if bool((gamma < 0).any()):
            raise OptionError(
                explain(
                    f"error returned {float(gamma.min()):.3g}.",
                    "errors of at least 0.",
                    "error=lambda y, index: (y - x[index]).abs().flatten(1).mean(dim=1)",
                )
            )
        is_right = gamma <= self.threshold
        return Verdict(is_right, torch.where(is_right, gamma, 0.0))

    def _gamma(self, solution: State, index: Tensor) -> Any:
        """Return what ``error`` answers, given what it takes."""
        if self.at is not None:
            return self.error(last(solution) if self.at == "end" else solution, index)
        n_times = (solution if isinstance(solution, Tensor) else solution[0]).shape[0]
        if n_times == len(index) > 1:
            # One error a time would look like one a sample: ask with fewer samples.
            parts = (slice(0, -1), slice(-1, None))
            gammas = [self._gamma(_samples(solution, part), index[part]) for part in parts]
            return torch.cat(gammas) if all(isinstance(g, Tensor) for g in gammas) else None
        try:
            gamma = self.error(solution, index)
        except (RuntimeError, ValueError, IndexError, TypeError):
            gamma = None  # it may take the final state only, and says what is wrong below
        if isinstance(gamma, Tensor) and gamma.shape == index.shape:
            return gamma
        return self.error(last(solution), index)


def _samples(solution: State, part: slice) -> State:
    if isinstance(solution, Tensor):
        return solution[:, part]
    return tuple(values[:, part] for values in solution)
