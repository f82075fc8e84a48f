"""What a kind of solver has to say so that the engine can fit it: a target and its phases.

The engine (`_engine.run`) checks the field, solves references, trains, compares, reports and
keeps checkpoints. A target says what is trained, from which start, and what becomes of it; its
phases say how. `_hypersolver` and `_bespoke` are the two there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchdiffeq_hyper._state import State
from torchdiffeq_hyper.fitting._budget import Budget, Pace, ReferencePlan
from torchdiffeq_hyper.fitting._checkpoint import FitState, PhaseState
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import Data
from torchdiffeq_hyper.fitting._errors import Comparison
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._problem import Problem
from torchdiffeq_hyper.fitting._reference import Tolerances
from torchdiffeq_hyper.solvers._solver import Solver


class Phase(ABC):
    """One minimisation of a fit: an optimizer and what it minimises.

    Attributes:
        name: the objective's name in the history.
        wanted: iterations wanted.
        gain: fall of the held-out error that counts as progress, relative.
        training: how far the phase is; what a checkpoint holds of it.
        pace: how many iterations end in time.
    """

    name: str
    gain: float = 0.0
    wanted: int
    training: PhaseState
    pace: Pace

    @abstractmethod
    def begin(self, saved: PhaseState | None, budget: Budget) -> bool:
        """Begin, or go on from what a checkpoint holds.

        Returns:
            Whether the net was changed, so that its held-out error has to be measured anew.
        """

    @abstractmethod
    def iterate(self, number: int, done: int) -> float:
        """Do an iteration and return its training loss.

        Args:
            number: iterations of the fit before it.
            done: iterations of the phase before it.

        Raises:
            OutOfTimeError: a reference solution did not end in time, in any process.
            FitDivergedError: loss or gradient turned non-finite.
        """

    @abstractmethod
    def error(self) -> float:
        """Return the held-out error by which states of all phases are compared."""

    @property
    def every(self) -> int:
        """Iterations between two validations."""
        return 1

    def plan(self, done: int) -> int:
        """Return how many iterations to plan for after ``done`` of this phase."""
        return self.wanted

    @abstractmethod
    def validated(self, done: int) -> None:
        """React to a validation, which ``training`` counts already."""

    @abstractmethod
    def has_converged(self, done: int) -> bool:
        """Return whether more iterations would gain nothing."""

    def save(self) -> PhaseState:
        """Return the state of the phase as it is now."""
        return self.training


@dataclass(frozen=True)
class Start:
    """What was measured before the first iteration.

    Attributes:
        error: held-out error of what the fit starts with.
        base_error: held-out error of what it is compared with.
        noise: noise floor.
    """

    error: float
    base_error: float
    noise: float


class Target(ABC):
    """What is fitted: a solver's learned part, its start and its end.

    The engine calls the methods in the order in which they stand here, up to `solver`.

    Attributes:
        problem: the arguments.
        method: the method string of the solver.
        order: the order p of the base: g is multiplied by dt^(p+1).
        net: the net that is trained in place, None without.
        module: what is trained, with all its parameters.
        phase_states: the kind of state of each phase.
    """

    problem: Problem
    method: str
    order: int
    net: nn.Module | None
    module: nn.Module
    phase_states: Sequence[type[PhaseState]]

    def config_for(self, y0: object) -> FitConfig:
        """Return the configuration that batches are made with."""
        return self.problem.config

    @abstractmethod
    def open(self, y0: State) -> None:
        """Set ``net``, and ``module`` if it is known already, for starts like ``y0``."""

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Return what tells this fit from those of other solvers: plain values."""

    @abstractmethod
    def measure_noise(self, field: Field, y0: State, tolerances: Tolerances) -> float:
        """Return the noise in what is fitted to, on a few samples.

        Raises:
            NoiseFloorError: what is fitted to does not stand above it.
            OutOfTimeError: the time of ``field`` ended.
        """

    @abstractmethod
    def prepare(self, data: Data, choice: dict[str, Any] | None) -> dict[str, Any] | None:
        """Take the data; return the choice of a net, as it was or as it is made now."""

    @abstractmethod
    def start(self, noise: float | None, plan: ReferencePlan) -> Start:
        """Bring ``module`` to its start and measure it.

        Args:
            noise: what `measure_noise` returned, None if there was no time for it.
            plan: how references were solved.

        Raises:
            NoiseFloorError: nothing can be gained.
        """

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """Return the phases in order."""

    @abstractmethod
    def comparison(self) -> Comparison:
        """Return the solver as it is, and the one it started as."""

    @abstractmethod
    def finish(self, state: FitState) -> None:
        """Give up what is worse than the start; complete ``state``, whose report is made next."""

    @abstractmethod
    def deltas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return quantiles of |R - g|_2 and of |R|_2 on held-out samples."""

    @abstractmethod
    def notes(self, state: FitState) -> Sequence[str]:
        """Return what a user should know of this fit."""

    @abstractmethod
    def restore(self, state: FitState) -> None:
        """Take the best state of an earlier run, in place of all from `measure_noise` on."""

    @abstractmethod
    def leave_unfitted(self) -> str:
        """Be what can be had without data, and return its name for people."""

    @abstractmethod
    def solver(self, y0: State) -> Solver:
        """Return the solver with its domain, without its report."""
