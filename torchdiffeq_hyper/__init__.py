"""Learned solvers for torchdiffeq: fast inference of Neural ODEs, unchanged code.

Importing the package adds method names to torchdiffeq's `odeint`, `odeint_adjoint` and
`odeint_event`, and to torchdyn's solvers once torchdyn is imported; it changes no existing
name.
"""

from torchdiffeq_hyper import _builtin, dise, errors, hypernets, regularizers
from torchdiffeq_hyper._fields import Conditioned
from torchdiffeq_hyper._state import StepInput
from torchdiffeq_hyper.dise import (
    Candidate,
    ClassificationCost,
    Dise,
    RegressionCost,
    SelectorConfig,
)
from torchdiffeq_hyper.errors import HyperError, HyperWarning, MissingHypernetError
from torchdiffeq_hyper.evaluation import evaluate
from torchdiffeq_hyper.fitting import FitConfig, fit
from torchdiffeq_hyper.hosts import install, uninstall
from torchdiffeq_hyper.hosts.torchdiffeq import (
    odeint_with_errors,
    override,
    record,
    register_method,
    unregister_method,
)
from torchdiffeq_hyper.hypernets import ConcatHypernet
from torchdiffeq_hyper.methods._plugins import (
    hookimpl,
    load_entry_points,
    register_plugin,
    unregister_plugin,
)
from torchdiffeq_hyper.solvers._binding import attach, detach, using
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._report import FitReport
from torchdiffeq_hyper.solvers._solver import Solver
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver

__version__ = "0.1.0"

__all__ = [
    "BespokeSolver",
    "Candidate",
    "ClassificationCost",
    "ConcatHypernet",
    "Conditioned",
    "Dise",
    "FitConfig",
    "FitDomain",
    "FitReport",
    "HyperError",
    "HyperSolver",
    "HyperWarning",
    "MissingHypernetError",
    "RegressionCost",
    "SelectorConfig",
    "Solver",
    "StepInput",
    "attach",
    "detach",
    "dise",
    "errors",
    "evaluate",
    "fit",
    "hookimpl",
    "hypernets",
    "install",
    "odeint_with_errors",
    "override",
    "record",
    "register_method",
    "register_plugin",
    "regularizers",
    "uninstall",
    "unregister_method",
    "unregister_plugin",
    "using",
]

register_plugin(_builtin, "torchdiffeq_hyper")
install()
load_entry_points()
