"""Hypernets: the learned part of a hypersolver, and how to feed any net the paper's inputs."""

from torchdiffeq_hyper.hypernets._concat import ConcatHypernet, join_channels, split_channels
from torchdiffeq_hyper.hypernets._files import from_architecture
from torchdiffeq_hyper.hypernets._kinds import (
    MLP,
    Bottleneck,
    Conv,
    Linear,
    families,
    ready,
    suited,
)
from torchdiffeq_hyper.hypernets._layers import ReadyConcatHypernet
from torchdiffeq_hyper.hypernets._multistep import Multistep, MultistepOnGrid
from torchdiffeq_hyper.hypernets._ready import ReadyHypernet

__all__ = [
    "MLP",
    "Bottleneck",
    "ConcatHypernet",
    "Conv",
    "Linear",
    "Multistep",
    "MultistepOnGrid",
    "ReadyConcatHypernet",
    "ReadyHypernet",
    "families",
    "from_architecture",
    "join_channels",
    "ready",
    "split_channels",
    "suited",
]
