"""A folder of one DICOM series as an image in RAS+ millimetres."""

import functools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segraft.errors import SegraftError

if TYPE_CHECKING:
    from pydicom import Dataset

_log = logging.getLogger(__name__)
_MAGIC_AT, _MAGIC = 128, b"DICM"
SEG_SUFFIX = ".dcm"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ASIDE_NAMES = {"DICOMDIR", "LICENSE", "README", "LOCKFILE", "VERSION"}
_ASIDE_SUFFIXES = {
    ".txt",
    ".md",
    ".json",
    ".xml",
    ".csv",
    ".html",
    ".pdf",
    ".jpg",
    ".jpeg",
    ".png",
    ".ini",
    ".inf",
    ".db",
}
_LARGEST_ATTRIBUTE = 65_536  # bytes of what is no pixels
_SMALLEST_STEP_MM = 1e-3  # closer slices lie at one place
_SPACING_SHARE, _SPACING_MM = 0.01, 0.01  # how far a slice may be off, whichever is more
_LARGEST_TILT_DEG = 0.1
COSINE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Slice:
    """What one file says of itself; lengths in mm, in DICOM's patient axes (left, posterior, superior)."""

    path: Path
    dataset: "Dataset"
    series: str
    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float]  # between rows, between columns
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    position: NDArray[np.float64]


def holds_series(folder: Path) -> bool:
    """Whether a folder has DICOM files in it (folders inside it do not count)."""
    return any(is_dicom(file) for file in folder.iterdir() if file.is_file() and file.name != "DICOMDIR")


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
        planes = [_hounsfield(each).T for each in ordered]
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


def load_pydicom() -> ModuleType:
    """The library, which only those who have DICOM need.

    Raises:
        SegraftError: it is not installed.
    """
    try:
        import pydicom
        import pydicom.pixels
        import pydicom.uid
    except ImportError as error:
        raise SegraftError(f"DICOM needs pydicom, which is not installed ({error}): install segraft[dicom].") from error
    return pydicom


def load_highdicom() -> ModuleType:
    """What writes and reads DICOM SEG, which only those who have DICOM need.

    Raises:
        SegraftError: it is not installed.
    """
    load_pydicom()
    try:
        import highdicom
    except ImportError as error:
        raise SegraftError(
            f"DICOM SEG needs highdicom, which is not installed ({error}): pip install 'segraft[dicom]'."
        ) from error
    return highdicom


@contextmanager
def warnings_logged(folder: Path) -> Iterator[None]:
    """Log what is warned of inside, so that it neither fails where warnings are errors nor is lost.

    pydicom warns where a value breaks the rules of its type but can be read (identifiers with letters, say), and where
    pixel data are longer than they should be or contradict their description.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for message in dict.fromkeys(" ".join(str(each.message).split()) for each in caught):
                log_once(folder, message)


@functools.cache
def log_once(path: Path, message: str) -> None:
    """Warn of something in a file or folder that may be read many times."""
    _log.warning("%s: %s", path, message)


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM files do (PS3.10, section 7.1)."""
    try:
        with file.open("rb") as stream:
            return stream.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
    except OSError as error:
        raise SegraftError(f"{file} cannot be read ({error.strerror}): correct the path or its permissions.") from error


def _files(folder: Path) -> list[Path]:
    found = []
    try:
        inside = sorted(file for file in folder.iterdir() if not file.is_dir())
    except OSError as error:
        raise SegraftError(f"the folder {folder} cannot be read ({error.strerror}): correct the path.") from error
    for file in inside:
        if file.name.startswith(".") or file.name in _ASIDE_NAMES or file.suffix.lower() in _ASIDE_SUFFIXES:
            continue
        if not is_dicom(file):
            raise SegraftError(f"{file} is not a DICOM file (no DICM at byte {_MAGIC_AT}): move it out of the folder.")
        found.append(file)
    if not found:
        raise SegraftError(f"the folder {folder} holds no DICOM files: give the folder of one series.")
    return found


def _volume(folder: Path, *, defer_size: int | None = None) -> tuple[NDArray[np.float64], list[_Slice]]:
    """The affine and the slices in order; elements of more bytes than `defer_size` are not read."""
    pydicom = load_pydicom()
    slices = [_slice(path, _dataset(path, pydicom, defer_size)) for path in _files(folder)]
    _check_alike(folder, slices)
    return _stacked(folder, slices)


def _dataset(path: Path, pydicom: ModuleType, defer_size: int | None) -> "Dataset":
    try:
        dataset: Dataset = pydicom.dcmread(path, defer_size=defer_size)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise SegraftError(f"the DICOM file {path} is damaged or cut short ({error}): copy it again.") from error
    return dataset


def _slice(path: Path, dataset: "Dataset") -> _Slice:
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
    orientation = _numbers(path, dataset, "ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=COSINE_TOLERANCE):
        raise SegraftError(
            f"the DICOM file {path} has rows and columns (ImageOrientationPatient) that are not perpendicular unit "
            "vectors: export the series again."
        )
    rows, columns = (int(_numbers(path, dataset, tag, 1)[0]) for tag in ("Rows", "Columns"))
    between_rows, between_columns = (float(mm) for mm in _numbers(path, dataset, "PixelSpacing", 2))
    if not min(between_rows, between_columns) > 0:
        raise SegraftError(f"the DICOM file {path} has a PixelSpacing that is not above 0: export the series again.")
    return _Slice(
        path,
        dataset,
        series=str(dataset.get("SeriesInstanceUID") or ""),
        size=(rows, columns),
        spacing=(between_rows, between_columns),
        along_row=orientation[0],
        along_column=orientation[1],
        position=_numbers(path, dataset, "ImagePositionPatient", 3),
    )


def _check_hounsfield(path: Path, dataset: "Dataset") -> None:
    for tag in ("RescaleSlope", "RescaleIntercept"):
        _numbers(path, dataset, tag, 1)
    unit = dataset.get("RescaleType") or "HU"
    if unit not in {"HU", "US"}:  # US: unspecified
        raise SegraftError(f"the DICOM file {path} holds values in {unit}, not HU: export the plain CT series.")


def _count(path: Path, dataset: "Dataset", tag: str) -> int:
    """1 where the tag is not there."""
    return int(_numbers(path, dataset, tag, 1)[0]) if dataset.get(tag) else 1


def _numbers(path: Path, dataset: "Dataset", tag: str, count: int) -> NDArray[np.float64]:
    try:
        value: Any = dataset.get(tag)
        numbers = np.atleast_1d(np.asarray([] if value is None or value == "" else value, dtype=np.float64))
    except (ValueError, TypeError, OverflowError) as error:
        raise SegraftError(f"the DICOM file {path} has an unreadable {tag} ({error}): export it again.") from error
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        have = f"{numbers.size} of {count} numbers in" if numbers.size else "no"
        raise SegraftError(f"the DICOM file {path} has {have} {tag}: export the series again with all its tags.")
    return numbers


def _check_alike(folder: Path, slices: Sequence[_Slice]) -> None:
    first = slices[0]
    for other in slices[1:]:
        if other.series != first.series:
            raise SegraftError(
                f"the folder {folder} mixes the series {first.series or '(none)'} ({first.path.name}) and "
                f"{other.series or '(none)'} ({other.path.name}): keep one series per folder."
            )
        alike = {
            "sizes": other.size == first.size,
            "pixel spacings": np.allclose(other.spacing, first.spacing, rtol=1e-4, atol=0),
            "orientations": np.allclose(
                (other.along_row, other.along_column), (first.along_row, first.along_column), atol=COSINE_TOLERANCE
            ),
        }
        for what, equal in alike.items():
            if not equal:
                raise SegraftError(
                    f"the slices {first.path.name} and {other.path.name} of {folder} have different {what}: move out "
                    "what is not of the volume, such as an overview image."
                )


def _stacked(folder: Path, slices: Sequence[_Slice]) -> tuple[NDArray[np.float64], list[_Slice]]:
    """The affine (voxel to RAS+ mm) of the slices, and the slices in order."""
    first = slices[0]
    normal = np.cross(first.along_row, first.along_column)
    ordered = sorted(slices, key=lambda each: float(each.position @ normal))
    positions = np.stack([each.position for each in ordered])
    step = normal * _thickness(first) if len(slices) == 1 else _step(folder, ordered, positions, normal)
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns): the column index moves along the row by the second.
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return LPS_TO_RAS @ affine, ordered


def _thickness(alone: _Slice) -> float:
    tag = "SpacingBetweenSlices" if alone.dataset.get("SpacingBetweenSlices") else "SliceThickness"
    thickness = float(_numbers(alone.path, alone.dataset, tag, 1)[0])
    if not thickness > 0:
        raise SegraftError(f"the DICOM file {alone.path} has a {tag} that is not above 0: export it again.")
    return thickness


def _step(
    folder: Path, ordered: Sequence[_Slice], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """From one slice to the next (mm, [3]), the same all through."""
    distances = np.diff(positions @ normal)
    usual = float(np.median(distances))
    tolerance = max(_SPACING_SHARE * usual, _SPACING_MM)
    for k, distance in enumerate(distances):
        pair = f"{ordered[k].path.name} and {ordered[k + 1].path.name} of {folder}"
        if distance < _SMALLEST_STEP_MM:
            raise SegraftError(f"the slices {pair} lie at the same place: keep one of them.")
        if abs(distance - usual) > tolerance:
            raise SegraftError(
                f"the slices {pair} lie {distance:g} mm apart, the others {usual:g} mm: add the missing slices, or "
                "resample the series to even distances."
            )
    steps = len(ordered) - 1
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / steps
    along = float(step @ normal)
    tilt = math.degrees(math.atan2(float(np.linalg.norm(step - along * normal)), along))
    if tilt > _LARGEST_TILT_DEG:
        raise SegraftError(
            f"the series {folder} was taken with a gantry tilted by {tilt:.1f}°, which shifts its slices sideways: "
            "convert it with dcm2niix, which corrects the tilt, and give that NIfTI file."
        )
    straight = positions[0] + np.arange(steps + 1)[:, None] * step
    off = np.abs(positions - straight).max(axis=1)
    if off.max() > tolerance:
        worst = int(off.argmax())
        raise SegraftError(
            f"the slice {ordered[worst].path} lies {off[worst]:.3g} mm beside the line of the others: export the "
            "series again as one volume."
        )
    return step


def _hounsfield(each: _Slice) -> NDArray[Any]:
    """Rescaled intensities [rows, columns]: int16 if exact, else float32."""
    from pydicom.pixels.processing import apply_modality_lut

    _check_decoder(each)
    try:
        values = np.asarray(apply_modality_lut(each.dataset.pixel_array, each.dataset), dtype=np.float64)
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError, OSError) as error:
        raise SegraftError(f"the pixels of {each.path} cannot be read ({error}): copy or export it again.") from error
    if values.shape != each.size:
        raise SegraftError(f"the pixels of {each.path} are no single plane ({values.shape}): export it again.")
    whole = np.iinfo(np.int16)
    if values.min() >= whole.min and values.max() <= whole.max and np.array_equal(values, np.rint(values)):
        return values.astype(np.int16)
    return values.astype(np.float32)


def _check_decoder(each: _Slice) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = each.dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise SegraftError(
            f"{each.path} is stored as {syntax.name}, which is no way to store CT: export it uncompressed."
        ) from error
    if not decoder.is_available:
        needed = "; or ".join(decoder.missing_dependencies)
        raise SegraftError(
            f"{each.path} is compressed as {syntax.name}, and no decoder for it is installed ({needed}): install one "
            "of these, or export the series uncompressed."
        )
