import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.cohort import Case, Cohort
from segraft.errors import SegraftError


def entries(*names: str) -> list[dict[str, str]]:
    return [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]


def test_read_decathlon(write_listing, tmp_path):
    path = write_listing(training=entries("a.nii.gz", "b.nii", "._c.nii.gz"), modality={"1": "T2", "0": "T1"})
    cohort = Cohort.read(path)
    assert cohort == Cohort.read(tmp_path)
    assert cohort.name == "Toy"
    assert cohort.labels == {1: "anterior", 2: "Posterior"}
    assert cohort.modalities == ("T1", "T2")
    assert [case.id for case in cohort.cases] == ["a", "b", "._c"]
    assert cohort.cases[0] == Case(
        *("a", "a", (tmp_path / "imagesTr/a.nii.gz",), tmp_path / "labelsTr/a.nii.gz"), channels=("T1", "T2")
    )


def test_read_nnunet(write_listing):
    path = write_listing(
        labels={"background": 0, "anterior": 1, "posterior": 2},
        modality=None,
        channel_names={"0": "MRI"},
        training=[{"image": "imagesTr/hip_001_0000.nii.gz"}],
    )
    cohort = Cohort.read(path)
    assert cohort.labels == {1: "anterior", 2: "posterior"}
    assert cohort.modalities == ("MRI",)
    assert cohort.cases[0].id == "hip_001"
    assert cohort.cases[0].label is None


def test_patients(write_listing):
    training = [*entries("p1_s1.nii.gz", "p1_s2.nii.gz"), {"image": "odd.nii.gz", "patient": "P9"}]
    cohort = Cohort.read(write_listing(training=training), patient_pattern=r"^(p\d+)_")
    assert [case.patient for case in cohort.cases] == ["p1", "p1", "P9"]
    assert [case.patient for case in Cohort.read(cohort.path).cases] == ["p1_s1", "p1_s2", "P9"]


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [("(x)_", "does not match the case a"), ("a", "no group"), ("(", "not a regular expression"), ("(z?)", "match")],
)
def test_bad_patient_pattern(write_listing, pattern, complaint):
    with pytest.raises(SegraftError, match=complaint):
        Cohort.read(write_listing(), patient_pattern=pattern)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"labels": None}, "labels: Field required"),
        ({"training": None}, "training: Field required"),
        ({"training": []}, "lists no cases"),
        ({"training": "a.nii.gz"}, "training: Input should be a valid list"),
        ({"training": [{"label": "a.nii.gz"}]}, "training.0.image: Field required"),
        ({"training": [{"image": 3}] * 5}, "and 2 more"),
        ({"training": entries("a.nii.gz", "a.nii")}, "case imagesTr_a more than once"),
        ({"labels": {"0": "background"}}, "no label beside the background"),
        ({"labels": {"background": 0, "all": [1, 2]}}, "labels"),
        ({"labels": {"one": 1, "two": 1}}, "same number"),
        ({"labels": {"1": "x", "2": "X"}}, "same name"),
        ({"labels": {"-1": "x"}}, "label numbers"),
        ({"labels": {"1": True}}, "labels"),
    ],
)
def test_bad_content(write_listing, keys, complaint):
    path = write_listing(**keys)
    with pytest.raises(SegraftError, match=complaint) as caught:
        Cohort.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]", b""])
def test_not_a_listing(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(SegraftError, match=r"dataset\.json"):
        Cohort.read(tmp_path)


def test_missing_file(tmp_path):
    for name in ("dataset.json", "other.json", "folder"):
        with pytest.raises(SegraftError, match=f"{name} cannot be read .No such file .* give a dataset.json"):
            Cohort.read(tmp_path / name)


@pytest.mark.parametrize("name", ["../outside.nii.gz", "a/../../outside.nii.gz", "/etc/outside.nii.gz", "link/x.nii"])
@pytest.mark.parametrize("key", ["image", "label"])
def test_paths_stay_inside(write_listing, tmp_path_factory, tmp_path, name, key):
    (tmp_path / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    path = write_listing(training=[{"image": "a.nii.gz", "label": "b.nii.gz", key: name}])
    with pytest.raises(SegraftError, match="leaves its folder"):
        Cohort.read(path)


def test_null_character_in_path(write_listing):
    with pytest.raises(SegraftError, match="no usable path"):
        Cohort.read(write_listing(training=[{"image": "a\0.nii"}]))


def test_linked_folder_is_inside(write_listing, tmp_path, tmp_path_factory):
    write_listing(training=entries("sub/../a.nii.gz"))
    link = tmp_path_factory.mktemp("links") / "cohort"
    link.symlink_to(tmp_path)
    assert Cohort.read(link).cases[0].id == "a"


def test_select_labels(write_listing):
    cohort = Cohort.read(write_listing())
    assert list(cohort.select_labels(["posterior", "1"]).items()) == [(2, "Posterior"), (1, "anterior")]
    assert cohort.select_labels([]) == {1: "anterior", 2: "Posterior"}
    with pytest.raises(SegraftError, match=r"no label \"liver\": choose among 1 \(anterior\), 2 \(Posterior\)"):
        cohort.select_labels(["liver"])
    with pytest.raises(SegraftError, match="twice"):
        cohort.select_labels(["ANTERIOR", "1"])


def test_digest(tmp_path):
    """The same voxels in another file, type or place are the same scan; one other voxel makes another."""
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    expected = hashlib.sha256(b"(2, 3, 4)" + voxels.astype(np.float32).tobytes()).hexdigest()[:16]

    def digest(name: str, values: np.ndarray, affine: np.ndarray) -> str:
        nib.save(nib.Nifti1Image(values, affine), tmp_path / name)
        return Case("a", "a", (tmp_path / name,), None).digest()

    assert digest("a.nii.gz", voxels, np.eye(4)) == expected
    assert digest("b.nii", voxels.astype(np.float32), 2 * np.eye(4)) == expected
    voxels[0, 0, 0] += 1
    assert digest("c.nii.gz", voxels, np.eye(4)) != expected
    with pytest.raises(SegraftError, match="cannot be read"):
        Case("b", "b", (tmp_path / "missing.nii.gz",), None).digest()


def test_scans_of_one_name_in_folders_of_their_own(tmp_path):
    """TotalSegmentator's layout: s0001/ct.nii.gz, s0002/ct.nii.gz."""
    listing = {
        "labels": {"0": "background", "1": "liver"},
        "training": [{"image": f"./s{k}/ct.nii.gz", "label": f"./s{k}/liver.nii.gz"} for k in (1, 2)],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    assert [case.id for case in Cohort.read(tmp_path).cases] == ["s1_ct", "s2_ct"]


@pytest.mark.data
def test_real_listing(real_data: Path):
    cohort = Cohort.read(real_data / "hippocampus")
    assert (len(cohort.cases), cohort.labels, cohort.modalities) == (200, {1: "anterior", 2: "posterior"}, ("MRI",))
    assert all(case.image.is_file() and case.label.is_file() for case in cohort.cases)
