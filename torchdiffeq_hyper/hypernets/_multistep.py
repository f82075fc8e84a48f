"""A linear multistep formula with matrices as coefficients: the ready net that has a memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from math import factorial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchdiffeq_hyper._rules import Real, Row, Rule, Such, Whole
from torchdiffeq_hyper._state import State, StepInput, is_differentiated, values_of
from torchdiffeq_hyper.errors import BaseMismatchError, OptionError, StateShapeError
from torchdiffeq_hyper.hypernets._concat import join_channels, refuse_complex, split_channels
from torchdiffeq_hyper.hypernets._ready import ReadyHypernet, but_channels

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
        span: start and end of the fitted span; beyond it the matrices stay as they are there.
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
        tensor([[0.3660, 0.3660]])
    """

    kind = "multistep"
    rules: ClassVar[Mapping[str, Rule]] = {
        "history": Whole(0, 4),
        "degree": Whole(0, 3),
        "span": Such(Row(Real(), Real()), lambda span: span[0] != span[1], "distinct"),
    }
    is_scalable = True
    feature_scale: Tensor
    output_scale: Tensor

    def __init__(
        self,
        channels: int,
        history: int = 2,
        degree: int = 3,
        *,
        span: Sequence[float] = (0.0, 1.0),
        n_stages: int = 1,
        order: int = 1,
    ) -> None:
        own = {"history": history, "degree": degree, "span": list(span)}
        super().__init__(channels, own, n_stages=n_stages)
        self.order = order
        self.span: tuple[float, float] = float(span[0]), float(span[1])
        self.history = history
        self.n_inputs = (history + n_stages + 1) * channels + 1
        shape = (history + 1, degree + 1, channels, self.n_inputs)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.register_buffer("feature_scale", torch.ones(self.n_inputs))
        self.register_buffer("output_scale", torch.ones(channels))
        self._cached: tuple[tuple[Any, ...], list[Tensor], tuple[Tensor, ...]] | None = None

    @property
    def architecture(self) -> dict[str, Any]:
        """JSON-ready description from which `from_architecture` rebuilds the net."""
        return {**super().architecture, "span": list(self.span), "order": self.order}

    def last_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the matrices: the net is zero where they are."""
        yield self.weight

    def concat(self, step: StepInput) -> Tensor:
        r"""Return what the matrices are multiplied by, over dt^p: (batch, features, \*spatial)."""
        u, earlier, available = self._sizes(step)
        blocks = torch.stack(self._blocks(step), dim=1)
        power = u**self.order
        terms = self._terms(u, earlier, available)[0][:, self._present(int(available))] / power
        features = torch.einsum("rb,nbc...->nrc...", terms.to(blocks.dtype), blocks).flatten(1, 2)
        constant = torch.ones_like(features[:, :1]) * (u / power).to(blocks.dtype)
        return torch.cat([features, constant], dim=1)

    def _set_scales(self, inputs: Tensor, residual: Tensor, unit: float) -> None:
        """Scale features and output to a root mean square of 1."""
        sizes = inputs.square().mean(but_channels(inputs)).sqrt()
        # A feature that is zero, or next to it, must not be blown up.
        self.feature_scale.copy_(sizes.clamp(min=1e-6 * float(sizes.max())))
        left = residual * unit
        for k, number in enumerate(self._adams_bashforth_weights()):
            # What is to be learned is what the method that the fit starts from leaves.
            feature = inputs[:, k * self.channels : (k + 1) * self.channels]
            has_history = feature.flatten(1).any(1)
            if bool(has_history.any()):
                inputs, left = inputs[has_history], left[has_history]
                left = left - number * feature[has_history]
        size = float(left.square().mean().sqrt())
        # A step of an optimizer moves all weights: the more there are, the less each may move.
        self.output_scale.fill_((size or 1.0) * min(1.0, 8 / len(sizes)))

    def _adams_bashforth_weights(self) -> tuple[float, ...]:
        is_euler = self.order == 1 and self.n_stages == 1
        return ADAMS_BASHFORTH[: self.history] if is_euler else ()

    def classical_methods(self) -> list[Multistep]:
        """Return the Adams-Bashforth methods above Euler's, where that is the base."""
        orders = range(2, len(self._adams_bashforth_weights()) + 2)
        nets = [copy.deepcopy(self) for _ in orders]
        for net, order in zip(nets, orders, strict=True):
            net.start_as_adams_bashforth(order)
        return nets

    @torch.no_grad()
    def start_as_adams_bashforth(self, order: int) -> None:
        """Set the matrices to the numbers of an Adams-Bashforth method: for Euler's method only.

        At a solve's first steps the order is lower: as the history that there is allows.
        """
        if order not in range(1, len(self._adams_bashforth_weights()) + 2):
            raise OptionError(
                problem=f"order is {order!r} for a net with history={self.history} on a base of "
                f"order {self.order} with {self.n_stages} stages.",
                expected="a base of order 1 with one stage, and an order up to history + 1.",
                fix="Multistep(channels, history=2).start_as_adams_bashforth(3)",
            )
        self.reset()
        for available in range(self.history + 1):
            for k in range(1, min(order, available + 1)):
                at = slice((k - 1) * self.channels, k * self.channels)
                number = ADAMS_BASHFORTH[k - 1] * self.feature_scale[at] / self.output_scale
                self.weight[available, 0, :, at] = number.diag()

    def scaled(self, step: StepInput) -> State:
        """Return time_unit^(p+1) g, like ``step.y``."""
        u, earlier, available = self._sizes(step)
        matrix, constant = self._matrices(step.t.reshape(1), u, earlier, available)
        matrix = matrix[0][:, self._present(int(available))].flatten(1)
        blocks = torch.cat(self._blocks(step), dim=1)
        dtype = torch.promote_types(blocks.dtype, self.weight.dtype)
        power = u**self.order
        out = torch.einsum("ci,ni...->nc...", (matrix / power).to(dtype), blocks.to(dtype))
        constant = (constant[0] / power).to(dtype)
        return split_channels(out + constant.reshape(-1, *(1,) * (out.dim() - 2)), step.y)

    def check_base(self, order: int) -> None:
        """Refuse to correct a base of another order."""
        if order != self.order:
            raise BaseMismatchError(
                problem=f"the hypernet is for a base of order {self.order}, the base has {order}.",
                expected="a net made for the base.",
                fix=f"tdh.hypernets.Multistep({self.channels}, n_stages=..., order={order})",
            )

    def on_grid(
        self, t: Tensor, dt: Tensor, y: Tensor, *, negated: bool = False
    ) -> MultistepOnGrid:
        """Return the net for all steps of a time grid; see `ReadyHypernet.on_grid`."""
        self._check_channels(y)
        # In a dtype of its own choice autocast would round the base's increment as well.
        with torch.autocast(y.device.type, enabled=False):
            matrices = self._cached_matrices(t, dt, y, negated=negated)
        return MultistepOnGrid(self, matrices, y)

    def _cached_matrices(self, t: Tensor, dt: Tensor, y: Tensor, *, negated: bool) -> list[Tensor]:
        """Return those of the last solve, unless it had other times or they are differentiated."""
        parts = (self.weight, self.feature_scale, self.output_scale)
        times = values_of(t), values_of(dt)
        if None in times or any(map(is_differentiated, (*parts, t, dt))):
            return self._matrices_on_grid(t, dt, y, negated=negated)
        key = (*times, t.dtype, y.dtype, y.device, negated, self.time_unit, self.span)
        cached = self._cached
        if cached is not None and cached[0] == key and all(map(torch.equal, cached[2], parts)):
            return cached[1]
        with torch.inference_mode(mode=False), torch.no_grad():  # for solves that train func
            matrices = self._matrices_on_grid(t, dt, y, negated=negated)
        # One tuple, so that threads see all or none.
        self._cached = key, matrices, tuple(part.detach().clone() for part in parts)
        return matrices

    def _matrices_on_grid(self, t: Tensor, dt: Tensor, y: Tensor, *, negated: bool) -> list[Tensor]:
        """Return for each step dt times what the joined blocks, after ones, are multiplied by."""
        u, history = dt / self.time_unit, self.history
        # Where there is no earlier step any number serves: its terms are zero.
        before = [torch.cat([u[:k], u[:-k]])[: len(u)] for k in range(1, history + 1)]
        earlier = torch.stack(before, 1) if before else u.new_empty(len(u), 0)
        available = torch.arange(len(u), device=u.device).clamp(max=history)
        matrices, constants = self._matrices(t, u, earlier, available)
        unit = self.time_unit * (-1 if negated else 1)
        matrices = torch.cat([matrices[:, :, :1], unit * matrices[:, :, 1:]], 2)
        size = u.reshape(-1, 1, 1)
        by_step = (size.unsqueeze(3) * matrices).to(y.device, y.dtype).unbind()
        constants = (size * constants.unsqueeze(2)).to(y.device, y.dtype)
        return [
            torch.cat([constant, matrix[:, self._present(n)].flatten(1)], 1)
            for n, (constant, matrix) in enumerate(zip(constants.unbind(), by_step, strict=True))
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the last solve's matrices."""
        return {**self.__dict__, "_cached": None}

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
        self.check_stages(step.stages)
        blocks = [join_channels(state) for state in (step.y, step.f0, *earlier, *step.stages[1:])]
        self._check_channels(blocks[0])
        return [blocks[0], *((block * self.time_unit).to(blocks[0].dtype) for block in blocks[1:])]

    def check_stages(self, stages: Sequence[State]) -> None:
        """Refuse the stages of another base."""
        if len(stages) != self.n_stages:
            raise StateShapeError(
                problem=f"the base has {len(stages)} stages, the hypernet is for {self.n_stages}.",
                expected="a net made for the base.",
                fix=f"tdh.hypernets.Multistep({self.channels}, n_stages={len(stages)}, order=...)",
            )

    def _present(self, available: int) -> list[int]:
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
                weight = factorial(k) * one
                for i in set(range(k + 1)) - {j}:
                    gap = nodes[j] - nodes[i]
                    weight = weight * (u / torch.where(gap == 0, one, gap))
                row[1 + j] = torch.where(available.to(u.device) >= k, weight, zero)
            rows.append(row)
        for stage in range(2 + self.history, n_blocks):
            row = [zero] * n_blocks
            row[1], row[stage] = -one, one
            rows.append(row)
        rows += [[zero, u, *[zero] * (n_blocks - 2)], [u, *[zero] * (n_blocks - 1)]]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    def _matrices(
        self, t: Tensor, u: Tensor, earlier: Tensor, available: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each step's matrices of the blocks (n, channels, blocks, channels), and constants.

        Without the factor dt; the constants are (n, channels).
        """
        start, end = self.span
        x = 2 * ((t - start) / (end - start)).clamp(0, 1) - 1
        legendre = torch.stack([torch.ones_like(x), x, 1.5 * x**2 - 0.5, 2.5 * x**3 - 1.5 * x], 1)
        scaled = self.output_scale.unsqueeze(1) * self.weight / self.feature_scale
        chosen = scaled[available.to(scaled.device)].to(u.dtype)
        at = torch.einsum("nj,njcf->ncf", legendre[:, : scaled.shape[1]], chosen)
        by_term = at[..., :-1].unflatten(2, (-1, self.channels))
        terms = self._terms(u, earlier, available)
        return torch.einsum("nrb,ncrk->ncbk", terms, by_term), u.unsqueeze(1) * at[..., -1]


class MultistepOnGrid:
    """A `Multistep` net for the steps of one solve, in order, on states that are one tensor.

    All that depends on times alone is computed beforehand: ``matrices`` has one for each step, of
    the channels that `add` joins.
    """

    def __init__(self, net: Multistep, matrices: Sequence[Tensor], y: Tensor) -> None:
        self._net, self._matrices = net, matrices
        self._history = net.history
        self._ones = torch.ones_like(y[:, :1])
        self.restart()

    def restart(self) -> None:
        """Begin at the first step again."""
        self._n = 0
        self._earlier: tuple[Tensor, ...] = ()

    def add(self, dy: Tensor, y: Tensor, stages: tuple[Tensor, ...]) -> Tensor:
        """Return ``dy + dt^(p+1) g`` for the next step."""
        matrix = self._matrices[self._n]
        if self._n == 0:
            self._net.check_stages(stages)
        blocks = torch.cat([self._ones, y, stages[0], *self._earlier, *stages[1:]], 1)
        self._n += 1
        # A copy: func may answer in memory that it uses again.
        f0 = blocks.narrow(1, 1 + y.shape[1], y.shape[1])
        self._earlier = (f0, *self._earlier)[: self._history]
        if not blocks.dtype == dy.dtype == matrix.dtype or torch.is_autocast_enabled(
            dy.device.type
        ):
            with torch.autocast(dy.device.type, enabled=False):
                product = torch.einsum("ci,ni...->nc...", matrix, blocks.to(matrix.dtype))
                return dy + product.to(dy.dtype)
        if dy.dim() == 2:
            return torch.addmm(dy, blocks, matrix.T)
        flat = blocks.flatten(2)
        return torch.baddbmm(dy.flatten(2), matrix.expand(len(flat), -1, -1), flat).view_as(dy)
