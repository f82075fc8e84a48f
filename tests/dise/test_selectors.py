"""The ready selectors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from torchdiffeq_hyper.dise import selectors
from torchdiffeq_hyper.errors import FileFormatError, OptionError

STATES = [
    (torch.randn(5), "mlp"),
    (torch.randn(5, 2), "mlp"),
    (torch.randn(5, 3, 7), "residual-conv"),
    (torch.randn(5, 3, 7, 7), "residual-conv"),
    (torch.randn(5, 2, 3, 4, 4), "residual-conv"),
    ((torch.randn(5, 3), torch.randn(5)), "mlp"),
    ((torch.randn(5, 3, 7, 7), torch.randn(5, 1)), "residual-conv"),
    (torch.randn(5, 2, dtype=torch.complex64), "mlp"),
    (torch.randn(5, 2, dtype=torch.float64), "mlp"),
    (torch.randn(5, 2).bfloat16(), "mlp"),
    (torch.randn(5, 1, 1, 1), "residual-conv"),
]


@pytest.mark.parametrize(("y0", "kind"), STATES)
def test_every_state_gets_a_selector_that_takes_it(y0: Any, kind: str) -> None:
    net = selectors.ready(y0, 3).eval()
    assert net.architecture["kind"] == kind
    out = net(y0)
    assert out.shape == (5, 3)
    assert out.dtype in {torch.float32, torch.float64}
    one = net(tuple(p[2:3] for p in y0) if isinstance(y0, tuple) else y0[2:3])
    torch.testing.assert_close(one, out[2:3])


@pytest.mark.parametrize(
    "net",
    [
        selectors.MLP(6, 2, hidden=(4,), dropout=0.0),
        selectors.TanhMLP(6, 2, hidden=(4, 5)),
        selectors.ResidualConv(2, 3, hidden=4, blocks=1, n_spatial=1),
    ],
)
def test_a_selector_is_rebuilt_from_its_description(net: selectors.ReadySelector) -> None:
    rebuilt = selectors.from_architecture(json.loads(json.dumps(net.architecture)))
    assert repr(rebuilt) == repr(net)
    rebuilt.load_state_dict(net.state_dict())
    y0 = torch.randn(4, 2, 3)
    assert torch.equal(rebuilt.eval()(y0), net.eval()(y0))


@pytest.mark.parametrize("y0", [torch.randn(99, 3), torch.randn(99, 3, 4, 4)])
def test_inputs_are_normalised_channel_by_channel(y0: Tensor) -> None:
    net = selectors.ready(y0, 2)
    scale = torch.tensor([1.0, 1e3, 0.0]).reshape(3, *[1] * (y0.dim() - 2))
    shifted = y0 * scale + 50
    net.calibrate(shifted)
    normalised = net.normalised(shifted)
    dims = [0, *range(2, y0.dim())]
    torch.testing.assert_close(normalised.mean(dims), torch.zeros(3), atol=1e-3, rtol=0)
    deviation = normalised.std(dims, correction=0)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: selectors.MLP(0, 2), "n_inputs is 0"),
        (lambda: selectors.MLP(2, 0), "n_candidates is 0"),
        (lambda: selectors.MLP(2, 2, hidden=(3, 0)), "hidden is"),
        (lambda: selectors.MLP(2, 2, dropout=1.0), "dropout is 1.0"),
        (lambda: selectors.MLP(2, 2, dropout=-0.5), "dropout is -0.5"),
        (lambda: selectors.MLP(2, 2, dropout=1.5), "dropout is 1.5"),
        (lambda: selectors.TanhMLP(2, 2, hidden=(True,)), "hidden is"),
        (lambda: selectors.ResidualConv(2, 2, n_spatial=4), "n_spatial is 4"),
        (lambda: selectors.ResidualConv(2, 2, blocks=0), "blocks is 0"),
    ],
)
def test_impossible_arguments_are_refused(build: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        build()


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ({}, 'kind is None(?s:.*)"mlp"'),
        ({"kind": "mlpp", "n_inputs": 2}, "kind is 'mlpp'"),
        ({"kind": "mlp"}, "n_inputs is missing"),
        ({"kind": "mlp", "n_inputs": -2}, "n_inputs is -2"),
        ({"kind": "tanh-mlp", "n_inputs": 2**40, "n_candidates": 2**40}, "cannot be built"),
    ],
)
def test_damaged_descriptions_are_refused(architecture: dict[str, Any], named: str) -> None:
    with pytest.raises(FileFormatError, match=named):
        selectors.from_architecture(architecture)
