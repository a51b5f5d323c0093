"""DICOM SEG: segments become labels by their names, or by their numbers where names say nothing."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from tests.data.dicom_segs import LABELS, mask_of, read

from segraft.data.labels import Labels
from segraft.errors import SegraftError


def rename(path: Path, *names: str) -> None:
    dataset = pydicom.dcmread(path)
    for segment, name in zip(dataset.SegmentSequence, names, strict=True):
        segment.SegmentLabel = name
    dataset.save_as(path)


def test_names_before_numbers(scan, seg):
    rename(seg, "Liver", "kidney_left", "hämatom")
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())


def test_several_segments_of_one_name_are_one_label(scan, seg):
    rename(seg, "liver", "liver", "left kidney")
    mask = read(seg, LABELS, scan)
    np.testing.assert_array_equal(mask == 1, np.isin(mask_of(), (1, 4)))
    np.testing.assert_array_equal(mask == 4, mask_of() == 300)


def test_numbers_where_no_name_is_known(scan, seg, caplog):
    rename(seg, "GREEN", "RED", "BLUE")
    for _ in range(2):
        mask = read(seg, Labels({1: "a", 2: "b", 3: "c"}), scan)
    for number, value in enumerate(LABELS, start=1):
        np.testing.assert_array_equal(mask == number, mask_of() == value)
    (told,) = caplog.messages
    assert 'segment 2 ("RED") is b' in told


GENERIC = [
    ("", "", ""),
    ("Segment 1", "segment_2", "Segment-3"),
    ("Segment_1", "Label 2", "ROI3"),
    ("Light Blue", "DARK_GREEN", "yellow"),
    ("1", "2", "03"),
    ("myth", "foo", "bar"),
]


@pytest.mark.parametrize("names", GENERIC)
def test_names_that_say_nothing_go_by_number(scan, seg, names):
    rename(seg, *names)
    labels = ("liver", "spleen", "myocardium") if names != GENERIC[-1] else ("a", "b", "c")
    mask = read(seg, Labels(dict(enumerate(labels, start=1))), scan)
    np.testing.assert_array_equal(mask == 2, mask_of() == 4)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("myocardium", "liver"),
        ("liver", "myocardium"),
        ("vertebrae L1", "liver"),
        ("liver", "vertebrae L1"),
        ("prostate or uterus", "spleen"),
        ("psv", "left kidney"),
        ("Segment of liver", "liver"),
    ],
)
def test_what_is_known_on_either_side_is_not_taken_by_its_number(scan, seg, name, label):
    rename(seg, name, "foo", "bar")
    with pytest.raises(SegraftError, match=f'segment 1 of .* is "{name}", and label 1 is "{label}"'):
        read(seg, Labels({1: label, 2: "b", 3: "c"}), scan)


@pytest.mark.parametrize("names", [("left kidney", "kidney_left"), ("LKidney", "Left-Kidney")])
def test_labels_that_are_one_by_name(scan, seg, names):
    rename(seg, names[0], names[1], names[0])
    with pytest.raises(SegraftError, match=f'labels 1 "{names[0]}" and 2 "{names[1]}" are one structure'):
        read(seg, Labels(dict(enumerate(names, start=1))), scan)


@pytest.mark.parametrize(
    ("names", "labels", "says"),
    [
        (("liver", "RED", "Hämatom"), LABELS, r'segment 2 \("RED"\) of .* is none of the labels .*, though others are'),
        (("GREEN", "RED", "BLUE"), LABELS, r'such as 1 \("GREEN"\), are none of the labels .* by name or by number'),
        (
            ("GREEN", "spleen", "x"),
            Labels({1: "a", 2: "liver", 3: "c"}),
            r'segment 2 .* "spleen", and label 2 is "liver"',
        ),
    ],
)
def test_segments_that_are_no_labels(scan, seg, names, labels, says):
    rename(seg, *names)
    with pytest.raises(SegraftError, match=says):
        read(seg, labels, scan)
