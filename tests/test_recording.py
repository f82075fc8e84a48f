"""What a record holds, whoever fills it in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchdiffeq_hyper import recording
from torchdiffeq_hyper._state import StateLayout, part_norms
from torchdiffeq_hyper.errors import HyperError, OptionError, StateShapeError
from torchdiffeq_hyper.recording import Draft, GraphCheck, Recorder, Solve, Steps

NAN = math.nan


def _steps(errors: tuple[Tensor, ...], layout: StateLayout, **fields: object) -> Steps:
    n = len(errors[0])
    t = torch.arange(float(n))
    accepted = torch.tensor([True, False, True])
    return Steps(t, torch.ones(n), torch.ones(n), accepted, errors, layout, **fields)  # type: ignore[arg-type]


def _solve(steps: Steps | None, method: str = "dopri5") -> Solve:
    recorder = Recorder()
    draft = Draft(method, torch.zeros(4, 2), StateLayout(None), (recorder,))
    draft.steps = steps
    draft.publish()
    return recorder.solves[0]


def test_part_norms_are_taken_over_the_non_batch_dimensions() -> None:
    layout = StateLayout(((2, 3), (2,), ()))
    flat = torch.tensor([3.0, 0, 4, 0, 0, 12, -5, 6, -7])
    norms = part_norms(layout, flat)
    assert [n.tolist() for n in norms] == [[5, 12], [5, 6], [7]]
    (norm,) = part_norms(StateLayout(None), flat[:6].reshape(2, 3) * 1j)
    assert norm.tolist() == [5, 12]


def test_states_without_entries_have_norms_without_entries() -> None:
    assert part_norms(StateLayout(None), torch.empty(0, 3))[0].shape == (0,)
    assert part_norms(StateLayout(None), torch.empty(4, 0))[0].tolist() == [0.0] * 4


def test_joint_errors_leave_out_parts_that_belong_to_no_sample() -> None:
    layout = StateLayout(((2, 3), (2,), ()))
    errors = (torch.full((3, 2), 3.0), torch.full((3, 2), 4.0), torch.full((3, 1), 100.0))
    steps = _steps(errors, layout)
    assert steps.error.tolist() == [[5.0, 5.0]] * 3
    assert steps.error_of(2).tolist() == [[100.0]] * 3
    assert float(_solve(steps).error_penalty()) == 20.0
    assert float(_solve(steps).error_penalty(part=0)) == 12.0


def test_a_state_of_numbers_alone_is_one_sample() -> None:
    errors = (torch.full((3, 1), 3.0), torch.full((3, 1), 4.0))
    assert _steps(errors, StateLayout(((), ()))).error.tolist() == [[5.0]] * 3


def test_parts_without_a_common_batch_need_a_choice() -> None:
    errors = (torch.ones(3, 2), torch.ones(3, 5))
    steps = _steps(errors, StateLayout(((2, 3), (5,))))
    with pytest.raises(StateShapeError, match="part=0"):
        _ = steps.error
    assert steps.error_of(1).shape == (3, 5)


@pytest.mark.parametrize("part", [2, -1, True, 0.0])
def test_a_part_that_is_not_there_is_refused(part: int) -> None:
    steps = _steps((torch.ones(3, 2), torch.ones(3, 2)), StateLayout(((2, 3), (2,))))
    with pytest.raises(OptionError, match="2 parts"):
        steps.error_of(part)


def test_a_tensor_has_no_parts() -> None:
    with pytest.raises(OptionError, match="one tensor"):
        _steps((torch.ones(3, 2),), StateLayout(None)).error_of(0)


def test_steps_of_each_sample_are_padded_with_nan_and_counted_without_it() -> None:
    """The layout of methods whose samples step on their own: two samples, three and one step."""
    dt = torch.tensor([[0.1, 0.5], [0.2, NAN], [0.3, NAN]])
    error = torch.tensor([[1.0, 2.0], [4.0, NAN], [8.0, NAN]], requires_grad=True)
    accepted = torch.tensor([[True, True], [False, False], [True, False]])
    solve = _solve(Steps(dt, dt, dt, accepted, (error,)))
    assert (solve.n_accepted, solve.n_rejected) == (3, 1)
    penalty = solve.error_penalty()
    penalty.backward()
    assert penalty.item() == 11.0
    assert error.grad is not None
    assert error.grad.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_stiffness_of_states_that_coincide_is_zero_with_a_finite_gradient() -> None:
    rise = torch.tensor([[6.0], [0.0], [1.0]], requires_grad=True)
    run = torch.tensor([[2.0], [0.0], [0.0]], requires_grad=True)
    steps = _steps((rise,), StateLayout(None), part_slopes=((rise,), (run,)))
    stiffness = steps.stiffness_of()
    assert stiffness.tolist() == [[3.0], [0.0], [0.0]]
    stiffness.sum().backward()
    assert run.grad is not None
    assert bool(run.grad.isfinite().all())


def test_methods_without_error_estimates_have_no_penalty() -> None:
    solve = _solve(None, method="euler")
    assert solve.steps.error.shape == (0, 4)
    assert (solve.n_accepted, solve.n_rejected) == (0, 0)
    with pytest.raises(recording.NothingRecordedError, match='without error estimates: "euler"'):
        solve.error_penalty()


def test_a_method_can_tell_more_of_itself_than_the_host_sees() -> None:
    recorder = Recorder()
    with recording.opened(recorder):
        assert recording.running() is None
        draft = Draft("dise", torch.zeros(3, 2), StateLayout(None), recording.open_recorders())
        with draft.entered():
            found = recording.running()
            assert found is not None
            found.nfe = 9
            found.sample_nfe = torch.tensor([1, 4, 4])
            found.selection = torch.tensor([0, 1, 1])
        draft.publish()
        assert recording.running() is None
    solve = recorder.solves[0]
    assert solve.nfe == 9
    assert solve.sample_nfe.tolist() == [1, 4, 4]
    assert solve.selection is not None
    assert solve.selection.tolist() == [0, 1, 1]


def test_values_without_a_graph_are_given_as_they_are() -> None:
    value = torch.ones(3)
    assert GraphCheck().protect(value) is value
    with torch.no_grad():
        assert not GraphCheck(is_adjoint=True).protect(value).requires_grad


def test_marks_notice_a_freed_graph_and_change_nothing() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    same, node = recording.mark(x * 2)
    assert torch.equal(same, x * 2)
    check = GraphCheck((node,))
    check.check()
    (same**2).sum().backward(retain_graph=True)
    check.check()
    (same**2).sum().backward()
    with pytest.raises(recording.FreedGraphError):
        check.check()
    plain = x.detach()
    unmarked, no_node = recording.mark(plain)
    assert unmarked is plain
    assert no_node is None
    assert torch.autograd.gradgradcheck(lambda x: recording.mark(x)[0] ** 3, (x,))


def test_every_error_is_also_the_builtin_a_caller_would_expect() -> None:
    for error, builtin in (
        (recording.NothingRecordedError, ValueError),
        (recording.FreedGraphError, RuntimeError),
        (recording.AdjointGradientError, RuntimeError),
        (recording.MaxStepsError, AssertionError),
    ):
        assert issubclass(error, HyperError)
        assert issubclass(error, builtin)
