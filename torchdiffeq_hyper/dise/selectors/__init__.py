"""Ready selectors: small nets from a start to the predicted cost of every candidate.

The three kinds of [D]: a residual convolutional net for images, a perceptron with dropout,
and one with tanh activations. Any module that maps y0 to (batch, candidates) does as well.
"""

from torchdiffeq_hyper.dise.selectors._base import ReadySelector
from torchdiffeq_hyper.dise.selectors._perceptrons import MLP, TanhMLP
from torchdiffeq_hyper.dise.selectors._ready import from_architecture, ready
from torchdiffeq_hyper.dise.selectors._residual import ResidualConv

__all__ = ["MLP", "ReadySelector", "ResidualConv", "TanhMLP", "from_architecture", "ready"]
