"""The phases and learning rates of a fit of known length."""

from __future__ import annotations

from dataclasses import dataclass

from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.fitting.annealing import annealed
from torchdiffeq_hyper.fitting.problem import RESIDUAL_SHARE


@dataclass(frozen=True)
class Schedule:
    """When each phase ends.

    Attributes:
        ends: the optimizer steps done by the end of each phase.
    """

    ends: tuple[int, ...]

    @classmethod
    def of(cls, total: float, n_phases: int) -> Schedule:
        """Return the schedule for a number of optimizer steps.

        Raises:
            OptionError: it is infinite.
        """
        if total == float("inf"):
            raise OptionError(
                explain(
                    "the Trainer has no last step, so the learning rate cannot be annealed.",
                    "a number of epochs or steps.",
                    "Trainer(max_epochs=100)   # or max_steps=2000; EarlyStopping may end it",
                )
            )
        last = max(1, int(total))
        return cls((max(1, round(RESIDUAL_SHARE * last)), last)[-n_phases:])

    def phase_at(self, step: int) -> int:
        """Return the number of the phase in which a step is."""
        return sum(step >= end for end in self.ends[:-1])

    def rate_at(self, step: int) -> float:
        """Return the share of the learning rate for a step."""
        number = self.phase_at(step)
        start = self.ends[number - 1] if number else 0
        return annealed(min(1.0, (step - start) / max(1, self.ends[number] - start)))
