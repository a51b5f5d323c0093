"""DICOM SEG: label maps and fractions, as other tools write them."""

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes
from tests.data.dicom_segs import LABELS, change, mask_of, read

from segraft.errors import SegraftError


def other_type(scan: Path, path: Path, kind: str, values: np.ndarray) -> Path:
    """By highdicom, as another tool would write it: slices in the order of their files."""
    concept = codes.SCT.Tissue
    description = highdicom.seg.SegmentDescription(
        *(1, "liver", concept, concept, "MANUAL"),
    )
    sources = [pydicom.dcmread(file) for file in sorted(scan.iterdir())]
    for each in sources:
        each.PatientName = None
    uid = pydicom.uid.generate_uid
    made = highdicom.seg.Segmentation(
        sources,
        np.moveaxis(values, 2, 0).transpose(0, 2, 1),
        kind,
        [description],
        uid(),
        1,
        uid(),
        1,
        "M",
        "N",
        "1",
        "2",
    )
    made.save_as(path)
    return path


def test_label_maps(scan, tmp_path):
    path = other_type(scan, tmp_path / "s.dcm", "LABELMAP", (mask_of() == 1).astype(np.uint8))
    np.testing.assert_array_equal(read(path, LABELS, scan), mask_of() == 1)


def test_fractions(scan, tmp_path):
    """0 and the largest value are no fractions."""
    path = other_type(scan, tmp_path / "s.dcm", "FRACTIONAL", (mask_of() == 1).astype(np.float32))
    np.testing.assert_array_equal(read(path, LABELS, scan), mask_of() == 1)
    path = other_type(scan, tmp_path / "s.dcm", "FRACTIONAL", (mask_of() == 1).astype(np.float32) * 0.6)
    with pytest.raises(SegraftError, match=r"holds fractions .* threshold it"):
        read(path, LABELS, scan)


def test_compressed_frames_that_are_not_all_there(scan, tmp_path):
    path = other_type(scan, tmp_path / "s.dcm", "LABELMAP", (mask_of() == 1).astype(np.uint8))
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(path)
    np.testing.assert_array_equal(read(path, LABELS, scan), mask_of() == 1)
    change(path, NumberOfFrames=3)
    with pytest.raises(SegraftError, match="4 of 3 frames"):
        read(path, LABELS, scan)
