"""Reading a scan, however it is stored: a NIfTI file, or a folder of one DICOM series."""

from pathlib import Path

import nibabel as nib

from segraft.data.dicom import read_series
from segraft.data.dicom_files import holds_series, is_dicom
from segraft.data.nifti import SUFFIXES, ends_in, load_nifti
from segraft.errors import SegraftError


def load_scan(path: str | Path) -> nib.Nifti1Image:
    """Read a scan whole.

    Args:
        path: a `.nii` or `.nii.gz` file, or a folder of one DICOM series (needs `segraft[dicom]`).

    Returns:
        The image with its data [X, Y, Z] in memory; HU for CT from DICOM.

    Raises:
        SegraftError: what `load_nifti` or `read_series` refuses; a folder without DICOM files; one DICOM file.
    """
    path = Path(path)
    if path.is_dir():
        if not holds_series(path):
            raise SegraftError(f"the image {path} is a folder without DICOM files: give a scan or one DICOM series.")
        return read_series(path)
    if path.is_file() and is_dicom(path):
        raise SegraftError(f"the image {path} is a single DICOM file: give the folder of its series.")
    return load_nifti(path)


def mask_name(scan: Path) -> str:
    """The file name of a scan's mask: the scan's own, for a folder with `.nii.gz` added.

    Raises:
        SegraftError: a file that is not named as a NIfTI file.
    """
    if scan.is_dir():
        return f"{scan.resolve().name}.nii.gz"
    if not ends_in(scan, SUFFIXES):
        raise SegraftError(f"{scan} is not named as a NIfTI file, and its mask would be: name it .nii or .nii.gz.")
    return scan.name
