"""Moving voxel values from one grid to another through their affines."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from numpy.typing import NDArray

_WHOLE_VOXEL_TOLERANCE = 1e-2  # of a voxel, anywhere on the grid: what float32 headers blur
_REACH = {"bilinear": 1.0 + 1e-3, "nearest": 0.5 + 1e-3}
"""How far beyond the outermost centres the outermost value holds, in voxels."""


def resample(
    values: torch.Tensor,
    affine: NDArray[np.float64],
    shape: Sequence[int],
    to_affine: NDArray[np.float64],
    *,
    mode: Literal["bilinear", "nearest"],
) -> torch.Tensor:
    """Sample `values` at the voxel centres of another grid.

    Where every target voxel centre is a source voxel centre (axes flipped, permuted or cropped), values are
    copied and come out bit for bit. Else they are interpolated. Beyond the outermost source centres the outermost value
    holds, for half a voxel ("nearest") or a whole one ("bilinear"), and the result is 0 further out.

    Args:
        values: [C, X, Y, Z].
        affine: [4, 4], voxel to mm, of `values`.
        shape: target grid (three axes).
        to_affine: [4, 4], voxel to mm, of the target grid.
        mode: "bilinear" (linear along all three axes) or "nearest".

    Returns:
        [C, *shape], float32, on the device of `values`.
    """
    between = np.linalg.inv(affine) @ to_affine  # target voxel to source voxel
    whole = np.rint(between)
    corners = _corners(shape)
    if _is_permutation(whole) and np.abs((between - whole) @ corners).max() < _WHOLE_VOXEL_TOLERANCE:
        return _copy(values.float(), shape, whole.astype(int))
    source = MetaTensor(values.float(), affine=torch.as_tensor(affine, dtype=torch.float64))
    sampler = SpatialResample(mode=mode, padding_mode="border", align_corners=False, dtype=torch.float32)
    sampled = sampler(source, dst_affine=torch.as_tensor(to_affine, dtype=torch.float64), spatial_size=tuple(shape))
    result: torch.Tensor = sampled.as_tensor()
    return result * _inside(values, shape, between, _REACH[mode]).to(result)


def _corners(shape: Sequence[int]) -> NDArray[np.float64]:
    """The eight corner voxels of a grid as columns of homogeneous coordinates, [4, 8]."""
    ends = np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")
    return np.stack([*(axis.ravel() for axis in ends), np.ones(8)]).astype(np.float64)


def _is_permutation(matrix: NDArray[np.float64]) -> bool:
    turns = np.abs(matrix[:3, :3])
    return bool((turns.sum(axis=0) == 1).all() and (turns.sum(axis=1) == 1).all())


def _copy(values: torch.Tensor, shape: Sequence[int], whole: NDArray[np.int_]) -> torch.Tensor:
    source_axes = [int(axis) for axis in np.abs(whole[:3, :3]).argmax(axis=0)]  # by target axis
    result = values.permute(0, *(axis + 1 for axis in source_axes))
    for target_axis, source_axis in enumerate(source_axes):
        places = whole[source_axis, target_axis] * np.arange(shape[target_axis]) + whole[source_axis, 3]
        outside = (places < 0) | (places >= values.shape[source_axis + 1])
        result = result.index_select(
            target_axis + 1, torch.as_tensor(np.where(outside, 0, places), device=values.device)
        )
        if outside.any():
            result.index_fill_(target_axis + 1, torch.as_tensor(np.flatnonzero(outside), device=values.device), 0)
    return result.contiguous()


def _inside(values: torch.Tensor, shape: Sequence[int], between: NDArray[np.float64], reach: float) -> torch.Tensor:
    """Which target voxel centres lie at most `reach` source voxels beyond the outermost source centres, [*shape] bool.

    A whole voxel for probabilities: resampling rounds the number of voxels, so the scan's own outermost centres can
    lie that far outside the resampled ones; dropped, the first and last slice of such a scan could not be segmented.
    """
    axes = [np.arange(size, dtype=np.float32) for size in shape]
    inside = np.ones(tuple(shape), dtype=bool)
    for row, size in zip(between[:3], values.shape[1:], strict=True):
        x, y, z = (np.float32(factor) * axis for factor, axis in zip(row[:3], axes, strict=True))
        place = x[:, None, None] + y[:, None] + z + np.float32(row[3])
        inside &= (place > -reach) & (place < size - 1 + reach)
    return torch.as_tensor(inside, device=values.device)
