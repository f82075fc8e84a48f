"""A Lightning Trainer fits what `fit` fits; func is no part of the module it trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchdiffeq_hyper as tdh
from stubs import Counted, MLPField, damped_wave
from torchdiffeq_hyper.errors import MissingExtraError, OptionError, StateShapeError, StateTypeError

pytestmark = [
    # Lightning 2.6 warns about loaders without worker processes, about fewer batches than
    # log_every_n_steps, and uses what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def starts(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def loader(y0: Tensor, size: int = 16, **arguments: Any) -> Any:
    return DataLoader(TensorDataset(y0), batch_size=size, **arguments)


def make(func: Any = damped_wave, y0: Any = None, **arguments: Any) -> Any:
    from torchdiffeq_hyper.lightning import HyperSolverModule

    given = {"base": "heun", "steps": 4, **arguments}
    return HyperSolverModule(func, starts(16, 5) if y0 is None else y0, (0.0, 1.0), **given)


def trainer(**arguments: Any) -> Any:
    from pytorch_lightning import Trainer

    given = {
        "accelerator": "cpu",
        "max_epochs": 12,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **arguments,
    }
    return Trainer(**given)


def train(module: Any, y0: Any = None, val: Any = None, **arguments: Any) -> Any:
    fitting = trainer(**arguments)
    y0 = starts(48) if y0 is None else y0
    fitting.fit(module, loader(y0), loader(starts(24, 2) if val is None else val, 9))
    return fitting


@pytest.mark.parametrize("objective", ["residual", "trajectory", "combined"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_a_trainer_reduces_the_error_on_starts_it_has_not_seen(
    objective: str, direction: str
) -> None:
    module = make(objective=objective, direction=direction)
    fitting = train(module, max_epochs=40)
    figures = fitting.callback_metrics
    assert figures["validation"] < figures["validation_base"] / 4
    assert figures["train_loss"] < 0.4


def test_a_subclass_may_bring_its_own_optimizer() -> None:
    module = make()

    class Own(type(module)):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.hypernet.parameters(), lr=1e-3)

    module.__class__ = Own
    before = [p.detach().clone() for p in module.hypernet.parameters()]
    train(module, max_epochs=1)
    pairs = zip(before, module.hypernet.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)
    assert module.report.losses[-1].phase == "residual"


def test_the_solver_serves_odeint_with_domain_and_report() -> None:
    module = make()
    fitting = train(module)
    solver, report = module.solver, module.report
    assert solver.domain.directions == (1,)
    assert solver.domain.shapes == ((2,),)
    assert solver.report == report
    assert report.validation == pytest.approx(float(fitting.callback_metrics["validation"]))
    assert report.iterations == 12 * 3
    assert [point.iteration for point in report.losses] == [3 * (n + 1) for n in range(12)]
    assert report.losses[0].phase == "residual"
    assert report.losses[-1].phase == "trajectory"
    assert report.stopped == "trainer"
    assert report.delta["0.5"] < report.base_delta["0.5"]
    assert report.seconds > report.reference_seconds > 0
    assert not any(p.requires_grad for p in solver.parameters())
    assert all(p.requires_grad for p in module.hypernet.parameters())
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    y0 = starts(24, 2)
    from torchdiffeq import odeint

    exact = odeint(damped_wave, y0, t, rtol=1e-10, atol=1e-10)
    sizes = exact.norm(dim=-1)
    sizes = sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))
    errors = (solver.solve(damped_wave, y0, t) - exact).norm(dim=-1) / sizes
    assert report.validation == pytest.approx(float(errors[1:].mean()), rel=1e-5)


def labelled(y0: Tensor) -> tuple[Tensor, Tensor]:
    return y0, (3 * y0[:, 0]).long() % 3


def by_label(t: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return damped_wave(t, y) * (1 + labels.to(y.dtype).unsqueeze(1))


def test_batches_bring_the_context_of_their_samples() -> None:
    module = make(by_label, labelled(starts(16, 5)), context="batch")
    fitting = trainer(max_epochs=20)
    data = (labelled(starts(48)), labelled(starts(24, 2)))
    loaders = [DataLoader(TensorDataset(*part), batch_size=24) for part in data]
    fitting.fit(module, *loaders)
    report = module.report
    assert report.validation < report.base_validation / 2
    y0, labels = data[1]
    from torchdiffeq import odeint

    func, t = tdh.Conditioned(by_label, labels), torch.linspace(0, 1, 5, dtype=torch.float64)
    exact = odeint(func, y0, t, rtol=1e-10, atol=1e-10)
    sizes = exact.norm(dim=-1)
    sizes = sizes.clamp_min(0.1 * float(sizes.square().mean().sqrt()))
    errors = (module.solver.solve(func, y0, t) - exact).norm(dim=-1) / sizes
    assert report.validation == pytest.approx(float(errors[1:].mean()), rel=1e-5)


def test_a_batch_with_other_context_is_measured_anew() -> None:
    module = make(by_label, labelled(starts(16, 5)), context="batch")
    y0, labels = labelled(starts(16))
    first = module._measure(("train", 0), [y0, labels])
    assert module._measure(("train", 0), [y0.clone(), labels.clone()]) is first
    assert module._measure(("train", 0), [y0, labels + 1]) is not first


def test_context_that_a_loader_cannot_bring_is_refused() -> None:
    y0, labels = labelled(starts(16, 5))
    for func, context in ((by_label, labels), (tdh.Conditioned(by_label, labels), None)):
        with pytest.raises(OptionError, match='context="batch"'):
            make(func, y0, context=context)
    with pytest.raises(StateTypeError, match="a batch is a Tensor"):
        make(by_label, y0, context="batch")
    module = make(by_label, (y0, labels), context="batch")
    with pytest.raises(StateShapeError, match="as the first batch"):
        module._measure(("train", 0), [y0, labels.double()])
    with pytest.raises(StateShapeError, match=r"tdh\.Conditioned"):
        make(lambda t, y: by_label(t, y, labels), y0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_without_a_validation_there_is_no_report_but_a_solver() -> None:
    module = make()
    fitting = trainer(max_epochs=1)
    fitting.fit(module, loader(starts(16)))
    assert module.report is None
    assert module.solver.report is None


def test_references_of_batches_that_come_again_are_kept() -> None:
    func = Counted(damped_wave)
    module = make(func, objective="residual")
    train(module, max_epochs=2, num_sanity_val_steps=0)
    first = module.report.reference_nfe
    calls = func.calls
    train(module, max_epochs=3, num_sanity_val_steps=0)
    assert module.report.reference_nfe == first
    assert func.calls == calls
    train(module, starts(48, 8), max_epochs=1, num_sanity_val_steps=0)
    assert module.report.reference_nfe > first


def test_the_field_is_neither_trained_nor_saved_nor_left_changed(tmp_path: Path) -> None:
    field = MLPField()
    field.add_module("norm", nn.BatchNorm1d(2))
    field.net[0].bias.requires_grad_(False)
    field.train()
    before = {name: value.clone() for name, value in field.state_dict().items()}
    seen = set()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            seen.add((field.training, any(p.requires_grad for p in field.parameters())))
            return self.field(t, y)

    module = make(Watched())
    fitting = train(module, max_epochs=3)
    assert seen == {(False, False)}
    assert field.training
    assert [p.requires_grad for p in field.parameters()] == [True, False, True, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in field.state_dict().items())
    trained = {id(p) for group in fitting.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.hypernet.parameters()}
    assert all(name.startswith("hypernet.") for name in module.state_dict())


def test_the_field_comes_back_after_an_error() -> None:
    field = MLPField()

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise ZeroDivisionError
            return self.field(t, y)

    module = make(Fragile(), objective="trajectory")
    with pytest.raises(ZeroDivisionError):
        train(module)
    assert field.training
    assert all(p.requires_grad for p in field.parameters())


def test_the_field_moves_with_the_module() -> None:
    field = MLPField()
    module = make(field)
    module.to(torch.float32)
    assert {p.dtype for p in field.parameters()} == {torch.float32}


def test_a_checkpoint_holds_the_net_and_the_history(tmp_path: Path) -> None:
    from torchdiffeq_hyper.lightning import HyperSolverModule

    module = make(MLPField())
    fitting = train(module, max_epochs=3)
    path = tmp_path / "last.ckpt"
    fitting.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert all(name.startswith("hypernet.") for name in saved["state_dict"])
    loaded = HyperSolverModule.load_from_checkpoint(
        path, func=MLPField(), y0=starts(16, 5), t_span=(0.0, 1.0), base="heun", steps=4
    )
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.report.losses == module.report.losses
    assert loaded.report.validation == module.report.validation


def rotated(t: Tensor, y: Tensor) -> Tensor:
    return y.flip(1) * torch.tensor([1.0, -1.0], dtype=y.dtype)


def test_the_checkpoint_of_another_field_is_refused(tmp_path: Path) -> None:
    from torchdiffeq_hyper.errors import FileFormatError, OptionError
    from torchdiffeq_hyper.lightning import HyperSolverModule

    path = tmp_path / "last.ckpt"
    train(make(rotated, base="euler"), max_epochs=1).save_checkpoint(path)

    def load(func: Any, y0: Tensor) -> Any:
        given = {"t_span": (0.0, 1.0), "base": "euler", "steps": 4}
        return HyperSolverModule.load_from_checkpoint(path, func=func, y0=y0, **given)

    assert load(rotated, starts(16, 5)).solver.base == "euler"
    with pytest.raises(OptionError, match="belongs to another field"):
        load(lambda t, y: -rotated(t, y), starts(16, 5))
    # From other starts the two cannot be compared.
    assert load(lambda t, y: -rotated(t, y), starts(16, 6)).solver.base == "euler"

    saved = torch.load(path, weights_only=True)
    del saved["torchdiffeq_hyper_field"]  # as earlier versions wrote it
    torch.save(saved, path)
    assert load(rotated, starts(16, 5)).solver.base == "euler"
    for damaged in ({"losses": 3}, {"seconds": "1"}, {"losses": [{}]}, {"more": 1}, None):
        torch.save({**saved, "torchdiffeq_hyper": damaged}, path)
        with pytest.raises(FileFormatError, match="the checkpoint cannot be used: torchdiffeq"):
            load(rotated, starts(16, 5))
    del saved["torchdiffeq_hyper"]
    torch.save(saved, path)
    with pytest.raises(FileFormatError, match="torchdiffeq_hyper is missing"):
        load(rotated, starts(16, 5))


def test_a_fit_that_was_stopped_goes_on_bitwise_from_its_checkpoint(tmp_path: Path) -> None:
    straight = make(objective="trajectory")
    train(straight, max_epochs=4)
    stopped = make(objective="trajectory")

    from pytorch_lightning import Callback

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    fitting = train(stopped, max_epochs=4, callbacks=[Stop()])
    assert fitting.global_step == 6
    fitting.save_checkpoint(tmp_path / "half.ckpt")
    again = make(objective="trajectory")
    going_on = trainer(max_epochs=4)
    going_on.fit(
        again, loader(starts(48)), loader(starts(24, 2), 9), ckpt_path=tmp_path / "half.ckpt"
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.report.losses == straight.report.losses


def test_early_stopping_and_model_checkpoints_watch_the_validation_error(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

    best = ModelCheckpoint(tmp_path, monitor="validation", filename="best")
    patience = EarlyStopping("validation", patience=1, stopping_threshold=1e9)
    fitting = train(make(), enable_checkpointing=True, callbacks=[best, patience])
    assert fitting.current_epoch < 3
    assert Path(best.best_model_path).exists()


def test_the_rate_is_annealed_in_each_phase() -> None:
    rates = []
    from pytorch_lightning import Callback

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(make(config=tdh.FitConfig(lr=1.0)), max_epochs=8, callbacks=[Watch()])
    assert len(rates) == 24
    assert rates[0] == rates[6] == 1.0
    assert sorted(rates[:6], reverse=True) == rates[:6]
    assert sorted(rates[6:], reverse=True) == rates[6:]
    assert rates[-1] < 0.03


def test_tuple_states_are_fitted() -> None:
    def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, z = state
        return damped_wave(t, x), torch.cos(t) * x.mean(-1) - z

    y0 = starts(48), starts(48)[:, 0]
    module = make(pair, y0)
    data = DataLoader(TensorDataset(*y0), batch_size=16)
    fitting = trainer(max_epochs=30)
    fitting.fit(module, data, data)
    assert module.solver.domain.is_tuple
    assert module.report.validation < module.report.base_validation / 2


def test_a_trainer_without_an_end_is_refused() -> None:
    with pytest.raises(OptionError, match="no last step"):
        train(make(), max_epochs=-1)


def test_batches_of_another_shape_are_refused() -> None:
    with pytest.raises(StateShapeError, match="trailing shapes"):
        train(make(), torch.zeros(8, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"objective": "best"}, OptionError),
        ({"steps": 0}, OptionError),
        ({"base": None}, OptionError),
        ({"hypernet": nn.Identity()}, StateTypeError),
        ({"func": lambda y: y}, StateTypeError),
        ({"y0": torch.zeros(4, 2, dtype=torch.int64)}, StateTypeError),
    ],
)
def test_impossible_arguments_are_refused_at_once(argument: Any, error: Any) -> None:
    with pytest.raises(error):
        make(**argument)


def test_without_lightning_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchdiffeq_hyper.lightning import _find_lightning

    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(MissingExtraError, match=r"torchdiffeq_hyper\[lightning\]"):
        _find_lightning()


DDP = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_lightning import make, train
module = make()
fitting = train(module, max_epochs=4, devices=2, strategy="ddp")
weights = sum(float(p.detach().sum()) for p in module.hypernet.parameters())
# All through the first process: the launcher may end the others before they have written.
ends = [None, None]
mine = fitting.global_rank, fitting.global_step, module.report.validation, weights
torch.distributed.all_gather_object(ends, mine)
torch.distributed.destroy_process_group()
if fitting.global_rank == 0:
    for end in ends:
        print("END", *end, flush=True)
"""


def test_two_devices_fit_one_net(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    ends = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("END")]
    assert sorted(rank for rank, *_ in ends) == ["0", "1"]
    assert ends[0][1:] == ends[1][1:]
    assert ends[0][1] == "8"  # 48 samples, 16 a batch, two processes: 2 steps an epoch


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_that_would_cast_func_is_refused(precision: str) -> None:
    field = MLPField(dtype=torch.float32)
    dtypes = [p.dtype for p in field.parameters()]
    with pytest.raises(OptionError, match=precision):
        trainer(precision=precision).fit(
            make(field, starts(16).float()), loader(starts(16).float()), loader(starts(16).float())
        )
    assert [p.dtype for p in field.parameters()] == dtypes
