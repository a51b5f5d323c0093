"""DICOM SEG: which file of a folder is one, which series it is of, and which case it makes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.data.dicom_segs import LABELS, change, mask_of, read, series, write

from segraft.data.case import Case
from segraft.data.dicom import read_series
from segraft.data.dicom_files import holds_series
from segraft.data.dicom_seg import is_segmentation, segmentation_file
from segraft.data.dicom_seg_writing import Found
from segraft.data.labels import Labels
from segraft.errors import SegraftError


def test_a_seg_among_the_slices(scan, seg):
    shutil.copy(seg, scan / "slice_0009.dcm")
    with pytest.raises(SegraftError, match=r"slice_0009.dcm is a SEG, no slice of a scan: move it out of the folder"):
        read_series(scan)


def test_another_series(seg, tmp_path):
    with pytest.raises(SegraftError, match=r"refers to the series .* give the series it was drawn on"):
        read(seg, LABELS, series(tmp_path / "other", seed=7))


def test_no_reference(scan, seg, tmp_path):
    """Then the frame of reference must be the same."""
    change(seg, ReferencedSeriesSequence=None)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    change(seg, FrameOfReferenceUID="1.2.3")
    with pytest.raises(SegraftError, match="FrameOfReferenceUID is not that of its image"):
        read(seg, LABELS, scan)


def test_dicom_that_is_no_seg(scan):
    with pytest.raises(SegraftError, match="is DICOM of CT, no SEG"):
        read(scan / "slice_0000.dcm", LABELS, scan)


def test_folders(scan, seg, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SegraftError, match="a folder of 0 DICOM files"):
        segmentation_file(folder)
    shutil.copy(seg, folder / "IM1")
    (folder / "notes.txt").write_text("")
    assert segmentation_file(folder) == folder / "IM1"
    assert is_segmentation(folder)
    assert is_segmentation(folder / "IM1")
    assert not is_segmentation(tmp_path / "label.nii.gz")
    with pytest.raises(SegraftError, match="a folder of 4 DICOM files"):
        segmentation_file(scan)


@pytest.mark.parametrize("name", ["DICOMDIR", "._slice_0000.dcm", "AAA.txt"])
def test_what_is_no_slice_beside_the_slices(scan, seg, tmp_path, name):
    """Nor is it asked which series it is, nor does it count among the files of a label's folder."""
    other = series(tmp_path / "other", seed=7) / "slice_0000.dcm"
    shutil.copy(other, scan / name)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(other, folder / name)
    assert not holds_series(folder)
    shutil.copy(seg, folder / "seg.dcm")
    assert segmentation_file(folder) == folder / "seg.dcm"


def test_a_case_is_known_by_its_segments_and_what_they_are_taken_for(seg, scan, tmp_path):
    def digest(path: Path, labels: Labels) -> str:
        return Case("p", "p", (scan,), path, segment_labels=labels).label_digest([1])

    shutil.copy(seg, tmp_path / "copy.dcm")
    other = write(Found(LABELS, mask_of(seed=3), {}), scan, tmp_path / "other.dcm")
    first = digest(seg, LABELS)
    assert digest(tmp_path / "copy.dcm", LABELS) == first
    assert len({first, digest(other, LABELS), digest(seg, Labels({4: "liver", 1: "left kidney", 300: "Hämatom"}))}) == 3
