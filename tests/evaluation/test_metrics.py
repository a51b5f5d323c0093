"""Dice, surface distance and volume against hand-computed cases, a brute force and MONAI."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_hausdorff_distance
from scipy.spatial.distance import cdist

from segraft.data.strata import STRATA_ML
from segraft.errors import SegraftError
from segraft.evaluation.metrics import dice, hausdorff95_mm, spacing_of, strata, stratum, volume_ml

spacings = st.tuples(*[st.floats(0.3, 6)] * 3)
shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=6)


@st.composite
def mask_pairs(draw, shape=shapes):
    shape = draw(shape)
    elements = hnp.arrays(np.bool_, shape)
    return draw(elements), draw(elements)


def cube(shape, low, high):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def voxel(shape, place):
    return cube(shape, place, [p + 1 for p in place])


def surface(mask):
    """MONAI's surface in plain loops: voxels with a face neighbour outside the mask or outside the grid."""
    steps = [np.array(step) for step in product((-1, 0, 1), repeat=3) if np.abs(step).sum() == 1]
    inside = {tuple(place) for place in np.argwhere(mask)}
    return np.array([p for p in sorted(inside) if any(tuple(np.array(p) + step) not in inside for step in steps)])


def brute_force_95(a, b, spacing):
    distances = cdist(surface(a) * spacing, surface(b) * spacing)
    return max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))


# ---- Dice ----


def test_dice_counts_by_hand():
    prediction, truth = cube((6, 6, 6), (0, 0, 0), (2, 2, 2)), cube((6, 6, 6), (1, 0, 0), (4, 2, 2))
    # TP 4 (one layer of 2×2), FP 4, FN 8
    assert dice(prediction, truth) == pytest.approx(2 * 4 / (2 * 4 + 8 + 4))


@given(mask_pairs())
def test_dice_follows_its_formula(pair):
    prediction, truth = pair
    assume(prediction.any() or truth.any())
    tp, fp, fn = (prediction & truth).sum(), (prediction & ~truth).sum(), (~prediction & truth).sum()
    assert dice(prediction, truth) == pytest.approx(2 * tp / (2 * tp + fn + fp))
    assert dice(prediction, truth) == dice(truth, prediction)


# ---- 95 % Hausdorff distance ----


@pytest.mark.parametrize(("axis", "expected"), [(0, 3 * 0.5), (1, 3 * 2.0), (2, 3 * 5.0)])
def test_two_voxels_three_apart(axis, expected):
    place = [1, 1, 1]
    there = [p + 3 * (axis == a) for a, p in enumerate(place)]
    one, other = voxel((6, 6, 6), place), voxel((6, 6, 6), there)
    assert hausdorff95_mm(one, other, (0.5, 2.0, 5.0)) == pytest.approx(expected)


def test_a_diagonal_step_mixes_the_spacings():
    one, other = voxel((4, 4, 4), (0, 0, 0)), voxel((4, 4, 4), (3, 2, 1))
    assert hausdorff95_mm(one, other, (1, 2, 4)) == pytest.approx(math.sqrt(9 + 16 + 16))


def test_a_shifted_cube_is_off_by_the_shift():
    # The far face (16 of 56 surface voxels, more than 5 %) is exactly two voxels away.
    one, other = cube((12, 8, 8), (1, 2, 2), (5, 6, 6)), cube((12, 8, 8), (3, 2, 2), (7, 6, 6))
    assert hausdorff95_mm(one, other, (1.5, 1, 1)) == pytest.approx(3.0)


def test_a_few_stray_voxels_do_not_count():
    truth = cube((40, 10, 10), (0, 0, 0), (10, 10, 10))
    stray = truth | voxel(truth.shape, (39, 0, 0))  # 1 of 489 surface voxels
    assert hausdorff95_mm(stray, truth, (1, 1, 1)) == 0


def test_it_is_the_larger_direction_and_not_the_pooled_percentile():
    shape = (60, 1, 1)
    near, both = cube(shape, (0, 0, 0), (2, 1, 1)), cube(shape, (0, 0, 0), (2, 1, 1)) | voxel(shape, (50, 0, 0))
    # In one dimension all voxels here are surface: distances 0, 0 one way and 0, 0, 49 the other.
    assert hausdorff95_mm(near, both, (1, 1, 1)) == pytest.approx(np.percentile([0, 0, 49], 95))


@settings(max_examples=150, deadline=None)
@given(mask_pairs(), spacings)
def test_hausdorff_is_the_brute_force(pair, spacing):
    one, other = pair
    assume(one.any() and other.any())
    assert hausdorff95_mm(one, other, spacing) == pytest.approx(brute_force_95(one, other, np.array(spacing)))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*:FutureWarning")  # MONAI's own call
@pytest.mark.parametrize("seed", range(5))
def test_hausdorff_is_monais(seed):
    import torch

    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(0.5, 5, 3))
    one, other = (rng.random((9, 11, 7)) < share for share in (0.2, 0.5))
    theirs = compute_hausdorff_distance(
        torch.from_numpy(one)[None, None],
        torch.from_numpy(other)[None, None],
        include_background=True,
        percentile=95,
        spacing=spacing,
    )
    assert hausdorff95_mm(one, other, spacing) == pytest.approx(theirs.item(), rel=1e-5)


@given(mask_pairs(), spacings, st.tuples(*[st.integers(0, 3)] * 6))
def test_hausdorff_and_dice_do_not_depend_on_the_empty_margin(pair, spacing, margin):
    one, other = pair
    assume(one.any() and other.any())
    wider = [np.pad(mask, np.reshape(margin, (3, 2))) for mask in pair]
    assert hausdorff95_mm(*wider, spacing) == pytest.approx(hausdorff95_mm(one, other, spacing))
    assert dice(*wider) == dice(one, other)


@given(mask_pairs(), spacings, st.permutations(range(3)))
def test_hausdorff_is_symmetric_and_follows_the_axes(pair, spacing, order):
    one, other = pair
    turned = [mask.transpose(order) for mask in (other, one)]
    expected = hausdorff95_mm(one, other, spacing)
    assert hausdorff95_mm(*turned, [spacing[axis] for axis in order]) == pytest.approx(expected)


@given(mask_pairs(), spacings)
def test_hausdorff_stays_below_what_an_empty_prediction_costs(pair, spacing):
    one, other = pair
    assume(one.any() and other.any())
    assert hausdorff95_mm(one, other, spacing) < hausdorff95_mm(one, np.zeros_like(one), spacing)


def test_a_slice_has_an_outline():
    # Were a slice surface all over, the voxels inside would dilute the percentile: 0 here instead of 1.
    full, hollow = cube((30, 30, 1), (0, 0, 0), (30, 30, 1)), cube((30, 30, 1), (1, 1, 0), (29, 29, 1))
    assert hausdorff95_mm(full, hollow, (2, 2, 9)) == pytest.approx(2)
    flat = hausdorff95_mm(full[:, :, 0], hollow[:, :, 0], (2, 2))
    assert hausdorff95_mm(full, hollow, (2, 2, 9)) == pytest.approx(flat)


# ---- empty masks ----


def test_both_empty_is_perfect():
    empty = np.zeros((4, 5, 6), dtype=bool)
    assert dice(empty, empty) == 1
    assert hausdorff95_mm(empty, empty, (1, 1, 1)) == 0


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_costs_the_diagonal(swap):
    pair = np.zeros((4, 5, 6), dtype=bool), voxel((4, 5, 6), (0, 0, 0))
    pair = pair[::-1] if swap else pair
    assert dice(*pair) == 0
    assert hausdorff95_mm(*pair, (1, 2, 0.5)) == pytest.approx(math.sqrt(4**2 + 10**2 + 3**2))


def test_the_penalty_is_that_of_brats():
    shape = (240, 240, 155)
    assert hausdorff95_mm(np.zeros(shape, bool), np.ones(shape, bool), (1, 1, 1)) == pytest.approx(373.12866)


# ---- volume, spacing, strata ----


@given(hnp.arrays(np.bool_, shapes), spacings)
def test_volume_is_voxels_times_edges(mask, spacing):
    assert volume_ml(mask, spacing) == pytest.approx(mask.sum() * spacing[0] * spacing[1] * spacing[2] / 1000)


@given(spacings, st.floats(-math.pi, math.pi), st.permutations(range(3)), st.tuples(*[st.floats(-200, 200)] * 3))
def test_spacing_survives_rotation_flip_and_offset(spacing, angle, order, offset):
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, -1]])
    affine = np.eye(4)
    affine[:3, :3] = turn[list(order)] @ np.diag(spacing)
    affine[:3, 3] = offset
    assert spacing_of(affine) == pytest.approx(spacing)


@pytest.mark.parametrize(
    ("volume", "name"),
    [
        (0, "none"),
        (1e-9, "(0, 25]"),
        (25, "(0, 25]"),
        (25.001, "(25, 50]"),
        (50, "(25, 50]"),
        (100, "(50, 100]"),
        (300, "(100, 300]"),
        (300.1, ">300"),
    ],
)
def test_strata_are_open_below_and_closed_above(volume, name):
    assert stratum(volume) == name


def test_strata_are_listed_by_volume():
    assert strata() == ("none", "(0, 25]", "(25, 50]", "(50, 100]", "(100, 300]", ">300")
    assert [low for low, _ in STRATA_ML[1:]] == [high for _, high in STRATA_ML[:-1]]


# ---- bad input ----

ONE = np.ones((2, 2, 2), dtype=bool)


@pytest.mark.parametrize(
    "call",
    [
        lambda: dice(ONE, ONE[:1]),  # must not broadcast
        lambda: hausdorff95_mm(ONE, ONE[:, :1], (1, 1, 1)),
        lambda: hausdorff95_mm(ONE, ONE, (1, 1)),
        lambda: hausdorff95_mm(ONE, ONE, (1, 0, 1)),
        lambda: volume_ml(ONE, (1, math.nan, 1)),
        lambda: volume_ml(ONE, (1, -1, 1)),
        lambda: spacing_of(np.eye(3)),
        lambda: spacing_of(np.zeros((4, 4))),
        lambda: spacing_of(np.full((4, 4), math.nan)),
        lambda: stratum(-1),
        lambda: stratum(math.nan),
    ],
)
def test_bad_input_is_one_sentence_with_a_cure(call):
    with pytest.raises(SegraftError, match=r"^[^\n]+: (check|resample) [^\n]+\.$"):
        call()


def test_probabilities_are_no_masks():
    with pytest.raises(TypeError, match="boolean"):
        dice(ONE * 0.3, ONE)
