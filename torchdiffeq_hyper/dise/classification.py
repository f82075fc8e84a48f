"""The cost of classifying: calls of func if the class is right, a penalty if not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchdiffeq_hyper._types import State
from torchdiffeq_hyper.dise.costs import Verdict, check_callable, check_settings
from torchdiffeq_hyper.dise.samples import last
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError, explain


class ClassificationCost:
    r"""Calls of func where the class is right, a penalty where it is wrong.

    .. math:: c = \Delta^\alpha \text{ if the prediction is right, else } M^\alpha

    with :math:`\Delta` the calls of func for the sample, solved alone ([D] eq. 4).

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
        self,
        predict: Callable[[State], Tensor],
        labels: Tensor,
        alpha: float,
        penalty: float,
    ) -> None:
        check_callable("predict", predict, "predict=model.classifier")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            raise StateTypeError(
                explain(
                    "labels are "
                    + (f"{labels.dtype}." if isinstance(labels, Tensor) else "no tensor."),
                    "a tensor of integers: each sample's class.",
                    "labels = torch.as_tensor(labels).long()",
                )
            )
        if labels.dim() != 1:
            raise StateShapeError(
                explain(
                    f"labels have shape {tuple(labels.shape)}.",
                    "one class a sample, (batch,).",
                    "labels = labels.argmax(dim=1)   # from one-hot rows",
                )
            )
        self.predict = predict
        self.labels = labels
        self.alpha, self.penalty = check_settings(alpha, penalty)

    def check(self, batch: int) -> None:
        """Refuse labels of another length.

        Raises:
            StateShapeError: there are not as many labels as samples.
        """
        if len(self.labels) != batch:
            raise StateShapeError(
                explain(
                    f"there are {len(self.labels)} labels and {batch} samples in y0.",
                    "a label for each sample, in the same order.",
                    "labels=labels[: len(y0)]",
                )
            )

    def judge(self, solution: State, index: Tensor) -> Verdict:
        """Return which samples are classified rightly from their final states.

        Raises:
            StateShapeError: ``predict`` returned another shape than (batch, classes), or
                fewer than two classes.
            OptionError: a label is none of the classes.
        """
        logits = self.predict(last(solution))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(index):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise StateShapeError(
                explain(
                    f"predict returned {got} for {len(index)} samples.",
                    "logits of shape (batch, classes).",
                    "predict=lambda y: classifier(y.flatten(1))",
                )
            )
        classes, labels = logits.shape[1], self.labels.to(logits.device)[index]
        if classes < 2:
            raise StateShapeError(
                explain(
                    f"predict returned {classes} class: every answer would be the same.",
                    "logits of at least two classes.",
                    "predict=lambda y: torch.cat([-score(y), score(y)], dim=1)",
                )
            )
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise OptionError(
                explain(
                    f"labels lie in {int(labels.min())} to {int(labels.max())}, and predict "
                    f"knows {classes} classes.",
                    f"labels in 0 to {classes - 1}.",
                    "labels = labels - labels.min()   # if they are counted from 1",
                )
            )
        is_right = logits.argmax(dim=1) == labels
        return Verdict(is_right, torch.ones(len(index), device=logits.device))
