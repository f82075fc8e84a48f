"""Hypernets: the layout of `ConcatHypernet`, and the ready nets."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_hyper as tdh
from exact import zero
from stubs import Counted, coupled, coupled_start, damped_wave
from torchdiffeq_hyper.errors import FileFormatError, OptionError, StateShapeError, StateTypeError
from torchdiffeq_hyper.hypernets import (
    MLP,
    Bottleneck,
    ConcatHypernet,
    Conv,
    Linear,
    ReadyHypernet,
    families,
    from_architecture,
    join_channels,
    ready,
    split_channels,
)
from torchdiffeq_hyper.tableaus import EULER, HEUN, RK4

SHAPES = [(3, 2), (3, 2, 5), (3, 2, 5, 4), (3, 2, 5, 4, 6)]
TIMES = torch.tensor([0.0, 1.0])


def step_at(y: Any, n_stages: int = 1, dt: float = 0.1, t: float = 0.5) -> tdh.StepInput:
    """Return a step whose inputs all differ: stage i is y + i, y0 is y - 1."""

    def shifted(by: float) -> Any:
        return y + by if isinstance(y, Tensor) else tuple(part + by for part in y)

    stages = tuple(shifted(float(i)) for i in range(1, n_stages + 1))
    return tdh.StepInput(torch.tensor(dt), torch.tensor(t), y, stages[0], stages, shifted(-1.0))


def randomised(net: ReadyHypernet) -> ReadyHypernet:
    """Give a net weights that are not zero anywhere, and scales that are not one."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        for buffer in net.buffers():
            buffer.copy_(1 + torch.rand_like(buffer))
    return net


def net_for(shape: tuple[int, ...], **arguments: Any) -> ReadyHypernet:
    """Return a ready net for a state of two channels."""
    return Conv(2, n_spatial=len(shape) - 2, **arguments) if len(shape) > 2 else MLP(2, **arguments)


# The layout


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_lie_along_dim_1_in_the_order_named(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape)
    step = step_at(y, n_stages=2)
    net = ConcatHypernet(lambda x: x, inputs=("t", "stages", "y0", "dt", "y", "f0"))
    constant = torch.ones(3, 1, *shape[2:])
    expected = [0.5 * constant, y + 1, y + 2, y - 1, 0.1 * constant, y, y + 1]
    assert torch.equal(net.concat(step), torch.cat(expected, dim=1))


def test_default_inputs_are_those_of_the_paper() -> None:
    step = step_at(torch.randn(3, 2))
    assert isinstance(step.y, Tensor)
    expected = torch.cat([step.y, step.y + 1, torch.full((3, 1), 0.1)], dim=1)
    assert torch.equal(ConcatHypernet(nn.Linear(5, 2)).concat(step), expected)


@pytest.mark.parametrize("shape", [(4,), (), (0,), (1,)])
def test_states_without_channels_become_one_and_come_back(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape)
    net = nn.Linear(3, 1)
    out = ConcatHypernet(net)(step_at(y))
    assert out.shape == shape
    columns = torch.stack([y.reshape(-1), y.reshape(-1) + 1, torch.full((y.numel(),), 0.1)], 1)
    assert torch.equal(out, net(columns).reshape(shape))


def test_tuple_parts_are_joined_and_the_output_is_split_back() -> None:
    image, features, scalar = torch.randn(3, 2, 5, 4), torch.randn(3, 2), torch.randn(3)
    joined = join_channels((image, features, scalar))
    assert joined.shape == (3, 5, 5, 4)
    assert torch.equal(joined[:, :2], image)
    assert torch.equal(joined[:, 2:4], features[..., None, None].expand(3, 2, 5, 4))
    assert torch.equal(joined[:, 4], scalar[:, None, None].expand(3, 5, 4))

    out = torch.randn(3, 5, 5, 4)
    parts = split_channels(out, (image, features, scalar))
    assert torch.equal(parts[0], out[:, :2])
    torch.testing.assert_close(parts[1], out[:, 2:4].mean(dim=(2, 3)))
    torch.testing.assert_close(parts[2], out[:, 4].mean(dim=(1, 2)))


def test_splitting_undoes_joining() -> None:
    state = coupled_start()
    for part, back in zip(state, split_channels(join_channels(state), state), strict=True):
        torch.testing.assert_close(back, part)


def test_tuple_inputs_have_all_parts_of_each_name_together() -> None:
    y = (torch.randn(3, 2), torch.randn(3))
    joined = ConcatHypernet(lambda x: x, inputs=("y", "y0")).concat(step_at(y))
    assert torch.equal(joined, torch.cat([y[0], y[1][:, None], y[0] - 1, y[1][:, None] - 1], 1))


def test_tuple_state_of_mixed_shapes_solves_with_a_ready_net() -> None:
    y0 = coupled_start()
    solver = tdh.HyperSolver("heun", randomised(ready(y0, HEUN)), steps=3)
    corrected = solver.solve(coupled, y0, TIMES.double())
    plain = tdh.HyperSolver("heun", zero, steps=3).solve(coupled, y0, TIMES.double())
    for ours, base, part in zip(corrected, plain, y0, strict=True):
        assert ours.shape == (2, *part.shape)
        assert not torch.equal(ours, base)


@pytest.mark.parametrize(
    "state",
    [
        (torch.ones(3, 2), torch.ones(4)),
        (torch.ones(3, 2, 5), torch.ones(3, 2, 4)),
        (torch.ones(3, 2, 5), torch.ones(3, 2, 5, 4)),
    ],
    ids=["batch", "space", "dimensions"],
)
def test_parts_that_cannot_be_joined_are_refused(state: tuple[Tensor, ...]) -> None:
    with pytest.raises(StateShapeError, match="cannot be concatenated") as caught:
        ConcatHypernet(nn.Linear(5, 2))(step_at(state))
    assert str([tuple(part.shape) for part in state]) in str(caught.value)


def test_tuple_output_of_wrong_channels_is_refused() -> None:
    y = (torch.ones(3, 2), torch.ones(3))
    with pytest.raises(StateShapeError, match=r"3 channels \(2 \+ 1\)"):
        ConcatHypernet(nn.Linear(3, 2), inputs=("y",))(step_at(y))


@pytest.mark.parametrize("y", [torch.ones(3), torch.ones(()), torch.ones(3, 2)])
def test_tensor_output_of_wrong_channels_is_refused_by_the_solver(y: Tensor) -> None:
    n_in = 2 * (y.shape[1] if y.dim() > 1 else 1) + 1
    solver = tdh.HyperSolver("euler", ConcatHypernet(nn.Linear(n_in, 4)), steps=1)
    with pytest.raises(StateShapeError, match="hypernet returned shape"):
        solver.solve(damped_wave, y, TIMES)


# Dtypes


def test_float32_net_serves_a_float64_state() -> None:
    seen: list[torch.dtype] = []
    net = nn.Linear(5, 2)
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    y = torch.ones(3, 2, dtype=torch.float64)
    solution = tdh.HyperSolver("euler", ConcatHypernet(net), steps=2).solve(
        damped_wave, y, TIMES.double()
    )
    assert set(seen) == {torch.float32}
    assert solution.dtype == torch.float64


@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
def test_net_without_parameters_gets_the_dtype_of_the_state(t_dtype: torch.dtype) -> None:
    step = step_at(torch.ones(3, 2))._replace(dt=torch.tensor(0.1, dtype=t_dtype))
    assert ConcatHypernet(lambda x: x).concat(step).dtype == torch.float32


def test_cast_follows_a_net_that_is_cast_later() -> None:
    net = nn.Linear(5, 2)
    g = ConcatHypernet(net)
    assert g(step_at(torch.ones(3, 2))).dtype == torch.float32
    net.double()
    assert g(step_at(torch.ones(3, 2))).dtype == torch.float64


@pytest.mark.parametrize("is_tuple", [False, True])
def test_complex_state_is_refused(is_tuple: bool) -> None:
    y = torch.ones(3, 2, dtype=torch.complex64)
    with pytest.raises(StateTypeError, match="complex"):
        ConcatHypernet(nn.Linear(5, 2))(step_at((y, torch.ones(3)) if is_tuple else y))


# Wrong construction, wrong number of inputs


@pytest.mark.parametrize(
    ("inputs", "fix"),
    [
        (("y", "f", "dt"), "inputs=('y', 'f0', 'dt')"),
        (("y", "stage"), "inputs=('y', 'stages')"),
        ("y", "inputs=('y',)"),
        ((), "inputs=('y',)"),
    ],
)
@pytest.mark.parametrize("make", [lambda **k: ConcatHypernet(nn.Linear(5, 2), **k), Linear, MLP])
def test_unknown_inputs_are_refused(make: Any, inputs: Any, fix: str) -> None:
    with pytest.raises(OptionError) as caught:
        make(**({"channels": 2} if isinstance(make, type) else {}), inputs=inputs)
    assert fix in str(caught.value)


def test_net_that_is_not_callable_is_refused() -> None:
    with pytest.raises(StateTypeError, match="net is a int"):
        ConcatHypernet(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("net", "y"),
    [
        (nn.Linear(5, 2), torch.ones(3, 2)),
        (nn.Sequential(nn.Identity(), nn.Conv2d(5, 2, 3, padding=1)), torch.ones(3, 2, 4, 4)),
        (MLP(2).net, torch.ones(3, 2)),
    ],
    ids=["linear", "convolution", "ready"],
)
def test_wrong_number_of_inputs_names_both_counts_and_where_they_come_from(
    net: nn.Module, y: Tensor
) -> None:
    g = ConcatHypernet(net, inputs=("y", "stages", "dt"))
    with pytest.raises(StateShapeError) as caught:
        g(step_at(y, n_stages=2))
    text = str(caught.value)
    assert "takes 5 channels" in text
    assert "7 along dim 1" in text
    assert '"y" 2, "stages" 4, "dt" 1' in text


def test_net_with_an_unused_first_layer_is_not_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(99, 1)
            self.used = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    assert ConcatHypernet(Odd())(step_at(torch.ones(3, 2))).shape == (3, 2)


@pytest.mark.parametrize("layers", [[nn.Linear(5, 2)], []])
def test_other_failures_of_the_net_come_through(layers: list[nn.Module]) -> None:
    trouble = "my own trouble"

    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(trouble)

    with pytest.raises(RuntimeError, match=trouble):
        ConcatHypernet(Broken(*layers))(step_at(torch.ones(3, 2)))


# Composition


def test_convolutions_from_elsewhere_run_unchanged_with_one_call_a_step() -> None:
    net = nn.Sequential(nn.Conv2d(7, 8, 3, padding=1), nn.PReLU(), nn.Conv2d(8, 3, 3, padding=1))
    y0, func = torch.randn(2, 3, 6, 6), Counted(damped_wave)
    solution = tdh.HyperSolver("euler", ConcatHypernet(net), steps=10).solve(func, y0, TIMES)
    assert func.calls == 10

    y, dt = y0, torch.tensor(0.1)
    for t in torch.lerp(TIMES[0], TIMES[1], torch.arange(10) / 10):
        f0 = damped_wave(t, y)
        y = y + dt * f0 + dt**2 * net(torch.cat([y, f0, dt.expand(2, 1, 6, 6)], dim=1))
    torch.testing.assert_close(solution[-1], y)


@pytest.mark.parametrize(
    "y",
    [
        torch.randn(3, 2),
        torch.randn(3),
        torch.randn(3, 2, 4, 4),
        (torch.randn(3, 2, 4), torch.randn(3)),
    ],
    ids=["matrix", "vector", "image", "tuple"],
)
def test_solve_with_a_ready_net_compiles_to_one_graph(y: Any) -> None:
    solver = tdh.HyperSolver("heun", randomised(ready(y, HEUN)), steps=2)

    def field(t: Tensor, y: Any) -> Any:
        return damped_wave(t, y) if isinstance(y, Tensor) else tuple(-t * part for part in y)

    compiled = torch.compile(solver.solve, fullgraph=True, backend="aot_eager")
    expected, got = solver.solve(field, y, TIMES), compiled(field, y, TIMES)
    torch.testing.assert_close(got, expected)


def test_vmap_over_samples_equals_the_batch() -> None:
    g, y = randomised(MLP(2)), torch.randn(4, 2)
    each = torch.func.vmap(lambda row: g(step_at(row.unsqueeze(0))).squeeze(0))(y)
    torch.testing.assert_close(each, g(step_at(y)))


def test_gradients_flow_to_everything_a_step_holds() -> None:
    g = randomised(MLP(2, inputs=("y", "stages", "dt", "t", "y0"), n_stages=1)).double()
    numbers = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    times = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(y: Tensor, f0: Tensor, y0: Tensor, dt: Tensor, t: Tensor) -> Tensor:
        out: Tensor = g(tdh.StepInput(dt, t, y, f0, (f0,), y0))
        return out

    assert torch.autograd.gradcheck(call, (*numbers, *times))


# Ready nets


@pytest.mark.parametrize("shape", [(3,), (), *SHAPES])
@pytest.mark.parametrize("base", ["euler", "rk4"])
def test_unfitted_solver_is_its_base_bitwise(shape: tuple[int, ...], base: str) -> None:
    y0 = torch.randn(shape)
    unfitted = tdh.HyperSolver(base, ready(y0, EULER if base == "euler" else RK4), steps=3)
    plain = tdh.HyperSolver(base, zero, steps=3)
    assert torch.equal(unfitted.solve(damped_wave, y0, TIMES), plain.solve(damped_wave, y0, TIMES))


@pytest.mark.parametrize(
    "net",
    [
        Linear(2),
        MLP(2, hidden=()),
        MLP(3, hidden=(8, 7), inputs=("y", "stages", "t"), n_stages=4),
        Conv(2, hidden=5, kernel_size=1, n_spatial=1),
        Conv(2, n_spatial=3, inputs=("y0", "dt")),
        Bottleneck(2, hidden=5, kernel_size=5, n_spatial=1),
    ],
    ids=lambda net: net.kind,
)
def test_architecture_survives_json_and_rebuilds_the_net(net: ReadyHypernet) -> None:
    randomised(net)
    rebuilt = from_architecture(json.loads(json.dumps(net.architecture)))
    assert type(rebuilt) is type(net)
    assert rebuilt.architecture == net.architecture
    rebuilt.load_state_dict(net.state_dict())
    shape = (3, net.channels, *(4,) * net.architecture.get("n_spatial", 0))
    step = step_at(torch.randn(shape), n_stages=net.n_stages)
    assert torch.equal(rebuilt(step), net(step))


@pytest.mark.parametrize("architecture", [{"kind": "transformer"}, {}, {"kind": ["mlp"]}])
def test_unknown_kind_is_refused(architecture: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match=r'kind is (?s:.*) one of "linear", "mlp"'):
        from_architecture(architecture)


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ({"kind": "mlp"}, "channels is missing"),
        ({"kind": "mlp", "channels": "two"}, "channels is 'two'"),
        ({"kind": "mlp", "channels": 2, "hidden": [3, True]}, r"hidden\[1\] is True"),
        ({"kind": "linear", "channels": 2, "hidden": [3]}, "hidden is a field that this version"),
        ({"kind": "conv", "channels": 2, "inputs": ["q"]}, r"inputs\[0\] is 'q'"),
        ({"kind": "conv", "channels": 2, "kernel_size": 4}, "kernel_size is 4"),
        ({"kind": "conv", "channels": 2**40, "hidden": 2**40}, "cannot be built"),
    ],
)
def test_damaged_architecture_is_refused(architecture: dict[str, Any], named: str) -> None:
    with pytest.raises(FileFormatError, match=named):
        from_architecture(architecture)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Linear, {"channels": 0}),
        (Linear, {"channels": 2.0}),
        (MLP, {"channels": 2, "n_stages": 0}),
        (MLP, {"channels": 2, "hidden": 64}),
        (MLP, {"channels": 2, "hidden": (64, 0)}),
        (Conv, {"channels": 2, "hidden": -1}),
        (Conv, {"channels": 2, "kernel_size": 4}),
        (Conv, {"channels": 2, "kernel_size": "3"}),
        (Conv, {"channels": 2, "n_spatial": 4}),
        (Bottleneck, {"channels": 2, "hidden": 0}),
        (Bottleneck, {"channels": 2, "kernel_size": 2}),
        (Bottleneck, {"channels": 2, "n_spatial": 0}),
    ],
)
def test_impossible_arguments_are_refused(make: type, arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make(**arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [Linear, MLP])
def test_pointwise_nets_act_alike_at_every_point(make: Any, shape: tuple[int, ...]) -> None:
    g, y = randomised(make(2)), torch.randn(shape)
    out = g(step_at(y))
    assert out.shape == shape
    point = (..., *(0,) * (len(shape) - 2))
    torch.testing.assert_close(out[point], g(step_at(y[point])))


@pytest.mark.parametrize("n_in", [5, 9])
def test_convolution_refuses_a_state_that_torch_would_take_as_unbatched(n_in: int) -> None:
    g = Conv(2, n_spatial=2)
    y = torch.ones(n_in, 2, 8)  # with n_in = 5 the batch is as long as the net's input channels
    with pytest.raises(StateShapeError, match="n_spatial=1"):
        g(step_at(y))


def test_convolution_points_to_the_mlp_for_more_dimensions_than_torch_has() -> None:
    with pytest.raises(StateShapeError, match=r"hypernets\.MLP"):
        Conv(2, n_spatial=3)(step_at(torch.ones(1, 2, 2, 2, 2, 2)))


@pytest.mark.parametrize("n_spatial", [1, 2, 3])
@pytest.mark.parametrize("make", [Bottleneck, Conv])
def test_scales_folded_into_the_weights_give_the_numbers_of_scales_applied(
    make: Any, n_spatial: int
) -> None:
    g = randomised(make(2, kernel_size=1 if make is Conv else 3, n_spatial=n_spatial)).double()
    x = torch.randn(3, 5, *(4,) * n_spatial, dtype=torch.float64)
    net = g.net
    applied = net.layers(net.input_scale * x + net.input_shift) * net.output_scale
    torch.testing.assert_close(net(x), applied)


def test_folded_scales_follow_a_calibration_and_pass_gradients() -> None:
    g = Bottleneck(2)
    inputs, residual = torch.randn(16, 5, 4, 4) * 7 + 3, torch.randn(16, 2, 4, 4) * 1e-3
    g.calibrate(inputs, residual)
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    net = g.net
    applied = net.layers(net.input_scale * inputs + net.input_shift) * net.output_scale
    torch.testing.assert_close(net(inputs), applied)
    net(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in g.parameters())


def test_a_bottleneck_sees_as_far_as_its_kernel() -> None:
    g, y = randomised(Bottleneck(2, kernel_size=5)), torch.zeros(1, 2, 9, 9)
    moved = y.clone()
    moved[0, 0, 4, 4] = 1.0
    far = (g(step_at(moved)) - g(step_at(y)))[0, 0] != 0
    rows = far.any(dim=1).nonzero().flatten().tolist()
    # step_at adds numbers to y alike everywhere, so that only the moved point differs.
    assert rows == [2, 3, 4, 5, 6]


# Calibration


@pytest.mark.parametrize("shape", SHAPES)
def test_calibrated_layers_see_and_return_numbers_of_order_one(shape: tuple[int, ...]) -> None:
    g = net_for(shape)
    inputs = torch.randn(64, 5, *shape[2:]) * 1e4 + 3e5
    inputs[:, 4] = 0.1
    residual = torch.randn(64, 2, *shape[2:]) * 1e-6
    g.calibrate(inputs, residual)
    seen: list[Tensor] = []
    g.net.layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    g.net(inputs)
    over = [0, *range(2, len(shape))]
    spread, mean = torch.std_mean(seen[0], over, correction=0)
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-2, rtol=0)
    torch.testing.assert_close(spread[:4], torch.ones(4), atol=1e-2, rtol=0)
    assert spread[4] == 0
    rms = (residual / g.net.output_scale).square().mean(over).sqrt()
    torch.testing.assert_close(rms, torch.ones(2))


def test_calibrating_keeps_an_unfitted_net_zero() -> None:
    g = MLP(2)
    g.calibrate(torch.randn(9, 5) * 1e3, torch.randn(9, 2) * 1e-3)
    assert torch.equal(g(step_at(torch.randn(3, 2))), torch.zeros(3, 2))


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, -1e6])
def test_constant_channels_do_not_divide_by_zero(value: float) -> None:
    g = MLP(1, inputs=("y",))
    g.calibrate(torch.full((8, 1), value), torch.zeros(8, 1))
    assert all(torch.isfinite(buffer).all() for buffer in g.buffers())
    at_value = torch.addcmul(g.net.input_shift, torch.tensor([value]), g.net.input_scale)
    torch.testing.assert_close(at_value, torch.zeros(1), atol=1e-6, rtol=0)


def test_step_sizes_of_one_float32_grid_count_as_constant() -> None:
    sizes = torch.linspace(0, 100, 10001).diff().unsqueeze(1)
    assert sizes.unique().numel() > 1
    g = Linear(1, inputs=("y", "dt"))
    g.calibrate(torch.cat([torch.randn_like(sizes), sizes], dim=1), torch.ones_like(sizes))
    seen = g.net.input_scale[1] * sizes + g.net.input_shift[1]
    assert seen.abs().max() < 1e-2


def test_several_step_sizes_are_normalised() -> None:
    sizes = torch.tensor([0.1, 0.2, 0.3]).repeat(10).unsqueeze(1)
    g = Linear(1, inputs=("dt",))
    g.calibrate(sizes, torch.ones_like(sizes))
    torch.testing.assert_close(1 / g.net.input_scale, sizes.std(0, correction=0))


def test_channel_without_residual_keeps_a_small_scale() -> None:
    g = MLP(2)
    g.calibrate(torch.randn(9, 5), torch.tensor([[0.0, 8.0]]).expand(9, 2))
    torch.testing.assert_close(g.net.output_scale, torch.tensor([8e-3, 8.0]))


@pytest.mark.parametrize(
    ("inputs", "residual", "named"),
    [
        (torch.ones(4, 6), torch.ones(4, 2), "inputs"),
        (torch.ones(4, 5), torch.ones(4, 3), "residual"),
        (torch.ones(0, 5), torch.ones(0, 2), "inputs"),
        (torch.ones(5), torch.ones(4, 2), "inputs"),
    ],
)
def test_calibrating_on_other_channels_is_refused(
    inputs: Tensor, residual: Tensor, named: str
) -> None:
    g = MLP(2)
    before = copy.deepcopy(g.state_dict())
    with pytest.raises(StateShapeError, match=named):
        g.calibrate(inputs, residual)
    assert all(torch.equal(before[name], value) for name, value in g.state_dict().items())


def test_fit_after_calibration_does_not_depend_on_the_units() -> None:
    def relative_loss(unit: float) -> float:
        torch.manual_seed(1)
        g = MLP(2, hidden=(16,))
        y = torch.randn(256, 2) * unit
        f0 = -y
        step = tdh.StepInput(torch.tensor(0.1), torch.tensor(0.0), y, f0, (f0,), y)
        target = unit * torch.sin(y / unit)
        g.calibrate(g.concat(step), target)
        optimiser = torch.optim.AdamW(g.parameters(), lr=1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            loss = (g(step) - target).square().mean() / unit**2
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    losses = [relative_loss(unit) for unit in (1.0, 1e-4, 1e4)]
    assert max(losses) < 0.1
    for one, other in itertools.pairwise(losses):
        assert one == pytest.approx(other, rel=0.05)


# The choice


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((), "mlp"),
        ((3,), "mlp"),
        ((3, 2), "mlp"),
        ((3, 2, 4), "conv"),
        ((3, 2, 4, 4), "conv"),
        ((3, 2, 4, 4, 4), "conv"),
        ((3, 2, 2, 2, 2, 2), "mlp"),
    ],
)
def test_ready_net_follows_the_shape_and_the_stages(shape: tuple[int, ...], kind: str) -> None:
    y = torch.randn(shape)
    g = ready(y, HEUN)
    assert g.kind == kind
    assert g.inputs == ("y", "stages", "dt", "t")
    assert g(step_at(y, n_stages=2)).shape == shape


def test_ready_net_for_a_tuple_takes_all_parts() -> None:
    y = (torch.ones(3, 2, 4, 4), torch.ones(3))
    g = ready(y, EULER)
    assert (g.kind, g.channels) == ("conv", 3)
    assert [part.shape for part in g(step_at(y))] == [part.shape for part in y]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_ready_net_has_the_dtype_that_steps_are_made_in(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    y = torch.ones(3, 2, dtype=dtype)
    g = ready(y, EULER)
    assert {tensor.dtype for tensor in g.state_dict().values()} == {expected}
    solution = tdh.HyperSolver("euler", g, steps=2).solve(lambda t, y: -y, y, TIMES)
    assert solution.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_no_ready_net_for_integers_or_complex_numbers(dtype: torch.dtype) -> None:
    with pytest.raises(StateTypeError):
        ready(torch.ones(3, 2, dtype=dtype), EULER)


@pytest.mark.parametrize("shape", [(), (3,), *SHAPES])
def test_families_fit_the_state_and_grow_with_the_width(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape, dtype=torch.float64)
    for family in families(y, HEUN):
        sizes = [sum(p.numel() for p in net.parameters()) for net in family]
        assert sizes == sorted(set(sizes))
        for net in family:
            out = net(step_at(y, n_stages=2))
            assert torch.equal(out, torch.zeros_like(y))
            assert out.dtype == y.dtype
