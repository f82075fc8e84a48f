"""States of one tensor and of several are taken apart in one place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from torchdiffeq_hyper import _state, errors

PAIR = (torch.arange(6.0).reshape(3, 2), torch.arange(3.0))


def test_parts_are_mapped_into_a_state_of_the_same_kind() -> None:
    one = _state.map_parts(torch.add, PAIR[0], PAIR[0])
    assert isinstance(one, torch.Tensor)
    both = _state.map_parts(torch.sub, PAIR, PAIR)
    assert isinstance(both, tuple)
    assert [part.abs().max() for part in both] == [0, 0]
    with pytest.raises(ValueError, match="shorter"):
        _state.map_parts(torch.add, PAIR, PAIR[:1])


def test_samples_are_taken_from_all_parts() -> None:
    first, second = _state.take(PAIR, torch.tensor([2, 0]))
    assert first.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert second.tolist() == [2.0, 0.0]


def test_samples_are_counted_where_the_parts_share_them() -> None:
    assert _state.n_samples(PAIR) == _state.batch_size(PAIR) == 3
    assert _state.n_samples((PAIR[0], torch.tensor(1.0))) == 0
    assert _state.batch_size((PAIR[0], torch.tensor(1.0))) == 3
    assert _state.n_samples((PAIR[0], PAIR[1][:2])) == 0
    assert _state.batch_size((PAIR[0], PAIR[1][:2])) == 1
    assert _state.n_samples(torch.empty(3, 0)) == 0


def test_only_half_precision_is_stepped_in_another_dtype() -> None:
    assert _state.stepped_dtype(torch.bfloat16) == torch.float32
    assert _state.stepped_dtype(torch.float64) == torch.float64
    assert _state.stepped_dtype(torch.complex64) == torch.complex64
    assert {part.dtype for part in _state.cast(PAIR, torch.float16)} == {torch.float16}


def test_shapes_tell_states_from_answers_that_are_none() -> None:
    assert _state.shapes_of(PAIR) == (True, [(3, 2), (3,)])
    assert _state.shapes_of(PAIR[0]) != _state.shapes_of((PAIR[0],))
    assert _state.shapes_of(None) == (False, [(-1,)])


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.HyperError)
        and kind is not errors.UnfinishedSolveError
    ],
)
def test_errors_and_their_copies_say_problem_expected_fix(
    kind: type[errors.HyperError],
) -> None:
    error = kind(problem="this.", expected="that.", fix="a = 1\nb = 2")
    text = "this.\n  expected: that.\n  fix:      a = 1\n            b = 2"
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(same) is kind
        assert str(same) == text
