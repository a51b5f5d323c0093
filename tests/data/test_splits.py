from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.data.cohort import Case
from segraft.data.splits import draw, folds
from segraft.errors import SegraftError


def cohort(scans: list[int]) -> list[Case]:
    """Patient i has scans[i] cases."""
    return [
        Case(f"c{patient}_{scan}", f"p{patient}", (Path("x.nii"),), None)
        for patient, count in enumerate(scans)
        for scan in range(count)
    ]


SCANS = st.lists(st.integers(1, 3), min_size=2, max_size=12)
SEED = st.integers(0, 2**31)


@given(scans=SCANS, seed=SEED, data=st.data())
def test_draw(scans, seed, data):
    cases = cohort(scans)
    count = data.draw(st.integers(1, len(scans)))
    shuffled = data.draw(st.permutations(cases))
    drawn = draw(cases, count, seed=seed)
    patients = {case.patient for case in drawn}
    assert len(patients) == count
    assert set(drawn) == {case for case in cases if case.patient in patients}
    assert len(drawn) == len(set(drawn))
    assert draw(shuffled, count, seed=seed) == drawn
    assert draw(cases, len(scans), seed=seed)[: len(drawn)] == drawn


@given(scans=SCANS, seed=SEED, data=st.data())
def test_folds(scans, seed, data):
    cases = cohort(scans)
    n = data.draw(st.integers(2, len(scans)))
    split = folds(cases, n, seed=seed)
    assert len(split) == n
    assert sorted((case for _, held in split for case in held), key=lambda c: c.id) == sorted(cases, key=lambda c: c.id)
    sizes = [len({case.patient for case in held}) for _, held in split]
    assert max(sizes) - min(sizes) <= 1
    for train, held in split:
        assert set(train) | set(held) == set(cases)
        assert not {case.patient for case in train} & {case.patient for case in held}
    assert folds(data.draw(st.permutations(cases)), n, seed=seed) == split


def test_seeds_differ():
    cases = cohort([1] * 30)
    assert len({draw(cases, 5, seed=seed) for seed in range(20)}) > 15
    assert folds(cases, 3, seed=0) != folds(cases, 3, seed=1)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda cases: draw(cases, 4, seed=0), "4 patients were asked for but there are only 3"),
        (lambda cases: draw(cases, 0, seed=0), "at least 1"),
        (lambda cases: folds(cases, 4, seed=0), "4 folds were asked for but there are only 3"),
        (lambda cases: folds(cases, 1, seed=0), "at least 2"),
    ],
)
def test_impossible(call, complaint):
    with pytest.raises(SegraftError, match=complaint):
        call(cohort([2, 1, 3]))
