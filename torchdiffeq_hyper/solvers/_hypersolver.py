r"""A hypersolver: a Runge-Kutta base plus dt^(p+1) times a small net."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._fields import check_hypernet, context_of
from torchdiffeq_hyper._files._container import read_metadata
from torchdiffeq_hyper._state import Hypernet, State, StateLayout, VectorField, is_half
from torchdiffeq_hyper.errors import OutsideFitWarning
from torchdiffeq_hyper.hypernets._files import load_weights
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.solvers._domain import FitDomain, Match
from torchdiffeq_hyper.solvers._export import export_solve
from torchdiffeq_hyper.solvers._files import read_hypersolver, write_hypersolver
from torchdiffeq_hyper.solvers._finite import cast_back, is_finite, raise_non_finite
from torchdiffeq_hyper.solvers._grid import Steps, check_steps, check_times, equal_steps, step_sizes
from torchdiffeq_hyper.solvers._report import FitReport
from torchdiffeq_hyper.solvers._stepping import Correction, Step, integrate, stage_call
from torchdiffeq_hyper.tableaus import Tableau

_owner_of: dict[str, type[HyperSolver]] = {}


class HyperSolver(nn.Module):
    r"""An explicit Runge-Kutta base of order p with a learned correction.

    .. math:: y_{n+1} = y_n + dt\,\psi(t_n, y_n) + dt^{p+1} g(dt, t_n, y_n, k_1..k_s)

    ([H] eq. 4.) A step costs s calls of func, as the base does, and one of g, which
    reuses the stages. The local error is O(delta dt^(p+1)) where g approximates the
    base's residual within delta ([H] theorem 1).

    Args:
        base: "euler" (p = 1), "midpoint", "heun", "alpha" (2) or "rk4" (4).
        hypernet: g, called with a `StepInput`, returning a correction like ``step.y``.
        steps: equal steps to take between two time points; a (low, high) range takes
            ``high``; None takes one step between consecutive points, as the host.
        alpha: parameter of the base "alpha" (default 0.5, the midpoint method).
        domain: what the solver was fitted for (`fit` fills it in).
        report: what the fit measured (`fit` fills it in).

    Raises:
        OptionError: unknown base, ``alpha`` out of place, or impossible ``steps``.
        StateTypeError: ``hypernet`` is not callable.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> solver = tdh.HyperSolver("euler", lambda step: step.y / 2, steps=10)
        >>> y = solver.solve(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> y[-1]
        tensor([0.3685])
    """

    def __init__(
        self,
        base: str,
        hypernet: Hypernet,
        steps: Steps = None,
        *,
        alpha: float | None = None,
        domain: FitDomain | None = None,
        report: FitReport | None = None,
    ) -> None:
        super().__init__()
        self.tableau: Tableau = _registry.find_tableau(base, alpha)
        check_hypernet(hypernet)
        self.hypernet = hypernet
        self.steps = check_steps(steps)
        self.domain = domain
        self.report = report
        self._warned: set[str] = set()

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        """Let `load` hand files of a kind of their own to the subclass that writes them."""
        super().__init_subclass__(**kwargs)
        if kind is not None:
            _owner_of[kind] = cls

    @property
    def base(self) -> str:
        """Name of the base method."""
        return self.tableau.name

    @property
    def alpha(self) -> float | None:
        """Parameter of the base "alpha", None for the others."""
        return self.tableau.alpha

    @property
    def method(self) -> str:
        """The method string this solver answers to, e.g. "hypereuler"."""
        return _registry.method_of(self.base).name

    @property
    def n_steps(self) -> int | None:
        """Equal steps taken between two time points (the high end of a range)."""
        return self.steps[1] if isinstance(self.steps, tuple) else self.steps

    def forward(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Same as `solve`."""
        return self.solve(func, y0, t)

    def solve(self, func: VectorField, y0: State, t: Tensor) -> State:
        """Solve dy/dt = func(t, y) from ``y0`` without a host.

        Gives the numbers of ``odeint(func, y0, t, method=self.method)``. With two points
        in ``t`` it takes ``steps`` equal steps, with more it takes one step between
        consecutive points. It never branches on values, so that
        ``torch.compile(solver.solve, fullgraph=True)`` makes one graph of it (a counter in
        func, ``self.nfe += 1``, has torch compile anew each time); without gradients, two
        points keep no state between.

        Args:
            func: called as ``func(t, y)`` with a 0-d ``t``; returns a state like ``y``.
            y0: tensor of any shape, or tuple of tensors. Half precision is integrated
                in float32 and cast for each call.
            t: 1-D floating tensor, increasing or decreasing, from the time of ``y0`` on.

        Returns:
            The state at every point of ``t``: like ``y0`` with ``len(t)`` in front.

        Raises:
            StateTypeError: integer state, or a net on another device.
            StateShapeError: ``t`` is not 1-D, or func or g returned another shape.
            NonFiniteError: the solve ended in inf or nan, or overflows the state's dtype.

        Example:
            >>> import torch, torchdiffeq_hyper as tdh
            >>> solver = tdh.HyperSolver("heun", lambda step: -step.y / 6, steps=4)
            >>> solver.solve(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0])).shape
            torch.Size([2, 2])
        """
        layout = StateLayout.of(y0)
        flat = layout.join(y0)
        dtype = flat.dtype
        grid = equal_steps(check_times(t, flat), self.n_steps)
        n_points = len(t)
        if flat.numel() == 0 or len(grid) == 1:
            return layout.split(flat.unsqueeze(0).expand(n_points, *flat.shape).clone())
        if is_half(dtype):
            flat = flat.float()
        part = None if self.domain is None else self.domain.corrected_part(y0)
        correction = Correction(
            self.hypernet,
            self.tableau.order,
            layout,
            flat,
            part=part,
            context=context_of(func),
        )
        call = stage_call(func, layout, dtype, is_scalar=flat.dim() == 0)
        step = Step(self.tableau, call, correction)
        sizes = step_sizes(grid, are_equal=n_points == 2)
        self.warn_outside_fit(sizes, readable=None if n_points == 2 else self._read_off_by)
        states = integrate(step, grid, sizes, flat, ends_only=n_points == 2)
        if not is_finite(states[-1]):
            raise_non_finite(step, zip(grid[:-1], grid[1:], strict=True), flat, dtype=dtype)
        return layout.split(cast_back(torch.stack(states), dtype))

    @property
    def is_tied_to_span(self) -> bool:
        """Whether it serves no times but those of its span."""
        return False

    def match(self, direction: int, start: float | None = None, end: float | None = None) -> Match:
        """Return how well the solver suits a solve: see `FitDomain.match`.

        Without a domain it suits every solve.
        """
        return Match.SPAN if self.domain is None else self.domain.match(direction, start, end)

    @property
    def _read_off_by(self) -> str:
        return (
            f'torchdiffeq.odeint(func, y0, t, method="{self.method}", options={{"solver": solver, '
            "{options}})"
        )

    def warn_outside_fit(self, dt: Tensor, sign: int = 1, readable: str | None = None) -> None:
        """Warn, once a kind, when signed step sizes lie outside the fit.

        Args:
            dt: 1-D tensor of step sizes.
            sign: -1 where the host's time is negated.
            readable: see `FitDomain.outside`.
        """
        if self.domain is None or torch.compiler.is_compiling():
            return
        if self._warned >= {"direction", "dt" if readable is None else "points"}:
            return
        for kind, text in self.domain.outside(dt, sign, readable).items():
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(text, OutsideFitWarning, stacklevel=4)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the solver to one safetensors file; an old one stays until it is complete.

        Raises:
            StateTypeError, FileWriteError: a plain function as net; nothing could be written.
        """
        write_hypersolver(path, self)

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

    @classmethod
    def load(cls, path: str | os.PathLike[str], hypernet: nn.Module | None = None) -> HyperSolver:
        """Read a solver that `save` wrote; runs no code from the file.

        It comes frozen (``solver.requires_grad_()`` thaws it), in evaluation mode, in its
        original dtype and, unless an instance is given, on the CPU.

        Args:
            path: the file.
            hypernet: instance to load into, if not a ready net; untouched if loading fails.

        Raises:
            FileNotFoundError, FileFormatError: no file; truncated, other kind, newer format.
            BaseMismatchError, StateShapeError, StateTypeError: the instance is another net.
        """
        owner = _owner_of.get(str(read_metadata(path)["kind"]))
        if cls is HyperSolver and owner is not None:
            return owner.load(path, hypernet)
        arguments, net, weights = read_hypersolver(path, hypernet)
        solver = cls(hypernet=net, **arguments)
        load_weights([(net, weights, hypernet is not None)], path)
        return solver.eval().requires_grad_(requires_grad=False)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the tableau's closures."""
        state = self.__dict__.copy()
        state["tableau"] = (self.base, self.alpha)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the tableau again by its name."""
        base, alpha = state.pop("tableau")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.tableau = _registry.find_tableau(base, alpha)
