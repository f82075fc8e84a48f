"""What is attached to a func: kept on it, seen by nobody, freed with it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh
from exact import zero
from torchdiffeq_hyper.errors import OptionError
from torchdiffeq_hyper.solvers import _binding

T = torch.tensor([0.0, 1.0])


def solver(steps: int = 4, net: Any = zero) -> tdh.HyperSolver:
    return tdh.HyperSolver("euler", net, steps=steps)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.linear(y))
        return out

    def other(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class Plain:
    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class Slotted:
    __slots__ = ("__weakref__", "held")

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class Bare:
    __slots__ = ()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class DictAlone:
    __slots__ = ("__dict__",)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


@dataclasses.dataclass
class Rate:
    rate: float

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


@dataclasses.dataclass(frozen=True)
class FrozenRate:
    rate: float

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


class Guarded:
    """Lets nobody set an attribute, and answers for all of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class WithClass:
    @classmethod
    def field(cls, t: Tensor, y: Tensor) -> Tensor:
        return -y


def function() -> Callable[..., Tensor]:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y

    return func


def partial() -> Callable[..., Tensor]:
    return functools.partial(Rate(1.0).__call__.__func__, Rate(2.0))  # type: ignore[attr-defined]


KINDS = [Field, Plain, Slotted, Bare, DictAlone, lambda: Rate(1.0), lambda: FrozenRate(1.0)]
KINDS += [Guarded, function, partial, lambda: WithClass.field, lambda: torch.nn.functional.relu6]


def find(func: Any, method: str = "hypereuler") -> Any:
    return _binding.find_bound(func, method, _binding.Times(T, is_negated=False))


@pytest.mark.parametrize("make", KINDS)
def test_attaching_and_detaching_leave_nothing_behind(make: Any) -> None:
    func = make()
    before = dict(vars(func)) if hasattr(func, "__dict__") else None
    elsewhere = dict(_binding._elsewhere)
    mine = tdh.attach(func, solver())
    assert find(func) is mine
    tdh.attach(func, solver(5))
    other = tdh.attach(func, tdh.HyperSolver("heun", zero, steps=2))
    tdh.detach(func, "hypereuler")
    assert find(func) is None
    assert find(func, "hyperheun") is other
    tdh.detach(func)
    assert before is None or dict(vars(func)) == before
    assert _binding._elsewhere == elsewhere
    with pytest.raises(OptionError, match="not attached"):
        tdh.detach(func)


class Calls(nn.Module):
    """A net that calls the field."""

    def __init__(self, func: Any) -> None:
        super().__init__()
        self.func = func

    def forward(self, step: tdh.StepInput) -> Any:
        return self.func(step.t, step.y)


def through_a_closure(func: Any) -> Any:
    return lambda step: func(step.t, step.y)


@pytest.mark.parametrize("net", [Calls, through_a_closure])
@pytest.mark.parametrize("make", [Field, Plain, lambda: Rate(1.0), function, Guarded])
def test_field_held_by_its_own_solver_is_freed(make: Any, net: Any) -> None:
    kept = []
    for _ in range(5):
        func = make()
        mine = solver(4, net(func))
        tdh.attach(func, mine)
        tdh.attach(func.__call__, mine)
        if isinstance(func, Field):
            tdh.attach(func.other, mine)
        kept += [weakref.ref(func), weakref.ref(mine)]
    del func, mine
    gc.collect()
    assert not any(ref() for ref in kept)


def test_field_that_its_bespoke_solver_holds_is_freed() -> None:
    func = Field()
    held = tdh.BespokeSolver.classical("rk4", 4)
    held.field = func
    tdh.attach(func, held)
    kept = weakref.ref(func)
    del func, held
    gc.collect()
    assert kept() is None


def test_attachment_ends_with_its_func_where_that_has_no_dict() -> None:
    func = Slotted()
    key = id(func)
    tdh.attach(func, solver())
    assert key in _binding._elsewhere
    del func
    gc.collect()
    assert key not in _binding._elsewhere


def test_solver_is_freed_with_its_func_and_by_detaching() -> None:
    for end in ("del", "detach"):
        func, mine = Field(), solver()
        kept = weakref.ref(mine)
        tdh.attach(func, mine)
        del mine
        gc.collect()
        assert kept() is not None
        if end == "detach":
            tdh.detach(func)
        else:
            del func
        gc.collect()
        assert kept() is None


def test_parameters_state_mode_and_text_of_a_module_know_nothing_of_it() -> None:
    func = Field()
    mine = tdh.HyperSolver("euler", tdh.hypernets.MLP(2), steps=2)
    seen = [str(func), list(func.state_dict()), [n for n, _ in func.named_modules()]]
    tdh.attach(func, mine)
    mine.train()
    func.eval()
    assert mine.training
    assert seen == [str(func), list(func.state_dict()), [n for n, _ in func.named_modules()]]
    assert len(list(func.parameters())) == 2
    func.double()
    assert next(mine.parameters()).dtype == torch.float32
    assert not [name for name in func.__annotations__ if "hyper" in name]


def test_fields_of_a_dataclass_know_nothing_of_it() -> None:
    for kind in (Rate, FrozenRate):
        one, two = kind(2.0), kind(2.0)
        tdh.attach(one, solver())
        assert one == two
        assert repr(one) == repr(two)
        assert dataclasses.asdict(one) == dataclasses.asdict(two)  # type: ignore[call-overload]
        assert find(dataclasses.replace(one, rate=2.0)) is None  # type: ignore[type-var]


@pytest.mark.parametrize("make", [Field, Plain, lambda: Rate(1.0), Guarded, partial])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda func: pickle.loads(pickle.dumps(func))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_not_attached_and_can_be(make: Any, duplicate: Any) -> None:
    func, mine = make(), solver()
    tdh.attach(func, mine)
    other = duplicate(func)
    assert find(other) is None
    its_own = tdh.attach(other, solver(5))
    assert (find(func), find(other)) == (mine, its_own)
    tdh.detach(func)
    assert (find(func), find(other)) == (None, its_own)
    again = tdh.attach(func, solver(6))
    tdh.detach(other)
    assert (find(func), find(other)) == (again, None)
    tdh.detach(func)
    assert find(copy.copy(other)) is None


def test_wraps_copies_no_attachment() -> None:
    func = function()
    tdh.attach(func, solver())

    @functools.wraps(func)
    def twice(t: Tensor, y: Tensor) -> Tensor:
        return 2 * func(t, y)

    assert find(twice) is None
    assert find(copy.copy(functools.partial(func, y=T))) is None


def test_pickles_hold_neither_the_solver_nor_a_name_of_this_package() -> None:
    func = Field()
    plain = pickle.dumps(func)
    tdh.attach(func, tdh.HyperSolver("euler", lambda step: step.y, steps=3))  # cannot be pickled
    data = pickle.dumps(func)
    assert b"torchdiffeq_hyper." not in data
    assert len(data) < len(plain) + 100
    buffer = io.BytesIO()
    torch.save(func, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert find(loaded) is None
    assert torch.equal(loaded(T[0], torch.ones(2)), func(T[0], torch.ones(2)))


def test_pickles_are_read_where_this_package_is_not(tmp_path: Path) -> None:
    func = nn.Sequential(nn.Linear(2, 2))
    tdh.attach(func, solver())
    (tmp_path / "func.pickle").write_bytes(pickle.dumps(func))
    code = (
        "import sys, pickle\n"
        "sys.modules['torchdiffeq_hyper'] = None\n"
        f"print(pickle.load(open({str(tmp_path / 'func.pickle')!r}, 'rb'))[0].in_features)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ran.stdout.strip() == "2"


def test_compiled_fields_are_not_compiled_again() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for func in (Field(), function(), Plain()):
        graphs.clear()
        compiled = torch.compile(func, backend=backend, fullgraph=True)  # type: ignore[call-overload]
        y = torch.ones(3, 2)
        wanted = compiled(T[0], y)
        tdh.attach(func, solver())
        tdh.attach(compiled, tdh.HyperSolver("heun", zero, steps=2))
        assert torch.equal(compiled(T[0], y), wanted)
        assert find(compiled) is find(func) is not None
        tdh.detach(func)
        assert torch.equal(compiled(T[0], y), wanted)
        assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_attached_modules_can_be_scripted_exported_and_traced() -> None:
    func, y = Field().eval(), torch.ones(3, 2)
    tdh.attach(func, solver())
    wanted = func(T[0], y)
    scripted = torch.jit.script(func)
    assert find(scripted) is None
    assert torch.equal(scripted(T[0], y), wanted)
    mine = tdh.attach(scripted, solver())
    assert find(scripted) is mine
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert find(torch.jit.load(buffer)) is None
    exported = torch.export.export(func, (T[0], y))
    torch.testing.assert_close(exported.module()(T[0], y), wanted)
    torch.testing.assert_close(torch.fx.symbolic_trace(func)(T[0], y), wanted)
    values = torch.func.functional_call(func, dict(func.named_parameters()), (T[0], y))
    assert torch.equal(values, wanted)


def test_two_objects_with_one_dict_keep_their_own() -> None:
    class Shared:
        state: dict[str, Any] = {}  # noqa: RUF012 - shared, that is the point

        def __init__(self) -> None:
            self.__dict__ = self.state

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

    one, two = Shared(), Shared()
    first, second = tdh.attach(one, solver()), tdh.attach(two, solver())
    assert (find(one), find(two)) == (first, second)
    tdh.detach(one)
    assert (find(one), find(two)) == (None, second)
    tdh.detach(two)


def test_methods_of_one_object_have_solvers_of_their_own() -> None:
    func = Field()
    whole, part = tdh.attach(func, solver()), tdh.attach(func.other, solver(5))
    assert find(func) is find(func.forward) is find(func.__call__) is whole
    assert find(func.other) is part
    tdh.detach(func.other)
    assert find(func.other) is None
    assert find(func) is whole
    replaced = tdh.attach(func.forward, solver())
    assert find(func) is replaced
    tdh.detach(func.__call__)
    assert find(func.forward) is None


def test_call_of_a_function_stands_for_it() -> None:
    for func in (function(), partial()):
        mine = tdh.attach(func.__call__, solver())  # type: ignore[operator]
        assert find(func) is find(func.__call__) is mine  # type: ignore[operator]
        tdh.detach(func)


def test_method_of_a_parent_class_is_another_field() -> None:
    class Child(Field):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(t, y)

        def parent(self) -> Any:
            return super().forward

    func = Child()
    mine, parents = tdh.attach(func, solver()), tdh.attach(func.parent(), solver(5))
    assert find(func) is mine
    assert find(func.parent()) is parents


def test_method_put_on_an_instance_stands_for_it() -> None:
    func = Field()
    func.forward = func.other  # type: ignore[method-assign]
    mine = tdh.attach(func, solver())
    assert find(func.other) is mine


def test_class_methods_belong_to_their_class() -> None:
    class Child(WithClass):
        pass

    mine = tdh.attach(WithClass.field, solver())
    assert find(WithClass.field) is mine
    assert find(Child.field) is None
    tdh.detach(WithClass.field)


def test_methods_are_solved_with_their_own_solvers() -> None:
    func, y0 = Field(), torch.ones(3, 2)
    tdh.attach(func.other, solver(9))
    tdh.attach(func.forward, solver(3))
    with torch.no_grad():
        for field, steps in ((func.other, 9), (func, 3)):
            wanted = solver(steps).solve(field, y0, T)
            assert torch.equal(odeint(field, y0, T, method="hypereuler"), wanted)


def test_threads_attach_to_one_func_without_losing_any() -> None:
    func = Field()
    spans = [(0.0, float(end)) for end in range(1, 41)]
    domains = [tdh.FitDomain(s, 0.1, 9.0, (1,), ((2,),), False, "float32") for s in spans]
    barrier = threading.Barrier(4)

    def work(k: int) -> None:
        barrier.wait()
        for domain in domains[k::4]:
            tdh.attach(func, tdh.HyperSolver("euler", zero, steps=2, domain=domain))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    from torchdiffeq_hyper._fields._wrappers import Owner

    assert len(_binding.attached_to(Owner(func, None), "hypereuler")) == 40
