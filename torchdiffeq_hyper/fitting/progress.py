"""One progress bar over all iterations of a fit."""

from __future__ import annotations

from tqdm import tqdm

from torchdiffeq_hyper.fitting.checkpoint import FitState


class Progress:
    """Shows how far a fit is, what it is doing and how well.

    Args:
        title: what is fitted.
        iterations: iterations of all phases.
        shown: whether to show anything.
    """

    def __init__(self, title: str, iterations: int, *, shown: bool) -> None:
        self._bar = tqdm(total=iterations, desc=title, disable=not shown)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def say(self, activity: str) -> None:
        """Show what is going on before the first iteration."""
        self._bar.set_postfix_str(activity)

    def tell(self, line: str) -> None:
        """Show a line that stays."""
        if not self._bar.disable:
            self._bar.write(line, file=self._bar.fp)

    def show(self, phase: str, iteration: int, total: int, state: FitState) -> None:
        """Show the state after an iteration."""
        self._bar.total = total
        self._bar.set_postfix_str(
            f"{phase}, held-out error {state.best_error:.3g} (base {state.base_error:.3g})",
            refresh=False,
        )
        self._bar.update(iteration - self._bar.n)
