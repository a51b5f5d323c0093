"""DICOM SEG: a damaged file, or one whose frames are not all there, is refused."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from tests.data.dicom_segs import LABELS, change, mask_of, read

from segraft.errors import SegraftError


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def strip_positions(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    del dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    dataset.save_as(path)


def unknown_segment(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    groups = dataset.PerFrameFunctionalGroupsSequence[0]
    groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut, r"seg.dcm"),
        (strip_positions, r"seg.dcm is damaged .*0020,9113"),
        (unknown_segment, r"segment 9"),
        (lambda path: change(path, SegmentSequence=None), "seg.dcm is damaged"),
        (lambda path: change(path, PerFrameFunctionalGroupsSequence=None), "seg.dcm is damaged"),
        (lambda path: path.write_bytes(b"\0" * 500), "no DICOM file"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damaged(scan, seg, spoil, says):
    spoil(seg)
    with pytest.raises(SegraftError, match=says):
        read(seg, LABELS, scan)


def without_groups(dataset: pydicom.Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-3]


def with_fewer_frames(dataset: pydicom.Dataset) -> None:
    without_groups(dataset)
    dataset.NumberOfFrames -= 3


def with_more_frames(dataset: pydicom.Dataset) -> None:
    dataset.NumberOfFrames = 2**31 - 1


def with_fewer_rows(dataset: pydicom.Dataset) -> None:
    dataset.Rows -= 1


def with_many_rows(dataset: pydicom.Dataset) -> None:
    dataset.Rows = dataset.Columns = 60_000


def with_fewer_pixels(dataset: pydicom.Dataset) -> None:
    dataset.PixelData = dataset.PixelData[:-2]


def of_another_type(dataset: pydicom.Dataset) -> None:
    dataset.SegmentationType = "LABELMAP"


def of_no_type(dataset: pydicom.Dataset) -> None:
    dataset.SegmentationType = "OTHER"


def with_wider_pixels(dataset: pydicom.Dataset) -> None:
    dataset.BitsAllocated = 8


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_groups, "9 of 12 frames"),
        (with_more_frames, "12 of 2147483647 frames"),
        (with_fewer_frames, r"\d+ bytes of pixels, and 9 frames"),
        (with_fewer_rows, r"\d+ bytes of pixels, and 12 frames of 5 rows"),
        (with_many_rows, r"\d+ bytes of pixels, and 12 frames of 60000 rows"),
        (with_fewer_pixels, r"\d+ bytes of pixels, and 12 frames"),
        (with_wider_pixels, "BINARY with 8 as"),
        (of_another_type, "LABELMAP with 1 as"),
        (of_no_type, "OTHER with 1 as"),
    ],
)
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"])
def test_frames_that_are_not_all_there(scan, seg, spoil, says, syntax):
    """Where frames have no groups, or others than their pixels are for, no part of them is read."""
    dataset = pydicom.dcmread(seg)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.save_as(seg, implicit_vr=syntax == "1.2.840.10008.1.2", little_endian=True)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    dataset = pydicom.dcmread(seg)
    spoil(dataset)
    dataset.save_as(seg)
    with pytest.raises(SegraftError, match=f"seg.dcm .*{says}.*: export it again"):
        read(seg, LABELS, scan)
