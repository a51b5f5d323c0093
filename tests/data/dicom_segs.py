"""Series of random voxels, SEGs written on them, and what is read of these."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom

from segraft.data.dicom import read_series
from segraft.data.dicom_seg import read_segments
from segraft.data.dicom_seg_writing import Found, Origin, write_segmentation
from segraft.data.dicom_writing import write_series
from segraft.data.labels import Labels

AFFINE = np.array([[0.5, 0, 0, -7.0], [0, 0.75, 0, 3.0], [0, 0, 4.0, -20.0], [0, 0, 0, 1]])
SHAPE = (5, 6, 4)
LABELS = Labels({1: "liver", 4: "left kidney", 300: "Hämatom"})
REGIONS = Labels({1: "whole", 2: "core"}, {1: (1, 2), 2: (2,)})
ORIGIN = Origin("adapter.safetensors", "0123456789abcdef" * 4)
MADE = datetime(2024, 2, 29, 12, 34, 56, tzinfo=UTC)


def series(folder: Path, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE, seed: int = 0) -> Path:
    """A CT series of random values, in slice_0000.dcm and so on."""
    data = np.random.default_rng(seed).integers(-1024, 3071, shape).astype(np.int16)
    write_series(nib.Nifti1Image(data, affine), folder, patient="Doe^Jane")
    return folder


def mask_of(shape: tuple[int, ...] = SHAPE, values: Sequence[int] = (0, 1, 4, 300), seed: int = 1) -> np.ndarray:
    """Random labels."""
    return np.random.default_rng(seed).choice(values, shape)


def write(found: Found, folder: Path, path: Path, **options: Any) -> Path:
    """A SEG on the series of a folder."""
    write_segmentation(found, folder, path, **{"origin": ORIGIN, "made": MADE, **options})
    return path


def read(path: Path, labels: Labels, scan: Path, asked: Sequence[int] | None = None) -> np.ndarray:
    """What a SEG says of the series in a folder."""
    return np.asanyarray(read_segments(path, labels, asked, read_series(scan), scan).dataobj)


def change(path: Path, **tags: Any) -> None:
    """Set tags; None removes one."""
    dataset = pydicom.dcmread(path)
    for tag, value in tags.items():
        if value is None:
            delattr(dataset, tag)
        else:
            setattr(dataset, tag, value)
    dataset.save_as(path)
