"""Volumes of NIfTI files of known size, whatever their spacing and orientation."""

import math

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from segraft.data.nifti import load_nifti, write_mask
from segraft.evaluation.metrics import spacing_of, volume_ml

SHAPE = (9, 7, 5)
FLOAT32 = 1e-5  # headers hold float32

spacings = st.tuples(*[st.floats(0.3, 6)] * 3)
quaternions = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: math.hypot(*q) > 0.1)
signs = st.tuples(*[st.sampled_from((-1, 1))] * 3)
offsets = st.tuples(*[st.floats(-300, 300)] * 3)


def affine_of(spacing, rotation=None, flips=(1, 1, 1), offset=(0, 0, 0)):
    turn = np.eye(3) if rotation is None else Rotation.from_quat(rotation).as_matrix()
    return nib.affines.from_matvec(turn @ np.diag(np.multiply(spacing, flips)), offset)


def box(count=(4, 3, 2)):
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[tuple(slice(1, 1 + n) for n in count)] = 1
    return mask


def saved(path, mask, affine, *, forms=("sform", "qform")):
    """Write with nibabel alone, with the affine in these fields of the header."""
    image = nib.Nifti1Image(mask, None)
    image.set_sform(affine, code="scanner" if "sform" in forms else "unknown")
    image.set_qform(affine, code="scanner" if "qform" in forms else "unknown", strip_shears="sform" not in forms)
    nib.save(image, path)
    return path


def measured(path):
    image = load_nifti(path, what="mask")
    spacing = spacing_of(image.affine)
    return volume_ml(np.asarray(image.dataobj) > 0, spacing), spacing


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((1, 1, 1), 0.024),  # 4 · 3 · 2 voxels of 1 mm³
        ((0.5, 0.5, 5), 0.030),  # 24 · 1.25 mm³: a head CT
        ((0.4, 0.6, 2.5), 0.0144),  # 24 · 0.6 mm³
        ((3, 2, 1), 0.144),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_box_by_hand(tmp_path, spacing, expected, name):
    volume, edges = measured(saved(tmp_path / name, box(), affine_of(spacing)))
    assert volume == pytest.approx(expected, rel=FLOAT32)
    assert edges == pytest.approx(spacing, rel=FLOAT32)


@pytest.mark.parametrize("forms", [("sform", "qform"), ("sform",), ("qform",)], ids="+".join)
@given(spacing=spacings, rotation=quaternions, flips=signs, offset=offsets)
def test_neither_rotation_flip_nor_offset_changes_a_volume(tmp_path_factory, forms, spacing, rotation, flips, offset):
    affine = affine_of(spacing, rotation, flips, offset)
    path = saved(tmp_path_factory.getbasetemp() / "oblique.nii", box(), affine, forms=forms)
    volume, edges = measured(path)
    # Each entry of the header is rounded by itself: relative to the largest, not to the smallest spacing.
    assert edges == pytest.approx(spacing, rel=1e-4)
    assert volume == pytest.approx(24 * math.prod(spacing) / 1000, rel=2e-4)
    assert volume == pytest.approx(24 * abs(np.linalg.det(nib.load(path).affine[:3, :3])) / 1000, rel=2e-4)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SAR", "PIR", "ASL"])
def test_a_file_stored_in_another_order_of_axes_has_the_same_volume(tmp_path, codes):
    mask, affine = box(), affine_of((0.5, 0.7, 5), (0.1, 0.05, 0.2, 1))
    change = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    stored = apply_orientation(mask, change)
    path = saved(tmp_path / "a.nii.gz", stored, affine @ inv_ornt_aff(change, mask.shape))
    assert nib.aff2axcodes(load_nifti(path).affine) == tuple(codes)
    assert measured(path)[0] == pytest.approx(24 * 0.5 * 0.7 * 5 / 1000, rel=FLOAT32)


@given(spacing=st.tuples(*[st.floats(0.7, 2)] * 3), rotation=quaternions, flips=signs, radius=st.floats(15, 20))
def test_a_ball_painted_in_world_space_has_the_volume_of_a_ball(tmp_path_factory, spacing, rotation, flips, radius):
    """The grid is oblique and anisotropic: edges read from the rows of the affine, not its columns, would show."""
    shape = np.ceil(2 * (radius + 3) / np.array(spacing)).astype(int)
    turned = affine_of(spacing, rotation, flips)
    turned[:3, 3] = -turned[:3, :3] @ ((shape - 1) / 2)
    places = nib.affines.apply_affine(turned, np.indices(shape).reshape(3, -1).T)
    ball = (np.linalg.norm(places, axis=1) <= radius).reshape(shape)
    path = saved(tmp_path_factory.getbasetemp() / "ball.nii", ball.astype(np.uint8), turned)
    assert measured(path)[0] == pytest.approx(4 / 3 * math.pi * radius**3 / 1000, rel=0.05)  # in whole voxels


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_how_the_voxels_are_stored_does_not_matter(tmp_path, dtype, trailing):
    path = saved(tmp_path / "a.nii", box().astype(dtype).reshape(*SHAPE, *trailing), affine_of((0.5, 0.5, 5)))
    assert measured(path)[0] == pytest.approx(0.03, rel=FLOAT32)


def test_a_mask_that_is_written_back_keeps_its_volume(tmp_path):
    affine = affine_of((0.45, 0.45, 4.8), (0.2, -0.1, 0.05, 1), (-1, 1, 1), (100, -80, 30))
    scan = saved(tmp_path / "scan.nii.gz", np.full(SHAPE, 40, dtype=np.int16), affine)
    write_mask(box(), load_nifti(scan), tmp_path / "mask.nii.gz")
    assert measured(tmp_path / "mask.nii.gz")[0] == pytest.approx(24 * 0.45 * 0.45 * 4.8 / 1000, rel=FLOAT32)


def test_an_empty_mask_has_no_volume(tmp_path):
    assert measured(saved(tmp_path / "a.nii", box((0, 0, 0)), affine_of((0.5, 0.5, 5))))[0] == 0


@pytest.mark.data
def test_real_masks_have_the_volume_that_their_headers_say(real_data):
    paths = sorted((real_data / "hippocampus" / "labelsTr").glob("*.nii*"))[:5]
    paths += sorted((real_data / "spleen_ct").rglob("*.nii*"))
    for path in paths:
        image = nib.load(path)
        voxels = np.count_nonzero(np.asarray(image.dataobj) > 0)
        assert measured(path)[0] == pytest.approx(voxels * math.prod(image.header.get_zooms()[:3]) / 1000, rel=1e-4)
