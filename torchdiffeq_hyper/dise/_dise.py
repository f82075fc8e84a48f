"""Per-sample integrator selection: the candidates, the selector, and what both are used for."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import State, VectorField, map_parts
from torchdiffeq_hyper.dise import _files
from torchdiffeq_hyper.dise._candidates import Batch, Candidate, check_candidates
from torchdiffeq_hyper.dise._costs import Cost, check_settings
from torchdiffeq_hyper.dise._fit import Scale, SelectorConfig, Training, are_finite, labels_of
from torchdiffeq_hyper.dise._report import DiseReport, Labels, Oracle, TradeOff, one_candidate
from torchdiffeq_hyper.dise.selectors import predict
from torchdiffeq_hyper.errors import (
    MissingHypernetError,
    NonFiniteError,
    OneCandidateWarning,
    check_callable,
)


class Dise(nn.Module):
    r"""Sends every sample to the candidate that a selector net predicts to be cheapest.

    .. math:: j(x) = \arg\min_j v_j(y_0(x))

    with v the predicted costs of `ClassificationCost` or `RegressionCost`: "DISE: Dynamic
    Integrator Selection to Minimize Forward-pass Time in Neural ODEs", ICLR 2021 submission,
    equations 4 and 5. A call costs one call of v, and for each group of samples what its
    candidate costs on that sub-batch. Fixed-step and ``dopri5_per_sample`` candidates answer
    as for each sample alone; a ``dopri5`` group shares one step size.

    Args:
        candidates: at least one `Candidate`, no two the same.
        selector: v, maps y0 to predicted costs (batch, candidates), in any unit that all
            candidates share; see `selectors`. None: `fit` makes a ready one.

    Attributes:
        unit: shift and scale from v's outputs to costs.
        report: what `fit` measured, else None.

    Raises:
        OptionError: no candidates, or two that are the same.
        StateTypeError: a candidate is not a `Candidate`, or ``selector`` is not callable.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> from torchdiffeq import odeint
        >>> far = lambda y0: torch.stack([y0[:, 0].abs(), torch.ones(len(y0))], dim=1)
        >>> dise = tdh.Dise([tdh.Candidate("euler", steps=2), tdh.Candidate("rk4")], far)
        >>> y0, t = torch.tensor([[0.5], [2.0]]), torch.tensor([0.0, 1.0])
        >>> odeint(lambda t, y: -y, y0, t, method="dise", options={"dise": dise})[-1].flatten()
        tensor([0.1250, 0.7500])
    """

    method = "dise"
    """The method string."""

    def __init__(
        self, candidates: Sequence[Candidate], selector: Callable[[State], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.candidates = check_candidates(candidates)
        # Moved, saved and frozen with the rest.
        self.solvers = nn.ModuleList([c.solver for c in self.candidates if c.solver is not None])
        if selector is not None:
            check_callable("selector", selector, fix="selector=None   # fit makes a ready one")
        self.selector = selector
        self.unit = Scale(0.0, 1.0)
        self.report: DiseReport | None = None
        self.train()

    def extra_repr(self) -> str:
        """Return the candidates, for printing."""
        return ",\n".join(map(repr, self.candidates))

    def train(self, mode: bool = True) -> Dise:  # noqa: FBT001, FBT002 - torch's signature
        """Set the mode of the candidates; v stays in evaluation mode: it must not be noisy."""
        super().train(mode)
        if isinstance(self.selector, nn.Module):
            self.selector.eval()
        return self

    def forward(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Same as `solve` at its default tolerances."""
        return self.solve(func, y0, t)

    def solve(
        self, func: VectorField, y0: State, t: Tensor, *, rtol: Any = 1e-7, atol: Any = 1e-9
    ) -> State:
        """Solve dy/dt = func(t, y), each sample by the candidate that v chooses.

        Args:
            func: called as ``func(t, y)`` on parts of the batch. If it holds something of
                every sample, it needs a method ``restrict(index)``, see `Conditioned`.
            y0: tensor or tuple of tensors, the samples along dim 0. Half precision is
                integrated in float32 and cast for each call.
            t: 1-D floating tensor, strictly increasing or decreasing.
            rtol: relative tolerance of candidates without their own.
            atol: absolute tolerance of these.

        Returns:
            The state at every point of ``t``: like ``y0`` with ``len(t)`` in front.

        Raises:
            MissingHypernetError: there is no selector.
            StateShapeError: v or func returned another shape, or func takes no part of a batch.
            CoupledSamplesError: samples that depend on each other go to several candidates.
            NonFiniteError: v predicted inf or nan, or a solution ended so.
        """
        draft = recording.take_over(self)
        batch = Batch.of(func, y0, t, rtol=rtol, atol=atol)
        if batch.is_empty:
            return batch.constant(y0)
        selection = self.select(y0)
        solution = batch.dispatch(self.candidates, selection, draft)
        # Candidates of the host do not look at what they return.
        finite = are_finite(map_parts(lambda part: part[-1:], solution))
        if not bool(finite.all()):
            sample = int((~finite).nonzero()[0])
            label = self.candidates[int(selection[sample])].label
            problem = f"the solution of sample {sample} by {label} ended in inf or nan."
            fix = 'more steps for that candidate, or tdh.Candidate("dopri5_per_sample")'
            raise NonFiniteError(problem=problem, expected="a finite solution.", fix=fix)
        return solution

    def dispatch(
        self,
        func: VectorField,
        y0: State,
        t: Tensor,
        selection: Tensor,
        *,
        rtol: Any = 1e-7,
        atol: Any = 1e-9,
    ) -> State:
        """Solve each sample by a given candidate; otherwise as `solve`, of the same arguments.

        ``selection`` holds the positions of candidates, (batch,) integers, else `OptionError`.
        """
        batch = Batch.of(func, y0, t, rtol=rtol, atol=atol)
        return batch.constant(y0) if batch.is_empty else batch.dispatch(self.candidates, selection)

    @torch.no_grad()
    def select(self, y0: State) -> Tensor:
        """Return the position of each sample's cheapest candidate in `predicted_costs`, int64."""
        return predict(self._fitted_selector, y0, len(self.candidates)).argmin(dim=1)

    @torch.no_grad()
    def predicted_costs(self, y0: State) -> Tensor:
        """Return the predicted cost of every candidate, (batch, candidates)."""
        predicted = predict(self._fitted_selector, y0, len(self.candidates))
        return predicted * self.unit.scale + self.unit.shift

    @property
    def _fitted_selector(self) -> Callable[[State], Tensor]:
        if self.selector is None:
            raise MissingHypernetError(
                problem="this Dise has no selector.",
                expected="a fitted one, or one of your own.",
                fix="dise.fit(func, y0, t, cost=cost)\ntdh.Dise(candidates, selector=v)",
            )
        return self.selector

    def fit(
        self,
        func: VectorField,
        y0: State,
        t: Tensor,
        *,
        cost: Cost,
        config: SelectorConfig | None = None,
        labels: Labels | None = None,
        rtol: Any = 1e-7,
        atol: Any = 1e-9,
        progress: bool = True,
    ) -> Dise:
        """Fit v to the costs of every candidate on every sample; return the object itself.

        Each sample is solved alone by each candidate; v is trained by regression on all costs
        at once. func and ``cost.predict`` come back as found, global random state is not
        touched. `report` tells what was gained, on held-out samples.

        Args:
            func: the vector field, or a torchdyn `NeuralODE`.
            y0: starts like those that the selector will meet, at least two.
            t: the times that it will meet.
            cost: a `ClassificationCost` or a `RegressionCost` for these samples.
            config: how v is trained.
            labels: what an earlier `suggest` or `oracle` measured of the same samples.
            rtol: relative tolerance of candidates without their own.
            atol: absolute tolerance of these.
            progress: whether to show bars.

        Raises:
            OptionError: fewer than two samples, or an M smaller than a right answer costs.
            StateShapeError: labels of another length, or a wrong shape.
            NoisyFieldError: func draws fresh noise at each call.
            CoupledSamplesError: func makes samples depend on each other.
            NonFiniteError: v predicted inf or nan.
            FitDivergedError: v's loss turned non-finite.
        """
        start = time.perf_counter()
        n_candidates = len(self.candidates)
        training = Training.of(y0, config, progress=progress)
        selector = training.selector(self.selector, n_candidates)
        batch = Batch.of(func, y0, t, rtol=rtol, atol=atol)
        labels = labels_of(self.candidates, batch, cost, known=labels, progress=progress)
        costs = labels.costs(cost.alpha, cost.penalty)
        label_seconds = time.perf_counter() - start
        self.unit, losses = training.run(selector, costs)
        self.selector = selector
        selection = self.select(y0)
        seconds = {"label_seconds": label_seconds, "seconds": time.perf_counter() - start}
        self.report = DiseReport(
            labels, selection, cost.alpha, cost.penalty, training.held_out, tuple(losses), **seconds
        )
        if n_candidates > 1 and len(selection.unique()) == 1:
            text = one_candidate(labels, int(selection[0]), cost.alpha, cost.penalty)
            warnings.warn(text, OneCandidateWarning, stacklevel=2)
        return self

    def suggest(
        self,
        func: VectorField,
        y0: State,
        t: Tensor,
        *,
        cost: Cost,
        alphas: Iterable[float] = (0.1, 0.3, 1.0),
        penalties: Iterable[float] | None = None,
        config: SelectorConfig | None = None,
        labels: Labels | None = None,
        rtol: Any = 1e-7,
        atol: Any = 1e-9,
        progress: bool = True,
    ) -> TradeOff:
        """Fit a selector at every alpha and M; return right answers against calls of func.

        Samples are solved once for all settings. The object itself is not changed. Arguments
        and errors are those of `fit`, but for alpha and M, which replace those in ``cost``:
        ``penalties=None`` takes 1.5, 10 and 100 times the dearest right answer.
        """
        training = Training.of(y0, config, progress=progress)
        own = self.selector if isinstance(self.selector, nn.Module) else None
        unfitted = training.selector(own, len(self.candidates))
        batch = Batch.of(func, y0, t, rtol=rtol, atol=atol)
        labels = labels_of(self.candidates, batch, cost, known=labels, progress=progress)
        if penalties is None:
            penalties = [times * float(labels.weighted_nfe.max()) for times in (1.5, 10, 100)]
        settings = [check_settings(alpha, penalty) for alpha in alphas for penalty in penalties]
        return training.sweep(unfitted, labels, settings)

    def oracle(
        self,
        func: VectorField,
        y0: State,
        t: Tensor,
        *,
        cost: Cost,
        rtol: Any = 1e-7,
        atol: Any = 1e-9,
        progress: bool = False,
    ) -> Oracle:
        """Return for each sample the right candidate with the fewest calls of func.

        What a perfect selector would do with these candidates; needs no selector. The
        arguments are those of `fit`; one sample is enough.
        """
        batch = Batch.of(func, y0, t, rtol=rtol, atol=atol)
        labels = labels_of(self.candidates, batch, cost, progress=progress)
        return Oracle(labels, labels.oracle())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write candidates, selector and report to one safetensors file.

        Raises:
            MissingHypernetError: there is no selector.
            StateTypeError: the selector or a hypernet is a plain function, or an option
                of a candidate is no JSON value.
            FileWriteError: the file cannot be written; nothing half-written is left.
        """
        _files.write(path, self.candidates, self._fitted_selector, self.unit, self.report)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        selector: nn.Module | None = None,
        hypernets: Mapping[int, nn.Module] | None = None,
    ) -> Dise:
        """Return what `save` wrote, frozen, on the CPU; runs no code from the file.

        Args:
            path: the file.
            selector: instance to load into, if the selector saved is not a ready one.
            hypernets: the same for hypernets of candidates, by the candidate's position.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: truncated, of another kind, or of a newer format.
            BaseMismatchError: an instance's weights are not those saved.
        """
        candidates, selector, unit, report = _files.read(path, selector, hypernets or {})
        loaded = cls(candidates, selector)
        loaded.unit, loaded.report = unit, report
        return loaded.eval().requires_grad_(requires_grad=False)
