"""Per-sample integrator selection: each sample goes to the cheapest method that is right."""

from torchdiffeq_hyper._context import Conditioned
from torchdiffeq_hyper.dise import selectors
from torchdiffeq_hyper.dise._dise import Dise
from torchdiffeq_hyper.dise.candidates import Candidate
from torchdiffeq_hyper.dise.classification import ClassificationCost
from torchdiffeq_hyper.dise.config import SelectorConfig
from torchdiffeq_hyper.dise.costs import Cost, Verdict
from torchdiffeq_hyper.dise.labels import Labels
from torchdiffeq_hyper.dise.regression import RegressionCost
from torchdiffeq_hyper.dise.report import DiseReport
from torchdiffeq_hyper.dise.tradeoff import Oracle, TradeOff, TradeOffPoint

__all__ = [
    "Candidate",
    "ClassificationCost",
    "Conditioned",
    "Cost",
    "Dise",
    "DiseReport",
    "Labels",
    "Oracle",
    "RegressionCost",
    "SelectorConfig",
    "TradeOff",
    "TradeOffPoint",
    "Verdict",
    "selectors",
]
