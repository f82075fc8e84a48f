"""The part of a Dise that solves: candidates, and a selector that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import State, VectorField, parts_of
from torchdiffeq_hyper.dise._candidates import Candidate, check_candidates
from torchdiffeq_hyper.dise._dispatch import count, dispatch
from torchdiffeq_hyper.dise._training import Scale, predict
from torchdiffeq_hyper.errors import MissingHypernetError, NonFiniteError, StateTypeError, explain
from torchdiffeq_hyper.solvers._finite import is_finite
from torchdiffeq_hyper.solvers._grid import check_times


class Dispatcher(nn.Module):
    """Solves each sample by the candidate that a selector chooses; see `Dise`.

    Args:
        candidates: at least one `Candidate`, no two the same.
        selector: v, or None.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        selector: Callable[[State], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.candidates = check_candidates(candidates)
        # Moved, saved and frozen with the rest.
        self.solvers = nn.ModuleList([c.solver for c in self.candidates if c.solver is not None])
        if selector is not None and not callable(selector):
            raise StateTypeError(
                explain(
                    f"selector is a {type(selector).__name__}.",
                    "a module that maps y0 to predicted costs (batch, candidates).",
                    "selector=tdh.dise.selectors.MLP(n_inputs=2, n_candidates=3)",
                )
            )
        self.selector = selector
        self.unit = Scale(0.0, 1.0)
        self.train(self.training)

    def extra_repr(self) -> str:
        """Return the candidates, for printing."""
        return ",\n".join(map(repr, self.candidates))

    def train(self, mode: bool = True) -> Dispatcher:  # noqa: FBT001, FBT002 - torch's signature
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

        Gives what ``odeint(func, y0, t, method="dise", options={"dise": dise})`` gives.

        Args:
            func: called as ``func(t, y)`` on parts of the batch. If it holds something of
                every sample (noise, controls, conditioning), it needs a method
                ``restrict(index)``, see `Conditioned`.
            y0: tensor or tuple of tensors, the samples along dim 0. Half precision is
                integrated in float32 and cast for each call.
            t: 1-D floating tensor, strictly increasing or decreasing.
            rtol: relative tolerance of candidates without their own.
            atol: absolute tolerance of candidates without their own.

        Returns:
            The state at every point of ``t``: like ``y0`` with ``len(t)`` in front.

        Raises:
            MissingHypernetError: there is no selector.
            StateShapeError: v or func returned another shape, or func cannot take a part
                of the batch.
            CoupledSamplesError: samples that depend on each other go to several candidates.
            NonFiniteError: v predicted inf or nan, or a solution ended so.
        """
        draft = recording.take_over(self)
        t = check_times(t, parts_of(y0)[0])
        if count(y0) == 0 or not any(part.numel() for part in parts_of(y0)):
            return _repeated(y0, len(t))
        chosen = self.select(y0)
        solution = dispatch(self.candidates, func, y0, t, chosen, rtol=rtol, atol=atol, draft=draft)
        # Candidates of the host do not look at what they return.
        if not all(is_finite(part[-1]) for part in parts_of(solution)):
            self._raise_non_finite(solution, chosen)
        return solution

    def _raise_non_finite(self, solution: State, chosen: Tensor) -> NoReturn:
        """Name the first sample whose end is not finite, and its candidate."""
        ends = (part[-1].reshape(len(chosen), -1) for part in parts_of(solution))
        broken = [~torch.isfinite(end).all(1) for end in ends]
        sample = int(torch.stack(broken).any(0).nonzero()[0])
        candidate = self.candidates[int(chosen[sample])]
        raise NonFiniteError(
            explain(
                f"the solution of sample {sample} by {candidate.label} ended in inf or nan.",
                "a candidate that stays finite on the samples that are sent to it.",
                'more steps for that candidate, or tdh.Candidate("dopri5_per_sample")',
            )
        )

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
        """Solve each sample by a given candidate; otherwise as `solve`.

        Args:
            func: see `solve`.
            y0: see `solve`.
            t: see `solve`.
            selection: position of each sample's candidate (batch,), integers.
            rtol: see `solve`.
            atol: see `solve`.

        Raises:
            OptionError: ``selection`` is no choice of candidates for this batch.
        """
        t = check_times(t, parts_of(y0)[0])
        if count(y0) == 0 or not any(part.numel() for part in parts_of(y0)):
            return _repeated(y0, len(t))
        return dispatch(self.candidates, func, y0, t, selection, rtol=rtol, atol=atol)

    def select(self, y0: State) -> Tensor:
        """Return the position of the candidate chosen for each sample, (batch,) int64.

        Raises:
            MissingHypernetError: there is no selector.
            StateShapeError: v returned another shape than (batch, candidates).
            NonFiniteError: v predicted inf or nan.
        """
        return self._predict(y0).argmin(dim=1)

    def predicted_costs(self, y0: State) -> Tensor:
        """Return the predicted cost of every candidate, (batch, candidates).

        Raises:
            MissingHypernetError: there is no selector.
        """
        return self._predict(y0) * self.unit.scale + self.unit.shift

    @torch.no_grad()
    def _predict(self, y0: State) -> Tensor:
        if self.selector is None:
            raise MissingHypernetError(
                explain(
                    "this Dise has no selector.",
                    "a fitted one, or one of your own.",
                    "dise.fit(func, y0, t, cost=cost)   # see tdh.ClassificationCost\n"
                    "tdh.Dise(candidates, selector=v)\n"
                    "dise.dispatch(func, y0, t, selection)   # with choices of your own",
                )
            )
        return predict(self.selector, y0, len(self.candidates))


def _repeated(y0: State, times: int) -> State:
    """Return the solution of an empty batch, or of samples without numbers."""
    parts = tuple(part.expand(times, *part.shape).clone() for part in parts_of(y0))
    return parts if isinstance(y0, tuple) else parts[0]
