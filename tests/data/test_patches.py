import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.utils.data import DataLoader

from segraft.data.augmentation import Augmentation, cut
from segraft.data.cohort import Cohort
from segraft.data.patches import EpochSampler, PatchSource, collate
from segraft.data.preparation import Preparation, Window
from segraft.errors import SegraftError

SHAPE = (14, 12, 10)
PLAIN = Window(low=0, high=1)


def coded() -> np.ndarray:
    """Every voxel its own value in 0…1."""
    return (np.arange(np.prod(SHAPE)) / np.prod(SHAPE)).reshape(SHAPE).astype(np.float32)


@pytest.fixture
def case(write_case):
    label = np.zeros(SHAPE, np.uint8)
    label[3:5, 4:6, 2:4] = 1
    label[9:13, 8:11, 6:9] = 2
    return write_case("a", coded(), label)


def source(cases, *, patch=(6, 6, 6), labels=(1, 2), seed=0, **options) -> PatchSource:
    return PatchSource(cases, Preparation(intensity=PLAIN, patch=patch), labels, seed=seed, **options)


@pytest.mark.parametrize("patch", [(6, 6, 6), (6, 5, 1), (20, 6, 13)])
@pytest.mark.parametrize("augmentation", ["none", "standard", "elastic"])
def test_shapes(case, patch, augmentation):
    item = source([case], patch=patch, patches_per_volume=3, augmentation=augmentation)[0, 0]
    assert item["image"].shape == (3, 1, *patch)
    assert item["label"].shape == (3, 2, *patch)
    assert item["image"].dtype == item["label"].dtype == torch.float32
    assert set(item["label"].unique().tolist()) <= {0.0, 1.0}
    assert item["case"] == "a"


def places(image: torch.Tensor) -> np.ndarray:
    """Where in the coded volume the first voxel of each unaugmented patch lies."""
    flat = np.rint(image[:, 0, 0, 0, 0].numpy() * np.prod(SHAPE)).astype(int)
    return np.stack(np.unravel_index(flat, SHAPE), axis=1)


def test_unaugmented_patches_are_cut_from_the_volume(case, tmp_path):
    item = source([case], augmentation="none", patches_per_volume=8)[0, 0]
    label = np.zeros(SHAPE)
    label[3:5, 4:6, 2:4] = 1
    label[9:13, 8:11, 6:9] = 2
    for patch, planes, start in zip(item["image"], item["label"], places(item["image"]), strict=True):
        box = tuple(slice(first, first + 6) for first in start)
        np.testing.assert_allclose(patch[0], coded()[box], atol=1e-6)
        np.testing.assert_array_equal(planes, [label[box] == 1, label[box] == 2])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_foreground_fraction(write_case, fraction):
    """With patches of one voxel, the centre is the patch."""
    label = np.random.default_rng(0).random(SHAPE) < 0.3
    patches = source(
        [write_case("a", coded(), label.astype(np.uint8))],
        patch=(1, 1, 1),
        labels=[1],
        foreground_fraction=fraction,
        patches_per_volume=2,
    )
    hits = [patches[epoch, 0]["label"].sum().item() for epoch in range(200)]
    assert sum(hits) == pytest.approx(400 * fraction, abs=30)
    if fraction != 0.25:
        assert set(hits) == {2 * fraction}


def test_every_voxel_is_reached_and_labels_weigh_alike(case):
    patches = source([case], patch=(1, 1, 1), augmentation="none", patches_per_volume=400)
    items = [patches[epoch, 0] for epoch in range(120)]
    planes = torch.cat([item["label"] for item in items]).sum(dim=(0, 2, 3, 4))
    assert planes.sum() == 120 * 200
    assert planes[0] / planes.sum() == pytest.approx(0.5, abs=0.02)  # 8 voxels against 36
    background = [
        tuple(place) for item in items for place in places(item["image"][item["label"].sum(dim=(1, 2, 3, 4)) == 0])
    ]
    assert len(set(background)) == np.prod(SHAPE) - 8 - 36


@pytest.mark.parametrize("value", [0, 1])
def test_all_background_or_all_foreground(write_case, value):
    patches = source([write_case("a", coded(), np.full(SHAPE, value, np.uint8))], labels=[1], augmentation="none")
    assert (patches[0, 0]["label"] == value).all()


def test_small_volumes_are_padded_with_zeros(case):
    item = source([case], patch=(18, 12, 13), augmentation="none")[0, 0]
    image = item["image"][0, 0].numpy()
    np.testing.assert_allclose(image[2:-2, :, 1:-2], coded(), atol=1e-6)
    image[2:-2, :, 1:-2] = 0
    assert (image == 0).all()


def test_patches_depend_on_seed_epoch_and_index_alone(write_case, case):
    cases = [case, write_case("b", coded() ** 2, (coded() > 0.8).astype(np.uint8))]
    first, again, other = source(cases), source(cases), source(cases, seed=1)
    item = first[3, 1]["image"]
    again[0, 0], again[7, 1]
    assert torch.equal(again[3, 1]["image"], item)
    for different in (first[4, 1], first[3, 0], other[3, 1]):
        assert not torch.equal(different["image"], item)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_patches(write_case, case, workers):
    cases = [case, *(write_case(name, coded() ** 2, (coded() > 0.8).astype(np.uint8)) for name in "bcd")]
    patches, sampler = source(cases, patch=(9, 9, 9)), EpochSampler(len(cases), seed=5)
    sampler.set_epoch(2)
    loaders = [
        DataLoader(patches, batch_size=2, sampler=sampler, collate_fn=collate, num_workers=n) for n in (0, workers)
    ]
    for mine, theirs in zip(*loaders, strict=True):
        assert mine["case"] == theirs["case"]
        assert torch.equal(mine["image"], theirs["image"])
        assert torch.equal(mine["label"], theirs["label"])


def test_sampler():
    sampler = EpochSampler(20, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        assert sorted(key[1] for key in keys) == list(range(20)) == list(range(len(sampler)))
        orders.append([key[1] for key in keys])
    assert orders[0] == orders[2] != orders[1]
    assert list(EpochSampler(20, seed=4)) != list(EpochSampler(20, seed=3))


def test_collate():
    items = [
        {"image": torch.full((2, 1, 3, 3, 1), i), "label": torch.full((2, 4, 3, 3, 1), i), "case": f"c{i}"}
        for i in (1, 2, 3)
    ]
    batch = collate(items)
    assert batch["image"][:, 0, 0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert batch["label"].shape == (6, 4, 3, 3, 1)
    assert batch["case"] == ["c1", "c2", "c3"]


@pytest.mark.parametrize(
    "wrong",
    [{"labels": []}, {"seed": -1}, {"patches_per_volume": 0}, {"foreground_fraction": 1.5}],
)
def test_wrong_settings(case, wrong):
    with pytest.raises(SegraftError):
        source([case], **wrong)


@pytest.mark.parametrize(
    ("orientation", "flip_axes", "expected"),
    [("RAS", None, (0,)), ("SPL", None, (2,)), ("RAS", (), ()), ("RAS", (0, 2), (0, 2))],
)
def test_mirrored_axes(case, orientation, flip_axes, expected):
    preparation = Preparation(orientation=orientation, intensity=PLAIN, patch=(4, 4, 4))
    patches = PatchSource([case], preparation, [1], seed=0, flip_axes=flip_axes)
    rng = np.random.default_rng(0)
    seen = {axis for _ in range(50) for axis, part in enumerate(patches._augmentation.flip(rng)) if part.step == -1}
    assert seen == set(expected)


@pytest.mark.parametrize("patch", [(9, 9, 9), (9, 8, 1)])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 5)])
def test_turns_are_rotations_in_millimetres(patch, spacing):
    spacing = np.array(spacing)
    rng = np.random.default_rng(0)
    drawn = [Augmentation(()).warp(patch, spacing, rng) for _ in range(400)]
    turns = [turn for turn in drawn if turn is not None]
    assert len(turns) == pytest.approx(80, abs=30)
    for turn in turns:
        metric = turn * spacing[:, None] / spacing
        if patch[2] == 1:
            np.testing.assert_allclose(metric[2], [0, 0, 1], atol=1e-12)
            np.testing.assert_allclose(metric[:, 2], [0, 0, 1], atol=1e-12)
            metric = metric[:2, :2]
        gram = metric.T @ metric
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-12)
        assert np.linalg.det(metric) > 0
        assert 1 / 1.18 <= np.sqrt(gram[0, 0]) <= 1 / 0.85
        if patch[2] == 1:
            assert metric[0, 0] / np.sqrt(gram[0, 0]) >= np.cos(np.radians(15)) - 1e-12


def test_a_turned_patch_samples_the_volume_about_its_centre():
    volume = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    turn = None
    rng = np.random.default_rng(1)
    while turn is None:
        turn = Augmentation(()).warp((5, 4, 3), np.array([1, 1, 2]), rng)
    start = np.array([4, 4, 3])
    offsets = np.indices((5, 4, 3)).reshape(3, -1) - np.array([[2], [1.5], [1]])
    where = turn @ offsets + start[:, None] + np.array([[2], [1.5], [1]])
    for order, tolerance in ((1, 1e-6), (0, 0)):
        expected = map_coordinates(volume, where, order=order).reshape(5, 4, 3)
        np.testing.assert_allclose(cut(volume, start, (5, 4, 3), turn, order=order), expected, atol=tolerance)
    np.testing.assert_allclose(
        cut(volume, start, (5, 4, 3), np.eye(3), order=1), cut(volume, start, (5, 4, 3), None, order=1), atol=1e-6
    )


def test_intensity_changes_are_mild_and_keep_the_order():
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 50, dtype=np.float32)
    for _ in range(100):
        image = ramp.copy()
        Augmentation(()).recolour(image, rng)
        assert (np.diff(image) > 0).all()
        assert -0.1 <= image[0] <= 0.1
        assert 0.8 <= image[-1] <= 1.2
        assert np.abs(image - ramp).max() < 0.4


@pytest.mark.data
def test_real_patches(real_data):
    cohort = Cohort.read(real_data / "hippocampus")
    patches = PatchSource(cohort.cases[:5], Preparation(patch=(32, 32, 32)), [1, 2], seed=0, patches_per_volume=4)
    for key in EpochSampler(5, seed=0):
        item = patches[key]
        assert torch.isfinite(item["image"]).all()
        assert item["label"].sum(dim=(2, 3, 4)).any(dim=0).all()
