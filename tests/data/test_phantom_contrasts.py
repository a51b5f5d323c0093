"""Phantom brains in four contrasts: what each channel shows of a tumour, and the files."""

import json

import nibabel as nib
import numpy as np
import pytest

from segraft.data.checks import check_cases
from segraft.data.cohort import Cohort
from segraft.data.phantom_contrast_cohort import REGIONS, write_contrast_cohort, write_unlabelled_contrasts
from segraft.data.phantom_contrasts import CHANNELS, CORE, EDEMA, ENHANCING, SHAPE, SIGNALS, SPACING_MM, brain
from segraft.errors import SegraftError
from segraft.jobs.unlabelled import read_unlabelled

SEEDS = range(12)
every_brain = pytest.mark.parametrize("seed", SEEDS)


def draw(seed: int, **grid):
    return brain(np.random.default_rng(seed), **grid)


def told_apart(values, others) -> float:
    """How well a threshold tells two samples apart: the area under the ROC curve, folded to 0.5…1."""
    both = np.concatenate([values, others])
    ranks = both.argsort().argsort() + 1.0
    area = (ranks[: len(values)].sum() - len(values) * (len(values) + 1) / 2) / (len(values) * len(others))
    return max(area, 1 - area)


@every_brain
def test_parts_lie_within_one_another_and_are_all_there(seed):
    _, label = draw(seed)
    assert label.dtype == np.uint8
    assert label.shape == SHAPE
    volumes = [np.isin(label, values).sum() for values in REGIONS.values()]
    assert volumes == sorted(volumes, reverse=True)
    assert len(set(volumes)) == 3
    assert min(np.bincount(label.ravel(), minlength=4)[1:]) >= 16
    assert 5 < volumes[0] * np.prod(SPACING_MM) / 1000 < 250  # mL


@every_brain
def test_it_is_a_brain_without_its_skull(seed):
    image, label = draw(seed)
    assert image.dtype == np.int16
    assert image.shape == (*SHAPE, 4)
    inside = (image > 0).any(-1)
    assert 900 < inside.sum() * np.prod(SPACING_MM) / 1000 < 1900  # mL
    assert not (image[0] > 0).any(), "air at the side"
    assert inside[label > 0].all()
    middle = [float(at) for at in np.mean(np.argwhere(inside), axis=0)]
    assert middle == pytest.approx([(size - 1) / 2 for size in SHAPE], abs=3)


BORDERS = {
    "oedema from white matter": ({"T1": False, "T1c": False, "T2": True, "FLAIR": True}, (EDEMA,), "white"),
    "core from oedema": ({"T1": True, "T1c": True, "T2": False, "FLAIR": False}, (CORE,), (EDEMA,)),
    "what enhances from the core": ({"T1": False, "T1c": True, "T2": False, "FLAIR": False}, (ENHANCING,), (CORE,)),
}


@pytest.mark.parametrize("border", BORDERS)
def test_which_channel_shows_which_border(border):
    """Of single voxels deep within each part, over scans, so that no partial volume or uneven coil counts."""
    from scipy import ndimage

    seen, of, others = BORDERS[border]
    areas = {name: [] for name in CHANNELS}
    for seed in SEEDS:
        image, label = draw(seed)
        if others == "white":
            t1 = image[..., 0]
            near = ndimage.binary_dilation(label > 0, iterations=5) & ~ndimage.binary_dilation(label > 0)
            against = near & (t1 > np.percentile(t1[t1 > 0], 75))  # only white matter is that bright in T1
            part = label == EDEMA
            part &= t1 > np.percentile(t1[t1 > 0], 75)  # oedema of white matter, which T1 does not tell
        else:
            against, part = np.isin(label, others), np.isin(label, of)
            surface = ndimage.binary_erosion(np.isin(label, (*of, *others)))
            against, part = against & surface, part & surface
        if min(part.sum(), against.sum()) < 20:
            continue
        for place, name in enumerate(CHANNELS):
            areas[name].append(told_apart(image[part][:, place], image[against][:, place]))
    means = {name: float(np.mean(found)) for name, found in areas.items()}
    assert {name: mean > 0.8 for name, mean in means.items()} == seen, means


def test_no_contrast_shows_all_parts():
    """By the table of signals, which is what `BORDERS` sees of the scans."""
    for place in range(len(CHANNELS)):
        assert any(np.isnan(SIGNALS[part][place]) for part in ("edema", "core", "enhancing"))
    for part in ("edema", "core", "enhancing"):
        assert not np.isnan(SIGNALS[part]).all(), f"{part} shows somewhere"


def test_the_same_state_gives_the_same_brain_and_another_another():
    for first, second, same in ((1, 1, True), (1, 2, False)):
        assert all(np.array_equal(a, b) is same for a, b in zip(draw(first), draw(second), strict=True))


def test_scans_have_a_gain_of_their_own():
    brightest = np.array([np.percentile(draw(seed)[0][..., :], 99, axis=(0, 1, 2)) for seed in SEEDS])
    assert (brightest.std(0) > 0.15 * brightest.mean(0)).all()
    correlation = np.corrcoef(brightest.T)[~np.eye(4, dtype=bool)]
    assert (correlation < 0.9).all(), "each contrast has its own"


def test_another_grid_shows_the_same_brain():
    coarse = draw(3)[1]
    fine = draw(3, shape=(72, 72, 48), spacing=tuple(each * 2 / 3 for each in SPACING_MM))[1]
    for values in REGIONS.values():
        volumes = [np.isin(label, values).sum() * voxel for label, voxel in ((coarse, 1.0), (fine, (2 / 3) ** 3))]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.1)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"shape": (40, 48, 32)}, "at least"),
        ({"spacing": (0.0, 3.6, 3.8)}, "at least"),
        ({"shape": (10, 10, 8), "spacing": (18.0, 18.0, 18.0)}, "smaller voxel spacing"),
    ],
)
def test_a_grid_that_holds_no_tumour_is_refused(grid, says):
    with pytest.raises(SegraftError, match=says):
        draw(0, **grid)


def test_the_cohort_is_read_with_its_regions(tmp_path):
    cohort = Cohort.read(write_contrast_cohort(tmp_path / "C", patients=3, seed=0))
    assert cohort.channels == CHANNELS
    assert dict(cohort.labels) == {1: "WT", 2: "TC", 3: "ET"}
    assert [cohort.labels.covers(value) for value in cohort.labels] == [(1, 2, 3), (2, 3), (3,)]
    assert [case.patient for case in cohort.cases] == ["brain_000", "brain_001", "brain_002"]
    check_cases(cohort.cases, cohort, cohort.labels)
    case = cohort.cases[1]
    image, label = brain(np.random.default_rng([0, 0, 1]))
    assert np.array_equal(np.asanyarray(nib.load(case.image).dataobj), image)
    assert np.array_equal(np.asanyarray(nib.load(case.label).dataobj), label)
    scan = case.load()
    assert np.allclose(np.diag(scan.first.affine)[:3], SPACING_MM)
    assert np.array_equal(np.asanyarray(scan.channels[3].dataobj), image[..., 3])


def test_a_larger_cohort_begins_with_the_smaller_one(tmp_path):
    for patients in (1, 2):
        write_contrast_cohort(tmp_path / str(patients), patients=patients, seed=4)
    first = [(tmp_path / str(n) / "imagesTr" / "phantom_brain_000.nii.gz").read_bytes() for n in (1, 2)]
    assert first[0] == first[1]


def test_scans_without_labels_are_of_others_and_of_one_channel_each(tmp_path):
    others = read_unlabelled(write_unlabelled_contrasts(tmp_path / "U", patients=5, seed=0))
    labelled = Cohort.read(write_contrast_cohort(tmp_path / "C", patients=5, seed=0))
    assert not {case.patient for case in others.cases} & {case.patient for case in labelled.cases}
    digests = {digest for case in labelled.cases for digest in case.digest().split("-")}
    assert not digests & {case.digest() for case in others.cases}
    for number, case in enumerate(others.cases):
        image = brain(np.random.default_rng([0, 1, number]))[0][..., number % 4]
        assert np.array_equal(np.asanyarray(nib.load(case.image).dataobj), image)
        assert case.label is None


def test_a_folder_of_another_data_set_is_left_alone(tmp_path):
    for write, name in ((write_contrast_cohort, "dataset.json"), (write_unlabelled_contrasts, "unlabelled.json")):
        (tmp_path / name).write_text(json.dumps({"name": "mine"}))
        with pytest.raises(SegraftError, match="belongs to another data set"):
            write(tmp_path, patients=1, seed=0)
        assert json.loads((tmp_path / name).read_text()) == {"name": "mine"}


@pytest.mark.parametrize("asked", [{"patients": 0, "seed": 0}, {"patients": 1, "seed": -1}])
def test_cohorts_that_cannot_be_drawn(tmp_path, asked):
    for write in (write_contrast_cohort, write_unlabelled_contrasts):
        with pytest.raises(SegraftError, match="cannot be drawn"):
            write(tmp_path / "none", **asked)
    assert not (tmp_path / "none").exists()
