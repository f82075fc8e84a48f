"""The base class of all fitted solvers. How to add one: see `fitting._engine`."""

from __future__ import annotations

import copy
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from torchdiffeq_hyper import _files
from torchdiffeq_hyper._fields._wrappers import context_of
from torchdiffeq_hyper._rules import Maybe, Record, Rule, Tagged, Text, under
from torchdiffeq_hyper._state import Hypernet, State, StateLayout, VectorField
from torchdiffeq_hyper.errors import BaseMismatchError, OutsideFitWarning
from torchdiffeq_hyper.hypernets._concat import NAMES_OF_INPUTS
from torchdiffeq_hyper.hypernets._files import ARCHITECTURES, UNSEEN, load_weights, match, pack
from torchdiffeq_hyper.solvers._domain import DOMAIN, FitDomain, Match
from torchdiffeq_hyper.solvers._export import export_solve
from torchdiffeq_hyper.solvers._fit_report import REPORT, FitReport
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._stepping import Correction

Weights: TypeAlias = tuple[nn.Module, Mapping[str, Tensor], bool]
"""A net, the weights to load into it, and whether it is the caller's instance."""
_class_of: dict[str, type[Solver]] = {}
_CUSTOM = Record({}, optional={"class": Text(1000), "inputs": NAMES_OF_INPUTS})
NET = Tagged({**ARCHITECTURES, "custom": _CUSTOM})
"""What files may say of a net."""


def file_rules(base: Rule, alpha: Rule, steps: Rule, hypernet: Rule) -> Record:
    """Return the rules for the settings in a solver's file."""
    rules = {"base": base, "alpha": alpha, "steps": steps, "hypernet": hypernet}
    rules |= {"domain": Maybe(DOMAIN), "report": Maybe(REPORT)}
    return Record(rules, optional=_files.HEADER)


class Solver(nn.Module, ABC):
    """A fitted solver: what `HyperSolver` and `BespokeSolver` share.

    It is an ``nn.Module``: its weights move with ``.to(...)`` and train with any optimizer.
    ``odeint(func, y0, t, method=solver.method)`` uses it once it is attached to func
    (`attach`), in scope (`using`), or given as ``options={"solver": solver}``. `fit` and
    `Solver.load` return one of its subclasses.

    Args:
        hypernet: the learned correction g, None for none.
        steps: how finely it solves; see the subclasses.
        domain: what it was fitted for, None if it was not fitted.
        report: what the fit measured.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> solver = tdh.BespokeSolver.classical("rk4", 8)
        >>> isinstance(solver, tdh.Solver), solver.method
        (True, 'bns')
    """

    kind: ClassVar[str] = "solver"
    """What files of this class call themselves."""
    follows_grid: ClassVar[bool] = True
    """Whether a call may ask for another number of steps."""
    _loads_all: ClassVar[bool] = True
    _file_rules: ClassVar[Record]  # what the settings in its files may be
    _net_prefix: ClassVar[str] = ""  # what the names of the net's tensors begin with there

    def __init__(
        self,
        hypernet: Hypernet | None,
        steps: Steps,
        domain: FitDomain | None,
        report: FitReport | None,
    ) -> None:
        super().__init__()
        self.hypernet, self.steps = hypernet, steps
        self.domain, self.report = domain, report
        self._warned: set[str] = set()

    def __init_subclass__(
        cls, *, kind: str | None = None, loads_all: bool = False, **kwargs: Any
    ) -> None:
        """Register the class that files of a kind are read into; see `load` for ``loads_all``."""
        super().__init_subclass__(**kwargs)
        cls._loads_all = loads_all
        if kind is not None:
            cls.kind = kind
            _class_of[kind] = cls

    @property
    @abstractmethod
    def base(self) -> str:
        """What `fit` calls ``base``."""

    @property
    @abstractmethod
    def method(self) -> str:
        """The method string this solver answers to, e.g. "hypereuler"."""

    @property
    def alpha(self) -> float | None:
        """Parameter of the base "alpha", None for the others."""
        return None

    @property
    def label(self) -> str:
        """What tables call the solver."""
        return self.method

    @property
    def n_steps(self) -> int | None:
        """``steps`` as one number: the high end of a range."""
        return self.steps[1] if isinstance(self.steps, tuple) else self.steps

    @abstractmethod
    def solve(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Solve dy/dt = func(t, y) from ``y0``, without a host.

        Gives the numbers of ``odeint(func, y0, t, method=self.method)``, and never branches on
        values: ``torch.compile(solver.solve, fullgraph=True)`` makes one graph of it (a counter
        in func, ``self.nfe += 1``, has torch compile anew each time).

        Args:
            func: called as ``func(t, y)`` with a 0-d ``t``; returns a state like ``y``.
            y0: tensor of any shape, or tuple of tensors. Half precision is integrated
                in float32 and cast for each call.
            t: 1-D floating tensor, increasing or decreasing, from the time of ``y0`` on.

        Returns:
            The state at every point of ``t``: like ``y0`` with ``len(t)`` in front.

        Raises:
            OptionError: the solver belongs to a span, and ``t`` starts elsewhere or leaves it.
            StateTypeError: integer state, or a net on another device.
            StateShapeError: ``t`` is not 1-D, or func or g returned another shape.
            NonFiniteError: the solve ended in inf or nan, or overflows the state's dtype.
        """

    def forward(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Same as `solve`."""
        return self.solve(func, y0, t)

    @property
    def span(self) -> tuple[float, float] | None:
        """Where a solve starts, and ends at most; None where any span will do."""
        return None

    def match(self, direction: int, start: float | None = None, end: float | None = None) -> Match:
        """Return how well the solver suits a solve: see `FitDomain.match`; without one, well."""
        return Match.SPAN if self.domain is None else self.domain.match(direction, start, end)

    def warn_outside_fit(self, dt: Tensor, sign: int = 1, readable: str | None = None) -> None:
        """Warn, once a kind, of step sizes outside the fit: see `FitDomain.outside`."""
        has_all = self._warned >= {"direction", "dt" if readable is None else "points"}
        if self.domain is None or torch.compiler.is_compiling() or has_all:
            return
        for kind, text in self.domain.outside(dt, sign, readable).items():
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(text, OutsideFitWarning, stacklevel=4)

    def without_warnings(self) -> Solver:
        """Return the solver, its weights shared, as one that warns of nothing outside its fit."""
        twin = copy.copy(self)
        twin._warned = {"direction", "dt", "points"}  # noqa: SLF001 - a copy of this very object
        return twin

    def _correction(
        self, order: int, func: VectorField, y0: State, layout: StateLayout, flat: Tensor
    ) -> Correction:
        """Return the learned term of one solve, for a base of that order."""
        assert self.hypernet is not None
        part = None if self.domain is None else self.domain.corrected_part(y0)
        return Correction(self.hypernet, order, layout, flat, part=part, context=context_of(func))

    def describe(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the JSON-ready settings that a file holds."""
        tensors, description = ({}, None) if self.hypernet is None else pack(self.hypernet)
        return {self._net_prefix + name: tensor for name, tensor in tensors.items()}, {
            "base": self.base,
            "alpha": self.alpha,
            "steps": self.steps,
            "hypernet": description,
            "domain": None if self.domain is None else self.domain.to_dict(),
            "report": None if self.report is None else self.report.to_dict(),
        }

    @classmethod
    @abstractmethod
    def _arguments(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str
    ) -> dict[str, Any]:
        """Return the constructor's arguments, from checked settings and the tensors of no net."""

    @classmethod
    def rebuild(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        hypernet: nn.Module | None,
        path: str | os.PathLike[str],
        at: str = "",
    ) -> tuple[Solver, Weights | None]:
        """Return a solver from what `describe` gave, and weights that its net still lacks.

        ``hypernet`` is the caller's instance, if any; ``at`` is the place of the settings in the
        file, for messages.
        """
        path = os.fspath(path)
        what = _files.described_in(path)
        found = _files.checked(cls._file_rules, settings, what, at)
        weights = _files.tensors_under(cls._net_prefix, tensors)
        others = {k: v for k, v in tensors.items() if not k.startswith(cls._net_prefix)}
        net = found["hypernet"]
        arguments = cls._arguments(found, others, path)
        if net is not None:
            net = match(net, weights, hypernet, path, under(at, "hypernet"))
        else:
            _files.checked(Record({}), weights, what, "hypernet")
            if hypernet is not None and hypernet is not UNSEEN:
                problem = f"{path!r} holds a solver without a hypernet."
                fix = f"tdh.HyperSolver.load({path!r})"
                raise BaseMismatchError(problem, "no instance to load one into.", fix)
        with _files.damage_reported(path):
            domain, report = found["domain"], found["report"]
            domain = None if domain is None else FitDomain.from_dict(domain)
            report = None if report is None else FitReport.from_dict(report)
            solver = cls(hypernet=net, domain=domain, report=report, **arguments)
        return solver, None if net is None else (net, weights, hypernet is not None)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str]
    ) -> tuple[type[Solver], dict[str, Tensor], dict[str, Any]]:
        """Return the class of the solver in a file, its tensors and its settings, unchecked."""
        owner = solver_class(_files.read_metadata(path)["kind"]) if cls._loads_all else cls
        return owner, *_files.read(path, owner.kind)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the solver to one safetensors file; an old one stays until it is complete.

        Raises:
            StateTypeError: the hypernet is a plain function, or holds more than tensors.
            FileWriteError: the file cannot be written; nothing half-written is left.
        """
        tensors, settings = self.describe()
        _files.write(path, tensors, self.kind, settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str], hypernet: nn.Module | None = None) -> Solver:
        """Read a solver that `save` wrote; runs no code from the file.

        ``Solver.load`` and ``HyperSolver.load`` read files of every kind, other classes those
        of their own. The solver comes frozen (``solver.requires_grad_()`` thaws it), in
        evaluation mode, in its original dtype and, unless an instance is given, on the CPU.

        Args:
            path: the file.
            hypernet: instance to load into, if not a ready net; untouched if loading fails.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is truncated, of another kind, or of a newer format.
            BaseMismatchError: the instance is another net, or the file holds none.
            StateShapeError: the instance's weights have other shapes.
            StateTypeError: the instance's weights have other dtypes.

        Example:
            >>> import tempfile, torchdiffeq_hyper as tdh
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     tdh.BespokeSolver.classical("rk4", 8).save(f"{folder}/rk4.safetensors")
            ...     tdh.Solver.load(f"{folder}/rk4.safetensors").method
            'bns'
        """
        owner, tensors, settings = cls.read(path)
        solver, weights = owner.rebuild(settings, tensors, hypernet, path)
        load_weights([] if weights is None else [weights], path)
        return solver.eval().requires_grad_(requires_grad=False)

    def export(
        self,
        path: str | os.PathLike[str],
        func: VectorField,
        y0: State,
        t: Tensor,
        *,
        dynamic_batch: bool = True,
    ) -> None:
        """Write ``solve`` with func and weights to one file that runs without this package.

        ``torch.export.load(path).module()(y0, t)`` gives the numbers of ``solve(func, y0, t)``
        for every start and time of the shapes exported, in either direction ("bns": its span
        alone, else nan), unchecked. func and net stay in train or eval mode as they are.

        Args:
            path: the file, by custom ``*.pt2``; an old one stays until it is complete.
            func: called as ``func(t, y)``, of tensor operations alone, among them derivatives
                by ``torch.autograd.grad`` or ``torch.func.vjp``.
            y0: example of a state, for shapes, dtype and device.
            t: example of times, for their number and dtype.
            dynamic_batch: take any size of dim 0; of a tuple, in all parts that have the
                first one's size there.

        Raises:
            ExportError: func or g branches on values, or fixes the batch size.
            FileWriteError: the file cannot be written.

        Example:
            >>> import tempfile, torch, torchdiffeq_hyper as tdh
            >>> solver = tdh.HyperSolver("euler", lambda step: step.y / 2, steps=2)
            >>> t = torch.tensor([0.0, 1.0])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     solver.export(f"{folder}/decay.pt2", lambda t, y: -y, torch.ones(3, 1), t)
            ...     solve = torch.export.load(f"{folder}/decay.pt2").module()
            >>> solve(torch.ones(8, 1), t).shape
            torch.Size([2, 8, 1])
        """
        export_solve(path, self.solve, (func, self), (y0, t), dynamic_batch=dynamic_batch)


def solver_class(name: object) -> type[Solver]:
    """Return the class of a solver in a file, by its kind or base; `HyperSolver` for others."""
    return _class_of.get(str(name), _class_of["hypersolver"])
