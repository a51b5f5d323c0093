"""Where the slices of a DICOM series lie, and whether they are one volume."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segraft.data.dicom_slices import COSINE_TOLERANCE, Slice, numbers
from segraft.errors import SegraftError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SMALLEST_STEP_MM = 1e-3  # closer slices lie at one place
_SPACING_SHARE, _SPACING_MM = 0.01, 0.01  # how far a slice may be off, whichever is more
_LARGEST_TILT_DEG = 0.1


def check_alike(folder: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices that are not of one volume.

    Raises:
        SegraftError: several series; other sizes, pixel spacings or directions.
    """
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


def stacked(folder: Path, slices: Sequence[Slice]) -> tuple[NDArray[np.float64], list[Slice]]:
    """The affine (voxel to RAS+ mm) of the slices, and the slices in order.

    Raises:
        SegraftError: gaps, duplicates, or a tilted gantry.
    """
    normal = np.cross(slices[0].along_row, slices[0].along_column)
    ordered = sorted(slices, key=lambda each: float(each.position @ normal))
    first = ordered[0]  # whose directions are the volume's, whatever its file is called
    normal = np.cross(first.along_row, first.along_column)
    positions = np.stack([each.position for each in ordered])
    step = normal * _thickness(first) if len(slices) == 1 else _step(folder, ordered, positions, normal)
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns): the column index moves along the row by the second.
    affine[:3, 0] = first.along_row * first.spacing[1]
    affine[:3, 1] = first.along_column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return LPS_TO_RAS @ affine, ordered


def _thickness(alone: Slice) -> float:
    tag = "SpacingBetweenSlices" if alone.dataset.get("SpacingBetweenSlices") else "SliceThickness"
    thickness = float(numbers(alone.path, alone.dataset, tag, 1)[0])
    if not thickness > 0:
        raise SegraftError(f"the DICOM file {alone.path} has a {tag} that is not above 0: export it again.")
    return thickness


def _step(
    folder: Path, ordered: Sequence[Slice], positions: NDArray[np.float64], normal: NDArray[np.float64]
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
