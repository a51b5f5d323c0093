"""What one file of a DICOM series says of itself, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segraft.data.dicom_tools import load_pydicom
from segraft.errors import SegraftError

if TYPE_CHECKING:
    from pydicom import Dataset

COSINE_TOLERANCE = 1e-3
SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage, Label Map Segmentation Storage."""


@dataclass(frozen=True)
class Slice:
    """What one file says of itself; lengths in mm, in DICOM's patient axes (left, posterior, superior)."""

    path: Path
    dataset: "Dataset"
    series: str
    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float]  # between rows, between columns
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    position: NDArray[np.float64]


def read_slice(path: Path, *, defer_size: int | None = None) -> Slice:
    """Read a file of a series.

    Args:
        path: of the file.
        defer_size: elements of more bytes are left on the disk.

    Raises:
        SegraftError: pydicom is not installed; a file that is damaged or no single grey slice; a tag is missing.
    """
    pydicom = load_pydicom()
    try:
        dataset: Dataset = pydicom.dcmread(path, defer_size=defer_size)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise SegraftError(f"the DICOM file {path} is damaged or cut short ({error}): copy it again.") from error
    return _checked(path, dataset)


def _checked(path: Path, dataset: "Dataset") -> Slice:
    if dataset.get("SOPClassUID") in SEG_CLASSES:
        raise SegraftError(
            f"the DICOM file {path} is a SEG, no slice of a scan: move it out of the folder, and give the series alone."
        )
    if "PixelData" not in dataset:
        kind = dataset.get("Modality") or "unknown kind"
        raise SegraftError(f"the DICOM file {path} ({kind}) holds no image: move it out of the folder.")
    if "PerFrameFunctionalGroupsSequence" in dataset or _count(path, dataset, "NumberOfFrames") > 1:
        raise SegraftError(
            f"the DICOM file {path} holds several frames (an enhanced object): export it as one file per slice, or "
            "convert it with dcm2niix."
        )
    photometric = dataset.get("PhotometricInterpretation")
    if _count(path, dataset, "SamplesPerPixel") != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise SegraftError(f"the DICOM file {path} is {photometric}, no grey image: move it out of the folder.")
    if dataset.get("Modality") == "CT":
        _check_hounsfield(path, dataset)
    orientation = numbers(path, dataset, "ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=COSINE_TOLERANCE):
        raise SegraftError(
            f"the DICOM file {path} has rows and columns (ImageOrientationPatient) that are not perpendicular unit "
            "vectors: export the series again."
        )
    rows, columns = (int(numbers(path, dataset, tag, 1)[0]) for tag in ("Rows", "Columns"))
    between_rows, between_columns = (float(mm) for mm in numbers(path, dataset, "PixelSpacing", 2))
    if not min(between_rows, between_columns) > 0:
        raise SegraftError(f"the DICOM file {path} has a PixelSpacing that is not above 0: export the series again.")
    return Slice(
        path,
        dataset,
        series=str(dataset.get("SeriesInstanceUID") or ""),
        size=(rows, columns),
        spacing=(between_rows, between_columns),
        along_row=orientation[0],
        along_column=orientation[1],
        position=numbers(path, dataset, "ImagePositionPatient", 3),
    )


def _check_hounsfield(path: Path, dataset: "Dataset") -> None:
    for tag in ("RescaleSlope", "RescaleIntercept"):
        numbers(path, dataset, tag, 1)
    unit = dataset.get("RescaleType") or "HU"
    if unit not in {"HU", "US"}:  # US: unspecified
        raise SegraftError(f"the DICOM file {path} holds values in {unit}, not HU: export the plain CT series.")


def _count(path: Path, dataset: "Dataset", tag: str) -> int:
    """1 where the tag is not there."""
    return int(numbers(path, dataset, tag, 1)[0]) if dataset.get(tag) else 1


def numbers(path: Path, dataset: "Dataset", tag: str, count: int) -> NDArray[np.float64]:
    """The finite numbers of a tag.

    Raises:
        SegraftError: there are others, or not that many.
    """
    try:
        value: Any = dataset.get(tag)
        found = np.atleast_1d(np.asarray([] if value is None or value == "" else value, dtype=np.float64))
    except (ValueError, TypeError, OverflowError) as error:
        raise SegraftError(f"the DICOM file {path} has an unreadable {tag} ({error}): export it again.") from error
    if found.shape != (count,) or not np.isfinite(found).all():
        have = f"{found.size} of {count} numbers in" if found.size else "no"
        raise SegraftError(f"the DICOM file {path} has {have} {tag}: export the series again with all its tags.")
    return found
