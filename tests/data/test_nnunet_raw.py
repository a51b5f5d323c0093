"""nnU-Net v2's raw data sets, whose `dataset.json` lists no cases."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.checks import check_cases, load_case
from segraft.data.cohort import Cohort
from segraft.errors import SegraftError
from segraft.jobs.unlabelled import read_unlabelled

SHAPE = (4, 5, 6)
BRATS = {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3}


def save(path: Path, value: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.full(SHAPE, value, np.float32)
    data[0] += 1
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)


def listing(folder: Path, **keys) -> Path:
    content = {
        "channel_names": {"0": "FLAIR", "1": "T1"},
        "labels": {"background": 0, "edema": 1, "core": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **keys,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def raw(tmp_path) -> Path:
    """Two cases of two channels; the name of one is the beginning of the other's."""
    folder = tmp_path / "Dataset007_Brain"
    for place, name in enumerate(("case_01", "case_01_b")):
        for channel in (0, 1):
            save(folder / "imagesTr" / f"{name}_{channel:04}.nii.gz", 10 * place + channel)
        save(folder / "labelsTr" / f"{name}.nii.gz", 1)
    (folder / "imagesTr" / "._case_01_0000.nii.gz").write_bytes(b"")
    return listing(folder)


def test_cases_are_told_by_their_files(raw):
    cohort = Cohort.read(raw)
    assert cohort == Cohort.read(raw / "dataset.json")
    assert (cohort.name, cohort.modalities) == ("Dataset007_Brain", ("FLAIR", "T1"))
    assert cohort.labels == {1: "edema", 2: "core"}
    assert [case.id for case in cohort.cases] == ["case_01", "case_01_b"]
    for place, case in enumerate(cohort.cases):
        scan, label = load_case(case)
        assert scan.names == ("FLAIR", "T1")
        assert [channel.get_fdata()[1, 0, 0] for channel in scan.channels] == [10 * place, 10 * place + 1]
        assert label.get_fdata()[1, 0, 0] == 1
    check_cases(cohort.cases, cohort, cohort.select_labels(["edema"]))
    assert [case.patient for case in Cohort.read(raw, patient_pattern=r"^(case_\d+)").cases] == ["case_01"] * 2


def test_cases_are_nnunets(raw):
    theirs = pytest.importorskip("nnunetv2.utilities.utils", reason="the peer is not installed")
    (raw / "imagesTr" / "._case_01_0000.nii.gz").unlink()
    found = theirs.get_filenames_of_train_images_and_targets(str(raw))
    assert {case.id: ([str(image) for image in case.images], str(case.label)) for case in Cohort.read(raw).cases} == {
        name: (each["images"], each["label"]) for name, each in found.items()
    }


def test_regions(raw):
    cohort = Cohort.read(listing(raw, labels=BRATS, regions_class_order=[1, 2, 3]))
    assert cohort.labels == {1: "whole tumor", 2: "core", 3: "enhancing"}
    assert cohort.labels.regions == {1: (1, 2, 3), 2: (2, 3), 3: (3,)}


def test_a_channel_that_a_case_lacks(raw):
    (raw / "imagesTr" / "case_01_0000.nii.gz").unlink()
    first, second = Cohort.read(raw).cases
    assert first.load().missing == ("FLAIR",)
    assert not second.load().missing


def test_uncompressed_files_of_one_channel(tmp_path):
    save(tmp_path / "imagesTr" / "a_0000.nii", 1)
    save(tmp_path / "labelsTr" / "a.nii", 1)
    cohort = Cohort.read(listing(tmp_path, channel_names={"0": "CT"}, file_ending=".nii", numTraining=1))
    assert [(case.id, case.images) for case in cohort.cases] == [("a", (tmp_path / "imagesTr" / "a_0000.nii",))]


def test_cases_that_are_listed_by_name(raw):
    images = [f"imagesTr/case_01_000{channel}.nii.gz" for channel in (1, 0)]  # the order is the list's
    entry = {"images": images, "label": "labelsTr/case_01.nii.gz"}
    cohort = Cohort.read(listing(raw, dataset={"anna": entry}, numTraining=1, file_ending=None))
    (case,) = cohort.cases
    assert (case.id, case.images) == ("anna", tuple(raw / image for image in images))
    entry["images"][0] = "../elsewhere.nii.gz"
    with pytest.raises(SegraftError, match="leaves its folder"):
        Cohort.read(listing(raw, dataset={"anna": entry}, numTraining=1))


def test_a_list_of_cases_is_read_as_it_is(raw):
    entry = {"image": "imagesTr/case_01_b_0000.nii.gz", "label": "labelsTr/case_01_b.nii.gz"}
    assert [case.id for case in Cohort.read(listing(raw, training=[entry])).cases] == ["case_01_b"]


def test_without_labels(raw):
    """For masked pre-training, which reads none: neither they nor what they are called matter."""
    save(raw / "more.nii.gz", 30)
    listing(raw, labels={"ignore": 1}, unlabelled=[["more.nii.gz", None]])
    for label in (raw / "labelsTr").iterdir():
        label.unlink()
    content = json.loads((raw / "dataset.json").read_text())
    content["unlabelled"] = [{"image": ["more.nii.gz", None]}]
    (raw / "dataset.json").write_text(json.dumps(content))
    assert [case.id for case in read_unlabelled(raw).cases] == ["case_01", "case_01_b", "more"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"file_ending": ".mha"}, r"files ending in '\.mha', and NIfTI is read: convert"),
        ({"file_ending": 3}, "files ending in 3"),
        ({"numTraining": 3}, "says numTraining: 3, and imagesTr has 2 cases"),
        ({"channel_names": {"0": "CT"}}, r"case_01_0001\.nii\.gz is of channel 1, counted from 0, and .* names 1"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, 'label "ignore" is nnU-Net'),
        ({"labels": {**BRATS, "ignore": 4}, "regions_class_order": [1, 2, 3]}, 'label "ignore" is nnU-Net'),
        ({"labels": BRATS}, "regions_class_order"),
        ({"labels": None}, "labels: Field required"),
        ({"file_ending": None}, "training: Field required"),
        ({"dataset": {}, "numTraining": 0}, 'no cases under "dataset"'),
        ({"dataset": ["a"]}, 'no cases under "dataset"'),
        ({"dataset": {"a": {"image": "a.nii"}}}, '"images" and "label"'),
        ({"dataset": {"a": {"images": 3, "label": "a"}}, "numTraining": 1}, r"training\.0\.image"),
        ({"dataset": {"a": {"images": ["a.nii", "b.nii"], "label": 3}}, "numTraining": 1}, r"training\.0\.label"),
    ],
)
def test_what_is_refused(raw, keys, says):
    with pytest.raises(SegraftError, match=says) as caught:
        Cohort.read(listing(raw, **keys))
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit(raw):
    stray = raw / "labelsTr" / "case_09.nii.gz"
    save(stray, 1)
    with pytest.raises(SegraftError, match=r"case_09\.nii\.gz has no scan: add .*imagesTr.case_09_0000\.nii\.gz"):
        Cohort.read(raw)
    stray.rename(raw / "imagesTr" / "case_09.nii.gz")
    with pytest.raises(SegraftError, match=r"case_09\.nii\.gz is not named with its channel"):
        Cohort.read(raw)
    (raw / "imagesTr").rename(raw / "imagesTs")
    (raw / "labelsTr").rename(raw / "labelsTs")
    with pytest.raises(SegraftError, match=r"lists no training cases, and there is no .*imagesTr"):
        Cohort.read(raw)
    (raw / "imagesTr").mkdir()
    with pytest.raises(SegraftError, match="imagesTr has 0 cases"):
        Cohort.read(raw)


def test_a_label_that_is_not_there_is_named(raw):
    (raw / "labelsTr" / "case_01.nii.gz").unlink()
    with pytest.raises(SegraftError, match=r"labelsTr.case_01\.nii\.gz cannot be read"):
        load_case(Cohort.read(raw).cases[0])
