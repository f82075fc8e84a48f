"""Hypernets: the learned part of a hypersolver, and how to feed any net the paper's inputs."""

from torchdiffeq_hyper.hypernets._concat import ConcatHypernet
from torchdiffeq_hyper.hypernets._convolutional import Bottleneck, Conv
from torchdiffeq_hyper.hypernets._ready import MLP, Linear, ReadyHypernet
from torchdiffeq_hyper.hypernets._scaled import join_channels, split_channels
from torchdiffeq_hyper.hypernets._select import families, from_architecture, ready, suited

__all__ = [
    "MLP",
    "Bottleneck",
    "ConcatHypernet",
    "Conv",
    "Linear",
    "ReadyHypernet",
    "families",
    "from_architecture",
    "join_channels",
    "ready",
    "split_channels",
    "suited",
]
