"""The phantom cohort: volumes, intensities, where the blood lies, and the files."""

import json
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segraft.data import phantom
from segraft.data.cohort import Cohort
from segraft.data.phantom import SHAPE, SPACING_MM, Task, head, write_cohort
from segraft.data.strata import STRATA_ML
from segraft.errors import SegraftError

TASKS = get_args(Task)
HEADS = [(task, stratum, seed) for task in TASKS for stratum in range(4) for seed in (0, 7)]
every_head = pytest.mark.parametrize(("task", "stratum", "seed"), HEADS)


def draw(task: str, stratum: int, seed: int, **grid) -> tuple[np.ndarray, np.ndarray]:
    return head(np.random.default_rng(seed), task=task, stratum=stratum, **grid)


def millilitres(mask: np.ndarray, spacing: tuple[float, float, float] = SPACING_MM) -> float:
    return np.count_nonzero(mask) * np.prod(spacing) / 1000


def skull_and_inside(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bone, and what every slice's ring of bone encloses, seen from the image alone."""
    bone = image > 250
    closed = np.stack([ndimage.binary_fill_holes(s) for s in np.moveaxis(bone, 2, 0)], axis=2)
    return bone, closed & ~bone


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stratum", range(4))
def test_volume_lies_in_the_stratum(task: str, stratum: int):
    low, high = STRATA_ML[stratum]
    volumes = [millilitres(draw(task, stratum, seed)[1]) for seed in range(12)]
    assert all(max(low, 5 * (1 - 1e-9)) <= v <= high and v > low for v in volumes)
    assert np.std(volumes) > 0.1 * (high - low)  # anywhere in it, not one fixed volume


@settings(max_examples=12, deadline=None)
@given(
    spacing=st.tuples(st.floats(1.8, 5), st.floats(1.8, 5), st.floats(3, 12)),
    stratum=st.integers(0, 3),
    task=st.sampled_from(TASKS),
    seed=st.integers(0, 2**32),
)
def test_volume_lies_in_the_stratum_on_any_grid(spacing, stratum: int, task: str, seed: int):
    shape = tuple(int(np.ceil(extent / s)) for extent, s in zip((211, 211, 140), spacing, strict=True))
    image, mask = draw(task, stratum, seed, shape=shape, spacing=spacing)
    assert image.shape == mask.shape == shape
    low, high = STRATA_ML[stratum]
    assert low < millilitres(mask, spacing) <= high


@every_head
def test_intensities_are_those_of_a_head_ct(task: str, stratum: int, seed: int):
    image, mask = draw(task, stratum, seed)
    assert image.dtype == np.int16
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}
    bone, inside = skull_and_inside(image)
    brain = image[inside & (mask == 0)].mean()
    blood = image[mask == 1].mean()
    assert 25 < brain < 45
    assert 45 < blood < 75
    assert blood > brain + 12
    assert np.median(image[bone]) > 500
    assert 900 < np.percentile(image[bone], 99) < 1400
    assert np.median(image[0]) == pytest.approx(-1000, abs=5)  # air at the side of the scan


@every_head
def test_blood_lies_within_the_skull(task: str, stratum: int, seed: int):
    image, mask = draw(task, stratum, seed)
    _, inside = skull_and_inside(image)
    assert not np.any((mask == 1) & ~inside)
    assert 1000 < millilitres(inside) < 1800  # a cranial cavity


def test_the_head_has_the_size_of_a_head_and_fits_its_scan():
    for seed in range(10):
        image, _ = draw("traumatic", 0, seed)
        bone = image > 250
        extent = [np.ptp(np.flatnonzero(bone.any(axis=others))) for others in ((1, 2), (0, 2), (0, 1))]
        across, along, up = np.multiply(extent, SPACING_MM)
        assert 125 < across < 165
        assert 155 < along < 200
        assert 105 < up < 140
        assert across < along
        assert not bone[[0, -1]].any()
        assert not bone[:, [0, -1]].any()


def where(task: str, stratum: int, seed: int) -> tuple[float, float, float]:
    """Distance (mm) from bone to the connected part farthest from it, share of the largest part, share of the core.

    The core is what is left of the blood after taking one voxel off all round in the slice.
    """
    image, mask = draw(task, stratum, seed)
    bone, _ = skull_and_inside(image)
    to_bone = ndimage.distance_transform_edt(~bone, sampling=SPACING_MM)
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    farthest = np.max(ndimage.minimum(to_bone, parts, range(1, count + 1)))
    largest = np.bincount(parts[parts > 0]).max() / np.count_nonzero(mask)
    core = np.count_nonzero(ndimage.binary_erosion(mask, np.ones((3, 3, 1)))) / np.count_nonzero(mask)
    return float(farthest), largest, core


@pytest.mark.parametrize("stratum", range(4))
def test_traumatic_blood_is_one_mass_on_the_skull_and_subarachnoid_blood_deep_thin_and_scattered(stratum: int):
    traumatic, subarachnoid = (
        np.array([where(task, stratum, seed) for seed in range(8)]).T for task in ("traumatic", "subarachnoid")
    )
    assert np.all(traumatic[0] <= max(SPACING_MM))  # every part touches the inner table
    assert np.all(subarachnoid[0] > 2 * SPACING_MM[0])
    assert np.all(traumatic[1] > 0.9)
    assert np.median(subarachnoid[1]) < 0.95  # much blood fills clefts that run into each other
    # A thin crescent is thin too, so thickness is compared between the tasks and not head by head.
    assert np.mean(traumatic[2]) > 1.2 * np.mean(subarachnoid[2])


@pytest.mark.parametrize("stratum", range(4))
def test_subarachnoid_blood_replaces_fluid(stratum: int, monkeypatch: pytest.MonkeyPatch):
    """The same head before blood is painted: what the mask covers is darker than brain, for the most part."""
    seen = {}
    contents, lowest = phantom.painting.contents, phantom.bleeding.lowest

    def bloodless(*args):
        seen["image"] = contents(*args)
        return seen["image"].copy()

    def blood(*args):
        seen["blood"] = lowest(*args)
        return seen["blood"]

    monkeypatch.setattr(phantom.painting, "contents", bloodless)
    monkeypatch.setattr(phantom.bleeding, "lowest", blood)
    draw("subarachnoid", stratum, 3)
    before, mask = seen["image"], seen["blood"].mask
    assert np.mean(before[mask] < 25) > 0.8
    assert np.mean(before[~mask] < 25) < 0.45


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_voxels(task: str):
    first, again, other = (draw(task, 1, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_the_anatomy_does_not_depend_on_the_grid():
    fine, fine_mask = draw("traumatic", 1, 4, shape=(141, 141, 40), spacing=(1.5, 1.5, 3.5))
    coarse, coarse_mask = draw("traumatic", 1, 4)
    centre = [
        np.multiply(np.subtract(ndimage.center_of_mass(m), np.subtract(m.shape, 1) / 2), s)
        for m, s in ((fine_mask, (1.5, 1.5, 3.5)), (coarse_mask, SPACING_MM))
    ]
    assert np.allclose(*centre, atol=3)
    spacings = ((1.5, 1.5, 3.5), SPACING_MM)
    cavities = [millilitres(skull_and_inside(i)[1], s) for i, s in zip((fine, coarse), spacings, strict=True)]
    assert cavities[0] == pytest.approx(cavities[1], rel=0.05)


@pytest.mark.parametrize("task", TASKS)
def test_cohort_on_disk(task: str, tmp_path: Path):
    listing = write_cohort(tmp_path / "cohort", task=task, patients=5, seed=2)
    assert listing == tmp_path / "cohort" / "dataset.json"
    content = json.loads(listing.read_text())
    assert content["name"].startswith("PHANTOM")
    assert "no patients" in content["description"]
    assert content["labels"] == {"0": "background", "1": "haematoma"}
    assert content["modality"] == {"0": "CT"}
    assert content["numTraining"] == len(content["training"]) == 5
    assert len({entry["patient"] for entry in content["training"]}) == 5
    for k, entry in enumerate(content["training"]):
        image, label = (nib.load(listing.parent / entry[part]) for part in ("image", "label"))
        assert Path(entry["image"]).name == f"phantom_{task}_{k:03d}.nii.gz"
        assert image.shape == label.shape == SHAPE
        assert np.array_equal(image.affine, label.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert np.allclose(image.header.get_zooms(), SPACING_MM)
        assert np.allclose(image.affine @ [*(np.subtract(SHAPE, 1) / 2), 1], [0, 0, 0, 1], atol=1e-3)
        low, high = STRATA_ML[k % 4]
        assert low < millilitres(np.asanyarray(label.dataobj)) <= high
    assert {p.name for p in listing.parent.iterdir()} == {"imagesTr", "labelsTr", "dataset.json"}


def test_the_cohort_reader_accepts_it(tmp_path: Path):
    cohort = Cohort.read(write_cohort(tmp_path, task="traumatic", patients=2, seed=0))
    assert cohort.labels == {1: "haematoma"}
    assert [case.patient for case in cohort.cases] == ["traumatic_000", "traumatic_001"]


def test_a_larger_cohort_begins_with_the_smaller_one(tmp_path: Path):
    small = write_cohort(tmp_path / "small", task="subarachnoid", patients=1, seed=3).parent
    large = write_cohort(tmp_path / "large", task="subarachnoid", patients=2, seed=3).parent
    for part in ("imagesTr", "labelsTr"):
        first, again = (nib.load(f / part / "phantom_subarachnoid_000.nii.gz") for f in (small, large))
        assert np.array_equal(np.asanyarray(first.dataobj), np.asanyarray(again.dataobj))


def test_a_cohort_is_rewritten_but_never_over_another_data_set(tmp_path: Path):
    write_cohort(tmp_path, task="traumatic", patients=1, seed=0)
    listing = write_cohort(tmp_path, task="traumatic", patients=2, seed=1)
    assert json.loads(listing.read_text())["numTraining"] == 2
    with pytest.raises(SegraftError, match="belongs to another data set"):
        write_cohort(tmp_path, task="subarachnoid", patients=1, seed=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "stroke"}, 'no task "stroke"'),
        ({"patients": 0}, "at least 1 patient"),
        ({"seed": -1}, "seed of 0 or more"),
        ({"shape": (48, 96, 20)}, "too small for a head"),
        ({"spacing": (2.2, 2.2, float("nan"))}, "too small for a head"),
        ({"shape": (4, 4, 4), "spacing": (60.0, 60.0, 50.0)}, "smaller voxel spacing"),
        ({"shape": (10, 10, 6), "spacing": (30.0, 30.0, 30.0)}, "smaller voxel spacing"),
    ],
)
def test_bad_input_is_refused_before_a_file_is_written(wrong: dict, message: str, tmp_path: Path):
    asked = {"task": "traumatic", "patients": 1, "seed": 0} | wrong
    with pytest.raises(SegraftError, match=message):
        write_cohort(tmp_path / "none", **asked)
    assert not (tmp_path / "none").exists()


def test_an_unknown_stratum_is_refused():
    with pytest.raises(SegraftError, match="stratum 4"):
        draw("traumatic", 4, 0)
