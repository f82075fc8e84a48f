"""The package's own methods, registered through the same hook as anybody's."""

from __future__ import annotations

from torchdiffeq_hyper.dise import Dise
from torchdiffeq_hyper.methods import Register, WholeSolve, hookimpl
from torchdiffeq_hyper.solvers.bespoke import BespokeSolver
from torchdiffeq_hyper.solvers.per_sample import PerSampleDopri5
from torchdiffeq_hyper.tableaus import EULER, HEUN, MIDPOINT, RK4, second_order


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
