"""What to do about a selector that sends every sample to one candidate."""

from __future__ import annotations

import torch

from torchdiffeq_hyper.dise.labels import Labels


def one_candidate(labels: Labels, chosen: int, alpha: float, penalty: float) -> str:
    """Return a warning's text: what happened, and which of alpha and M to move where.

    Args:
        labels: what every candidate takes and achieves.
        chosen: the candidate that every sample goes to.
        alpha: of the cost.
        penalty: M of the cost.
    """
    name = labels.names[chosen]
    text = f"the selector sends every sample to {name!r}. "
    costs = labels.costs(alpha, penalty)
    if bool((costs.argmin(dim=1) == chosen).all()):
        return text + (
            "It is the cheapest right one for each of them, at any alpha and M: there is nothing "
            "to select. Use that method by itself, or add cheaper candidates."
        )
    everyone = torch.full((len(labels),), chosen, device=labels.nfe.device)
    is_most_accurate = labels.accuracy(everyone) >= float(labels.is_right.double().mean(0).max())
    is_cheapest = labels.mean_nfe(everyone) <= float(labels.nfe.double().mean(0).min())
    fewer_calls = (
        f"to save calls of func, make wrong answers weigh less: penalty M down from {penalty:g} "
        f"(towards the largest NFE, {int(labels.nfe.max())}) or alpha down from {alpha:g}"
    )
    more_right = (
        "to get more right answers, make wrong ones weigh more: penalty M up "
        f"(penalty={10 * penalty:g}) or alpha up (alpha={2 * alpha:g})"
    )
    if is_most_accurate and not is_cheapest:
        advice = fewer_calls
    elif is_cheapest and not is_most_accurate:
        advice = more_right
    else:
        advice = f"{fewer_calls}; {more_right}"
    return text + advice[0].upper() + advice[1:] + ". dise.suggest(...) shows the trade-off."
