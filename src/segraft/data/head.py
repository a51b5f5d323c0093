"""Levelling head CTs: the turned head set upright, the neck taken away, one size in-plane.

Everything is settled from the skull: it is there in every head CT, it is the largest connected piece of bone, and
tables and head holders are not joined to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from segraft.data.resampling import resample
from segraft.errors import SegraftError

HEAD_SIZE = 512
"""Voxels along both in-plane axes of a levelled head (the haemorrhage paper's)."""

OUTSIDE_HU = -1024.0
BONE_HU, SOFT_HU = 200.0, (-50.0, 150.0)
_COARSE_MM = 2.0  # voxels are averaged up to about this before anything is measured
_UPPER_MM = 130.0  # of the skull: below that jaw and neck, which move against it
_ROUGH_MM, _FINE_MM = 6.0, 2.5  # smoothing of the bone, first and last
_WIDEST_DEG, _SMALLEST_DEG = 40.0, 0.5
_BRAIN_CM2 = 30.0  # what the skull must enclose in some slice
_FLOOR_SHARE, _FLOOR_MARGIN_MM = 0.2, 15.0
_SCALP_MM = 25.0

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: the shape, and [4, 4] from voxel to RAS+ mm."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def sample(self, image: nib.Nifti1Image, mode: Literal["bilinear", "nearest"] = "bilinear") -> nib.Nifti1Image:
        """A scan on this grid: float32, -1024 HU outside of it. Values are copied where voxel centres coincide."""
        values = torch.from_numpy(image.get_fdata(dtype=np.float32, caching="unchanged"))[None] - OUTSIDE_HU
        moved = resample(values, image.affine, self.shape, self.affine, mode=mode)[0] + OUTSIDE_HU
        return nib.Nifti1Image(moved.numpy(), self.affine)


@dataclass(frozen=True)
class Levelling:
    """How a head is levelled.

    Attributes:
        yaw: degrees about the long axis by which the head had turned, counter-clockwise seen from above.
        roll: degrees by which it leaned sideways, its right side up.
        turned: the whole head on level axes.
        grid: the same without the neck, `HEAD_SIZE` × `HEAD_SIZE` in-plane with the middle of the head in its middle.
        neck_slices: how many slices that leaves away below.
    """

    yaw: float
    roll: float
    turned: Grid
    grid: Grid
    neck_slices: int


@dataclass(frozen=True)
class _Coarse:
    """A scan in averaged voxels. Positions q are in mm from the scan's middle, along the scan's own axes.

    Attributes:
        hu: [X, Y, Z].
        skull: its largest connected piece of bone.
        to_voxel: [3, 4], from q to places in `hu`.
        axes: [3, 3], columns: the scan's axes (nearest to right, front, up) in RAS+.
        middle: of the scan, RAS+ mm.
    """

    hu: NDArray[np.float32]
    skull: Bools
    to_voxel: Floats
    axes: Floats
    middle: Floats

    def at(self, field: NDArray[Any], points: Floats, outside: float = 0.0) -> Floats:
        """Linear interpolation of `field` at `points` [3, ...] (q)."""
        origin = self.to_voxel[:, 3].reshape(3, *(1 for _ in points.shape[1:]))
        places = np.tensordot(self.to_voxel[:, :3], points, 1) + origin
        values: Floats = ndimage.map_coordinates(field, places, order=1, cval=outside)
        return values

    def positions(self, mask: Bools) -> Floats:
        """The q of the voxels of `mask`, [3, N]."""
        places = np.argwhere(mask).T - self.to_voxel[:, 3:]
        found: Floats = np.linalg.solve(self.to_voxel[:, :3], places)
        return found


def level_head(image: nib.Nifti1Image) -> Levelling:
    """Find how to set a head CT level.

    The plane of symmetry of the skull's upper 130 mm gives yaw and roll (each up to 40°): it is where the bone agrees
    best with its mirror image. The head is turned the shortest way that brings this plane upright, about the scan's own
    axes, so that slices along a tilted plane stay so; below 0.5° it is not turned, and voxels are copied. Pitch is
    left as it was taken: no symmetry shows it, and every measure of the skull's shape changes with how much of the
    head is in the scan.

    The neck is what lies more than 15 mm below the lowest slice in which bone encloses soft tissue of at least a fifth
    of the largest area enclosed in any slice. The cranial cavity narrows to less than that only in the last
    millimetres above the foramen magnum, vertebrae and jaw enclose far less, and a slice whose bone is open
    (a craniectomy) never ends the head while one below it is closed: rather too much is kept than too little.

    Args:
        image: a head CT in HU, any orientation.

    Returns:
        The grids; both keep the scan's voxel sizes along its axes nearest to right, front and up.

    Raises:
        SegraftError: nothing is found that could be a skull; a head turned by more than 40°; voxels so small that
            `HEAD_SIZE` of them do not cover the skull.
    """
    upright = nib.as_closest_canonical(image)
    coarse = _coarse(upright)
    yaw, roll, across = _symmetry(coarse)
    normal = _normal(yaw, roll)
    turn = np.cross([1.0, 0, 0], normal)
    angle = np.arccos(np.clip(normal[0], -1, 1))
    if np.degrees(angle) < _SMALLEST_DEG:
        axes = np.eye(3)
    else:
        axes = Rotation.from_rotvec(turn / np.linalg.norm(turn) * angle).as_matrix()
    skull = axes.T @ coarse.positions(coarse.skull)  # u: mm along the level axes
    floor = _floor(coarse, axes, skull)
    vault = skull[:, skull[2] > floor]
    sizes = voxel_sizes(upright.affine)
    middle = np.array([across, (vault[1].min() + vault[1].max()) / 2])
    reach = np.abs(vault[:2] - middle[:, None]).max(axis=1)
    if (reach > HEAD_SIZE / 2 * sizes[:2]).any():
        raise SegraftError(
            f"{HEAD_SIZE} voxels of {sizes[0]:.3g} × {sizes[1]:.3g} mm do not cover the head, which is "
            f"{2 * reach[0]:.0f} × {2 * reach[1]:.0f} mm: resample it to larger voxels first."
        )
    low, high = _extent(upright, coarse, axes)
    high[2] = min(high[2], skull[2].max() + _SCALP_MM)
    low[2] = max(low[2], skull[2].min() - sizes[2])
    cut = max(low[2], floor - _FLOOR_MARGIN_MM)
    starts = np.array([*(middle - (HEAD_SIZE - 1) / 2 * sizes[:2]), cut])
    ends = np.array([*(starts[:2] + (HEAD_SIZE - 1) * sizes[:2]), high[2]])
    turned, grid = (_grid(upright, coarse, axes, *each) for each in ((low, high), (starts, ends)))
    removed = turned.shape[2] - grid.shape[2]
    return Levelling(yaw=yaw, roll=roll, turned=turned, grid=grid, neck_slices=removed)


def _coarse(upright: nib.Nifti1Image) -> _Coarse:
    sizes = voxel_sizes(upright.affine)
    hu = upright.get_fdata(dtype=np.float32, caching="unchanged")
    blocks = np.clip(np.rint(_COARSE_MM / sizes).astype(int), 1, hu.shape)
    whole = [size // block * block for size, block in zip(hu.shape, blocks, strict=True)]
    hu = hu[: whole[0], : whole[1], : whole[2]]
    for axis, block in enumerate(blocks):
        shape = (*hu.shape[:axis], -1, block, *hu.shape[axis + 1 :])
        hu = np.asarray(hu.reshape(shape).mean(axis=axis + 1), dtype=np.float32)
    affine = np.asarray(upright.affine @ np.diag([*blocks, 1.0]))
    affine[:3, 3] = apply_affine(upright.affine, (blocks - 1) / 2)
    left, _, right = np.linalg.svd(upright.affine[:3, :3] / sizes)
    axes, middle = left @ right, apply_affine(upright.affine, (np.array(upright.shape) - 1) / 2)
    inverse = np.linalg.inv(affine)
    to_voxel = np.column_stack([inverse[:3, :3] @ axes, apply_affine(inverse, middle)])
    return _Coarse(hu, _largest(hu > BONE_HU), to_voxel, axes, middle)


def _largest(bone: Bools) -> Bools:
    pieces, count = ndimage.label(bone, structure=np.ones((3, 3, 3)))
    if not count:
        raise SegraftError(
            f"no voxel is above {BONE_HU:g} HU: give a head CT in Hounsfield units, or leave out --head."
        )
    largest: Bools = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    return largest


def _normal(yaw: float, roll: float) -> Floats:
    """The direction to the right of a head that turned and leaned by these degrees, [3]."""
    y, r = np.radians([yaw, roll])
    return np.array([np.cos(r) * np.cos(y), np.cos(r) * np.sin(y), np.sin(r)])


def _symmetry(coarse: _Coarse) -> tuple[float, float, float]:
    """Yaw and roll in degrees, and how far to the right of the scan's middle the plane of symmetry lies (mm)."""
    near = ndimage.binary_dilation(coarse.skull, iterations=2)
    bone = np.where(near, np.clip((coarse.hu - BONE_HU / 2) / 1000, 0, 1), 0).astype(np.float64)
    mm = 1 / np.linalg.norm(coarse.to_voxel[:, :3], axis=1)
    # Read between the voxel centres: on these, the untilted mirror image would need no interpolation and look sharpest.
    shift = np.random.default_rng(0).uniform(-0.5, 0.5, (3, np.count_nonzero(near)))
    points: Floats = np.linalg.solve(coarse.to_voxel[:, :3], np.argwhere(near).T + shift - coarse.to_voxel[:, 3:])
    points = points[:, points[2] > points[2].max() - _UPPER_MM]
    # The blur mixes in slices that are not there beyond the first and last.
    lost = min(max(1, round(_FINE_MM / float(mm[2]))), (bone.shape[2] - 1) // 4)
    inner = replace(coarse, to_voxel=coarse.to_voxel - np.outer([0, 0, 1], [0, 0, 0, lost]))
    rough, exact = (
        _disagreement(inner, _blurred(bone, mm, width)[:, :, lost : bone.shape[2] - lost], points, count)
        for width, count in ((_ROUGH_MM, 3000), (_FINE_MM, 12000))
    )
    middle = coarse.positions(coarse.skull).mean(axis=1)
    turns = np.arange(-_WIDEST_DEG, _WIDEST_DEG + 1, 8)
    starts = [np.array([yaw, roll, _normal(yaw, roll) @ middle]) for yaw in turns for roll in turns]
    best = min((_descend(rough, start, 4.0) for start in sorted(starts, key=rough)[:3]), key=rough)
    # A skull cut off above or below agrees a little better with its untilted mirror image too: try beside it.
    tries = [_descend(exact, best + np.array([0, beside, 0]), 1.5) for beside in (-10, -5, 0, 5, 10)]
    yaw, roll, across = (float(each) for each in min(tries, key=exact))
    if max(abs(yaw), abs(roll)) > _WIDEST_DEG:
        raise SegraftError(
            f"the head seems turned by more than {_WIDEST_DEG:g}°, or is not one: check the scan, or leave out --head."
        )
    return yaw, roll, across


def _disagreement(coarse: _Coarse, field: Floats, points: Floats, count: int) -> Callable[[Floats], float]:
    """How badly `field` agrees with its mirror image, as a function of the plane (yaw, roll, across).

    Measured at about `count` of `points`, as one less the correlation without a mean.
    """
    values = coarse.at(field, points, outside=-1.0)
    some = np.flatnonzero(values >= 0)
    some = some[:: max(1, some.size // count)]
    values, points = values[some], points[:, some]

    def measure(plane: Floats) -> float:
        normal = _normal(plane[0], plane[1])
        mirrored = coarse.at(field, points - 2 * np.outer(normal, normal @ points - plane[2]), outside=-1.0)
        # What the mirror moves out of the scan says nothing, but a plane may not win by moving most of it out.
        inside = mirrored >= 0
        here, there = values[inside], mirrored[inside]
        norms = float(np.linalg.norm(here)) * float(np.linalg.norm(there))
        return 1 - float(here @ there) / max(norms, 1e-9) * min(1.0, float(inside.mean()) / 0.6)

    return measure


def _descend(measure: Callable[[Floats], float], start: Floats, step: float) -> Floats:
    simplex = start + np.vstack([np.zeros(3), step * np.eye(3)])
    found: Floats = minimize(measure, start, method="Nelder-Mead", options={"initial_simplex": simplex}).x
    return found


def _blurred(bone: Floats, mm: Floats, width: float) -> Floats:
    """`bone`, in voxels of `mm`, smooth by `width` mm or more, and by the same in all directions after interpolation.

    Blurred more along thick slices than across, a field would agree best with its untilted mirror image. Linear
    interpolation blurs by a triangle of one voxel's half-width, whose variance is a sixth of its square.
    """
    interpolated = mm**2 / 6
    variance = (np.maximum(width, 0.5 * mm) ** 2 + interpolated).max()
    blurred: Floats = ndimage.gaussian_filter(bone, np.sqrt(variance - interpolated) / mm)
    return blurred


def _floor(coarse: _Coarse, axes: Floats, skull: Floats) -> float:
    """The height (mm along the level axes) of the lowest slice of the cranial cavity."""
    step = _COARSE_MM
    low, high = skull.min(axis=1) - 3 * step, skull.max(axis=1) + 3 * step
    heights = np.arange(low[2], high[2], step)
    grid = np.stack(
        np.meshgrid(np.arange(low[0], high[0], step), np.arange(low[1], high[1], step), heights, indexing="ij")
    )
    points = np.tensordot(axes, grid, 1)
    hu = coarse.at(coarse.hu, points, outside=OUTSIDE_HU)
    near = coarse.at(ndimage.binary_dilation(coarse.skull).astype(np.float32), points) > 0.5
    radius = int(8 / step)  # sutures, foramina and thin bone are closed over 16 mm
    across = np.arange(-radius, radius + 1)
    disk = (np.hypot(*np.meshgrid(across, across)) <= radius + 0.5)[..., None]
    padded = np.pad((hu > BONE_HU) & near, ((radius, radius), (radius, radius), (0, 0)))
    closed = ndimage.binary_closing(padded, disk)[radius:-radius, radius:-radius]
    soft = (hu > SOFT_HU[0]) & (hu < SOFT_HU[1])
    areas = np.array(
        [np.count_nonzero(ndimage.binary_fill_holes(closed[..., k]) & soft[..., k]) for k in range(heights.size)]
    )
    areas = areas * step**2 / 100
    if areas.max() < _BRAIN_CM2:
        raise SegraftError(
            f"no bone encloses {_BRAIN_CM2:g} cm² of soft tissue in any slice: give a head CT in Hounsfield units, or "
            "leave out --head."
        )
    return float(heights[np.flatnonzero(areas >= _FLOOR_SHARE * areas.max())[0]])


def _extent(upright: nib.Nifti1Image, coarse: _Coarse, axes: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest place of the scan's voxel centres along the level axes (mm, [3] each)."""
    corners = np.stack(np.meshgrid(*[(0, size - 1) for size in upright.shape], indexing="ij"), axis=-1).reshape(-1, 3)
    along = (apply_affine(upright.affine, corners) - coarse.middle) @ coarse.axes @ axes
    return along.min(axis=0), along.max(axis=0)


def _grid(upright: nib.Nifti1Image, coarse: _Coarse, axes: Floats, low: Floats, high: Floats) -> Grid:
    """Voxels of the scan's size from about `low` to `high` (mm along the level axes).

    The middle one lies on a voxel of the scan, so that slices are mixed as little as the turn allows, and not at all
    where there is none.
    """
    sizes = voxel_sizes(upright.affine)
    level = np.array_equal(axes, np.eye(3))
    linear = upright.affine[:3, :3] if level else coarse.axes @ axes * sizes
    shape = np.floor((high - low) / sizes + 1e-3).astype(int) + 1
    central = coarse.middle + coarse.axes @ axes @ (low + shape // 2 * sizes)
    own = apply_affine(upright.affine, np.rint(apply_affine(np.linalg.inv(upright.affine), central)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, own - linear @ (shape // 2)
    x, y, z = (int(size) for size in shape)
    return Grid((x, y, z), affine)
