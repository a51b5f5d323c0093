"""Cohorts whose scans are a few voxels: enough to be recognised by content."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.cohort import Case, Cohort

MakeCohort = Callable[..., Cohort]


@pytest.fixture
def make_cohort(tmp_path: Path) -> MakeCohort:
    """make_cohort({id: patient}, contents={id: bytes}): a cohort; without contents each scan is its id."""

    def make(patients: dict[str, str], contents: dict[str, bytes] | None = None) -> Cohort:
        cases = []
        for name, patient in patients.items():
            image = tmp_path / f"{name}.nii.gz"
            voxels = np.frombuffer((contents or {}).get(name, name.encode()), np.uint8).reshape(-1, 1, 1)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), image)
            cases.append(Case(name, patient, (image,), None))
        return Cohort("Toy", tmp_path / "dataset.json", {1: "core"}, ("CT",), tuple(cases))

    return make


@pytest.fixture
def pairs(make_cohort: MakeCohort) -> Cohort:
    """Patients a to d with two scans each: a0, a1, b0, …"""
    return make_cohort({f"{patient}{scan}": patient for patient in "abcd" for scan in (0, 1)})
