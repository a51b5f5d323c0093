import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from segraft.data.resampling import resample

SHAPE = st.tuples(*[st.integers(1, 7)] * 3)
NUMBER = st.floats(-1, 1)
SPACING = st.lists(st.floats(0.4, 4), min_size=3, max_size=3).map(np.array)


@st.composite
def turns(draw) -> np.ndarray:
    """Axes permuted and flipped, 3 by 3."""
    matrix = np.eye(3)[list(draw(st.permutations(range(3))))]
    return matrix * draw(st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))


@st.composite
def affines(draw, *, oblique: bool = True) -> np.ndarray:
    """Any rotation (if oblique), permutation, flip, anisotropic spacing and origin."""
    turn = draw(turns())
    if oblique:
        angles = draw(st.lists(st.floats(-40, 40), min_size=3, max_size=3))
        turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn * draw(SPACING)
    affine[:3, 3] = draw(st.lists(st.floats(-50, 50), min_size=3, max_size=3))
    return affine


def voxels(shape) -> np.ndarray:
    """[4, N] homogeneous."""
    return np.stack([*np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])


@given(shape=SHAPE, affine=affines(), turn=turns(), data=st.data())
def test_flips_permutations_and_crops_copy_bit_for_bit(shape, affine, turn, data):
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(rng.normal(size=(2, *shape)).astype(np.float32))
    # the target grid's axes are the source's, turned; its first voxel is the source's corner they start from
    order = np.abs(turn).argmax(axis=0)
    target_shape = [shape[axis] for axis in order]
    to_source = np.eye(4)
    to_source[:3, :3] = turn
    to_source[:3, 3] = [(size - 1) * (turn[axis].sum() < 0) for axis, size in enumerate(shape)]
    flipped = [place + 1 for place, axis in enumerate(order) if turn[axis, place] < 0]
    expected = whole.permute(0, *(order + 1).tolist()).flip(flipped)
    blur = affine.astype(np.float32).astype(float)  # what a file's header keeps of it
    result = resample(whole, blur, target_shape, affine @ to_source, mode="bilinear")
    assert torch.equal(result, expected)
    # and back from a crop: exact inside, 0 outside
    first = [data.draw(st.integers(0, size - 1)) for size in target_shape]
    box = tuple(slice(start, None) for start in first)
    cropped_affine = affine @ to_source
    cropped_affine[:3, 3] += cropped_affine[:3, :3] @ first
    back = resample(result[(slice(None), *box)], cropped_affine, shape, affine, mode="nearest")
    kept = torch.zeros_like(expected)
    kept[(slice(None), *box)] = expected[(slice(None), *box)]
    inverse = np.argsort(order)
    assert torch.equal(back, kept.flip(flipped).permute(0, *(inverse + 1).tolist()))


@given(shape=SHAPE, target=SHAPE, affine=affines(), shift=st.lists(NUMBER, min_size=3, max_size=3), data=st.data())
def test_linear_functions_of_place_are_kept(shape, target, affine, shift, data):
    """Linear interpolation returns a·x + b exactly wherever the target lies between source voxels."""
    to_affine = data.draw(affines())
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    to_affine[:3, 3] = middle - to_affine[:3, :3] @ ((np.array(target) - 1) / 2) + shift
    slope = np.array([0.3, -0.2, 0.1, 5.0])
    values = (slope @ affine @ voxels(shape)).reshape(1, *shape).astype(np.float32)
    result = resample(torch.from_numpy(values), affine, target, to_affine, mode="bilinear").numpy().ravel()
    place = (np.linalg.inv(affine) @ to_affine @ voxels(target))[:3]
    last = np.array(shape)[:, None] - 1
    assume(not (np.abs(np.abs(place - last / 2) - (last / 2 + 1)) < 1e-2).any())  # too near to a face to say
    between = ((place >= 0) & (place <= last)).all(axis=0)
    outside = ((place < -1) | (place > last + 1)).any(axis=0)
    expected = slope @ to_affine @ voxels(target)
    np.testing.assert_allclose(result[between], expected[between], atol=2e-3)
    assert (result[outside] == 0).all()
    edge = map_coordinates(values[0].astype(float), place, order=1, mode="nearest")
    np.testing.assert_allclose(result[~outside], edge[~outside], atol=2e-3)


@given(affine=affines(), to_affine=affines(), target=SHAPE)
def test_nearest_agrees_with_scipy(affine, to_affine, target):
    shape = (6, 5, 4)
    values = np.random.default_rng(0).integers(1, 200, shape).astype(np.float32)
    to_affine[:3, 3] = affine[:3, 3]
    place = (np.linalg.inv(affine) @ to_affine @ voxels(target))[:3]
    assume((np.abs(place % 1 - 0.5) > 1e-3).all())  # ties may go either way
    result = resample(torch.from_numpy(values)[None], affine, target, to_affine, mode="nearest")
    expected = map_coordinates(np.pad(values, 1), place + 1, order=0, mode="constant", cval=0)
    np.testing.assert_array_equal(result.numpy().ravel(), expected)


@pytest.mark.parametrize("size", range(2, 9))
def test_no_slice_is_lost_between_one_and_two_millimetres(size):
    """MONAI's grid of ⌊(n-1)/2⌉+1 voxels ends half a voxel before the last slice when n is a multiple of 4."""
    coarse = torch.ones(1, 1, 1, int(np.round((size - 1) / 2 + 1)))
    fine = resample(coarse, np.diag([1.0, 1, 2, 1]), (1, 1, size), np.eye(4), mode="bilinear")
    np.testing.assert_allclose(fine.numpy(), 1)
