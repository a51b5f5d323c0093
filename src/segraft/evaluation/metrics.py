"""How well a predicted mask agrees with an annotated one: overlap, surface distance, volume.

Masks are boolean arrays `[X, Y, Z]` of one grid; spacings are voxel edges in mm, in the order of the axes.

What an empty mask counts (here alone; the other modules rely on it):

| prediction | truth     | Dice | 95 % Hausdorff distance          |
|------------|-----------|------|----------------------------------|
| empty      | empty     | 1    | 0 mm                             |
| empty      | not empty | 0    | the grid's diagonal (corner to corner) |
| not empty  | empty     | 0    | the grid's diagonal (corner to corner) |

The diagonal is longer than any distance between two voxels, so a method that predicts nothing cannot improve
its mean by dropping out. The BraTS challenges count the same way: 373.13 mm on their grid of 240×240×155 mm.
"""

import math
from collections.abc import Sequence

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from segraft.data.strata import STRATA_ML
from segraft.errors import SegraftError

Mask = NDArray[np.bool_]

NO_VOLUME = "none"


def dice(prediction: Mask, truth: Mask) -> float:
    """Return the Dice score 2TP / (2TP + FN + FP), between 0 and 1; 1 if both masks are empty.

    Args:
        prediction: boolean array `[X, Y, Z]`.
        truth: boolean array of the same shape.

    Raises:
        SegraftError: the shapes differ.
        TypeError: a mask is not boolean.
    """
    _check_pair(prediction, truth)
    voxels = np.count_nonzero(prediction) + np.count_nonzero(truth)  # 2TP + FN + FP
    return 2 * np.count_nonzero(prediction & truth) / voxels if voxels else 1.0


def hausdorff95_mm(prediction: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float:
    """Return the symmetric 95 % Hausdorff distance in mm.

    That is the larger of two 95th percentiles: of the distances from the prediction's surface voxels to the
    nearest surface voxel of the truth, and the other way round. A voxel is of the surface if one of its face
    neighbours is outside the mask or outside the grid (MONAI's definition). An axis of one voxel has no
    neighbours to ask, so a slice `[X, Y, 1]` has an outline and is not surface all over.

    Args:
        prediction: boolean array `[X, Y, Z]`.
        truth: boolean array of the same shape.
        spacing_mm: voxel edge along each axis in mm.

    Raises:
        SegraftError: the shapes differ, or the spacing is not one positive number per axis.
        TypeError: a mask is not boolean.
    """
    _check_pair(prediction, truth)
    spacing = _checked_spacing(spacing_mm, prediction.ndim)
    shape = np.array(prediction.shape)
    if prediction.any() != truth.any():
        return float(np.linalg.norm(shape * spacing))
    if np.array_equal(prediction, truth):  # both empty among them
        return 0.0
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    flat = tuple(np.flatnonzero(shape == 1))
    ours, theirs = (_surface_mm(mask[box].squeeze(axis=flat), spacing[shape > 1]) for mask in (prediction, truth))
    there = KDTree(theirs).query(ours)[0]
    back = KDTree(ours).query(theirs)[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def volume_ml(mask: Mask, spacing_mm: Sequence[float]) -> float:
    """Return the volume of a boolean mask `[X, Y, Z]` in mL: voxels × thickness × width × height / 1000.

    Raises:
        SegraftError: the spacing is not one positive number per axis.
    """
    return float(np.count_nonzero(mask) * _checked_spacing(spacing_mm, mask.ndim).prod() / 1000)


def spacing_of(affine: ArrayLike) -> tuple[float, float, float]:
    """Return the voxel edges in mm of a 4×4 affine (voxel → world in mm): the lengths of its columns.

    Raises:
        SegraftError: not a 4×4 matrix with three columns of finite length above zero.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise SegraftError(f"An affine must be a 4×4 matrix, not {matrix.shape}: check the image's header.")
    x, y, z = (float(edge) for edge in _checked_spacing(voxel_sizes(matrix), 3))
    return x, y, z


def stratum(volume_ml: float) -> str:
    """Name the stratum of an annotated volume in mL: "(0, 25]" … "(100, 300]", "none" for 0, ">300" above.

    Raises:
        SegraftError: the volume is negative or not a number.
    """
    if not volume_ml >= 0:
        raise SegraftError(f"A volume of {volume_ml} mL cannot be: check the mask and its voxel spacing.")
    if volume_ml == 0:
        return NO_VOLUME
    return next((f"({low}, {high}]" for low, high in STRATA_ML if volume_ml <= high), f">{STRATA_ML[-1][1]}")


def strata() -> tuple[str, ...]:
    """Return every name that `stratum` gives, by growing volume."""
    return NO_VOLUME, *(stratum(high) for _, high in STRATA_ML), stratum(math.inf)


def _check_pair(prediction: Mask, truth: Mask) -> None:
    if prediction.dtype != np.bool_ or truth.dtype != np.bool_:
        raise TypeError(f"Masks must be boolean, not {prediction.dtype} and {truth.dtype}.")
    if prediction.shape != truth.shape:
        raise SegraftError(
            f"Prediction {prediction.shape} and truth {truth.shape} differ in shape: resample one to the other's grid."
        )


def _checked_spacing(spacing_mm: Sequence[float], axes: int) -> NDArray[np.float64]:
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (axes,) or not all(math.isfinite(edge) and edge > 0 for edge in spacing):
        raise SegraftError(
            f"The voxel spacing {spacing.tolist()} is not one positive length in mm for each of {axes} axes: "
            "check the image's header."
        )
    return spacing


def _surface_mm(mask: Mask, spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions in mm, `[N, axes]`, of the voxels that a face-wise erosion takes away."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing
