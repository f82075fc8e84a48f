"""How far apart two sets of samples are, and whether a fast sampler stays within noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

PROJECTIONS = 128
MARGIN = 1.10


def sliced_wasserstein(x: Tensor, y: Tensor, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance of two sets (n, d) of equal size.

    The root of the mean, over random directions, of the squared distance between sorted
    projections.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], PROJECTIONS, generator=generator)
    directions = directions / directions.norm(dim=0)
    gaps = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values
    return math.sqrt(float(gaps.square().mean()))


def mmd(x: Tensor, y: Tensor, bandwidth: float, within_y: float | None = None) -> float:
    """Return the biased maximum mean discrepancy with a Gaussian kernel.

    Args:
        x: samples (n, d).
        y: samples (m, d).
        bandwidth: standard deviation of the kernel.
        within_y: ``mean_kernel(y, y, bandwidth)``, if it is known.
    """
    within_y = mean_kernel(y, y, bandwidth) if within_y is None else within_y
    squared = mean_kernel(x, x, bandwidth) + within_y - 2 * mean_kernel(x, y, bandwidth)
    return math.sqrt(max(0.0, squared))


def mean_kernel(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Return the mean of the kernel over all pairs of rows."""
    # In blocks that stay in the cache: the whole matrix is 100 MB.
    total = 0.0
    for rows in x.split(250):
        distances = torch.cdist(rows, y).square_()
        total += float(distances.mul_(-0.5 / bandwidth**2).exp_().sum(dtype=torch.float64))
    return total / (len(x) * len(y))


@dataclass(frozen=True)
class Verdict:
    """A sampler's distances to dopri5's samples, against dopri5's to dopri5's.

    Attributes:
        measure: the distance's name.
        mean: over pairs of sets, the sampler's against dopri5's.
        noise: the same, dopri5's against dopri5's.
        error: standard error of ``mean - 1.10 noise``.
    """

    sampler: str
    measure: str
    mean: float
    noise: float
    error: float

    @property
    def passed(self) -> bool:
        """Whether the mean is at most 1.10 times the noise, plus two standard errors."""
        return self.mean <= MARGIN * self.noise + 2 * self.error


def verdict(sampler: str, measure: str, mine: Sequence[float], noise: Sequence[float]) -> Verdict:
    """Compare distances of many independent pairs of sets."""
    spread = math.hypot(_standard_error(mine), MARGIN * _standard_error(noise))
    return Verdict(sampler, measure, statistics.mean(mine), statistics.mean(noise), spread)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


@torch.no_grad()
def compare(
    samplers: Mapping[str, Callable[[Tensor], Tensor]],
    exact: Callable[[Tensor], Tensor],
    dimension: int,
    pairs: int,
    samples: int,
) -> list[Verdict]:
    """Compare samplers, maps from noise (n, d) to samples, with an exact one.

    Every set has its own noise, drawn from seeds that nothing was fitted on; each pair is
    new. In a round all samplers are held against the same exact set.
    """
    generator = torch.Generator().manual_seed(10_000)

    def noise() -> Tensor:
        return torch.randn(samples, dimension, generator=generator)

    bandwidth = float(torch.pdist(exact(noise()[:1000])).median())
    maps = {"dopri5": exact, **samplers}
    found: dict[tuple[str, str], list[float]] = {}
    for seed in tqdm(range(pairs), desc="comparing samples", unit="pair"):
        truth = exact(noise())
        within = mean_kernel(truth, truth, bandwidth)
        for name, sampler in maps.items():
            mine = sampler(noise())
            wasserstein = sliced_wasserstein(mine, truth, seed)
            found.setdefault((name, "sliced Wasserstein"), []).append(wasserstein)
            found.setdefault((name, "MMD"), []).append(mmd(mine, truth, bandwidth, within))
    return [
        verdict(name, measure, values, found["dopri5", measure])
        for (name, measure), values in found.items()
        if name != "dopri5"
    ]
