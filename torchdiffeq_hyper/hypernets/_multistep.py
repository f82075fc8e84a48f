"""A linear multistep formula with matrices as coefficients: the ready net that has a memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import factorial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._rules import Rule, Whole
from torchdiffeq_hyper._state import State, StepInput
from torchdiffeq_hyper.errors import StateShapeError
from torchdiffeq_hyper.hypernets._concat import join_channels, refuse_complex, split_channels
from torchdiffeq_hyper.hypernets._ready import ReadyHypernet

ADAMS_BASHFORTH = (1 / 2, 5 / 12, 3 / 8, 251 / 720)
"""Weights of the backward differences of f in the Adams-Bashforth methods, from the first on."""


class Multistep(ReadyHypernet):
    r"""A linear multistep formula whose coefficients are matrices, smooth in time.

    .. math:: dt^{p+1} g = dt \sum_j P_j(\tau) \Big( \sum_{k=1}^{H} A_{jk} \delta_k
        + \sum_{i=2}^{s} S_{ji} (k_i - k_1) + dt\,(B_j f_0 + C_j y + b_j) \Big)

    with :math:`\delta_k = k!\, dt^k f[t_n, \dots, t_{n-k}]`, the divided differences of the
    derivatives at the last steps' starts (on a uniform grid: their backward differences), the
    stages k_1..k_s of the base, and the Legendre polynomials P_j in :math:`\tau`, the place in
    the fitted span. An Adams-Bashforth method has numbers in the place of the matrices A (see
    Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section III.1). The
    coefficients do not depend on dt, so that one fit serves many step sizes. At a solve's first
    steps, which have less history, matrices of their own serve.

    The same matrices serve every point of space. On a time grid that is known beforehand a step
    costs one product of a channels x (3 + H + s - 1) channels matrix, and no call of func.

    Args:
        channels: channels of the state, all parts of a tuple state together.
        history: H, how many earlier derivatives are used.
        degree: of the polynomials in time.
        n_stages: s, the stages of the base method.
        order: p, the order of the base method.

    Raises:
        OptionError: an argument is impossible.

    Example:
        >>> import torch, torchdiffeq_hyper as tdh
        >>> g = tdh.hypernets.Multistep(channels=2)
        >>> solver = tdh.HyperSolver("euler", g, steps=10)
        >>> y0, t = torch.ones(1, 2), torch.tensor([0.0, 1.0])
        >>> solver.solve(lambda t, y: -y, y0, t)[-1].detach()  # unfitted: Euler's method
        tensor([[0.3487, 0.3487]])
        >>> g.start_as_adams_bashforth(3)
        >>> solver.solve(lambda t, y: -y, y0, t)[-1].detach()  # exp(-1) is 0.3679
        tensor([[0.3697, 0.3697]])
    """

    kind = "multistep"
    rules: ClassVar[Mapping[str, Rule]] = {"history": Whole(0, 4), "degree": Whole(0, 3)}

    feature_scale: Tensor
    output_scale: Tensor
    span: Tensor

    def __init__(
        self,
        channels: int,
        history: int = 2,
        degree: int = 3,
        *,
        n_stages: int = 1,
        order: int = 1,
    ) -> None:
        super().__init__(channels, {"history": history, "degree": degree}, n_stages=n_stages)
        self.measure_time_in(1.0, order)
        self.history = history
        n_features = (history + n_stages + 1) * channels + 1
        shape = (history + 1, degree + 1, channels, n_features)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.register_buffer("feature_scale", torch.ones(n_features))
        self.register_buffer("output_scale", torch.ones(channels))
        self.register_buffer("span", torch.tensor([0.0, 1.0]))

    @property
    def architecture(self) -> dict[str, Any]:
        """JSON-ready description from which `from_architecture` rebuilds the net."""
        return {**super().architecture, "order": self.order}

    def last_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the matrices: the net is zero where they are."""
        yield self.weight

    def concat(self, step: StepInput) -> Tensor:
        r"""Return what the matrices are multiplied by, over dt^p: (batch, features, \*spatial)."""
        u, earlier, available = self._sizes(step)
        blocks = torch.stack(self._blocks(step), dim=1)
        power = u**self.order
        terms = self._terms(u, earlier, available)[0][:, self.present(int(available))] / power
        features = torch.einsum("rb,nbc...->nrc...", terms.to(blocks.dtype), blocks).flatten(1, 2)
        constant = torch.ones_like(features[:, :1]) * (u / power).to(blocks.dtype)
        return torch.cat([features, constant], dim=1)

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, residual: Tensor, unit: float = 1.0) -> None:
        """Scale features and output to a root mean square of 1; see `ReadyHypernet.calibrate`."""
        over = [0, *range(2, inputs.dim())]
        sizes = inputs.double().square().mean(over).sqrt()
        # A feature that is zero, or next to it, must not be blown up.
        self.feature_scale.copy_(sizes.clamp(min=1e-6 * float(sizes.max())))
        size = residual.double().square().mean().sqrt() * unit
        self.output_scale.fill_(float(size) or 1.0)

    @torch.no_grad()
    def start_as_adams_bashforth(self, order: int) -> None:
        """Set the matrices to the numbers of an Adams-Bashforth method: for Euler's method only.

        At a solve's first steps the order is lower: as the history that there is allows.
        """
        self.reset()
        for available in range(self.history + 1):
            for k in range(1, min(order, available + 1)):
                at = slice((k - 1) * self.channels, k * self.channels)
                number = ADAMS_BASHFORTH[k - 1] * self.feature_scale[at] / self.output_scale
                self.weight[available, 0, :, at] = number.diag()

    def scaled(self, step: StepInput) -> State:
        """Return time_unit^(p+1) g, like ``step.y``."""
        u, earlier, available = self._sizes(step)
        matrix, constant = self.matrices(step.t.reshape(1), u, earlier, available)
        matrix = matrix[0][:, self.present(int(available))].flatten(1)
        blocks = torch.cat(self._blocks(step), dim=1)
        dtype = torch.promote_types(blocks.dtype, self.weight.dtype)
        power = u**self.order
        out = torch.einsum("ci,ni...->nc...", (matrix / power).to(dtype), blocks.to(dtype))
        constant = (constant[0] / power).to(dtype)
        return split_channels(out + constant.reshape(-1, *(1,) * (out.dim() - 2)), step.y)

    def on_grid(
        self, t: Tensor, dt: Tensor, y: Tensor, *, negated: bool = False
    ) -> MultistepOnGrid:
        """Return the net for all steps of a time grid and states like ``y``, one tensor."""
        self._check_channels(y)
        return MultistepOnGrid(self, t, dt, y, negated=negated)

    def _check_channels(self, y: Tensor) -> None:
        """Refuse joined states that these matrices do not fit."""
        refuse_complex(y)
        if y.shape[1] != self.channels:
            raise StateShapeError(
                problem=f"the state has {y.shape[1]} channels along dim 1, the hypernet's matrices "
                f"{self.channels}.",
                expected="the samples along dim 0, and as many channels as the net was made for.",
                fix=f"tdh.hypernets.Multistep(channels={y.shape[1]})",
            )

    def _sizes(self, step: StepInput) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sizes of the step (1,) and the earlier ones (1, H), and how many there are."""
        u = step.dt.reshape(1) / self.time_unit
        known = [dt.reshape(1) / self.time_unit for _, dt in step.history[: self.history]]
        columns = [*known, *[u] * (self.history - len(known))]
        earlier = torch.stack(columns, 1) if columns else u.new_empty(1, 0)
        return u, earlier, torch.tensor([len(known)])

    def _blocks(self, step: StepInput) -> list[Tensor]:
        """Return state and derivatives in time units, each (batch, channels, *spatial)."""
        earlier = (f for f, _ in step.history[: self.history])
        blocks = [join_channels(state) for state in (step.y, step.f0, *earlier, *step.stages[1:])]
        self._check_channels(blocks[0])
        return [blocks[0], *(block * self.time_unit for block in blocks[1:])]

    def present(self, available: int) -> list[int]:
        """Return which of y, f0, f_-1 ... f_-H, k_2 ... k_s there are with so much history."""
        stages = range(2 + self.history, 1 + self.history + self.n_stages)
        return [*range(2 + min(available, self.history)), *stages]

    def _terms(self, u: Tensor, earlier: Tensor, available: Tensor) -> Tensor:
        """Return the terms of the sum as combinations of the blocks, (n, terms, blocks)."""
        zero, one = torch.zeros_like(u), torch.ones_like(u)
        n_blocks = 1 + self.history + self.n_stages
        nodes = torch.cat([zero.unsqueeze(1), -earlier.cumsum(1)], 1).unbind(1)
        rows = []
        for k in range(1, self.history + 1):
            row = [zero] * n_blocks
            for j in range(k + 1):
                others = [nodes[j] - nodes[i] for i in range(k + 1) if i != j]
                weight = factorial(k) * u**k / torch.stack(others).prod(0)
                row[1 + j] = torch.where(available.to(u.device) >= k, weight, zero)
            rows.append(row)
        for stage in range(2 + self.history, n_blocks):
            row = [zero] * n_blocks
            row[1], row[stage] = -one, one
            rows.append(row)
        rows += [[zero, u, *[zero] * (n_blocks - 2)], [u, *[zero] * (n_blocks - 1)]]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    def matrices(
        self, t: Tensor, u: Tensor, earlier: Tensor, available: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each step's matrices of the blocks (n, channels, blocks, channels), and constants.

        Without the factor dt; the constants are (n, channels).
        """
        start, end = self.span.to(t.dtype).unbind()
        x = 2 * ((t - start) / (end - start)).clamp(0, 1) - 1
        legendre = torch.stack([torch.ones_like(x), x, 1.5 * x**2 - 0.5, 2.5 * x**3 - 1.5 * x], 1)
        scaled = self.output_scale.unsqueeze(1) * self.weight / self.feature_scale
        chosen = scaled[available.to(scaled.device)].to(u.dtype)
        at = torch.einsum("nj,njcf->ncf", legendre[:, : scaled.shape[1]], chosen)
        by_term = at[..., :-1].unflatten(2, (-1, self.channels))
        terms = self._terms(u, earlier, available)
        return torch.einsum("nrb,ncrk->ncbk", terms, by_term), u.unsqueeze(1) * at[..., -1]


class MultistepOnGrid:
    r"""A `Multistep` net for the steps of one solve, in order, on states that are one tensor.

    All that depends on times alone is computed at once, for all steps.

    Args:
        net: the net.
        t: (n,) true times at which the steps start.
        dt: (n,) their true, signed sizes.
        y0: (batch, channels, \*spatial), a state of the solve.
        negated: whether derivatives are given negated, by a host that runs time backward so.
    """

    def __init__(
        self, net: Multistep, t: Tensor, dt: Tensor, y0: Tensor, *, negated: bool = False
    ) -> None:
        u, history = dt / net.time_unit, net.history
        # Where there is no earlier step any number serves: its terms are zero.
        before = [torch.cat([u[:k], u[:-k]])[: len(u)] for k in range(1, history + 1)]
        earlier = torch.stack(before, 1) if before else u.new_empty(len(u), 0)
        available = torch.arange(len(u), device=u.device).clamp(max=history)
        matrices, constants = net.matrices(t, u, earlier, available)
        unit = net.time_unit * (-1 if negated else 1)
        matrices = torch.cat([matrices[:, :, :1], unit * matrices[:, :, 1:]], 2)
        size = u.reshape(-1, 1, 1)
        by_step = (size.unsqueeze(3) * matrices).to(y0.dtype).unbind()
        constants = (size * constants.unsqueeze(2)).to(y0.dtype)
        self._matrices = [
            torch.cat([constant, matrix[:, net.present(n)].flatten(1)], 1)
            for n, (constant, matrix) in enumerate(zip(constants.unbind(), by_step, strict=True))
        ]
        self._ones = torch.ones_like(y0[:, :1])
        self._history = history
        self.restart()

    def restart(self) -> None:
        """Begin at the first step again."""
        self._n = 0
        self._earlier: tuple[Tensor, ...] = ()

    def add(self, dy: Tensor, y: Tensor, stages: tuple[Tensor, ...]) -> Tensor:
        """Return ``dy + dt^(p+1) g`` for the next step."""
        matrix = self._matrices[self._n]
        blocks = torch.cat([self._ones, y, stages[0], *self._earlier, *stages[1:]], 1)
        self._n += 1
        # A copy: func may answer in memory that it uses again.
        f0 = blocks.narrow(1, 1 + y.shape[1], y.shape[1])
        self._earlier = (f0, *self._earlier)[: self._history]
        if dy.dim() == 2:
            return torch.addmm(dy, blocks, matrix.T)
        flat = blocks.flatten(2)
        return torch.baddbmm(dy.flatten(2), matrix.expand(len(flat), -1, -1), flat).view_as(dy)
