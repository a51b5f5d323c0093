"""Labels that were drawn apart, joined: what a map of label values says of each is what was drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.data.labels import Labels
from segraft.data.overlapping import joined
from segraft.errors import SegraftError

TUMOUR = Labels({1: "whole", 2: "core", 3: "enhancing"}, {1: (1, 2, 3), 2: (2, 3), 3: (3,)})


def flat(*places: int) -> np.ndarray:
    return np.array(places, dtype=np.int64)


@given(st.data())
def test_every_region_comes_back(data):
    """Of any regions over any map: drawn apart and joined, each is where it was, and the order does not matter."""
    values = st.sets(st.integers(1, 5), min_size=1)
    covers = data.draw(st.lists(values, min_size=1, max_size=4))
    known = Labels({n: f"r{n}" for n in range(1, len(covers) + 1)}, dict(enumerate(covers, start=1)))
    shape = (3, 2, 4)
    truth = np.array(data.draw(st.lists(st.integers(0, 5), min_size=24, max_size=24))).reshape(shape)
    order = data.draw(st.permutations(list(known)))
    drawn = {label: np.flatnonzero(known.plane(truth, label)) for label in order}
    found = joined(drawn, known, known, shape, who="it")
    for label in known:
        np.testing.assert_array_equal(known.plane(found, label), known.plane(truth, label))


def test_labels_that_exclude_each_other():
    found = joined({7: flat(1, 0, 1), 300: flat(3)}, Labels({7: "a", 300: "b"}), Labels({7: "a"}), (2, 2), who="it")
    np.testing.assert_array_equal(found, [[7, 7], [0, 300]])
    assert found.dtype == np.uint16


def test_nothing_at_all():
    assert not joined({}, TUMOUR, TUMOUR, (2, 2), who="it").any()


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({1: flat(0), 2: flat(0, 1)}, r"1 voxels of it are in core alone, which no label value"),
        ({1: flat(0, 1), 3: flat(0, 1)}, r"2 voxels of it are in whole and enhancing together"),
    ],
)
def test_what_no_value_stands_for(places, says):
    with pytest.raises(SegraftError, match=says):
        joined(places, TUMOUR, TUMOUR, (2, 2), who="it")


def test_values_that_only_the_asked_labels_tell_apart():
    """A whole alone is 1 or 2: which, matters only to who asks for 2."""
    known = Labels({1: "whole"}, {1: (1, 2)})
    assert joined({1: flat(0)}, known, known, (2,), who="it").tolist() == [1, 0]
    with pytest.raises(SegraftError, match=r"values 1 and 2 are all whole in it"):
        joined({1: flat(0)}, known, Labels({2: "core"}, {2: (2,)}), (2,), who="it")
