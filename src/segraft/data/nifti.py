"""NIfTI files in and out: read whole and checked, written on the grid of another."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from segraft.atomic import replacing
from segraft.data.dicom_files import holds_series, is_dicom
from segraft.errors import SegraftError

SUFFIXES = (".nii", ".nii.gz")
_GRID_TOLERANCE = 1e-3  # per entry of the affine (mm, mm per voxel): room for float32 headers
_GZIP_MAGIC = b"\x1f\x8b"


def load_nifti(path: str | Path, *, what: str = "image", channels: Sequence[str] = ()) -> nib.Nifti1Image:
    """Read a NIfTI file whole; trailing axes of size 1 are dropped.

    Args:
        path: a `.nii` or `.nii.gz` file (NIfTI-1 or NIfTI-2).
        what: what the file is, for messages.
        channels: names of the channels that its last axis holds, where there are several.

    Returns:
        The image with its data [X, Y, Z], with several channels [X, Y, Z, C], in memory, in the file's own type (scaled
        if the header says so).

    Raises:
        SegraftError: the file is missing, damaged, cut short, not NIfTI, not 3D (or of another number of channels), or
            its affine is singular.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw.startswith(_GZIP_MAGIC):
            raw = gzip.decompress(raw)  # to the last byte, so a cut or damaged file shows here
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SegraftError(f"the {what} {path} is damaged or cut short ({error}): copy it again.") from error
    except OSError as error:
        raise SegraftError(f"the {what} {path} cannot be read ({error.strerror}): correct the path.") from error
    kind = nib.Nifti2Image if nib.Nifti2Header.may_contain_header(raw[:540]) else nib.Nifti1Image
    if not kind.header_class.may_contain_header(raw[:540]):
        raise SegraftError(f"the {what} {path} is not a NIfTI file: convert it to .nii.gz.")
    try:
        with np.errstate(invalid="ignore"):  # an infinite voxel size shows in the affine below
            image = kind.from_bytes(raw)
            data = np.asanyarray(image.dataobj)
    except (ImageFileError, HeaderDataError) as error:
        raise SegraftError(f"the {what} {path} is not a NIfTI file ({error}): convert it to .nii.gz.") from error
    except (OSError, ValueError, OverflowError, MemoryError) as error:  # fewer bytes than the header promises
        raise SegraftError(f"the {what} {path} is damaged or cut short ({error}): copy it again.") from error
    data = _four_axes(data, path, what, channels) if len(channels) > 1 else _three_axes(data, path, what)
    affine = np.asarray(image.affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < np.finfo(np.float32).tiny:
        raise SegraftError(f"the {what} {path} has a singular affine: correct its voxel sizes and orientation.")
    return kind(data, affine, image.header)


def ends_in(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a file is named with one of these endings, in upper or lower case."""
    return path.name.lower().endswith(endings)


def holds_several(path: Path) -> bool:
    """Whether a NIfTI file has more than one volume, by its header; False for what is none."""
    try:
        return path.is_file() and math.prod(nib.load(path).shape[3:]) > 1
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error):
        return False


def same_grid(a: nib.Nifti1Image, b: nib.Nifti1Image) -> bool:
    """Whether two images have the same shape, and affines equal within 0.001 (mm, or mm per voxel)."""
    return bool(a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=_GRID_TOLERANCE))


def require_same_grid(
    label: nib.Nifti1Image, path: Path, image: nib.Nifti1Image, scan: Path, *, cure: str | None = None
) -> None:
    """Refuse a label on another grid than its image; the paths of both, and what to do, are for the message.

    Raises:
        SegraftError: shapes or positions differ.
    """
    if same_grid(image, label):
        return
    where = "shapes" if image.shape != label.shape else "positions, of shape"
    raise SegraftError(
        f"the label {path} and its image {scan} lie on different grids ({where} {label.shape} and {image.shape}): "
        f"{cure or 'resample the image onto the grid of the label, or the label onto that of the image'} (labels by "
        "nearest neighbour)."
    )


def write_mask(mask: NDArray[Any], like: nib.Nifti1Image, path: str | Path) -> None:
    """Write a mask on the grid of `like`: same affine, qform and sform codes, voxel sizes and units.

    The type is uint8, or uint16 where a value exceeds 255. Header extensions of `like` are left behind: they
    may hold the patient's data.

    Args:
        mask: [X, Y, Z] label values, whole numbers in 0…65535.
        like: the scan that the mask belongs to.
        path: a `.nii` or `.nii.gz` file.

    Raises:
        SegraftError: another file ending, another shape than `like`, values that a mask cannot hold, or a path
            that cannot be written.
    """
    path = Path(path)
    if not ends_in(path, SUFFIXES):
        raise SegraftError(f"{path} cannot be a mask file: let its name end in .nii or .nii.gz.")
    if mask.shape != like.shape:
        raise SegraftError(f"the mask for {path} has shape {mask.shape}, its scan {like.shape}: they must agree.")
    largest = np.iinfo(np.uint16).max
    if mask.size and (mask.min() < 0 or mask.max() > largest or not np.array_equal(mask, np.rint(mask))):
        raise SegraftError(f"the mask for {path} holds values other than whole numbers in 0…{largest}: round it.")
    dtype = np.uint16 if mask.size and mask.max() > np.iinfo(np.uint8).max else np.uint8
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = 0  # a display range meant for the scan
    header.extensions.clear()
    image = type(like)(mask.astype(dtype), like.affine, header)
    with replacing(path) as aside:
        lower = aside.with_name(aside.name.lower())  # as nibabel writes `.nii.gz` where it is asked for `.Nii.gz`
        try:
            nib.save(image, lower)
            lower.replace(aside)
        except OSError:
            lower.unlink(missing_ok=True)
            raise


def list_scans(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, folders of a DICOM series too; other folders replaced by the scans in them.

    Those are its `.nii` and `.nii.gz` files and its folders that hold a DICOM series, sorted, hidden ones left out.

    Raises:
        SegraftError: a path that does not exist; a folder without scans, or with a folder that is none but holds some.
    """
    scans: list[Path] = []
    for path in map(Path, paths):
        if path.is_file() or (path.is_dir() and holds_series(path)):
            scans.append(path)
        elif path.is_dir():
            found = [inside for inside in _shown(path) if _is_scan(inside)]
            for inside in (each for each in _shown(path) if each.is_dir() and each not in found):
                if deeper := _scan_below(inside):
                    raise SegraftError(
                        f"{inside} is no scan, but holds DICOM deeper down ({deeper}): give the folders that hold the "
                        "series themselves, or move it out."
                    )
            if not found:
                raise SegraftError(
                    f"the folder {path} holds no .nii or .nii.gz files and no DICOM series: give one that does."
                )
            scans += found
        else:
            raise SegraftError(f"{path} does not exist: give a scan or a folder of scans.")
    return scans


def _is_scan(path: Path) -> bool:
    return holds_series(path) if path.is_dir() else path.is_file() and ends_in(path, SUFFIXES)


def _scan_below(folder: Path) -> Path | None:
    """A DICOM file somewhere in a folder; NIfTI files in it may be masks of an earlier run."""
    for path in _shown(folder):
        if path.is_dir() and not path.is_symlink():
            if found := _scan_below(path):
                return found
        elif path.is_file() and is_dicom(path):
            return path
    return None


def _shown(folder: Path) -> list[Path]:
    """What is in a folder, hidden files and folders left out, sorted."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise SegraftError(f"the folder {folder} cannot be read ({error.strerror}): correct the path.") from error


def _three_axes(data: NDArray[Any], path: Path, what: str) -> NDArray[Any]:
    shape = data.shape
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        several = "split it into one file per volume, or name its channels where the cohort is described"
        cure = several if data.ndim > 3 else "store it as a volume"
        raise SegraftError(f"the {what} {path} has shape {shape} where three axes are expected: {cure}.")
    return _of_numbers(data, path, what)


def _four_axes(data: NDArray[Any], path: Path, what: str, channels: Sequence[str]) -> NDArray[Any]:
    """[X, Y, Z, C]; NIfTI's own place for several values per voxel is the fifth axis, behind one time."""
    shape = data.shape
    if data.ndim == 5 and shape[3] == 1:
        data = data[:, :, :, 0]
    if data.ndim != 4 or data.shape[-1] != len(channels):
        raise SegraftError(
            f"the {what} {path} has shape {shape} where the {len(channels)} channels {', '.join(channels)} are "
            "expected as a fourth axis: store them so, or as one file per channel."
        )
    return _of_numbers(data, path, what)


def _of_numbers(data: NDArray[Any], path: Path, what: str) -> NDArray[Any]:
    if 0 in data.shape:
        raise SegraftError(f"the {what} {path} has shape {data.shape}, no voxels at all: export it again.")
    if data.dtype.names is not None or np.iscomplexobj(data):
        raise SegraftError(f"the {what} {path} holds {data.dtype} voxels: export one number per voxel.")
    return data
