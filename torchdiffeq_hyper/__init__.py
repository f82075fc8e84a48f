"""Learned solvers for torchdiffeq: fast inference of Neural ODEs, unchanged code.

Importing the package adds method names to torchdiffeq's `odeint`, `odeint_adjoint` and
`odeint_event`, and to torchdyn's solvers once torchdyn is imported; it changes no existing
name.
"""

import sys

from torchdiffeq_hyper import dise, errors, hypernets, regularizers
from torchdiffeq_hyper._fields._wrappers import Conditioned
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
from torchdiffeq_hyper.hosts.torchdiffeq._methods import (
    override,
    register_method,
    unregister_method,
)
from torchdiffeq_hyper.hosts.torchdiffeq._recording import odeint_with_errors, record
from torchdiffeq_hyper.hypernets import ConcatHypernet
from torchdiffeq_hyper.methods import Register, WholeSolve, hookimpl
from torchdiffeq_hyper.methods._registry import load_plugins, register_plugin, unregister_plugin
from torchdiffeq_hyper.solvers._binding import attach, detach, using
from torchdiffeq_hyper.solvers._domain import FitDomain
from torchdiffeq_hyper.solvers._fit_report import FitReport
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver
from torchdiffeq_hyper.solvers._per_sample import PerSampleDopri5
from torchdiffeq_hyper.solvers._solver import Solver
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver
from torchdiffeq_hyper.tableaus import EULER, HEUN, MIDPOINT, RK4, second_order

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


@hookimpl
def register_solvers(register: Register) -> None:
    """Register a hypersolver for every base, and the methods that solve the whole problem."""
    register("hypereuler", EULER)
    register("hypermidpoint", MIDPOINT)
    register("hyperheun", HEUN)
    register("hyper2", second_order())
    register("hyperrk4", RK4)
    by_sample = WholeSolve(PerSampleDopri5, None, "PerSampleDopri5()")
    register("dopri5_per_sample", by_sample, order=5, calls_per_step=6, follows_grid=False)
    example = 'tdh.fit(func, y0, (0.0, 1.0), base="bns", steps=8)'
    bespoke = WholeSolve(BespokeSolver, "solver", example)
    # What sums of weights guarantee; one step is the whole span, with as many calls as fitted.
    register("bns", bespoke, order=1, calls_per_step=1, follows_grid=False)
    candidates = 'tdh.Dise([tdh.Candidate("euler", steps=2), tdh.Candidate("dopri5")], selector=v)'
    dise = WholeSolve(Dise, "dise", candidates)
    # What its weakest candidate may have.
    register("dise", dise, order=1, calls_per_step=1, follows_grid=False)


register_plugin(sys.modules[__name__], "torchdiffeq_hyper")
install()
load_plugins()
