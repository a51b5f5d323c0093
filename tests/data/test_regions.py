"""Regions that may overlap: how they are listed and asked for, what patches are given of them, how they are painted."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from segraft.data.checks import check_cases
from segraft.data.cohort import Cohort
from segraft.data.labels import Labels, paint_values
from segraft.data.patches import PatchSource
from segraft.data.preparation import Preparation, prepare_case
from segraft.errors import SegraftError

TUMOUR = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}
REGIONS = {1: (1, 2, 3), 2: (2, 3), 3: (3,)}
PARTS = {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing"}
IMAGE = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
LABEL = np.zeros(IMAGE.shape, np.uint8)
LABEL[1:7, 1:7, 1:7], LABEL[2:6, 2:6, 2:6], LABEL[3:5, 3:5, 3:5] = 1, 2, 3


def test_read_nnunet(write_listing):
    cohort = Cohort.read(write_listing(labels=TUMOUR, regions_class_order=[1, 2, 3]))
    assert cohort.labels == {1: "whole tumor", 2: "tumor core", 3: "enhancing tumor"}
    assert cohort.labels.regions == REGIONS
    assert cohort.values == (1, 2, 3)
    asked = cohort.select_labels(["enhancing tumor", "1"])
    assert list(asked.items()) == [(3, "enhancing tumor"), (1, "whole tumor")]
    assert asked.regions == {1: (1, 2, 3), 3: (3,)}
    assert list(asked.regions) == [1, 3], "painted in the listed order, whatever the order asked"


def test_the_class_order_says_what_is_painted_when(write_listing):
    labels = {"background": 0, "core": [1, 4], "whole": [1, 2, 4]}
    cohort = Cohort.read(write_listing(labels=labels, regions_class_order=[1, 2]))
    assert cohort.labels == {1: "core", 2: "whole"}
    assert cohort.labels.regions == {1: (1, 4), 2: (1, 2, 4)}
    planes = {1: LABEL == 3, 2: LABEL > 0}
    assert set(np.unique(cohort.labels.painted(planes))) == {0, 2}, "the whole was listed last, so it lies above"


@pytest.mark.parametrize(
    "order", [None, [1, 2], [1, 2, 2], [1, 2, "3"], [0, 1, 2], [1, 2, 3, 4], "123", [1, 2, True, 3]]
)
def test_regions_without_their_order(write_listing, order):
    with pytest.raises(SegraftError, match="regions_class_order must list another number above 0 for each of the 3"):
        Cohort.read(write_listing(labels=TUMOUR, regions_class_order=order))


@pytest.mark.parametrize("bad", [[1, "2"], [1, -2], [[1]], [True]])
def test_regions_of_no_numbers(write_listing, bad):
    with pytest.raises(SegraftError, match="labels must be numbers"):
        Cohort.read(write_listing(labels={"a": bad, "b": 2}, regions_class_order=[1, 2]))


@pytest.mark.parametrize(
    ("asked", "names", "regions"),
    [
        (["WT=1+2+3", "TC=2+3", "ET=3"], {1: "WT", 2: "TC", 3: "ET"}, REGIONS),
        (["WT=1+2+3", "TC=necrosis + Enhancing", "3"], {1: "WT", 2: "TC", 3: "enhancing"}, REGIONS),
        (["A=1+2", "B=2+3"], {1: "A", 3: "B"}, {1: (1, 2), 3: (2, 3)}),
        (["ET=3", "rest=1+2"], {3: "ET", 1: "rest"}, {3: (3,), 1: (1, 2)}),
        (["all=3+2+1+1"], {3: "all"}, {3: (3, 2, 1)}),
    ],
)
def test_regions_asked_for(write_listing, asked, names, regions):
    cohort = Cohort.read(write_listing(labels=PARTS))
    found = cohort.select_labels(asked)
    assert list(found.items()) == list(names.items())
    assert found.regions == regions
    again = cohort.select_labels(found.asked_of(cohort.select_labels([])))
    assert (again, again.regions) == (found, found.regions), "a study asks for them again"


def test_the_labels_of_brats_2018_come_back():
    """1 necrosis, 2 edema, 4 enhancing: the mask of three nested regions is a label map again."""
    covers = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}
    regions = paint_values(covers)
    assert regions == {2: (1, 2, 4), 1: (1, 4), 4: (4,)}
    truth = np.array([[[0, 1, 2, 4]]])
    labels = Labels(zip(regions, covers, strict=True), regions)
    np.testing.assert_array_equal(labels.map_of(truth), truth)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["ET=3", "WT=1+2+3"], "the regions after ET cover all of it"),
        (["WT=1+9"], 'no label "9"'),
        (["WT=1+liver"], 'no label "liver"'),
        (["WT="], "has an empty part"),
        (["WT=1++2"], "has an empty part"),
        (["=1+2"], "has no name"),
        (["WT=1+2", "wt=3"], 'the region "wt" of .* is asked for twice'),
        (["WT=1+2", "1", "edema"], r"label 1 \(edema\) of .* is asked for twice"),
    ],
)
def test_regions_asked_for_wrongly(write_listing, asked, says):
    cohort = Cohort.read(write_listing(labels=PARTS))
    with pytest.raises(SegraftError, match=says):
        cohort.select_labels(asked)


def test_a_number_in_a_region_is_a_value_of_the_masks(write_listing):
    cohort = Cohort.read(write_listing(labels=TUMOUR, regions_class_order=[1, 2, 3]))
    assert cohort.select_labels(["rim=1+2"]).regions == {1: (1, 2)}
    assert cohort.select_labels(["rim=tumor core"]).regions == {2: (2, 3)}


def test_copies_keep_what_they_cover():
    labels = Labels({1: "a", 3: "b"}, {1: (1, 2), 3: (2, 3)})
    for other in (copy.deepcopy(labels), pickle.loads(pickle.dumps(labels)), Labels.of(labels)):
        assert (other, other.regions) == (labels, labels.regions)
    assert json.loads(json.dumps(labels)) == {"1": "a", "3": "b"}


def test_planes_overlap(write_case):
    labels = Labels({1: "WT", 2: "TC", 3: "ET"}, REGIONS)
    planes = prepare_case(write_case("a", IMAGE, LABEL), Preparation(), labels)["label"]
    np.testing.assert_array_equal(planes.numpy(), np.stack([LABEL > 0, LABEL > 1, LABEL > 2]))


def test_patches(write_case):
    """Each region is the centre of patches as often as another, though one lies within another."""
    labels = Labels({2: "TC", 1: "WT", 3: "ET"}, REGIONS)
    patches = PatchSource(
        [write_case("a", IMAGE, LABEL)], Preparation(patch=(1, 1, 1)), labels, seed=0, patches_per_volume=600,
        foreground_fraction=1, augmentation="none",
    )  # fmt: skip
    found = patches[0, 0]["label"].flatten(1)
    assert found.shape == (600, 3)
    counts = [np.count_nonzero(least <= LABEL) for least in (1, 2, 3)]
    inner, core, whole = found[:, 2].mean(), found[:, 0].mean(), found[:, 1].mean()
    assert float(whole) == 1
    # by hand: a third is drawn in each, and a draw in an outer one falls into an inner one by its share of voxels
    assert float(core) == pytest.approx((2 + counts[1] / counts[0]) / 3, abs=0.05)
    assert float(inner) == pytest.approx((1 + counts[2] / counts[1] + counts[2] / counts[0]) / 3, abs=0.05)


def test_exclusive_labels_are_their_own_regions(write_case):
    case = write_case("a", IMAGE, LABEL)
    patches = [
        PatchSource([case], Preparation(patch=(4, 4, 4)), labels, seed=0)[3, 0]
        for labels in ([3, 1], {3: "x", 1: "y"}, Labels({3: "x", 1: "y"}, {3: (3,), 1: (1,)}))
    ]
    for other in patches[1:]:
        assert torch.equal(other["label"], patches[0]["label"])
        assert torch.equal(other["image"], patches[0]["image"])


def test_check_cases(write_case, write_listing):
    cohort = Cohort.read(write_listing(labels=TUMOUR, regions_class_order=[1, 2, 3]))
    without = write_case("a", IMAGE, np.where(LABEL == 3, 2, LABEL).astype(np.uint8))
    check_cases([without], cohort, cohort.select_labels(["whole tumor", "tumor core"]))
    with pytest.raises(SegraftError, match=r"label 3 \(enhancing tumor\) is in none of the 1 training cases"):
        check_cases([without], cohort, cohort.labels)
    with pytest.raises(SegraftError, match="holds the value 4"):
        check_cases([write_case("b", IMAGE, LABEL + (LABEL == 3))], cohort, cohort.labels)
