"""Whether a tensor is still what it was, by its values where no version tells."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segraft.adapters.caching import Derived, Source


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]),
    st.sampled_from([lambda x: x, torch.t, lambda x: x[:, ::2], lambda x: x[1:]]),
    st.integers(0, 10_000),
)
@settings(max_examples=100, deadline=None)
def test_values_written_without_a_version_are_noticed(rows, columns, dtype, part, seed):
    """All of them, however few, of any kind, in any order of memory, with gaps; of up to 512 numbers, one is enough."""
    values = part(torch.randn(rows + 1, columns, generator=torch.Generator().manual_seed(seed)).to(dtype))
    source = Source.of(values)
    assert source.is_still(values)
    values.data.mul_(2)
    assert not source.is_still(values)
    values.data.div_(2)
    assert source.is_still(values)
    if values.numel() <= 512:
        values.data[seed % values.shape[0], seed % values.shape[1]] += 1
        assert not source.is_still(values)


def test_what_is_not_a_number_is_still_what_it_was():
    values = torch.full((40, 40), torch.nan)
    source = Source.of(values)
    assert source.is_still(values)
    values.data[0, 0] = 1
    assert not source.is_still(values)


def test_storage_that_was_looked_at_can_be_resized():
    """As sharding does, which takes parameters apart and puts them together again."""
    values = torch.ones(40, 40)
    source = Source.of(values)
    values.untyped_storage().resize_(0)
    assert not source.is_still(values)


def test_tensors_of_other_classes_are_looked_at():
    class Named(torch.Tensor):
        pass

    values = torch.ones(40, 40).as_subclass(Named)
    source = Source.of(values)
    assert source.is_still(values)
    values.data.mul_(2)
    assert not source.is_still(values)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_sources_of_any_shape(shape):
    values = torch.ones(shape)
    source = Source.of(values)
    assert source.is_still(values)
    values.data.fill_(2)
    assert source.is_still(values) is (values.numel() == 0)


@pytest.mark.parametrize("shape", [(1024, 1024, 3, 3), (64, 1024, 3, 3), (1024, 64, 1, 1), (33, 20), (7, 5, 3, 3, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_every_channel_is_looked_at(shape, last):
    weight = torch.ones(shape)
    weight = weight.movedim(1, -1).contiguous().movedim(-1, 1) if last else weight
    derived = Derived.of(weight)
    for dim in (0, 1):
        for channel in range(shape[dim]):
            part = weight.data.select(dim, channel)
            part.mul_(2)
            assert not derived.is_of(weight), (dim, channel)
            part.div_(2)
    assert derived.is_of(weight)
