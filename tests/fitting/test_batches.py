"""y0 of every kind becomes a held-out state and batches pulled once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from torchdiffeq_hyper import FitConfig
from torchdiffeq_hyper.errors import OptionError, StateShapeError, StateTypeError
from torchdiffeq_hyper.fitting._batches import Batches, n_samples

DATA = torch.arange(40.0).reshape(20, 2)


def _rows(*states: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for state in states for row in state}


def test_every_sample_is_fitted_on_or_held_out_never_both() -> None:
    batches = Batches(DATA, FitConfig(batch_size=6, validation=0.2))
    held, trained = _rows(batches.held_out.y0), _rows(*(batches[i].y0 for i in range(3)))
    assert len(held) == 4
    assert not held & trained
    assert held | trained == _rows(DATA)


def test_batches_are_of_nearly_equal_sizes_and_start_over() -> None:
    batches = Batches(DATA, FitConfig(batch_size=5, validation=0.2))  # 16 to train on
    assert [n_samples(batches[i]) for i in range(4)] == [4, 4, 4, 4]
    assert torch.equal(batches[5].y0, batches[1].y0)
    assert batches.position(5) == 1


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (Batches(DATA, FitConfig(seed=s)).held_out.y0 for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_more_than_two_batches_are_held_out() -> None:
    assert n_samples(Batches(torch.randn(100, 1), FitConfig(batch_size=4)).held_out) == 8


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.01), (2, 0.99), (3, 0.9)])
def test_both_sides_of_the_split_have_a_sample(count: int, fraction: float) -> None:
    batches = Batches(DATA[:count], FitConfig(validation=fraction))
    assert 1 <= n_samples(batches.held_out) < count
    assert n_samples(batches[0]) + n_samples(batches.held_out) == count


def test_one_shot_generators_are_pulled_lazily_and_once() -> None:
    pulled = []

    def source() -> Iterator[Tensor]:
        for i in range(3):
            pulled.append(i)
            yield DATA + 100 * i

    batches = Batches(source(), FitConfig(validation=0.25))
    assert pulled == [0]
    assert n_samples(batches.held_out) + n_samples(batches[0]) == len(DATA)
    assert torch.equal(batches[1].y0, DATA + 100)
    assert pulled == [0, 1]
    assert torch.equal(batches[2].y0, DATA + 200)
    assert torch.equal(batches[3].y0, batches[0].y0)
    assert torch.equal(batches[4].y0, batches[1].y0)
    assert pulled == [0, 1, 2]


def test_a_limit_keeps_an_endless_source_from_being_pulled_on() -> None:
    def source() -> Iterator[Tensor]:
        while True:
            yield torch.randn(4, 2)

    batches = Batches(source(), FitConfig())
    batches.most = 2
    assert [batches.position(i) for i in range(5)] == [0, 1, 0, 1, 0]


def test_a_list_of_one_tensor_is_that_tensor() -> None:
    loader = DataLoader(TensorDataset(DATA), batch_size=10)
    batches = Batches(loader, FitConfig(validation=0.2))
    assert torch.equal(batches[1].y0, DATA[10:])


def test_a_list_of_more_tensors_is_a_tuple_state() -> None:
    loader = DataLoader(TensorDataset(DATA, DATA[:, 0]), batch_size=10)
    batch = Batches(loader, FitConfig())[1].y0
    assert isinstance(batch, tuple)
    assert torch.equal(batch[1], DATA[10:, 0])


def test_parts_of_a_tuple_state_stay_together() -> None:
    batches = Batches((DATA, DATA[:, 0] * 7), FitConfig(batch_size=4))
    for state in (batches.held_out.y0, batches[0].y0, batches[2].y0):
        assert isinstance(state, tuple)
        assert torch.equal(state[0][:, 0] * 7, state[1])


def test_later_batches_follow_the_first_in_dtype() -> None:
    batches = Batches([DATA, DATA.double()], FitConfig())
    assert batches[1].y0.dtype == torch.float32


def test_states_lose_their_graph() -> None:
    assert not Batches(DATA.clone().requires_grad_(), FitConfig())[0].y0.requires_grad


@pytest.mark.parametrize(
    ("y0", "error", "text"),
    [
        (torch.arange(8).reshape(4, 2), StateTypeError, "int64"),
        (torch.ones(4, 2, dtype=torch.complex64), StateTypeError, "view_as_real"),
        ((torch.ones(4), torch.ones(4, dtype=torch.int32)), StateTypeError, "int32"),
        (torch.ones(0, 2), OptionError, "empty"),
        (torch.ones(3, 0), OptionError, "empty"),
        (torch.ones(1, 2), OptionError, "1 sample"),
        ([torch.ones(1, 2)], OptionError, "1 sample"),
        ([], OptionError, "no batch"),
        (iter(()), OptionError, "no batch"),
        (torch.tensor(1.0), StateShapeError, r"torch\.stack"),
        ((torch.ones(4, 2), torch.tensor(1.0)), StateShapeError, "dim 0"),
        ((torch.ones(4, 2), torch.ones(5)), StateShapeError, "dim 0"),
        (3.0, StateTypeError, "float"),
        ([1.0, 2.0], StateTypeError, "float"),
        ([{"x": torch.ones(4)}], StateTypeError, "dict"),
        ([[torch.ones(4, 2), torch.arange(4)]], StateTypeError, "labels"),
        ((), StateTypeError, "tuple"),
    ],
)
def test_bad_states_are_refused(y0: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Batches(y0, FitConfig())


def test_a_later_batch_of_another_shape_is_refused() -> None:
    batches = Batches([DATA, DATA[:, :1]], FitConfig())
    with pytest.raises(StateShapeError, match="as the first batch"):
        batches[1]
