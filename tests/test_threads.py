"""Methods that come and go in many threads leave the registry and the hosts consistent."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdyn.numerics.solvers.ode import SOLVER_DICT

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import damped_wave
from torchdiffeq_hyper.errors import DuplicateMethodError, UnknownMethodError
from torchdiffeq_hyper.methods import _registry
from torchdiffeq_hyper.tableaus import second_order

Y0, T = torch.ones(2), torch.tensor([0.0, 1.0])


def solver(steps: int = 2) -> tdh.HyperSolver:
    return tdh.HyperSolver("euler", zero, steps=steps)


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Check that nothing is left, and that the hosts hold what the registry holds."""
    before = dict(SOLVERS), dict(SOLVER_DICT), dict(_registry.methods())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    tdh.install()
    assert list(_registry.methods()) == list(before[2])
    assert SOLVERS.keys() == before[0].keys()
    assert SOLVER_DICT.keys() == before[1].keys()
    own = before[0].keys() - before[2].keys()
    assert all(SOLVERS[name] is before[0][name] for name in own)
    tdh.uninstall()
    assert not SOLVERS.keys() & _registry.methods().keys()
    assert not SOLVER_DICT.keys() & _registry.methods().keys()
    tdh.install()
    tdh.register_method("afterwards", solver())
    odeint(damped_wave, Y0, T, method="afterwards")
    tdh.unregister_method("afterwards")


def run(*works: Callable[[], Any]) -> None:
    """Run each in a thread of its own, all at once; raise what they raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def guarded(work: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def publish(name: str, n: int = 40) -> None:
    for _ in range(n):
        tdh.register_method(name, solver())
        assert name in SOLVERS
        odeint(damped_wave, Y0, T, method=name)
        tdh.unregister_method(name)


def test_names_are_published_in_threads() -> None:
    run(*(lambda k=k: publish(f"thread-{k}") for k in range(6)))  # type: ignore[misc]


def test_one_name_is_published_by_one_thread_at_a_time() -> None:
    held, most = itertools.count(), []
    lock, inside = threading.Lock(), set()

    def work() -> None:
        for _ in range(60):
            me = next(held)
            try:
                tdh.register_method("contended", solver())
            except DuplicateMethodError:
                continue
            with lock:
                inside.add(me)
                most.append(len(inside))
                inside.discard(me)
            tdh.unregister_method("contended")

    run(*[work] * 4)
    assert max(most) == 1


class Plugin:
    def __init__(self, name: str, *, fails: bool = False) -> None:
        self.name, self.fails = name, fails

    @tdh.hookimpl
    def register_solvers(self, register: Any) -> None:
        import dataclasses

        tableau = dataclasses.replace(second_order(2 / 3), name=self.name, alpha=None)
        register(f"hyper{self.name}", tableau)
        if self.fails:
            register("dopri5", tableau)


def plug(name: str) -> None:
    for i in range(15):
        if i % 3 == 0:
            with pytest.raises(DuplicateMethodError):
                tdh.register_plugin(Plugin(name, fails=True), name=name)
        tdh.register_plugin(Plugin(name), name=name)
        assert tdh.HyperSolver(name, zero, steps=1).method == f"hyper{name}"
        tdh.unregister_plugin(name)


def install_and_uninstall() -> None:
    for _ in range(15):
        tdh.uninstall()
        tdh.install()


def override_and_record() -> None:
    for _ in range(15):
        with tdh.override("dopri5", solver()), tdh.record() as record:
            odeint(damped_wave, Y0, T, method="dopri5")
        assert len(record.solves) == 1


def bind_and_solve() -> None:
    mine = solver()
    for _ in range(30):
        with tdh.using(mine):
            # Through no host: its names may just be taken away.
            assert mine.method == "hypereuler"
            mine.solve(damped_wave, Y0, T)


def test_all_that_changes_the_registry_runs_in_threads() -> None:
    run(
        lambda: plug("threada"),
        lambda: plug("threadb"),
        override_and_record,
        override_and_record,
        bind_and_solve,
        install_and_uninstall,
    )


def test_install_and_publishing_in_threads_leave_no_name_behind() -> None:
    def work(name: str) -> None:
        for _ in range(30):
            tdh.register_method(name, solver())
            tdh.unregister_method(name)
            with pytest.raises(UnknownMethodError):
                tdh.unregister_method(name)

    run(lambda: work("one"), lambda: work("two"), install_and_uninstall, install_and_uninstall)


def test_readers_of_the_registry_see_one_state() -> None:
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            assert tdh.HyperSolver("rk4", zero, steps=1).method == "hyperrk4"
            assert "dopri5" in _registry.host_methods()

    def write() -> None:
        publish("written")
        stop.set()

    run(read, read, write)
