"""Hypernets: the learned part of a hypersolver, and how to feed any net the paper's inputs."""

from torchdiffeq_hyper.hypernets._channels import join_channels, split_channels
from torchdiffeq_hyper.hypernets._concat import ConcatHypernet
from torchdiffeq_hyper.hypernets._ready import MLP, Conv, Linear, ReadyHypernet
from torchdiffeq_hyper.hypernets._select import from_architecture, ready

__all__ = [
    "MLP",
    "ConcatHypernet",
    "Conv",
    "Linear",
    "ReadyHypernet",
    "from_architecture",
    "join_channels",
    "ready",
    "split_channels",
]
