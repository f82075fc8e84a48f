"""Per-sample integrator selection: what is fitted, measured and saved."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._files import damage_reported
from torchdiffeq_hyper._state import State, VectorField, parts_of
from torchdiffeq_hyper.dise import _files
from torchdiffeq_hyper.dise._candidates import Candidate, check_candidates
from torchdiffeq_hyper.dise._costs import Cost
from torchdiffeq_hyper.dise._dispatch import count, take
from torchdiffeq_hyper.dise._dispatcher import Dispatcher
from torchdiffeq_hyper.dise._labels import Labels, collect
from torchdiffeq_hyper.dise._report import DiseReport
from torchdiffeq_hyper.dise._tradeoff import Oracle, TradeOff, one_candidate, sweep
from torchdiffeq_hyper.dise._training import SelectorConfig, Split, check_fittable, predict, train
from torchdiffeq_hyper.dise.selectors import ready
from torchdiffeq_hyper.errors import OneCandidateWarning, OptionError, explain
from torchdiffeq_hyper.fitting._guard import own_random_state
from torchdiffeq_hyper.hypernets._files import load_weights


class Analysed(Dispatcher):
    """Tells what can be gained with its candidates, without being changed; see `Dise`."""

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

        Samples are solved once for all settings. The object itself is not changed.

        Args:
            func: see `Dise.fit`.
            y0: see `Dise.fit`.
            t: see `Dise.fit`.
            cost: see `Dise.fit`; its own alpha and M do not matter.
            alphas: values of alpha.
            penalties: values of M; None takes 1.5, 10 and 100 times the dearest right answer.
            config: see `Dise.fit`.
            labels: see `Dise.fit`.
            rtol: see `Dise.fit`.
            atol: see `Dise.fit`.
            progress: whether to show bars.

        Raises:
            OptionError: a value is not above 0, or an M is too small.
            StateTypeError: the selector is a module without parameters.
        """
        config = config or SelectorConfig()
        Split.of(count(y0), config, parts_of(y0)[0].device)
        if isinstance(self.selector, nn.Module):
            check_fittable(self.selector)
        labels = self._labels(func, y0, t, cost, labels, rtol=rtol, atol=atol, progress=progress)

        def new_selector() -> nn.Module:
            if isinstance(self.selector, nn.Module):
                return copy.deepcopy(self.selector)
            return self._new_selector(y0, config)

        return sweep(
            labels,
            y0,
            new_selector,
            config,
            alphas=alphas,
            penalties=penalties,
            progress=progress,
        )

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

        What a perfect selector would do with these candidates; needs no selector.

        Args:
            func: see `Dise.fit`.
            y0: see `Dise.fit`; one sample is enough.
            t: see `Dise.fit`.
            cost: see `Dise.fit`.
            rtol: see `Dise.fit`.
            atol: see `Dise.fit`.
            progress: whether to show a bar.
        """
        labels = self._labels(func, y0, t, cost, None, rtol=rtol, atol=atol, progress=progress)
        return Oracle(labels, labels.oracle())

    def _labels(
        self,
        func: VectorField,
        y0: State,
        t: Tensor,
        cost: Cost,
        labels: Labels | None,
        **how: Any,
    ) -> Labels:
        """Return ``labels`` if they belong to these samples, or measure them if None."""
        if labels is None:
            return collect(self.candidates, func, y0, t, cost, **how)
        if labels.nfe.shape != (count(y0), len(self.candidates)):
            raise OptionError(
                explain(
                    f"labels are of {labels.nfe.shape[0]} samples and {labels.nfe.shape[1]} "
                    "candidates.",
                    f"those of these {count(y0)} samples and {len(self.candidates)} candidates.",
                    "labels=dise.suggest(func, y0, t, cost=cost).labels",
                )
            )
        return labels

    def _new_selector(self, y0: State, config: SelectorConfig) -> nn.Module:
        with own_random_state(config.seed):
            return ready(y0, len(self.candidates))


class Dise(Analysed):
    r"""Sends every sample to the candidate that a selector net predicts to be cheapest.

    .. math:: j(x) = \arg\min_j v_j(y_0(x))

    with v the predicted costs of [D] eq. 4 or 5. A call costs one call of v, and for each
    group of samples what its candidate costs on the compacted sub-batch. Fixed-step and
    ``dopri5_per_sample`` candidates answer as for each sample alone; a ``dopri5`` group
    shares one step size, as `odeint` on that sub-batch does.

    Args:
        candidates: at least one `Candidate`, no two the same.
        selector: v, maps y0 to predicted costs (batch, candidates), in any unit that all
            candidates share; see `selectors`. None: `fit` makes a ready one.

    Attributes:
        candidates: the candidates.
        selector: v, kept in evaluation mode; None before `fit`.
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
        >>> dise.select(y0)
        tensor([0, 1])
        >>> odeint(lambda t, y: -y, y0, t, method="dise", options={"dise": dise})[-1]
        tensor([[0.1250],
                [0.7500]])
    """

    method = "dise"
    """The method string."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        selector: Callable[[State], Tensor] | None = None,
    ) -> None:
        super().__init__(candidates, selector)
        self.report: DiseReport | None = None

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
        """Fit v to the costs of every candidate on every sample ([D] eq. 4 and 5).

        Each sample is solved alone by each candidate, so that no other sample changes its
        answer or its calls of func; v is trained by regression on all costs at once. func
        and the module ``cost.predict`` come back as found, global random state is not
        touched. `report` tells what was gained, on held-out samples.

        Args:
            func: the vector field; or a torchdyn `NeuralODE`, whose field is taken with its
                data control.
            y0: starts like those that the selector will meet, at least two.
            t: the times that it will meet.
            cost: a `ClassificationCost` or a `RegressionCost` for these samples.
            config: how v is trained.
            labels: what an earlier `suggest` or `oracle` measured of the same samples.
            rtol: relative tolerance of candidates without their own.
            atol: absolute tolerance of candidates without their own.
            progress: whether to show bars.

        Returns:
            The object itself.

        Raises:
            OptionError: fewer than two samples, or an M smaller than a right answer costs.
            StateShapeError: labels of another length, or a wrong shape.
            NoisyFieldError: func draws fresh noise at each call.
            CoupledSamplesError: func makes samples depend on each other.
            FitDivergedError: v's loss turned non-finite.
        """
        start = time.perf_counter()
        config = config or SelectorConfig()
        split = Split.of(count(y0), config, parts_of(y0)[0].device)
        selector = self._new_selector(y0, config) if self.selector is None else self.selector
        selector = check_fittable(selector)
        with torch.no_grad():  # before the long part
            predict(selector.eval(), take(y0, split.held_out[:1]), len(self.candidates))
        labels = self._labels(func, y0, t, cost, labels, rtol=rtol, atol=atol, progress=progress)
        costs = labels.costs(cost.alpha, cost.penalty)
        label_seconds = time.perf_counter() - start
        self.unit, losses = train(selector, y0, costs, split, config, progress=progress)
        self.selector = selector
        selection = self.select(y0)
        self.report = DiseReport(
            labels=labels,
            alpha=cost.alpha,
            penalty=cost.penalty,
            selection=selection,
            held_out=split.held_out,
            losses=tuple(losses),
            label_seconds=label_seconds,
            seconds=time.perf_counter() - start,
        )
        if len(self.candidates) > 1 and len(selection.unique()) == 1:
            text = one_candidate(labels, int(selection[0]), cost.alpha, cost.penalty)
            warnings.warn(text, OneCandidateWarning, stacklevel=2)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write candidates, selector and report to one safetensors file.

        Hypersolvers among the candidates are stored inside. An old file stays until the
        new one is complete.

        Raises:
            MissingHypernetError: there is no selector.
            StateTypeError: the selector or a hypernet is a plain function, or an option
                of a candidate is no JSON value.
            FileWriteError: the file cannot be written; nothing half-written is left.
        """
        _files.write(path, self.candidates, self.selector, self.unit, self.report)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        selector: nn.Module | None = None,
        hypernets: Mapping[int, nn.Module] | None = None,
    ) -> Dise:
        """Read what `save` wrote; runs no code from the file.

        It comes frozen, in evaluation mode and on the CPU.

        Args:
            path: the file.
            selector: for a selector that is none of the ready ones, an instance to load the
                weights into.
            hypernets: the same for hypernets of candidates, by the candidate's position.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: truncated, of another kind, or of a newer format.
            BaseMismatchError: an instance's weights are not those saved.
        """
        contents = _files.read(path, selector, hypernets or {})
        candidates, selector, unit, report, weights = contents
        with damage_reported(path):
            check_candidates(candidates)
        load_weights(weights, path)
        loaded = cls(candidates, selector)
        loaded.unit, loaded.report = unit, report
        return loaded.eval().requires_grad_(requires_grad=False)
