"""The table of augmentations: what each draws, elastic fields in millimetres, the four types of the paper."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.stats import chisquare
from torch.utils.data import DataLoader

from segraft.data.augmentation import (
    AUGMENTATIONS,
    ELASTIC_SMOOTHNESS,
    ELASTIC_STRENGTH,
    Augmentation,
    ElasticAugmentation,
    cut,
    displacement_mm,
)
from segraft.data.patches import PatchSource
from segraft.data.preparation import Preparation, Window
from segraft.errors import SegraftError

SPACINGS = [(1, 1, 1), (0.8, 0.8, 5)]


def elastic(patch, spacing, seed=0) -> np.ndarray:
    """A field that does deform: where each voxel of the patch comes from, in voxels from its first."""
    rng, spacing = np.random.default_rng(seed), np.asarray(spacing, dtype=np.float64)
    while (warp := ElasticAugmentation(()).warp(patch, spacing, rng)) is None:
        pass
    return warp


# --- the displacement field


@pytest.mark.parametrize(("patch", "spacing"), [((40, 30), (2, 1)), ((12, 10, 8), (1, 3, 5)), ((9,), (20,))])
def test_the_field_is_the_formula(patch, spacing):
    spacing = np.array(spacing, dtype=np.float64)
    found = displacement_mm(patch, spacing, np.random.default_rng(3))
    assert found.shape == (len(patch), *patch)
    half = [int(np.ceil((n - 1) / 2 * step / ELASTIC_SMOOTHNESS + 3)) for n, step in zip(patch, spacing, strict=True)]
    noise = np.random.default_rng(3).normal(0, ELASTIC_STRENGTH, (len(patch), *(2 * n + 1 for n in half)))
    points = np.argwhere(np.ones(noise.shape[1:])) - half  # in standard deviations of the Gaussian
    for voxel in ((0,) * len(patch), tuple(n // 3 for n in patch), tuple(n - 1 for n in patch)):
        place = (np.array(voxel) - (np.array(patch) - 1) / 2) * spacing / ELASTIC_SMOOTHNESS
        weights = np.exp(-((place - points) ** 2).sum(1) / 2) * np.pi ** (-len(patch) / 4)
        np.testing.assert_allclose(found[(slice(None), *voxel)], noise.reshape(len(patch), -1) @ weights, atol=1e-12)


@pytest.mark.parametrize("spacing", [0.5, 2.0, 7.0])
def test_strength_and_smoothness_are_in_millimetres_whatever_the_voxels(spacing):
    rng = np.random.default_rng(0)
    fields = np.stack([displacement_mm((21, 4), np.array([spacing, spacing]), rng) for _ in range(3000)])
    mean, deviation = fields.mean(axis=0), fields.std(axis=0)
    assert np.abs(mean).max() < 5 * ELASTIC_STRENGTH / np.sqrt(3000)
    np.testing.assert_allclose(deviation, ELASTIC_STRENGTH, rtol=0.07)  # at the border as in the middle
    along = [np.corrcoef(fields[:, 0, 0, 0], fields[:, 0, step, 0])[0, 1] for step in range(21)]
    expected = np.exp(-((np.arange(21) * spacing) ** 2) / (4 * ELASTIC_SMOOTHNESS**2))
    np.testing.assert_allclose(along, expected, atol=0.08)
    assert abs(np.corrcoef(fields[:, 0, 5, 1], fields[:, 1, 5, 1])[0, 1]) < 0.08  # axes are independent


@pytest.mark.parametrize("seed", range(10))
def test_nothing_folds(seed):
    """The determinant of the deformation stays positive."""
    field = displacement_mm((24, 24, 24), np.array([2.0, 2, 2]), np.random.default_rng(seed))
    gradients = np.stack([np.stack(np.gradient(component, 2.0)) for component in field])
    jacobian = np.eye(3) + np.moveaxis(gradients, (0, 1), (-2, -1))
    assert np.linalg.det(jacobian).min() > 0.1


# --- cutting along it


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("patch", [(9, 8, 7), (9, 8, 1)])
def test_a_warp_is_the_displacement_in_voxels(patch, spacing):
    rng = np.random.default_rng(1)
    while rng.random() >= 0.5:  # the draws that leave the patch straight
        pass
    moving = 3 if patch[2] > 1 else 2
    millimetres = displacement_mm(patch[:moving], np.array(spacing)[:moving], rng)
    moved = (elastic(patch, spacing, seed=1) - np.indices(patch)) * np.array(spacing)[:, None, None, None]
    np.testing.assert_allclose(moved[:moving].reshape(millimetres.shape), millimetres, atol=1e-12)
    assert (moved[moving:] == 0).all()  # slices deform in their plane


def test_a_deformed_patch_samples_the_volume():
    rng = np.random.default_rng(0)
    volume, start, warp = rng.random((20, 18, 16)), np.array([4, 3, 5]), elastic((8, 7, 6), (1, 1, 2))
    labels = rng.integers(0, 4, volume.shape).astype(np.uint8)
    where = (warp + start[:, None, None, None]).reshape(3, -1)
    linear = map_coordinates(volume, where, order=1).reshape(8, 7, 6)
    np.testing.assert_allclose(cut(volume, start, (8, 7, 6), warp, order=1), linear, atol=1e-12)
    found = cut(labels, start, (8, 7, 6), warp, order=0)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, labels[tuple(np.rint(where).astype(int))].reshape(8, 7, 6))


def test_a_linear_image_shows_the_displacement_itself():
    """Of an image whose values are positions, the deformed patch holds where each voxel came from."""
    shape, patch, start = (60, 60, 60), (12, 10, 8), np.array([24, 25, 26])
    warp = elastic(patch, (1, 1, 1))
    for axis, positions in enumerate(np.indices(shape).astype(np.float32)):
        found = cut(positions, start, patch, warp, order=1)
        np.testing.assert_allclose(found, warp[axis] + start[axis], atol=1e-4)


def test_an_undeformed_warp_is_a_straight_cut():
    volume, start = np.random.default_rng(0).random((9, 9, 9)), np.array([2, 3, 1])
    straight = cut(volume, start, (4, 5, 6), None, order=1)
    assert np.shares_memory(straight, volume)  # which costs nothing
    np.testing.assert_allclose(cut(volume, start, (4, 5, 6), np.indices((4, 5, 6)) * 1.0, order=1), straight)


# --- the types


@pytest.mark.parametrize("patch", [(6, 6, 6), (6, 6, 1)])
def test_four_types_in_equal_shares(patch):
    vary, spacing = ElasticAugmentation((0,)), np.array([1.0, 1, 3])
    seen: Counter[tuple[bool, bool]] = Counter()
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        warp = vary.warp(patch, spacing, rng)
        seen[warp is not None, vary.flip(rng)[0].step == -1] += 1
    assert len(seen) == 4
    assert chisquare(list(seen.values())).pvalue > 0.001
    assert max(seen.values()) < 1.15 * min(seen.values()) + 50


def test_without_an_axis_to_flip_there_are_two_types():
    vary, rng = ElasticAugmentation(()), np.random.default_rng(0)
    assert all(part == slice(None) for _ in range(100) for part in vary.flip(rng))


@pytest.fixture
def case(write_case):
    rng = np.random.default_rng(0)
    image = rng.random((24, 20, 12)).astype(np.float32)
    return write_case("a", image, (image > 0.8).astype(np.uint8), affine=np.diag([1, 1, 2.5, 1]))


def source(case, augmentation, patch=(24, 20, 12), **options) -> PatchSource:
    preparation = Preparation(intensity=Window(low=0, high=1), patch=patch)
    return PatchSource([case], preparation, [1], seed=4, augmentation=augmentation, **options)


def test_the_four_types_in_patches(case):
    """With patches as large as the volume, the label tells the type: as it is, mirrored, or neither."""
    label = source(case, "none", patches_per_volume=1)[0, 0]["label"][0, 0]
    patches = source(case, "elastic", patches_per_volume=1)
    seen = Counter(
        "none" if torch.equal(found, label) else "flip" if torch.equal(found, label.flip(0)) else "elastic"
        for found in (patches[epoch, 0]["label"][0, 0] for epoch in range(400))
    )
    assert seen["none"] == pytest.approx(100, abs=35)
    assert seen["flip"] == pytest.approx(100, abs=35)
    assert seen["elastic"] == pytest.approx(200, abs=45)


@pytest.mark.parametrize("patch", [(10, 8, 6), (10, 8, 1)])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_patches_depend_on_the_seed_alone(case, augmentation, patch):
    first, again = (source(case, augmentation, patch) for _ in range(2))
    for epoch in (3, 0, 3):
        for key in ("image", "label"):
            assert torch.equal(first[epoch, 0][key], again[epoch, 0][key])
        assert torch.isfinite(first[epoch, 0]["image"]).all()
        assert set(first[epoch, 0]["label"].unique().tolist()) <= {0.0, 1.0}


def test_a_worker_gives_the_same_deformed_patches(case):
    patches = source(case, "elastic", (10, 8, 6), patches_per_volume=6)
    here, there = (next(iter(DataLoader(patches, sampler=[(2, 0)], num_workers=n))) for n in (0, 1))
    assert torch.equal(here["image"], there["image"])
    assert torch.equal(here["label"], there["label"])


def test_image_and_label_deform_together(case):
    """Labels are nearest, the image linear: where a label is, the image is bright on average, as in the scan."""
    items = [source(case, "elastic", (16, 16, 1))[epoch, 0] for epoch in range(60)]
    image, label = (torch.cat([item[key] for item in items]).flatten() for key in ("image", "label"))
    assert image[label == 1].mean() > image[label == 0].mean() + 0.25


def test_the_standard_draws_in_its_order():
    """The draws, written out: a change to them would change every training that was recorded."""
    vary, spacing = Augmentation((0, 2)), np.array([1.0, 1.5, 2])
    for seed in range(60):
        rng, ours = np.random.default_rng(seed), np.random.default_rng(seed)
        warp, image = vary.warp((4, 4, 4), spacing, rng), np.full((2, 2, 2), 0.5, np.float32)
        index = vary.flip(rng)
        vary.recolour(image, rng)
        turned = ours.random() < 0.2
        assert (warp is not None) == turned
        if turned:
            ours.uniform(-15, 15, size=3)
            zoom = np.exp(ours.uniform(np.log(0.85), np.log(1.18)))
            assert np.linalg.det(warp) == pytest.approx(zoom**-3)
        chances = ours.random(3) < 0.5
        assert [part.step == -1 for part in index] == [chances[0], False, chances[2]]
        value = 0.5 ** np.exp(ours.uniform(np.log(0.7), np.log(1.5)))
        value = value * ours.uniform(0.9, 1.1)
        np.testing.assert_allclose(image, value + ours.uniform(-0.1, 0.1), rtol=1e-5)
        assert rng.random() == ours.random()


def test_none_leaves_patches_as_they_are(case):
    item = source(case, "none")[0, 0]
    assert torch.equal((item["image"] > 0.8).float(), item["label"])


def test_an_unknown_augmentation(case):
    with pytest.raises(SegraftError, match="unknown augmentation 'wild': choose one of none, standard, elastic"):
        source(case, "wild")
