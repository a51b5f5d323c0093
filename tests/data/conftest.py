"""Small cohorts on disk; a DICOM series, and a SEG on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tests.data.dicom_segs import LABELS, mask_of, series
from tests.data.dicom_segs import write as write_seg

from segraft.data.cohort import Case
from segraft.data.dicom_seg_writing import Found

WriteCase = Callable[..., Case]


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def write_case(tmp_path: Path) -> WriteCase:
    """write_case(name, image, label, affine=…, patient=…): a case in files."""

    def write(
        name: str,
        image: np.ndarray,
        label: np.ndarray | None = None,
        affine: np.ndarray | None = None,
        patient: str | None = None,
    ) -> Case:
        image_path = save(tmp_path / "imagesTr" / f"{name}.nii.gz", image, affine)
        label_path = None if label is None else save(tmp_path / "labelsTr" / f"{name}.nii.gz", label, affine)
        return Case(name, patient or name, (image_path,), label_path)

    return write


@pytest.fixture
def write_listing(tmp_path: Path) -> Callable[..., Path]:
    """write_listing(labels=…, …): a dataset.json; keyword arguments replace keys, None removes them."""

    def write(**keys: Any) -> Path:
        content = {
            "name": "Toy",
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "anterior", "2": "Posterior"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        } | keys
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return path

    return write


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """The folder of a DICOM series."""
    return series(tmp_path / "scan")


@pytest.fixture
def seg(scan: Path, tmp_path: Path) -> Path:
    """A DICOM SEG on `scan`: the labels of `mask_of()`."""
    return write_seg(Found(LABELS, mask_of(), {}), scan, tmp_path / "seg.dcm")
