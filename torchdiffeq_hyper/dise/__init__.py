"""Dynamic integrator selection: each sample goes to the cheapest integrator that is accurate."""

from torchdiffeq_hyper._fields._wrappers import Conditioned
from torchdiffeq_hyper.dise import selectors
from torchdiffeq_hyper.dise._candidates import Candidate
from torchdiffeq_hyper.dise._costs import ClassificationCost, Cost, RegressionCost, Verdict
from torchdiffeq_hyper.dise._dise import Dise
from torchdiffeq_hyper.dise._fit import SelectorConfig
from torchdiffeq_hyper.dise._report import DiseReport, Labels, Oracle, TradeOff, TradeOffPoint

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
