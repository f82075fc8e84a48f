"""Random calls against an independent evaluation in double precision.

Every call draws a method of the registry, a dtype, a state, times, options, a vector field
and an entry (torchdiffeq, torchdyn, `solve`, scopes, events, adjoints). Its answer agrees
with `reference`, to a tolerance that its dtype sets, or it is refused with an error of ours;
a part of the calls compares gradients. The number of calls, not a clock, sets the length:

    python -m pytest tests/fuzz                                          # about a minute
    python -m pytest tests/fuzz --fuzz-calls 10000 --fuzz-seed 7         # `make fuzz`
    python -m pytest tests/fuzz --fuzz-only "bns 7 123"                  # one call again
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuzz import reference
from fuzz.check import check
from fuzz.draw import METHODS, draw
from torchdiffeq_hyper.methods import _registry

pytestmark = pytest.mark.filterwarnings("default")  # `check` looks at those of each call


@pytest.mark.parametrize("method", METHODS)
def test_no_random_call_is_answered_wrongly(method: str, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    seed, numbers = option("--fuzz-seed"), range(-(-option("--fuzz-calls") // len(METHODS)))
    if option("--fuzz-only"):
        name, seed_text, number = option("--fuzz-only").split()
        if name != method:
            pytest.skip("another method's call is asked for")
        seed, numbers = int(seed_text), range(int(number), int(number) + 1)
    wrong = []
    for number in numbers:
        drawn = draw(method, seed, number)
        if (problem := check(drawn)) is not None:
            wrong.append(f"{drawn}\n    {problem}")
    assert not wrong, f"{len(wrong)} of {len(numbers)} calls:\n" + "\n".join(wrong[:20])


def test_every_registered_method_has_a_reference() -> None:
    whole = {"bns", "dise", "dopri5_per_sample"}
    for name in METHODS:
        tableau = _registry.find(name).tableau
        base = name if tableau is None else tableau.name
        assert base in {*reference.TABLES, "alpha", *whole}, f"tests/fuzz cannot check {name!r}"


def test_the_same_number_draws_the_same_call() -> None:
    first, second = (draw("bns", 3, 14) for _ in range(2))
    assert str(first) == str(second)
    assert all(torch.equal(a, b) for a, b in zip(first.y0, second.y0, strict=True))
    assert str(first) != str(draw("bns", 4, 14))


def _turn(t: Tensor, y: Tensor) -> Tensor:
    """Y' = (1 + cos t) J y, J a quarter turn: y turns by the angle t + sin t."""
    return (1 + torch.cos(t)) * torch.stack([-y[..., 1], y[..., 0]], -1)


def _turned(y: Tensor, t: float) -> Tensor:
    angle = t + math.sin(t)
    generator = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
    return y @ torch.linalg.matrix_exp(generator).T


@pytest.mark.parametrize("end", [2.0, -2.0])
def test_the_reference_agrees_with_an_exact_solution(end: float) -> None:
    y0, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.0, end / 3, end]).double()
    evaluate = reference.Evaluate(_turn, is_tuple=False)
    for at, (state,) in zip(t.tolist(), reference.exact(evaluate, (y0,), t), strict=True):
        torch.testing.assert_close(state, _turned(y0, at), rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", [*reference.TABLES, "alpha"])
def test_the_tables_of_the_reference_have_their_orders(base: str) -> None:
    y0, table = torch.randn(3, 2, dtype=torch.float64), reference.table_of(base, 0.7)
    errors = []
    for n in (32, 64):
        stepper = reference.Stepper(reference.Evaluate(_turn, is_tuple=False), table)
        grid = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        (state,) = stepper.solve((y0,), grid[[0, -1]], grid)[-1]
        errors.append(float((state - _turned(y0, 1.0)).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(table[2], abs=0.2)
