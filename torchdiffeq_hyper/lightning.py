"""Fitting under a Lightning `Trainer`: its loggers, callbacks, devices and DDP are the user's.

Needs ``pytorch_lightning`` or ``lightning``: ``pip install "torchdiffeq_hyper[lightning]"``.
The package itself does not import this module.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn, optim

from torchdiffeq_hyper._fields._restore import left_as_found, modules_in, own_random_state
from torchdiffeq_hyper._fields._wrappers import Conditioned
from torchdiffeq_hyper._files import checked
from torchdiffeq_hyper._rules import ANYTHING, Maybe, Record, Table, record_of
from torchdiffeq_hyper._state import State, VectorField, parts_of, wide_dtype
from torchdiffeq_hyper.errors import MissingExtraError, OptionError
from torchdiffeq_hyper.fitting import _batches, _objectives
from torchdiffeq_hyper.fitting._budget import ENDLESS, PROBES
from torchdiffeq_hyper.fitting._config import FitConfig
from torchdiffeq_hyper.fitting._data import MOST_BYTES, Batch
from torchdiffeq_hyper.fitting._field import Field
from torchdiffeq_hyper.fitting._fit import check_hypernet
from torchdiffeq_hyper.fitting._hypersolver import measure_noise
from torchdiffeq_hyper.fitting._phases import annealed
from torchdiffeq_hyper.fitting._problem import HypersolverProblem
from torchdiffeq_hyper.fitting._signature import check_same_field
from torchdiffeq_hyper.hypernets import ready
from torchdiffeq_hyper.solvers._fit_report import FitReport, LossPoint
from torchdiffeq_hyper.solvers._grid import Steps
from torchdiffeq_hyper.solvers._hypersolver import HyperSolver

__all__ = ["HyperSolverModule"]


def _find_lightning() -> Any:
    """Return Lightning under the name it is already used by, or is installed as."""
    names = ("pytorch_lightning", "lightning.pytorch")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in {name, name.partition(".")[0]}:
                raise
    raise MissingExtraError(
        problem="torchdiffeq_hyper.lightning needs Lightning, which is not installed.",
        expected="pytorch_lightning, or lightning.",
        fix='pip install "torchdiffeq_hyper[lightning]"',
    )


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule
else:
    _lightning = _find_lightning()
    Callback, LightningModule = _lightning.Callback, _lightning.LightningModule


class _FieldAsFound(Callback):
    """Keeps func as a fit needs it, and gives it back: a module has no hook for exceptions."""

    def __init__(self, func: VectorField) -> None:
        self._func, self._stack = func, ExitStack()

    def on_fit_start(self, *_: Any) -> None:
        self._stack.enter_context(left_as_found(self._func))

    def on_fit_end(self, *_: Any, **__: Any) -> None:
        self._stack.close()

    on_exception = on_fit_end


@dataclass
class _History:
    """The fields of a `FitReport` that grow during a fit; they are kept in checkpoints."""

    losses: list[LossPoint] = field(default_factory=list)
    delta: dict[str, float] = field(default_factory=dict)
    base_delta: dict[str, float] = field(default_factory=dict)
    validation: float = 0.0
    base_validation: float = 0.0
    iterations: int = 0
    seconds: float = 0.0


# What the module adds to a checkpoint; earlier versions did not tell fields apart.
_CHECKPOINT = Record(
    {"torchdiffeq_hyper": record_of(_History)},
    optional={"torchdiffeq_hyper_field": Maybe(Table(ANYTHING))},
)


class HyperSolverModule(LightningModule):
    r"""`torchdiffeq_hyper.fit` as a LightningModule, trained on batches; raises what `fit` does.

    A training step minimises what `fit` does, on the batch's own reference solution, with
    AdamW and half a cosine of annealing over the Trainer's steps (one for each phase). It
    logs ``train_loss``, relative to the base's on ``y0`` (so 1 is no correction), and the
    `FitReport`'s ``validation`` and, without the correction, ``validation_base``.

    A batch whose reference is known costs an iteration of `fit`, a new one an adaptive solve
    first. References are kept, up to 1 GiB, for batches that come again: do not shuffle.

    func is no submodule: it is neither trained nor saved, moves along to other devices, and comes
    back as it was. A checkpoint holds the hypernet and the history; to read it, pass the arguments
    again: ``load_from_checkpoint(path, func=func, y0=y0, t_span=..., base=..., steps=...)``.

    Args:
        func, t_span, steps, alpha, objective, direction: as in `fit`.
        y0: a batch of starts to make the net for and measure scales and noise on; not trained on.
        base, hypernet: as in `fit`, but for "bns"; the net is trained in place.
        context: "batch" where a batch, ``y0`` too, is (state, *context), as in `fit`.
        config: lr, weight_decay, rtol, atol, method and seed count; the rest is the Trainer's.

    Example:
        >>> import torch
        >>> from torchdiffeq_hyper.lightning import HyperSolverModule
        >>> func, y0 = lambda t, y: torch.sin(t) - y, torch.linspace(-1, 1, 8).unsqueeze(1)
        >>> HyperSolverModule(func, y0, (0.0, 1.0), base="euler", steps=4).solver.method
        'hypereuler'
    """

    def __init__(
        self,
        func: VectorField,
        y0: State,
        t_span: tuple[float, float] | Tensor,
        *,
        base: str,
        steps: Steps,
        hypernet: nn.Module | None = None,
        alpha: float | None = None,
        objective: str = "combined",
        direction: str = "forward",
        config: FitConfig | None = None,
        context: Literal["batch"] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(func, Conditioned) or not (context is None or isinstance(context, str)):
            raise _batches.many_batches()  # which rows are a batch's cannot be told
        self._problem = HypersolverProblem.for_net(
            func,
            t_span,
            hypernet,
            base=base,
            steps=steps,
            alpha=alpha,
            objective=objective,
            direction=direction,
            config=config,
            context=context,
        )
        check_hypernet(hypernet)
        self._func = (func,)  # in a tuple, so that torch does not take it for a part
        self._starts = _batches.checked_batch(y0, has_context=self._problem.context == "batch")
        with torch.enable_grad(), own_random_state(self._problem.config.seed), self._measuring():
            self._prepare(hypernet)
        self._ends: list[int] = []  # of the phases; none under another configure_optimizers
        self._train: list[float] = []
        self._history = _History()
        self._known: dict[Hashable, Batch] = {}

    def _prepare(self, net: nn.Module | None) -> None:
        """Check the field, measure the noise floor, and make and calibrate the net."""
        problem, starts = self._problem, self._starts
        self._references, self._signs = problem.check_field(starts, _batches.n_samples(starts))
        references = replace(self._references)  # whose solves are not counted as a Trainer's
        probes = _batches.head(starts, PROBES)
        field = Field(problem.func, probes, ENDLESS, references.units)
        tableau = problem.tableau
        self._noise = measure_noise(field, probes.y0, tableau, problem.plan, references.tolerances)
        batch = references.solve(starts, ENDLESS)
        self.hypernet = ready(starts.y0, tableau, time_unit=problem.width) if net is None else net
        with _objectives.measuring_time_in(self.hypernet, problem.span, tableau.order):
            is_new = _objectives.calibrate(self.hypernet, batch)
        solver = problem.solver(self.hypernet)
        self._phases = _objectives.objectives_of(problem.objective, solver, problem.func)
        if is_new:
            _objectives.take_classical_start(self.hypernet, self._phases[-1], batch)
        self._scales = [
            [_objectives.usable_scale(phase.base_loss(batch, r)) for r in range(len(batch.grids))]
            for phase in self._phases
        ]

    @property
    def solver(self) -> HyperSolver:
        """The hypersolver with a copy of the net as it is now, frozen, domain and report."""
        net, problem = copy.deepcopy(self.hypernet), self._problem
        domain = problem.domain(self._starts.y0)
        solver = problem.solver(net, problem.steps, domain=domain, report=self.report)
        return solver.eval().requires_grad_(requires_grad=False)

    @property
    def report(self) -> FitReport | None:
        """What was measured at the last validation; None before there was one."""
        if not self._history.delta:
            return None
        return FitReport(
            **{**vars(self._history), "losses": tuple(self._history.losses)},
            noise_floor=self._noise,
            reference_seconds=self._references.seconds,
            reference_nfe=self._references.calls,
            stopped="trainer",
            seed=self._problem.config.seed,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch on one grid, relative to the base's."""
        phase = self._phase_at(self.global_step)
        measured = self._measure(("train", batch_idx), batch)
        grid = self.global_step % len(measured.grids)
        with torch.inference_mode(mode=False):
            loss = self._phases[phase].loss(measured, grid)
        self._train.append(float(loss.detach()))
        relative = loss / self._scales[phase][grid]
        self.log("train_loss", relative, prog_bar=True, batch_size=_batches.n_samples(measured.y0))
        return relative

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._sums = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the validation errors."""
        measured = self._measure(("validation", dataloader_idx, batch_idx), batch)
        with self._measuring(), torch.no_grad():
            criterion = self._phases[-1]
            errors = criterion.error(measured), criterion.base_error(measured)
            if not self._sums[0]:
                self._history.delta, self._history.base_delta = (
                    _objectives.delta_quantiles(net, self._problem.tableau.order, measured)
                    for net in (self.hypernet, _objectives.no_correction)
                )
        count = _batches.n_samples(measured.y0)
        self._sums += count * self._sums.new_tensor([1.0, *errors])

    def on_validation_epoch_end(self) -> None:
        """Log the mean errors over all samples of all processes."""
        sums = self._sums.to(self.device, wide_dtype(self.device))
        count, error, base_error = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        history = self._history
        history.validation, history.base_validation = error / count, base_error / count
        self.log("validation", history.validation, prog_bar=True, sync_dist=True)
        self.log("validation_base", history.base_validation, sync_dist=True)
        if self._train:
            phase = self._phases[self._phase_at(max(0, self.global_step - 1))].name
            loss = sum(self._train) / len(self._train)
            history.losses.append(LossPoint(self.global_step, phase, loss, history.validation))
            self._train = []

    def setup(self, stage: str) -> None:
        """Refuse a precision that would leave func in another dtype, by `OptionError`."""
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise OptionError(
                problem=f"the Trainer's precision {precision!r} casts func and leaves it so.",
                expected='"32-true", which casts nothing, or "bf16-mixed".',
                fix="func and y0 cast by yourself, and Trainer() without precision",
            )

    def on_fit_start(self) -> None:
        """Start the clock, or let it go on."""
        self._began = time.perf_counter() - self._history.seconds

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count iterations and seconds."""
        self._history.iterations = self.global_step
        self._history.seconds = time.perf_counter() - self._began

    def configure_optimizers(self) -> Any:
        """Return AdamW on the hypernet, annealed over the steps that the Trainer will do."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise OptionError(
                problem="the Trainer has no last step, so the learning rate cannot be annealed.",
                expected="a number of epochs or steps.",
                fix="Trainer(max_epochs=100)   # or max_steps=2000; EarlyStopping may end it",
            )
        config = replace(self._problem.config, iterations=max(1, int(steps)))
        problem = replace(self._problem, config=config)
        self._ends = list(accumulate(problem.iterations(len(self._phases))))
        parameters = [p for p in self.hypernet.parameters() if p.requires_grad]
        optimizer = optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        schedule = optim.lr_scheduler.LambdaLR(optimizer, self._rate_at)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _phase_at(self, step: int) -> int:
        """Return the number of the phase in which an optimizer step is."""
        return sum(step >= end for end in self._ends[:-1])

    def _rate_at(self, step: int) -> float:
        """Return the share of the learning rate for an optimizer step."""
        start, end = [0, *self._ends][self._phase_at(step) :][:2]
        return annealed(min(1.0, (step - start) / max(1, end - start)))

    def configure_callbacks(self) -> list[Callback]:
        """Return what gives func back as it was, also after errors."""
        return [_FieldAsFound(self._func[0])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was measured, and what tells the field from others."""
        checkpoint["torchdiffeq_hyper"] = asdict(self._history)
        checkpoint["torchdiffeq_hyper_field"] = self._signs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what was measured; refuse a damaged checkpoint and that of another field."""
        own = {name: checkpoint[name] for name in _CHECKPOINT.fields if name in checkpoint}
        own = checked(_CHECKPOINT, own, "the checkpoint")
        check_same_field(own.get("torchdiffeq_hyper_field"), self._signs)
        history = own["torchdiffeq_hyper"]
        losses = [LossPoint(**point) for point in history["losses"]]
        self._history = _History(**{**history, "losses": losses})

    def _measure(self, key: Hashable, batch: Any) -> Batch:
        """Return a batch with its reference: the one known under a key if it has these samples."""
        with self._measuring(), torch.autocast(self.device.type, enabled=False):
            starts = _batches.checked_batch(batch, has_context=self._problem.context == "batch")
            _batches.check_like(starts, self._starts)
            known = self._known.pop(key, None)
            if known is None or not _are_same(known.starts, starts):
                known = self._references.solve(starts, ENDLESS)
            if known.nbytes + sum(other.nbytes for other in self._known.values()) <= MOST_BYTES:
                self._known[key] = known
            return known

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        with torch.inference_mode(mode=False), left_as_found(self._func[0]):
            yield

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        for module in modules_in(self._func[0]):
            module._apply(fn, recurse)  # noqa: SLF001
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _are_same(first: _batches.Starts, second: _batches.Starts) -> bool:
    tensors = ((*parts_of(starts.y0), *starts.context) for starts in (first, second))
    return all(a.device == b.device and torch.equal(a, b) for a, b in zip(*tensors, strict=True))
