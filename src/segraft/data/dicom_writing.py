"""A volume as a folder of one DICOM series, for tests and synthetic cohorts."""

import hashlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segraft.atomic import replacing
from segraft.data.dicom_geometry import LPS_TO_RAS
from segraft.data.dicom_slices import COSINE_TOLERANCE
from segraft.data.dicom_tools import load_pydicom
from segraft.errors import SegraftError

if TYPE_CHECKING:
    from pydicom import Dataset


def write_series(
    image: nib.Nifti1Image, folder: str | Path, *, patient: str = "anonymous", thickness_mm: float | None = None
) -> list[Path]:
    """Write a volume as CT Image Storage, one file per slice of the last axis.

    The same image and patient give the same files, identifiers included. `read_series` gives the same voxels at the
    same places; its slices are in reverse order if the axes of `image` are left-handed.

    Args:
        image: [X, Y, Z], whole HU within int16, with perpendicular axes.
        folder: receives `slice_0000.dcm` and so on; made if need be.
        patient: name and identifier.
        thickness_mm: slice thickness; the distance between slices if left out.

    Returns:
        The files.

    Raises:
        SegraftError: pydicom is not installed, other voxels or axes, or the folder holds other files.
    """
    folder, pydicom = Path(folder), load_pydicom()
    data = np.asanyarray(image.dataobj)
    whole = np.iinfo(np.int16)
    if data.ndim != 3 or not np.array_equal(data, np.rint(data)) or data.min() < whole.min or data.max() > whole.max:
        raise SegraftError(f"the image for {folder} is no volume of whole HU within int16: round it.")
    affine = LPS_TO_RAS @ image.affine
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / edges
    if not np.allclose(cosines.T @ cosines, np.eye(3), atol=COSINE_TOLERANCE):
        raise SegraftError(f"the image for {folder} has axes that are not perpendicular: resample it first.")
    files = [folder / f"slice_{k:04d}.dcm" for k in range(data.shape[2])]
    if folder.exists() and (others := {file.name for file in folder.iterdir()} - {file.name for file in files}):
        raise SegraftError(f"{folder} holds {min(others)}, which is not of this series: choose another folder.")
    content = hashlib.sha256(np.ascontiguousarray(data.astype(np.int16)).data)
    content.update(repr((data.shape, affine.tolist(), patient)).encode())
    for k, file in enumerate(files):
        dataset = _ct_slice(data[:, :, k].T.astype("<i2"), content.hexdigest(), k, pydicom)
        dataset.PatientName = dataset.PatientID = patient
        dataset.PixelSpacing = _decimals((edges[1], edges[0]), pydicom)
        dataset.ImageOrientationPatient = _decimals((*cosines[:, 0], *cosines[:, 1]), pydicom)
        dataset.ImagePositionPatient = _decimals(affine[:3, 3] + k * affine[:3, 2], pydicom)
        dataset.SliceThickness = _decimals([edges[2] if thickness_mm is None else thickness_mm], pydicom)[0]
        with replacing(file) as aside:
            dataset.save_as(aside, enforce_file_format=True)
    return files


def _decimals(values: Any, pydicom: ModuleType) -> list[Any]:
    """Numbers in at most 16 characters, as DICOM's decimal strings must be."""
    return [pydicom.valuerep.DSfloat(float(value), auto_format=True) for value in values]


def _ct_slice(pixels: NDArray[np.int16], content: str, k: int, pydicom: ModuleType) -> "Dataset":
    """A CT Image Storage object of `pixels` [rows, columns] without its place; identifiers come from `content`."""

    def uid(*parts: str) -> Any:
        return pydicom.uid.generate_uid(entropy_srcs=["segraft", content, *parts])

    dataset: Dataset = pydicom.Dataset()
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = uid("slice", str(k))
    dataset.file_meta = meta
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series")
    dataset.FrameOfReferenceUID = uid("frame")
    for empty in (
        *("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
        *("ReferringPhysicianName", "PositionReferenceIndicator", "KVP", "AcquisitionNumber"),
    ):
        setattr(dataset, empty, None)
    dataset.Modality, dataset.Manufacturer, dataset.PatientPosition = "CT", "Segraft", "HFS"
    dataset.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    dataset.SeriesNumber, dataset.InstanceNumber = 1, k + 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "HU"
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset
