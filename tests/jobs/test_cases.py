"""Which cases serve, by patient and by content."""

import json
from dataclasses import replace

import pytest

from segraft.data.cohort import Case
from segraft.errors import SegraftError
from segraft.jobs.cases import Served, choose, read_cohort, served_cases


def digests(cohort, *ids):
    return Served({case.id: case.digest() for case in cohort.cases if case.id in ids})


def chosen(cohort, count, *, never=(), avoid=(), seed=0):
    result = choose(
        cohort,
        count,
        seed=seed,
        never=digests(cohort, *never),
        avoid=digests(cohort, *avoid),
        purpose="to test",
    )
    return {case.id for case in result.cases}, result.notes


def test_nothing_served(pairs):
    assert served_cases(pairs, Served()) == frozenset()
    assert served_cases(pairs, Served({"a0": "0" * 16})) == frozenset()


def test_one_scan_of_a_patient_counts_for_all(pairs):
    assert served_cases(pairs, digests(pairs, "a0", "c1")) == {"a0", "a1", "c0", "c1"}


def test_content_counts_and_the_name_does_not(make_cohort):
    before = make_cohort({"old": "x"}, {"old": b"scan"})
    known = digests(before, "old")
    later = make_cohort({"new": "y", "old": "z"}, {"new": b"scan", "old": b"another scan"})
    assert served_cases(later, known) == {"new"}


def test_all_where_nothing_is_said(pairs):
    assert chosen(pairs, None) == ({case.id for case in pairs.cases}, ())


def test_whole_patients_are_drawn(pairs):
    for seed in range(5):
        ids, _ = chosen(pairs, 2, seed=seed)
        assert len(ids) == 4
        assert len({each[0] for each in ids}) == 2


def test_what_must_never_serve(pairs):
    ids, notes = chosen(pairs, None, never=["a0"])
    assert ids == {"b0", "b1", "c0", "c1", "d0", "d1"}
    assert notes == ("2 cases of Toy trained the adapter and are left out.",)


def test_what_should_not_serve_is_left_out_where_others_remain(pairs):
    ids, notes = chosen(pairs, 2, avoid=["a0", "b0"])
    assert ids == {"c0", "c1", "d0", "d1"}
    assert len(notes) == 1
    assert "4 cases of Toy trained the base" in notes[0]


def test_what_should_not_serve_serves_where_too_few_others_remain(pairs):
    ids, notes = chosen(pairs, 3, avoid=["a0", "b0"], never=["c0"])
    assert ids == {"a0", "a1", "b0", "b1", "d0", "d1"}
    assert any("also trained the base" in note for note in notes)


def test_all_avoided(pairs):
    ids, notes = chosen(pairs, None, avoid=["a0", "b0", "c0", "d1"])
    assert len(ids) == 8
    assert any("also trained the base" in note for note in notes)


@pytest.mark.parametrize("never", [(), ("a0",)])
@pytest.mark.parametrize("avoid", [(), ("b0", "c0")])
def test_the_draw_depends_on_the_seed_alone(pairs, never, avoid):
    first = chosen(pairs, 1, never=never, avoid=avoid, seed=3)
    assert first == chosen(pairs, 1, never=never, avoid=avoid, seed=3)
    drawn = {tuple(sorted(chosen(pairs, 1, never=never, avoid=avoid, seed=seed)[0])) for seed in range(20)}
    assert len(drawn) == (4 - len(avoid) - len(never))


@pytest.mark.parametrize(("count", "never"), [(5, ()), (4, ("a1",)), (None, ("a0", "b0", "c0", "d0"))])
def test_too_few(pairs, count, never):
    with pytest.raises(SegraftError, match="were asked for") as error:
        chosen(pairs, count, never=never)
    assert str(pairs.path) in str(error.value)
    assert ("trained the adapter" in str(error.value)) == bool(never)


@pytest.mark.parametrize("count", [0, -1])
def test_none_asked_for(pairs, count):
    with pytest.raises(SegraftError, match="at least 1"):
        chosen(pairs, count)


def test_by_id(pairs):
    assert chosen(pairs, ["c1", "a0"])[0] == {"a0", "c1"}
    with pytest.raises(SegraftError, match="'e0' to test is not in"):
        chosen(pairs, ["e0"])
    with pytest.raises(SegraftError, match="'a1' trained the adapter"):
        chosen(pairs, ["a1"], never=["a0"])
    with pytest.raises(SegraftError, match="'b0' is named more than once"):
        chosen(pairs, ["b0", "c0", "b0"])
    assert "1 of the cases to test also trained the base" in chosen(pairs, ["b0", "c0"], avoid=["b0"])[1][0]


def test_every_fresh_case_serves_before_one_that_served(pairs):
    for seed in range(5):
        ids, notes = chosen(pairs, 3, avoid=["a0", "b0"], seed=seed)
        assert ids > {"c0", "c1", "d0", "d1"}
        assert len(ids) == 6
        assert any("2 of the cases to test also trained the base" in note for note in notes)


def test_patients_are_told_as_before_in_the_same_cohort_alone(tmp_path):
    """Else the second scan of a patient would serve who trained with the first."""
    entries = [{"image": f"p{k}_{scan}.nii.gz", "label": "l.nii.gz"} for k in (1, 2) for scan in "ab"]
    listing = {"name": "Toy", "labels": {"1": "core"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    before = Served({}, "Toy", r"(p\d)_")
    assert {case.patient for case in read_cohort(tmp_path, None, Served(), before).cases} == {"p1", "p2"}
    assert len({case.patient for case in read_cohort(tmp_path, None, Served({}, "Other", r"(p\d)_")).cases}) == 4
    assert {case.patient for case in read_cohort(tmp_path, "_([ab])", before).cases} == {"a", "b"}


def test_a_patient_who_served_with_one_channel_is_known(make_cohort):
    """A base that was trained on the FLAIR alone has seen the patient of the scan with four channels, and back."""
    alone = make_cohort({"a": "a", "b": "b", "c": "c"})
    files = {case.id: case.image for case in alone.cases}
    several = replace(
        alone,
        modalities=("T1", "FLAIR"),
        cases=(
            Case("x", "x", (files["a"], files["b"]), None, channels=("T1", "FLAIR")),
            Case("y", "y", (None, files["c"]), None, channels=("T1", "FLAIR")),
        ),
    )
    assert served_cases(several, Served({"b": alone.cases[1].digest()})) == {"x"}
    assert served_cases(alone, Served({"x": several.cases[0].digest()})) == {"a", "b"}
    assert served_cases(several, Served({"y": several.cases[1].digest()})) == {"y"}, "what is missing is no image"
