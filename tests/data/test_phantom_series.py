"""The phantom cohort as DICOM: the same heads on the same grids."""

import numpy as np
import pydicom
import pytest

from segraft.data.checks import load_case
from segraft.data.cohort import Cohort
from segraft.data.nifti import same_grid
from segraft.data.phantom import write_cohort
from segraft.data.phantom_series import write_phantom_series
from segraft.errors import SegraftError

GRID = {"shape": (48, 56, 16), "spacing": (4.4, 4.0, 8.0)}


def test_the_same_cohort_either_way(tmp_path):
    arguments = {"task": "subarachnoid", "patients": 2, "seed": 3, **GRID}
    as_series = Cohort.read(write_phantom_series(tmp_path / "dicom", **arguments))
    as_nifti = Cohort.read(write_cohort(tmp_path / "nifti", **arguments))
    assert [case.id for case in as_series.cases] == [case.id for case in as_nifti.cases]
    assert [case.patient for case in as_series.cases] == [case.patient for case in as_nifti.cases]
    for one, other in zip(as_series.cases, as_nifti.cases, strict=True):
        assert one.image.is_dir()
        assert one.digest() == other.digest()
        (scan, label), (their_scan, their_label) = load_case(one), load_case(other)
        assert same_grid(scan.first, their_scan.first)
        np.testing.assert_array_equal(label.dataobj, their_label.dataobj)
        first = pydicom.dcmread(min(one.image.iterdir()))
        assert first.SOPClassUID.name == "CT Image Storage"
        assert str(first.PatientID) == one.id


def test_drawn_again_it_replaces_itself_but_not_a_larger_one(tmp_path):
    arguments = {"task": "subarachnoid", "patients": 1, "seed": 3}
    write_phantom_series(tmp_path, **arguments, **GRID)
    write_phantom_series(tmp_path, **arguments, **GRID)
    with pytest.raises(SegraftError, match="is not of this series"):
        write_phantom_series(tmp_path, **arguments, shape=(48, 56, 14), spacing=(4.4, 4.0, 8.0))
