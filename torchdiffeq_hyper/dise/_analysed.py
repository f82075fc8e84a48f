"""The part of a Dise that measures: every candidate on every sample, and what to gain."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from torchdiffeq_hyper._layout import parts_of
from torchdiffeq_hyper._types import State, VectorField
from torchdiffeq_hyper.dise._dispatcher import Dispatcher
from torchdiffeq_hyper.dise.config import SelectorConfig
from torchdiffeq_hyper.dise.costs import Cost
from torchdiffeq_hyper.dise.labels import Labels, collect
from torchdiffeq_hyper.dise.samples import count
from torchdiffeq_hyper.dise.selectors import ready
from torchdiffeq_hyper.dise.sweep import sweep
from torchdiffeq_hyper.dise.tradeoff import Oracle, TradeOff
from torchdiffeq_hyper.dise.training import Split, check_fittable
from torchdiffeq_hyper.errors import OptionError, explain
from torchdiffeq_hyper.fitting.guard import own_random_state


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
