"""The phantom cohort as a hospital sends scans: each image a DICOM series, its label a NIfTI file on its grid."""

from pathlib import Path

import nibabel as nib

from segraft.data.dicom_writing import write_series
from segraft.data.phantom import SHAPE, SPACING_MM, Task, Triple, write_cohort


def write_phantom_series(
    folder: Path,
    *,
    task: Task,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Triple = SPACING_MM,
) -> Path:
    """Write the heads of `write_cohort`, the same voxels, with every image as a folder of one DICOM series.

    Args:
        folder: receives `imagesTr/<case>/` with a file per slice, `labelsTr/` and `dataset.json`, written last.
        task: "traumatic" or "subarachnoid".
        patients: number of cases, one per patient.
        seed: 0 or more.
        shape: voxels along right, anterior and superior.
        spacing: voxel size in mm.

    Returns:
        The path of `dataset.json`, whose "image" entries are folders.

    Raises:
        SegraftError: as for `write_cohort`; pydicom is not installed; a folder holds files of another series.
    """
    return write_cohort(
        Path(folder), task=task, patients=patients, seed=seed, shape=shape, spacing=spacing, write_image=_write_folder
    )


def _write_folder(image: nib.Nifti1Image, folder: Path, name: str) -> Path:
    write_series(image, folder / name, patient=name)
    return folder / name
