"""What a candidate's answer for a sample costs: its calls of func, or a penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from torchdiffeq_hyper._fields._wrappers import SHAPE_CLASHES
from torchdiffeq_hyper._rules import Real, Rule, checked_arguments, shown
from torchdiffeq_hyper._state import State, map_parts, parts_of, take
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, check_callable


class Verdict(NamedTuple):
    """Whether each answer is good enough, and a call's weight in a right one; both (batch,)."""

    is_right: Tensor
    weight: Tensor


class Cost(Protocol):
    """A rule for what answers cost: `ClassificationCost`, `RegressionCost`, or one of your own.

    ``alpha`` is the exponent of costs, ``penalty`` M, what a wrong answer costs at alpha = 1.
    """

    alpha: float
    penalty: float

    def check(self, batch: int) -> None:
        """Raise if the cost belongs to another number of samples."""

    def judge(self, solution: State, index: Tensor) -> Verdict:
        """Return which answers are right, and what a call of func counts for in them.

        ``solution`` is (times, batch, ...), ``index`` the samples' positions in y0 (batch,).
        """


def check_number(name: str, value: Any, rule: Rule, fix: str) -> None:
    """Refuse a number that is not what its rule says; numpy's floats count as Python's."""
    plain = float(value) if isinstance(value, float) else value
    checked_arguments({name: rule}, {name: plain}, fix)


def check_settings(alpha: float, penalty: float) -> tuple[float, float]:
    """Return alpha and M, after checking that both are finite numbers above 0."""
    check_number("alpha", alpha, Real(above=0.0), "alpha=0.3")
    check_number("penalty", penalty, Real(above=0.0), "penalty=1000.0")
    return float(alpha), float(penalty)


def _end(solution: State) -> State:
    return map_parts(lambda part: part[-1], solution)


class ClassificationCost:
    r"""Calls of func where the class is right, a penalty where it is wrong.

    .. math:: c = \Delta^\alpha \text{ if the prediction is right, else } M^\alpha

    with :math:`\Delta` the calls of func for the sample, solved alone: equation 4 of "DISE:
    Dynamic Integrator Selection to Minimize Forward-pass Time in Neural ODEs", ICLR 2021
    submission.

    Args:
        predict: maps the state at t[-1] to logits (batch, classes).
        labels: the right classes (batch,), integers.
        alpha: above 0; the larger, the less calls matter beside right answers.
        penalty: M, what a wrong answer costs, in calls of func; more than any candidate takes.

    Raises:
        OptionError: ``alpha`` or ``penalty`` is not a finite number above 0.
        StateTypeError: ``predict`` is not callable, or ``labels`` are no integers.
        StateShapeError: ``labels`` are not 1-D.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> cost = tdh.ClassificationCost(lambda y: y, torch.tensor([0, 1]), 0.3, 1000.0)
        >>> solution = torch.tensor([[[2.0, 1.0], [2.0, 1.0]]])  # (times, batch, classes)
        >>> cost.judge(solution, torch.arange(2)).is_right
        tensor([ True, False])
    """

    def __init__(
        self, predict: Callable[[State], Tensor], labels: Tensor, alpha: float, penalty: float
    ) -> None:
        check_callable("predict", predict, "predict=model.classifier")
        problem, expected = f"labels are {shown(labels)}.", "integers (batch,): the classes."
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            fix = "labels = torch.as_tensor(labels).long()"
            raise StateTypeError(problem=problem, expected=expected, fix=fix)
        if labels.dim() != 1:
            fix = "labels = labels.argmax(dim=1)   # from one-hot rows"
            raise StateShapeError(problem=problem, expected=expected, fix=fix)
        self.predict, self.labels = predict, labels
        self.alpha, self.penalty = check_settings(alpha, penalty)

    def check(self, batch: int) -> None:
        """Raise `StateShapeError` unless there are as many labels as samples."""
        if len(self.labels) != batch:
            problem = f"there are {len(self.labels)} labels and {batch} samples in y0."
            fix = "labels=labels[: len(y0)]"
            raise StateShapeError(problem=problem, expected="a label for each sample.", fix=fix)

    def judge(self, solution: State, index: Tensor) -> Verdict:
        """Return which samples are classified rightly from their final states.

        Raises:
            StateShapeError: ``predict`` returned no (batch, at least two classes).
            OptionError: a label is none of the classes.
        """
        logits = self.predict(_end(solution))
        is_matrix = isinstance(logits, Tensor) and logits.dim() == 2
        if not is_matrix or len(logits) != len(index) or logits.shape[1] < 2:
            raise StateShapeError(
                problem=f"predict returned {shown(logits)} for {len(index)} samples.",
                expected="logits of shape (batch, classes), of at least two classes.",
                fix="predict=lambda y: torch.cat([-score(y), score(y)], dim=1)   # of one score",
            )
        classes, labels = logits.shape[1], self.labels.to(logits.device)[index]
        if bool(((labels < 0) | (labels >= classes)).any()):
            low, high = int(labels.min()), int(labels.max())
            problem = f"labels lie in {low} to {high}, and predict knows {classes} classes."
            fix = "labels = labels - labels.min()   # if they are counted from 1"
            raise OptionError(problem=problem, expected=f"0 to {classes - 1}.", fix=fix)
        is_right = logits.argmax(dim=1) == labels
        return Verdict(is_right, torch.ones(len(index), device=logits.device))


class RegressionCost:
    r"""Calls of func times the error where it is small enough, a penalty where it is not.

    .. math:: c = (\Delta\,\Gamma)^\alpha \text{ if } \Gamma \le \beta, \text{ else } M^\alpha

    with :math:`\Delta` the calls of func for the sample, solved alone: equation 5 of the paper
    that `ClassificationCost` names.

    Args:
        error: called as ``error(y, index)`` with the solution and the samples' positions
            ``index`` (batch,); returns Gamma (batch,), at least 0.
        threshold: beta, the largest error that counts as right.
        alpha: above 0; the larger, the less calls matter beside right answers.
        penalty: M, what a wrong answer costs; more than any right one.
        at: "all" gives ``error`` the solution (len(t), batch, ...), "end" the state at t[-1];
            None the first, and the second if its answer to that has not the shape (batch,).

    Raises:
        OptionError: a number is not finite and above 0, or ``at`` is something else.
        StateTypeError: ``error`` is not callable.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> error = lambda y, index: (y - torch.tensor([1.0, 2.0])[index]).abs()
        >>> cost = tdh.RegressionCost(error, 0.5, alpha=0.5, penalty=100.0)
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
            problem, expected = f"at is {at!r}.", '"end", "all" or None.'
            raise OptionError(problem=problem, expected=expected, fix='at="end"')
        check_number("threshold", threshold, Real(above=0.0), "threshold=0.1")
        self.error, self.at, self.threshold = error, at, float(threshold)
        self.alpha, self.penalty = check_settings(alpha, penalty)

    def check(self, batch: int) -> None:
        """Accept any number of samples: ``error`` finds its targets by their positions."""

    def judge(self, solution: State, index: Tensor) -> Verdict:
        """Return which samples have a small enough error, and that error as their weight.

        Raises:
            StateShapeError: ``error`` returned another shape than (batch,).
            OptionError: an error is below 0.
        """
        gamma = self._gamma(solution, index)
        fix = 'error=lambda y, index: (y - x[index]).flatten(1).norm(dim=1), at="end"'
        if not isinstance(gamma, Tensor) or gamma.shape != index.shape:
            problem = f"error returned {shown(gamma)} for {len(index)} samples (at={self.at!r})."
            raise StateShapeError(problem=problem, expected="Gamma of shape (batch,).", fix=fix)
        if bool((gamma < 0).any()):
            problem = f"error returned {float(gamma.min()):.3g}."
            raise OptionError(problem=problem, expected="errors of at least 0.", fix=fix)
        is_right = gamma <= self.threshold
        return Verdict(is_right, torch.where(is_right, gamma, 0.0))

    def _gamma(self, solution: State, index: Tensor) -> Any:
        """Return what ``error`` answers, given what it takes."""
        if self.at is not None:
            return self.error(_end(solution) if self.at == "end" else solution, index)
        if len(parts_of(solution)[0]) == len(index) > 1:
            # One error a time would look like one a sample: ask with fewer samples.
            positions = torch.arange(len(index), device=index.device)
            gammas = [
                self._gamma(take(solution, part, dim=1), index[part])
                for part in positions.split(len(index) - 1)
            ]
            return torch.cat(gammas) if all(isinstance(g, Tensor) for g in gammas) else None
        try:
            gamma = self.error(solution, index)
        except SHAPE_CLASHES:
            gamma = None  # it may take the final state only, and says what is wrong below
        is_of_samples = isinstance(gamma, Tensor) and gamma.shape == index.shape
        return gamma if is_of_samples else self.error(_end(solution), index)
