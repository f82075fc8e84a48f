"""Fits that several processes do together, each scenario a claim of test_distributed.py.

Usage: torchrun --nproc-per-node=2 ranks.py FOLDER, which writes FOLDER/<rank>.pt.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import torchdiffeq_hyper as tdh
from stubs import damped_wave
from torchdiffeq_hyper.fitting._distributed import ProcessGroup

BRIEF = tdh.FitConfig(iterations=20, pretrain_iterations=4, swap_every=2, max_seconds=1e6)
FULL = tdh.FitConfig(iterations=200, max_seconds=1e6)


def starts(count: int = 75) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def fit(func: Any = damped_wave, y0: Any = None, **arguments: Any) -> tdh.Solver:
    given = {"base": "heun", "steps": (3, 5), "config": BRIEF, "progress": False, **arguments}
    return tdh.fit(func, starts() if y0 is None else y0, (0.0, 1.0), **given)


def outcome(solver: tdh.Solver) -> dict[str, Any]:
    report = solver.report
    assert report is not None
    return {
        "weights": torch.cat([v.flatten() for v in solver.state_dict().values()]),
        "validation": report.validation,
        "iterations": report.iterations,
        "stopped": report.stopped,
        "calls": report.reference_nfe,
        "losses": [point.train for point in report.losses],
    }


def pair(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, z = state
    return damped_wave(t, x) * torch.cos(z).unsqueeze(-1), torch.cos(t) * x.mean(-1) - z


def residual(folder: Path) -> Any:
    return fit(objective="residual")


def trajectory(folder: Path) -> Any:
    return fit(objective="trajectory")


def combined(folder: Path) -> Any:
    return fit(objective="combined", direction="both")


def tuple_state(folder: Path) -> Any:
    return fit(pair, (starts(), starts()[:, 0]))


def odd_batches(folder: Path) -> Any:
    """Batches of 5, 4, ... samples, the last of a single one."""
    return fit(y0=[*starts(19).split([8, 5, 3, 2, 1])])


def full(folder: Path) -> Any:
    return fit(config=FULL)


def by_label(t: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    return damped_wave(t, y) * (1 + labels.to(y.dtype).unsqueeze(1)) / 2


def labels_of(y0: Tensor) -> Tensor:
    return (4 * y0[:, 0]).long() % 3


def context(folder: Path) -> Any:
    """Every sample has a label, and each process its part of both."""
    return fit(by_label, context=labels_of(starts()), objective="combined")


def context_of_batches(folder: Path) -> Any:
    batches = [(y0, labels_of(y0)) for y0 in starts(40).split([15, 13, 12])]
    return fit(by_label, batches, context="batch", base="bns", steps=3)


ALIKE: dict[str, Callable[[Path], Any]] = {
    scenario.__name__: scenario
    for scenario in (residual, trajectory, combined, tuple_state, odd_batches, context)
}


def other_weights(folder: Path) -> Any:
    """Every process comes with weights of its own."""
    torch.manual_seed(ProcessGroup.current().rank)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    return fit(hypernet=tdh.ConcatHypernet(net))


class Interrupted:
    """A field that breaks off in one process: at some call, of those in roll-outs or not."""

    def __init__(self, rank: int, at: int, error: BaseException, *, rolls_out: bool) -> None:
        self.at = at if rank == ProcessGroup.current().rank else -1
        self.error = error
        self.rolls_out = rolls_out
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled() == self.rolls_out
        if self.calls == self.at:
            raise self.error
        return damped_wave(t, y)


def fails_in_a_reference(folder: Path) -> Any:
    return fit(Interrupted(1, 20, ZeroDivisionError("by zero"), rolls_out=False))


def fails_in_a_roll_out(folder: Path) -> Any:
    func = Interrupted(1, 50, ZeroDivisionError("by zero"), rolls_out=True)
    return fit(func, objective="trajectory")


def fails_in_rank_0(folder: Path) -> Any:
    return fit(Interrupted(0, 60, ZeroDivisionError("by zero"), rolls_out=False))


class Explosive(nn.Module):
    """A net that turns non-finite in the last process's share, unless it stays zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.calls = 0

    def forward(self, step: tdh.StepInput) -> Tensor:
        self.calls += self.training
        group = ProcessGroup.current()
        broken = self.calls > 9 and group.rank == group.size - 1
        assert isinstance(step.y, Tensor)
        return step.y * self.weight + (float("inf") if broken else 0.0)


def diverges_in_one(folder: Path) -> Any:
    return fit(hypernet=Explosive(), objective="trajectory")


def loss_diverges_in_one(folder: Path) -> Any:
    return fit(hypernet=Explosive(), objective="residual")


def other_starts(folder: Path) -> Any:
    return fit(y0=starts() + ProcessGroup.current().rank)


def other_lengths(folder: Path) -> Any:
    """The iterable ends earlier in one process."""
    return fit(y0=list(starts().split(15))[: 5 - ProcessGroup.current().rank])


def unwritable(folder: Path) -> Any:
    return fit(config=replace(BRIEF, checkpoint=folder / "missing" / "fit.pt"))


def resumed(folder: Path) -> Any:
    """A fit that one process's interruption stopped goes on in all of them."""
    config = replace(BRIEF, iterations=60, checkpoint=folder / "fit.pt")
    with contextlib.suppress(KeyboardInterrupt, tdh.errors.RankError):
        func = Interrupted(1, 250, KeyboardInterrupt(), rolls_out=True)
        fit(func, objective="trajectory", config=config)
    dist.barrier()
    state = torch.load(folder / "fit.pt", weights_only=True)["state"]
    assert 0 < state["iteration"] < 60, state["iteration"]
    return fit(objective="trajectory", config=config)


def in_one_go(folder: Path) -> Any:
    return fit(objective="trajectory", config=replace(BRIEF, iterations=60))


def other_clocks(folder: Path) -> Any:
    """One process's clock runs a thousand times faster."""
    clock, rank = time.perf_counter, ProcessGroup.current().rank
    if rank == 0:
        time.perf_counter = lambda: 50.0 * clock()
    try:
        return fit(config=replace(BRIEF, iterations=100_000, max_seconds=100.0))
    finally:
        time.perf_counter = clock


def out_of_time_in_one(folder: Path) -> Any:
    """One process's own clock jumps to the end within a reference solution."""
    clock, calls = time.perf_counter, 0

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2500 and ProcessGroup.current().rank == 1:
            time.perf_counter = lambda: clock() + 1e9
        return damped_wave(t, y)

    def batches() -> Iterator[Tensor]:
        while True:
            yield starts(20)

    config = replace(BRIEF, iterations=100_000, pretrain_iterations=0, swap_every=1)
    try:
        return fit(func, batches(), objective="residual", config=config)
    finally:
        time.perf_counter = clock


def auto(folder: Path) -> Any:
    """One process chooses the net, for all."""
    return fit(hypernet="auto")


def shown(folder: Path) -> Any:
    with contextlib.redirect_stderr(io.StringIO()) as text:
        fit(progress=True)
    return text.getvalue()


def generator(folder: Path) -> Any:
    """A one-shot iterable, as long as one likes."""

    def batches() -> Iterator[Tensor]:
        while True:
            yield starts(20)

    return fit(y0=batches())


TOGETHER: dict[str, Callable[[Path], Any]] = {
    **ALIKE,
    **{
        scenario.__name__: scenario
        for scenario in (
            full,
            context_of_batches,
            other_weights,
            fails_in_a_reference,
            fails_in_a_roll_out,
            fails_in_rank_0,
            diverges_in_one,
            loss_diverges_in_one,
            other_starts,
            other_lengths,
            unwritable,
            resumed,
            in_one_go,
            other_clocks,
            out_of_time_in_one,
            auto,
            shown,
            generator,
        )
    },
}


def run(scenario: Callable[[Path], Any], folder: Path) -> Any:
    try:
        result = scenario(folder)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        return {"error": type(error).__name__, "text": str(error)}
    return outcome(result) if isinstance(result, tdh.Solver) else result


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results = {name: run(scenario, folder) for name, scenario in TOGETHER.items()}
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
