"""Levelling: phantoms that lie as told are set upright, keep their blood, and lose their neck alone."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from segraft.data import phantom
from segraft.data.head import HEAD_SIZE, OUTSIDE_HU, level_head
from segraft.data.phantom_anatomy import Patient
from segraft.data.resampling import resample
from segraft.errors import SegraftError

THIN, THICK = ((144, 160, 28), (1.4, 1.4, 5.0)), ((96, 96, 20), (2.2, 2.2, 7.0))


@pytest.fixture
def lying(monkeypatch):
    """lying(tilt, …): scan and label of a phantom whose head lies at these angles (pitch, roll, yaw in degrees)."""
    draw = Patient.draw

    def make(tilt, *, seed=0, task="subarachnoid", stratum=1, grid=THIN):
        monkeypatch.setattr(phantom.Patient, "draw", lambda rng: replace(draw(rng), tilt=tilt))
        shape, spacing = grid
        rng = np.random.default_rng(seed)
        voxels = phantom.head(rng, task=task, stratum=stratum, shape=shape, spacing=spacing)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
        return tuple(nib.Nifti1Image(each, affine) for each in voxels)

    return make


def to_the_right(tilt) -> np.ndarray:
    """The direction of the head's left-right axis in the scan: a row of `Patient.place`'s rotation."""
    return Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()[0]


def degrees_between(a, b) -> float:
    return float(np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))))


def blood_ml(label: nib.Nifti1Image) -> float:
    return float((label.get_fdata() > 0.5).sum() * abs(np.linalg.det(label.affine[:3, :3])) / 1000)


@pytest.mark.parametrize("grid", [THIN, THICK], ids=["5 mm", "7 mm"])
@pytest.mark.parametrize(
    ("tilt", "seed", "task"),
    [
        ((0, 0, 12), 0, "subarachnoid"),
        ((0, 8, 0), 1, "traumatic"),
        ((4, -6, 12), 0, "traumatic"),
        ((-5, 5, -25), 3, "subarachnoid"),
        ((3, 0, 0), 4, "traumatic"),
    ],
)
def test_a_tilted_head_is_levelled(lying, tilt, seed, task, grid):
    scan, label = lying(tilt, seed=seed, task=task, stratum=2, grid=grid)
    levelling = level_head(scan)
    right = levelling.grid.affine[:3, 0]
    assert degrees_between(right, to_the_right(tilt)) < 2
    np.testing.assert_allclose(nib.affines.voxel_sizes(levelling.grid.affine), grid[1], rtol=1e-6)
    directions = levelling.grid.affine[:3, :3] / grid[1]
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    assert np.linalg.det(directions) > 0
    # pitch is left: the turn is the shortest that brings the plane of symmetry upright
    turn = Rotation.from_matrix(directions).as_rotvec()
    assert abs(turn[0]) < 1e-6
    assert levelling.grid.shape[:2] == (HEAD_SIZE, HEAD_SIZE)

    moved = levelling.grid.sample(label, mode="nearest")
    kept = nib.Nifti1Image(np.maximum(moved.get_fdata(), 0), moved.affine)
    assert blood_ml(kept) == pytest.approx(blood_ml(label), rel=0.05)


def test_the_head_is_in_the_middle(lying):
    scan, _ = lying((0, 0, 15))
    levelled = level_head(scan).grid.sample(scan)
    x, y = np.argwhere((levelled.get_fdata() > 300).any(axis=2)).T
    assert abs((x.min() + x.max()) / 2 - (HEAD_SIZE - 1) / 2) < 3
    assert abs((y.min() + y.max()) / 2 - (HEAD_SIZE - 1) / 2) < 3


def test_a_level_head_is_copied(lying):
    scan, _ = lying((0, 0, 0))
    levelling = level_head(scan)
    assert max(abs(levelling.yaw), abs(levelling.roll)) < 0.5
    levelled = levelling.grid.sample(scan)
    values, counts = np.unique(levelled.get_fdata(), return_counts=True)
    assert set(values) <= {*np.unique(scan.dataobj), OUTSIDE_HU}
    assert counts[0] > 0.5 * levelled.get_fdata().size
    # and lies where it lay
    inside = resample_to(levelled, scan)
    seen = inside != OUTSIDE_HU
    np.testing.assert_array_equal(inside[seen], scan.get_fdata()[seen])


def resample_to(image, like) -> np.ndarray:
    import torch

    values = torch.from_numpy(image.get_fdata(dtype=np.float32))[None] - OUTSIDE_HU
    return resample(values, image.affine, like.shape, like.affine, mode="nearest")[0].numpy() + OUTSIDE_HU


@pytest.mark.parametrize("axes", ["LPS", "RPI", "SAR"])
def test_how_it_is_stored_does_not_matter(lying, axes):
    scan, _ = lying((0, 5, 10))
    codes = nib.orientations.axcodes2ornt(axes)
    turned = scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), codes))
    assert "".join(nib.aff2axcodes(turned.affine)) == axes
    one, other = level_head(scan).grid, level_head(turned).grid
    assert one.shape == other.shape
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)


def with_neck(scan: nib.Nifti1Image, slices: int) -> nib.Nifti1Image:
    """A neck with a spine below a head, joined to it, and a table as hard as bone behind both."""
    head = scan.get_fdata()
    x, y = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * 1.4 for n in head.shape[:2]), indexing="ij")
    neck = np.where(np.hypot(x, y + 15) < 60, 40.0, -1000.0)
    spine = np.hypot(x, y + 30)
    neck[(spine < 20) & (spine > 10)] = 700
    data = np.concatenate([np.repeat(neck[..., None], slices, axis=2), head], axis=2)
    behind = y < -105
    data[behind] = np.maximum(data[behind], 900)
    affine = scan.affine.copy()
    affine[2, 3] -= slices * affine[2, 2]
    return nib.Nifti1Image(data.astype(np.int16), affine)


@pytest.mark.parametrize("tilt", [(0, 0, 0), (0, 6, 10)])
def test_the_neck_goes_and_the_skull_stays(lying, tilt):
    scan, label = lying(tilt, task="traumatic", stratum=3)
    alone, necked = level_head(scan), level_head(with_neck(scan, 16))
    assert degrees_between(necked.grid.affine[:3, 0], to_the_right(tilt)) < 2
    assert necked.neck_slices >= 16 - 15 / 5 - 2
    middle = (HEAD_SIZE - 1) / 2
    bottom, was = (nib.affines.apply_affine(each.grid.affine, (middle, middle, 0))[2] for each in (necked, alone))
    assert bottom < was + 5  # no more of the head is cut off than without a neck
    moved = necked.grid.sample(label, mode="nearest").get_fdata() > 0.5
    assert moved.sum() == pytest.approx((np.asanyarray(label.dataobj) > 0).sum(), rel=0.05)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (np.full((20, 20, 10), 40, np.int16), "no voxel is above 200 HU"),
        (np.pad(np.full((8, 8, 4), 900, np.int16), 6), "no bone encloses 30 cm²"),
    ],
)
def test_no_head(data, complaint):
    with pytest.raises(SegraftError, match=complaint):
        level_head(nib.Nifti1Image(data, np.diag([3.0, 3, 5, 1])))


def test_voxels_too_small_to_cover_a_head(lying):
    scan, _ = lying((0, 0, 0))
    small = nib.Nifti1Image(np.repeat(np.repeat(scan.dataobj, 6, 0), 6, 1), np.diag([1.4 / 6, 1.4 / 6, 5, 1]))
    with pytest.raises(SegraftError, match="do not cover the head"):
        level_head(small)
