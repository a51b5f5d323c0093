"""Layouts that data sets are published in: told apart by what is there, each read as its authors mean it."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.case import Case
from segraft.data.checks import check_cases, load_case
from segraft.data.cohort import Cohort
from segraft.data.flare import ORGANS
from segraft.data.layouts import LAYOUTS
from segraft.data.preparation import Preparation, prepare_case
from segraft.data.splits import draw
from segraft.errors import SegraftError

SHAPE = (5, 6, 7)
IMAGE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
AFFINE = np.diag([1.5, 1.5, 1.5, 1])


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def box(low: int, high: int) -> np.ndarray:
    """1 in the slices `low` to `high` - 1 along the last axis."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[..., low:high] = 1
    return mask


def organs(case: Path, scan: str = "ct.nii.gz", **masks: np.ndarray) -> Path:
    """A case of TotalSegmentator's."""
    save(case / scan, IMAGE + float(sum(map(ord, case.name)) % 7))
    for name, mask in masks.items():
        save(case / "segmentations" / f"{name}.nii.gz", mask)
    return case


@pytest.fixture
def total(tmp_path: Path) -> Path:
    """Three cases; the second has no spleen in view, the third a colon as well."""
    folder = tmp_path / "TS"
    organs(folder / "s0002", liver=box(0, 3), spleen=box(0, 0))
    organs(folder / "s0000", liver=box(0, 2), spleen=box(5, 7))
    organs(folder / "s0010", liver=box(1, 2), spleen=box(2, 4), colon=box(4, 5))
    (folder / "meta.csv").write_text(
        "\ufeffimage_id;age;gender;institute;study_type;split\ns0000;45;m;C;ct thorax;train\n"
    )
    return folder


def flare(folder: Path, names: Sequence[str], *, folders: tuple[str, str] = ("imagesTr", "labelsTr")) -> Path:
    for place, name in enumerate(names):
        save(folder / folders[0] / f"{name}_0000.nii.gz", IMAGE + place)
        save(folder / folders[1] / f"{name}.nii.gz", box(0, 2) * np.uint8(13) + box(3, 4) * np.uint8(1))
    return folder


# What is there decides.


def test_a_folder_in_no_layout(tmp_path):
    save(tmp_path / "scans" / "a.nii.gz", IMAGE)
    with pytest.raises(SegraftError, match="in none of the layouts that are read") as caught:
        Cohort.read(tmp_path)
    for word in (
        "dataset.json",
        "TotalSegmentator",
        "FLARE'22",
        ".txt",
        str(tmp_path),
        *(each.name for each in LAYOUTS),
    ):
        assert word in str(caught.value)


def test_a_dataset_json_comes_first(total):
    listing = {
        "labels": {"1": "all"},
        "training": [{"image": "s0000/ct.nii.gz", "label": "s0000/segmentations/liver.nii.gz"}],
    }
    (total / "dataset.json").write_text(json.dumps(listing))
    cohort = Cohort.read(total)
    assert cohort.labels == {1: "all"}
    assert cohort.path == total / "dataset.json"
    (case,) = cohort.cases
    assert np.array_equal(load_case(case)[1].get_fdata(), box(0, 2))


# TotalSegmentator.


def test_read_totalsegmentator(total):
    cohort = Cohort.read(total)
    assert cohort.labels == {1: "colon", 2: "liver", 3: "spleen"}
    assert [case.id for case in cohort.cases] == [case.patient for case in cohort.cases] == ["s0000", "s0002", "s0010"]
    assert (cohort.name, cohort.path, cohort.modalities) == ("TS", total, ("CT",))
    assert cohort.cases[0] == Case(
        "s0000", "s0000", (total / "s0000/ct.nii.gz",), total / "s0000/segmentations", ("colon", "liver", "spleen")
    )


def test_a_region_of_several_organs(total):
    """Read are the masks that it covers, and no others; which they are is part of the label's digest."""
    cohort = Cohort.read(total)
    asked = cohort.select_labels(["abdomen=liver+spleen", "liver"])
    assert (asked, asked.regions) == ({3: "abdomen", 2: "liver"}, {3: (2, 3), 2: (2,)})
    check_cases(cohort.cases, cohort, asked)
    case = cohort.cases[0]
    planes = prepare_case(case, Preparation(orientation="RAS"), asked)["label"]
    assert planes.sum((1, 2, 3)).tolist() == [box(0, 2).sum() + box(5, 7).sum(), box(0, 2).sum()]
    other = cohort.select_labels(["abdomen=liver", "spleen"])
    assert case.label_digest(asked) == case.label_digest(other) == case.label_digest([2, 3])
    assert case.label_digest(asked) != case.label_digest(cohort.select_labels(["abdomen=liver"]))


def test_the_mr_set(tmp_path):
    organs(tmp_path / "s0001", "mri.nii.gz", liver=box(0, 2))
    cohort = Cohort.read(tmp_path)
    assert cohort.modalities == ("MR",)
    assert cohort.cases[0].image.name == "mri.nii.gz"


def test_patients_of_cases_told_by_a_pattern(tmp_path):
    for name in ("p1_a", "p1_b", "p2_a"):
        organs(tmp_path / name, liver=box(0, 2))
    cohort = Cohort.read(tmp_path, patient_pattern=r"(p\d+)_")
    assert [case.patient for case in cohort.cases] == ["p1", "p1", "p2"]
    with pytest.raises(SegraftError, match="does not match the case p1_a"):
        Cohort.read(tmp_path, patient_pattern="(x)")


def test_only_the_masks_asked_for_are_read(total):
    cohort = Cohort.read(total)
    for mask in total.glob("*/segmentations/[cl]*.nii.gz"):
        mask.write_bytes(b"not read")
    asked = cohort.select_labels(["spleen"])
    check_cases(cohort.cases, cohort, asked)
    _, label = load_case(cohort.cases[0], asked)
    assert np.array_equal(np.asanyarray(label.dataobj), 3 * box(5, 7))
    prepared = prepare_case(cohort.cases[0], Preparation(), [3])
    assert np.array_equal(prepared["label"][0].numpy(), box(5, 7))
    with pytest.raises(SegraftError, match=r"liver\.nii\.gz is not a NIfTI file"):
        check_cases(cohort.cases, cohort, cohort.select_labels(["liver"]))


def test_planes_come_in_the_order_asked(total):
    case = Cohort.read(total).cases[2]
    label = prepare_case(case, Preparation(), [3, 1, 2])["label"].numpy()
    for plane, mask in zip(label, (box(2, 4), box(4, 5), box(1, 2)), strict=True):
        assert np.array_equal(plane, mask)


def test_more_than_255_organs_can_be_listed(tmp_path):
    organs(tmp_path / "s0001", liver=box(0, 2))
    for number in range(300):
        (tmp_path / "s0001/segmentations" / f"a{number:03}.nii.gz").touch()
    cohort = Cohort.read(tmp_path)
    _, label = load_case(cohort.cases[0], cohort.select_labels(["liver"]))
    assert np.array_equal(np.asanyarray(label.dataobj), 301 * box(0, 2).astype(int))


def test_an_organ_that_is_in_no_case(total):
    cohort = Cohort.read(total)
    with pytest.raises(SegraftError, match=r"label 3 \(spleen\) is in none of the 1 training cases of .*TS"):
        check_cases(cohort.cases[1:2], cohort, cohort.select_labels(["liver", "spleen"]))
    check_cases(cohort.cases[1:2], cohort, cohort.select_labels(["liver", "spleen"]), each_present=False)


def test_a_missing_mask_is_no_empty_one(total):
    cohort = Cohort.read(total)
    with pytest.raises(SegraftError, match=r"the mask .*s0000/segmentations/colon\.nii\.gz is missing: add it \(empty"):
        check_cases(cohort.cases, cohort, cohort.select_labels(["colon"]))


@pytest.mark.parametrize(
    ("mask", "affine", "complaint"),
    [
        (box(0, 2) * np.uint8(2), AFFINE, r"liver\.nii\.gz holds the value 2: use 1"),
        (box(0, 2) * np.float32(0.5), AFFINE, r"liver\.nii\.gz holds the value 0\.5"),
        (box(0, 2) * np.float32(np.nan), AFFINE, r"liver\.nii\.gz holds the value nan"),
        (box(0, 2).astype(np.int16) * -1, AFFINE, r"liver\.nii\.gz holds the value -1"),
        (box(0, 2)[:-1], AFFINE, r"liver\.nii\.gz and its image .*s0000/ct\.nii\.gz lie on different grids \(shapes"),
        (box(0, 2), np.eye(4), r"liver\.nii\.gz .* lie on different grids \(positions"),
    ],
)
def test_bad_masks(total, mask, affine, complaint):
    save(total / "s0000/segmentations/liver.nii.gz", mask, affine)
    cohort = Cohort.read(total)
    with pytest.raises(SegraftError, match=complaint):
        load_case(cohort.cases[0], cohort.select_labels(["liver"]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_masks_of_any_type(total, dtype):
    save(total / "s0000/segmentations/liver.nii.gz", box(0, 2).astype(dtype))
    cohort = Cohort.read(total)
    assert np.array_equal(load_case(cohort.cases[0], [2])[1].get_fdata(), 2 * box(0, 2))


def test_a_case_without_segmentations(total):
    shutil.rmtree(total / "s0002/segmentations")
    cohort = Cohort.read(total)
    assert [case.label is None for case in cohort.cases] == [False, True, False]
    with pytest.raises(SegraftError, match=r"the case s0002 .*ct\.nii\.gz.* has no label"):
        check_cases(cohort.cases, cohort, cohort.select_labels(["liver"]))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda total: [shutil.rmtree(folder) for folder in total.glob("*/segmentations")], "3 cases of .* no masks"),
        (lambda total: (total / "s0002/ct.nii.gz").unlink(), r"s0002 has masks and no scan: add .*s0002/ct\.nii\.gz"),
        (lambda total: organs(total / "s0002", "mri.nii.gz"), r"s0002 has the scans ct\.nii\.gz and mri\.nii\.gz"),
        (lambda total: organs(total / "s0002", Liver=box(0, 0)), "one name but for capital letters"),
        (lambda total: save(total / "s0002/segmentations/liver.nii", box(0, 0)), "are masks of one organ"),
    ],
)
def test_what_is_no_totalsegmentator(total, spoil, complaint):
    spoil(total)
    with pytest.raises(SegraftError, match=complaint):
        Cohort.read(total)


def test_hidden_files_are_no_masks(total):
    (total / "s0000/segmentations/._liver.nii.gz").touch()
    (total / "s0000/segmentations/preview.png").touch()
    (total / ".cache/segmentations").mkdir(parents=True)
    assert Cohort.read(total).labels == {1: "colon", 2: "liver", 3: "spleen"}


def test_more_shots_than_cases(total):
    with pytest.raises(SegraftError, match="4 patients were asked for but there are only 3"):
        draw(Cohort.read(total).cases, 4, seed=0)


@pytest.mark.parametrize(
    ("asked", "first"),
    [("kidney lft", "kidney_left"), ("Kidneys-Left", "kidney_left"), ("livr", "liver"), ("rib left", "rib_left_")],
)
def test_close_names_are_offered_where_there_are_many(tmp_path, asked, first):
    masks = {f"rib_{side}_{number}": box(0, 0) for side in ("left", "right") for number in range(1, 13)}
    organs(tmp_path / "s0001", liver=box(0, 1), kidney_left=box(0, 0), kidney_right=box(0, 0), **masks)
    with pytest.raises(
        SegraftError, match=rf"no label \"{asked}\": choose one of its 27, such as \d+ \({first}"
    ) as caught:
        Cohort.read(tmp_path).select_labels([asked])
    assert str(caught.value).count("(") <= 5


@pytest.mark.parametrize("asked", ["left kidney", "Kidney-Left", "LKidney"])
def test_a_structure_may_be_called_as_elsewhere(tmp_path, asked):
    organs(tmp_path / "s0001", liver=box(0, 1), kidney_left=box(0, 0), kidney_right=box(0, 0))
    assert Cohort.read(tmp_path).select_labels([asked]) == {1: "kidney_left"}


# Overlaps.


def joined(folder: Path, asked: Sequence[str]) -> np.ndarray:
    cohort = Cohort.read(folder)
    return np.asanyarray(load_case(cohort.cases[0], cohort.select_labels(asked))[1].dataobj)


def test_a_shared_voxel_counts_for_the_smallest_mask_in_any_order(tmp_path):
    organs(tmp_path / "s0001", big=box(0, 4), small=box(3, 6), tiny=box(5, 7), alone=box(0, 0))
    expected = 2 * box(0, 3) + 3 * box(3, 5) + 4 * box(5, 7)
    for asked in (["big", "small", "tiny"], ["tiny", "small", "big"], ["small", "big", "tiny"]):
        assert np.array_equal(joined(tmp_path, asked), expected)
    assert np.array_equal(joined(tmp_path, ["big"]), 2 * box(0, 4))


def test_of_equal_masks_the_lower_number_has_a_shared_voxel(tmp_path):
    organs(tmp_path / "s0001", a=box(0, 3), b=box(2, 5))
    assert np.array_equal(joined(tmp_path, ["b", "a"]), box(0, 3) + 2 * box(3, 5))


@pytest.mark.parametrize("seed", range(5))
def test_joined_voxel_by_voxel(tmp_path, seed):
    """Against the rule applied to one voxel at a time."""
    rng = np.random.default_rng(seed)
    masks = {
        name: (rng.random(SHAPE) < share).astype(np.uint8) for name, share in zip("abcde", rng.random(5), strict=True)
    }
    organs(tmp_path / "s0001", **masks)
    rank = {number: (masks[name].sum(), number) for number, name in enumerate("abcde", start=1)}
    expected = np.zeros(SHAPE, int)
    for voxel in np.ndindex(SHAPE):
        claims = [number for number, name in enumerate("abcde", start=1) if masks[name][voxel]]
        expected[voxel] = min(claims, key=rank.__getitem__, default=0)
    assert np.array_equal(joined(tmp_path, list("cbeda")), expected)


def test_overlaps_are_told_once(tmp_path, caplog):
    organs(tmp_path / "s0001", a=box(0, 3), b=box(2, 6), c=box(6, 7))
    organs(tmp_path / "s0002", a=box(0, 4), b=box(2, 7), c=box(6, 7))
    organs(tmp_path / "s0003", a=box(0, 2), b=box(2, 6), c=box(6, 7))
    cohort = Cohort.read(tmp_path)
    check_cases(cohort.cases, cohort, cohort.labels)
    (record,) = caplog.records
    message = record.getMessage()
    assert "overlap in 2 of 3 cases" in message
    # two slices of a and b, one of b and c
    assert f"most in s0002, by {3 * 30} voxels; of all labels most those of b and a" in message
    caplog.clear()
    check_cases(cohort.cases, cohort, {1: "a", 3: "c"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"a": box(0, 3), "b": box(0, 3)}, ["180 voxels that b has", "180 lie in smaller masks", "(180 in a)"]),
        (
            {"whole": box(0, 7), "b": box(0, 2), "c": box(2, 4), "d": box(0, 0)},
            ["420 voxels that whole has", "240 lie in smaller masks", "(120 in c)", "ask for whole without them"],
        ),
    ],
)
def test_a_label_that_lies_in_others_is_refused(tmp_path, masks, says):
    for case in ("s0001", "s0002"):
        organs(tmp_path / case, **masks)
    cohort = Cohort.read(tmp_path)
    with pytest.raises(SegraftError, match="a voxel has one label") as caught:
        check_cases(cohort.cases, cohort, cohort.labels)
    for word in (*says, str(tmp_path)):
        assert word in str(caught.value)


def test_a_sliver_that_lies_in_another_in_one_case_is_not(tmp_path):
    organs(tmp_path / "s0001", a=box(0, 3), b=box(5, 7))
    organs(tmp_path / "s0002", a=box(0, 1), b=box(0, 1))
    cohort = Cohort.read(tmp_path)
    check_cases(cohort.cases, cohort, cohort.labels)


# Digests of labels.


def test_digest_of_a_label_file(tmp_path):
    path = save(tmp_path / "a.nii.gz", box(0, 2))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    case = Case("a", "a", (path,), path)
    assert case.label_digest({1: "liver"}) == case.label_digest([]) == expected
    with pytest.raises(SegraftError, match=r"missing\.nii\.gz cannot be read \(No such file"):
        Case("a", "a", (path,), tmp_path / "missing.nii.gz").label_digest([1])
    with pytest.raises(SegraftError, match=r"case a .* has no label"):
        Case("a", "a", (path,), None).label_digest([1])


def test_digest_of_masks(total):
    """Depends on the organs asked for and their masks; not on other masks, on order or on numbers."""
    cohort = Cohort.read(total)
    case, asked = cohort.cases[0], cohort.select_labels(["liver", "spleen"])
    before = case.label_digest(asked)
    assert case.label_digest([3, 2]) == before
    assert len({before, case.label_digest([2]), case.label_digest([3])}) == 3
    save(total / "s0000/segmentations/aorta.nii.gz", box(0, 1))
    again = Cohort.read(total)
    assert again.select_labels(["liver", "spleen"]) == {3: "liver", 4: "spleen"}
    assert again.cases[0].label_digest([3, 4]) == before
    for one, other in (("liver", "spleen"), ("spleen", "liver")):
        shutil.copy(total / f"s0010/segmentations/{one}.nii.gz", total / f"s0000/segmentations/{other}.nii.gz")
    assert case.label_digest(asked) != before
    with pytest.raises(SegraftError, match=r"s0000/segmentations/colon\.nii\.gz cannot be read \(No such file"):
        case.label_digest(cohort.labels)
    with pytest.raises(SegraftError, match="organs 1 to 3, and 4 is asked for"):
        case.label_digest([4])


# FLARE'22.


@pytest.mark.parametrize("folders", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_read_flare(tmp_path, folders):
    names = ["FLARE22_Tr_0001", "FLARE22_Tr_0002", "FLARETs_0001"]
    cohort = Cohort.read(flare(tmp_path / "train", names, folders=folders))
    assert cohort.labels == ORGANS
    assert (cohort.labels[2], cohort.labels[13], len(cohort.labels)) == ("right kidney", "left kidney", 13)
    assert [case.id for case in cohort.cases] == [case.patient for case in cohort.cases] == names
    assert cohort.cases[0].image.name == "FLARE22_Tr_0001_0000.nii.gz"
    asked = cohort.select_labels(["Left Kidney", "1"])
    check_cases(cohort.cases, cohort, asked)
    assert list(asked) == [13, 1]
    with pytest.raises(SegraftError, match=r"label 3 \(spleen\) is in none"):
        check_cases(cohort.cases, cohort, cohort.select_labels(["spleen"]))
    with pytest.raises(SegraftError, match="there are only 3"):
        draw(cohort.cases, 5, seed=0)


def test_a_value_beyond_flares(tmp_path):
    flare(tmp_path, ["FLARE22_Tr_0001"])
    save(tmp_path / "labelsTr/FLARE22_Tr_0001.nii.gz", box(0, 2) * np.uint8(14))
    cohort = Cohort.read(tmp_path)
    with pytest.raises(SegraftError, match=r"FLARE22_Tr_0001\.nii\.gz holds the value 14"):
        check_cases(cohort.cases, cohort, {1: "liver"})


def test_a_scan_of_flares_without_mask_is_a_case_without_label(tmp_path):
    flare(tmp_path, ["FLARE22_Tr_0001", "FLARE22_Tr_0002"])
    (tmp_path / "labelsTr/FLARE22_Tr_0002.nii.gz").unlink()
    cohort = Cohort.read(tmp_path)
    assert [case.label is None for case in cohort.cases] == [False, True]


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("labelsTr/FLARE22_Tr_0009.nii.gz", r"has no scan: add .*imagesTr/FLARE22_Tr_0009_0000\.nii\.gz"),
        ("imagesTr/other_0000.nii.gz", r"other_0000\.nii\.gz is not named as the files of FLARE'22"),
        ("imagesTr/FLARE22_Tr_0001_0000.nii", "are files of one case"),
    ],
)
def test_what_is_no_flare(tmp_path, extra, complaint):
    flare(tmp_path, ["FLARE22_Tr_0001"])
    save(tmp_path / extra, IMAGE)
    with pytest.raises(SegraftError, match=complaint):
        Cohort.read(tmp_path)


# Real scans.


@pytest.mark.data
def test_real_masks(real_data, tmp_path):
    """Scan and masks of TotalSegmentator's own tests, joined as its authors join them."""
    source = real_data / "totalsegmentator_examples"
    case = tmp_path / "s0001"
    case.mkdir()
    (case / "ct.nii.gz").symlink_to(source / "example_ct_sm.nii.gz")
    (case / "segmentations").symlink_to(source / "example_seg_fast")
    cohort = Cohort.read(tmp_path)
    assert len(cohort.labels) == 117
    assert cohort.select_labels(["liver", "Kidney_Left"]) == {44: "liver", 42: "kidney_left"}
    asked = cohort.select_labels(["liver", "spleen", "aorta", "vertebrae_T12"])
    check_cases(cohort.cases, cohort, asked)
    theirs = np.asanyarray(nib.load(source / "example_seg_fast.nii.gz").dataobj)
    _, label = load_case(cohort.cases[0], asked)
    ours = np.asanyarray(label.dataobj)
    for number in asked:
        (value,) = np.unique(theirs[ours == number])
        assert value > 0
        assert np.array_equal(ours == number, theirs == value)
    with pytest.raises(SegraftError, match=r"\(brain\) is in none of the 1 training cases"):
        check_cases(cohort.cases, cohort, cohort.select_labels(["brain"]))
    prepared = prepare_case(cohort.cases[0], Preparation(spacing=(6, 6, 6)), list(asked))
    assert prepared["label"].shape[0] == 4
    assert prepared["label"].sum(dim=(1, 2, 3)).min() > 0


@pytest.mark.data
def test_a_real_mask_on_another_grid(real_data, tmp_path):
    source = real_data / "totalsegmentator_examples" / "pulmonary_report" / "models"
    masks = tmp_path / "s0001" / "segmentations"
    masks.mkdir(parents=True)
    (tmp_path / "s0001/ct.nii.gz").symlink_to(source / "ct_cropped.nii.gz")
    for organ in ("heart", "pulmonary_artery"):
        (masks / f"{organ}.nii.gz").symlink_to(source / f"{organ}.nii.gz")
    cohort = Cohort.read(tmp_path)
    check_cases(cohort.cases, cohort, cohort.select_labels(["pulmonary_artery"]))
    with pytest.raises(SegraftError, match=r"segmentations/heart\.nii\.gz .* lie on different grids"):
        load_case(cohort.cases[0], cohort.select_labels(["heart"]))
