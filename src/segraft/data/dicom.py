"""A folder of one DICOM series as an image in RAS+ millimetres."""

from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segraft.data.dicom_files import series_files
from segraft.data.dicom_geometry import check_alike, stacked
from segraft.data.dicom_pixels import hounsfield
from segraft.data.dicom_slices import Slice, read_slice
from segraft.data.dicom_tools import warnings_logged

if TYPE_CHECKING:
    from pydicom import Dataset

_LARGEST_ATTRIBUTE = 65_536  # bytes of what is no pixels


def read_series(folder: str | Path) -> nib.Nifti1Image:
    """Read a folder of one DICOM series as one volume.

    Slices are sorted by position along the normal of their plane. Voxel (i, j, k) is column i, row j of slice k, and
    lies where equation C.7.6.2.1-1 of the DICOM standard (PS3.3) puts it, with x and y negated (LPS to RAS). Distances
    between slices come from the positions, never from the slice thickness, so that volumes hold for overlapping slices
    too. Intensities are rescaled by each slice's own slope and intercept: HU in CT, whichever photometric
    interpretation says how to display them; padding outside the reconstructed circle keeps its value.

    A tilted gantry shifts each slice sideways against the last. It is refused: distances and volumes are computed
    from voxel edges, which such a grid does not have, and most viewers show a mask on it in the wrong place.

    Args:
        folder: DICOM files of one series. What is plainly something else (`DICOMDIR`, text, pictures, hidden files) is
            left out, and so are folders inside.

    Returns:
        [columns, rows, slices], int16 where every value is whole and fits, else float32. What pydicom warns of is
        logged, once per folder and message.

    Raises:
        SegraftError: pydicom or a decoder is not installed; a file is damaged or no single grey slice; a tag is
            missing; several series; slices of different sizes or directions; gaps, duplicates, or a tilted gantry.
    """
    folder = Path(folder)
    with warnings_logged(folder):
        affine, ordered = _volume(folder)
        planes = [hounsfield(each).T for each in ordered]
    image = nib.Nifti1Image(np.stack(planes, axis=-1), affine)
    image.header.set_xyzt_units("mm")
    return image


def read_sources(folder: str | Path) -> list["Dataset"]:
    """The files of a series in the order of the slices of `read_series`, their pixels left on the disk.

    Raises:
        SegraftError: as `read_series`, but for what only the pixels show.
    """
    folder = Path(folder)
    with warnings_logged(folder):
        return [each.dataset for each in _volume(folder, defer_size=_LARGEST_ATTRIBUTE)[1]]


def _volume(folder: Path, *, defer_size: int | None = None) -> tuple[NDArray[np.float64], list[Slice]]:
    """The affine and the slices in order; elements of more bytes than `defer_size` are not read."""
    slices = [read_slice(path, defer_size=defer_size) for path in series_files(folder)]
    check_alike(folder, slices)
    return stacked(folder, slices)
