"""The frames of a DICOM SEG on the grid of a scan."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segraft.data.dicom_geometry import LPS_TO_RAS
from segraft.errors import SegraftError

if TYPE_CHECKING:
    from pydicom import Dataset

DAMAGED = (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)
"""What pydicom and highdicom raise of files that break the rules."""

_TOLERANCE = 0.1  # of a voxel's edge, anywhere in a frame
_SAME_PLACE_MM = 1e-3
_BITS = {"BINARY": (1,), "FRACTIONAL": (8,), "LABELMAP": (8, 16)}
"""Types of SEG -> Bits Allocated."""


def require_all_frames(path: Path, dataset: "Dataset") -> None:
    """Refuse a SEG whose frames, their functional groups and their pixels are not of one number and size.

    Args:
        path: of the SEG, for messages.
        dataset: as pydicom reads it.

    Raises:
        SegraftError: groups are missing, or left over; a type that its pixels are not of; too few or too many pixels
            that are not compressed.
    """
    frames, rows, columns = int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns)
    groups = len(dataset.PerFrameFunctionalGroupsSequence)
    if groups != frames:
        raise SegraftError(f"the DICOM SEG {path} says of {groups} of {frames} frames where they lie: export it again.")
    kind, bits = str(dataset.get("SegmentationType")), int(dataset.BitsAllocated)
    if bits not in _BITS.get(kind, ()):
        raise SegraftError(
            f"the DICOM SEG {path} is of type {kind} with {bits} as its Bits Allocated, which no SEG is: export it "
            "again."
        )
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    needed = (frames * rows * columns * bits + 7) // 8
    if (there := len(dataset.PixelData)) not in (needed, needed + needed % 2):
        raise SegraftError(
            f"the DICOM SEG {path} has {there} bytes of pixels, and {frames} frames of {rows} rows and {columns} "
            f"columns are {needed}: export it again, or copy it again."
        )


def frame_voxels(
    path: Path, segmentation: "Dataset", image: nib.Nifti1Image, scan: Path, *, refers: bool
) -> dict[int, NDArray[np.int64]]:
    """Where the segments are in a scan, by their numbers.

    A frame must lie on voxels of the scan, its rows and columns along two of the scan's axes, in any direction.

    Args:
        path: of the SEG, for messages.
        segmentation: as highdicom reads it.
        image: the scan, for its grid.
        scan: where it is, for messages.
        refers: whether the SEG refers to the scan's own series.

    Returns:
        Segment number -> flat indices of its voxels, in no order; of segments without frames nothing.

    Raises:
        SegraftError: frames that cannot be read or do not fit the scan; fractions.
    """
    found: dict[int, list[NDArray[np.int64]]] = {}
    try:
        shared = segmentation.SharedFunctionalGroupsSequence[0]
        apart = None if refers else _apart(path, segmentation)
        for place, groups in enumerate(segmentation.PerFrameFunctionalGroupsSequence):
            frame = segmentation.get_stored_frame(place, as_index=True)
            origin, steps = _on_grid(path, _Groups(groups, shared), frame.shape, image, scan, apart)
            for number, marked in _planes(path, segmentation, _Groups(groups, shared), frame):
                rows, columns = np.nonzero(marked)
                voxels = origin[:, None] + steps[:, :1] * columns + steps[:, 1:] * rows
                _require_inside(path, place, voxels, image, scan)
                found.setdefault(number, []).append(np.ravel_multi_index(tuple(voxels), image.shape))
    except SegraftError:
        raise
    except (*DAMAGED, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise SegraftError(f"the frames of the DICOM SEG {path} cannot be read ({reason}): export it again.") from error
    return {number: np.concatenate(each) for number, each in found.items()}


class _Groups:
    """The functional groups of a frame, of which some are shared by all."""

    def __init__(self, own: "Dataset", shared: "Dataset") -> None:
        self.own, self.shared = own, shared

    def item(self, name: str) -> "Dataset":
        for groups in (self.own, self.shared):
            if groups.get(name):
                found: Dataset = groups[name].value[0]
                return found
        raise ValueError(f"a frame has no {name}")


def _apart(path: Path, segmentation: "Dataset") -> float:
    """How far slices are apart (mm): as is said, else as frames lie, else as thick as they are.

    Raises:
        SegraftError: nothing says so.
    """
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    frames = [_Groups(own, shared) for own in segmentation.PerFrameFunctionalGroupsSequence]
    measures = frames[0].item("PixelMeasuresSequence")
    if said := abs(float(measures.get("SpacingBetweenSlices") or 0)):
        return said
    cosines = np.array(frames[0].item("PlaneOrientationSequence").ImageOrientationPatient, dtype=float).reshape(2, 3)
    positions = np.array([each.item("PlanePositionSequence").ImagePositionPatient for each in frames], dtype=float)
    distances = np.diff(np.sort(positions @ np.cross(*cosines)))
    if (distances := distances[distances > _SAME_PLACE_MM]).size:
        return float(distances.min())
    if thickness := abs(float(measures.get("SliceThickness") or 0)):
        return thickness
    raise SegraftError(
        f"the DICOM SEG {path} refers to no series that is its image, and says nowhere how thick its slices are: give "
        "the series it was drawn on, or export it again."
    )


def _planes(
    path: Path, segmentation: "Dataset", groups: _Groups, frame: NDArray[Any]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The segments in a frame [rows, columns]."""
    if segmentation.SegmentationType == "LABELMAP":
        for number in np.unique(frame[frame != int(segmentation.get("PixelPaddingValue") or 0)]):
            yield int(number), frame == number
        return
    if segmentation.SegmentationType == "FRACTIONAL":
        largest = int(segmentation.MaximumFractionalValue)
        if not np.isin(frame, (0, largest)).all():
            raise SegraftError(
                f"the DICOM SEG {path} holds fractions (SegmentationType FRACTIONAL), which are no labels: threshold "
                "it, and store it as BINARY."
            )
    yield int(groups.item("SegmentIdentificationSequence").ReferencedSegmentNumber), frame != 0


def _on_grid(
    path: Path,
    groups: _Groups,
    size: tuple[int, ...],
    image: nib.Nifti1Image,
    scan: Path,
    apart: float | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The voxel of a frame's first pixel [3], and the steps to the next column and the next row [3, 2].

    `apart` is how far slices must be apart (mm), None where the scan is known to be theirs.
    """
    position = np.array(groups.item("PlanePositionSequence").ImagePositionPatient, dtype=float)
    cosines = np.array(groups.item("PlaneOrientationSequence").ImageOrientationPatient, dtype=float).reshape(2, 3)
    measures = groups.item("PixelMeasuresSequence")
    between_rows, between_columns = (float(mm) for mm in measures.PixelSpacing)
    to_voxels = np.linalg.inv(image.affine) @ LPS_TO_RAS
    origin = to_voxels[:3, :3] @ position + to_voxels[:3, 3]
    steps = to_voxels[:3, :3] @ np.stack([cosines[0] * between_columns, cosines[1] * between_rows], axis=1)
    near, whole = np.rint(origin), np.rint(steps)
    corners = np.array([[column, row] for row in (0, size[0] - 1) for column in (0, size[1] - 1)]).T
    off = np.abs((origin - near)[:, None] + (steps - whole) @ corners).max()
    fits = off <= _TOLERANCE and (np.abs(whole).sum(axis=0) == 1).all() and whole[:, 0] @ whole[:, 1] == 0
    if fits and apart is not None:  # else thick slices would lie on some of the thin ones
        across = np.linalg.norm(to_voxels[:3, :3] @ np.cross(*cosines)) * apart
        fits = abs(across - 1) <= _TOLERANCE
    if not fits:
        raise SegraftError(
            f"the frames of {path} do not lie on the voxels of its image {scan}: resample it onto the image, or give "
            "the image it was drawn on."
        )
    return near.astype(np.int64), whole.astype(np.int64)


def _require_inside(path: Path, place: int, voxels: NDArray[np.int64], image: nib.Nifti1Image, scan: Path) -> None:
    if ((voxels < 0) | (voxels >= np.array(image.shape)[:, None])).any():
        raise SegraftError(
            f"frame {place + 1} of {path} marks voxels outside its image {scan}: give the whole image it was drawn on."
        )
