"""Lists of scans and masks, as splits are published: what the paths are relative to, and what the masks say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.checks import check_cases, load_case
from segraft.data.cohort import Cohort
from segraft.data.flare import ORGANS
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
    """Three cases of TotalSegmentator's; the second has no spleen in view, the third a colon as well."""
    folder = tmp_path / "TS"
    organs(folder / "s0002", liver=box(0, 3), spleen=box(0, 0))
    organs(folder / "s0000", liver=box(0, 2), spleen=box(5, 7))
    organs(folder / "s0010", liver=box(1, 2), spleen=box(2, 4), colon=box(4, 5))
    (folder / "meta.csv").write_text("image_id;age;gender;institute;study_type;split\n")
    return folder


@pytest.fixture
def split(tmp_path: Path) -> Callable[..., Path]:
    """split(text, place): a list in a folder below the data folder."""

    def write(text: str, place: str = "lists/train.txt") -> Path:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_a_list_of_one_organ(total, split):
    """As of few-shot fine-tuning: three blanks, the organ's own mask, paths from the folder of the data sets."""
    path = split(
        "\n# held out: s0010\nTS/s0002/ct.nii.gz   TS/s0002/segmentations/spleen.nii.gz\n"
        "TS/s0000/ct.nii.gz   TS/s0000/segmentations/spleen.nii.gz\n"
    )
    cohort = Cohort.read(path)
    assert cohort.labels == {1: "spleen"}
    assert [case.id for case in cohort.cases] == ["s0002", "s0000"]
    assert (cohort.name, cohort.path, cohort.modalities) == ("train", path, ("CT",))
    check_cases(cohort.cases, cohort, cohort.labels)
    assert np.array_equal(load_case(cohort.cases[1], [1])[1].get_fdata(), box(5, 7))


def test_a_list_of_folders_of_masks(total, split):
    cohort = Cohort.read(
        split("".join(f"TS/{each}/ct.nii.gz\tTS/{each}/segmentations\n" for each in ("s0010", "s0000")))
    )
    assert cohort.labels == {1: "colon", 2: "liver", 3: "spleen"}
    assert [case.id for case in cohort.cases] == ["s0010", "s0000"]


def test_lines_of_one_scan_and_several_organs_are_one_case(total, split):
    text = "".join(
        f"TS/{case}/ct.nii.gz TS/{case}/segmentations/{organ}.nii.gz\n"
        for organ in ("spleen", "liver")
        for case in ("s0000", "s0010")
    )
    cohort = Cohort.read(split(text))
    assert cohort.labels == {1: "liver", 2: "spleen"}
    assert [case.id for case in cohort.cases] == ["s0000", "s0010"]
    assert np.array_equal(load_case(cohort.cases[0])[1].get_fdata(), box(0, 2) + 2 * box(5, 7))


def test_a_list_of_label_maps(tmp_path, split):
    """As of the CLIP-driven universal model: a tab, and the numbers as the data set's own dataset.json has them."""
    for name in ("liver_0", "liver_1"):
        save(tmp_path / f"10_Decathlon/Task03_Liver/imagesTr/{name}.nii.gz", IMAGE)
        save(tmp_path / f"10_Decathlon/Task03_Liver/labelsTr/{name}.nii.gz", box(0, 2) * np.uint8(2))
    listing = {"labels": {"0": "background", "1": "liver", "2": "cancer"}}
    (tmp_path / "10_Decathlon/Task03_Liver/dataset.json").write_text(json.dumps(listing))
    folder = "10_Decathlon/Task03_Liver"
    path = split(f"{folder}/imagesTr/liver_1.nii.gz\t{folder}/labelsTr/liver_1.nii.gz\n")
    cohort = Cohort.read(path, patient_pattern=r"_(\d)")
    assert cohort.labels == {1: "liver", 2: "cancer"}
    assert (cohort.cases[0].id, cohort.cases[0].patient) == ("liver_1", "1")
    assert np.array_equal(load_case(cohort.cases[0])[1].get_fdata(), 2 * box(0, 2))
    (path.parent / "dataset.json").write_text('{"labels": {"1": "tissue", "2": "lesion"}}')
    assert Cohort.read(path).labels == {1: "tissue", 2: "lesion"}


def test_a_list_of_flares(tmp_path, split):
    folder = "17_FLARE22/train"
    save(tmp_path / f"{folder}/images/FLARE22_Tr_0002_0000.nii.gz", IMAGE)
    save(tmp_path / f"{folder}/labels/FLARE22_Tr_0002.nii.gz", box(0, 2) * np.uint8(13))
    text = f"{folder}/images/FLARE22_Tr_0002_0000.nii.gz   {folder}/labels/FLARE22_Tr_0002.nii.gz"
    cohort = Cohort.read(split(text))
    assert cohort.labels == ORGANS
    assert [case.id for case in cohort.cases] == ["FLARE22_Tr_0002"]


def test_the_nearest_folder_that_has_the_first_image(tmp_path, split):
    for place in (tmp_path, tmp_path / "lists"):
        organs(place / "s0001", liver=box(0, 2))
    path = split("s0001/ct.nii.gz s0001/segmentations/liver.nii.gz\n")
    assert Cohort.read(path).cases[0].image == tmp_path / "lists/s0001/ct.nii.gz"
    shutil.rmtree(tmp_path / "lists/s0001")
    assert Cohort.read(path).cases[0].image == tmp_path / "s0001/ct.nii.gz"


def test_blanks_in_paths_between_tabs(tmp_path, split):
    organs(tmp_path / "my scans/s 1", liver=box(0, 2))
    line = "my scans/s 1/ct.nii.gz\tmy scans/s 1/segmentations/liver.nii.gz"
    assert Cohort.read(split(line + "\r\n")).cases[0].id == "s 1"
    with pytest.raises(SegraftError, match=r"line 2 of .*train\.txt is 6 words .*with a tab between them"):
        Cohort.read(split("# \n" + line.replace("\t", " ")))


def test_scans_of_one_name_are_told_by_their_paths(tmp_path, split):
    for folder in ("CT", "MR"):
        organs(tmp_path / folder / "s0001", liver=box(0, 2))
    text = "".join(f"{each}/s0001/ct.nii.gz {each}/s0001/segmentations/liver.nii.gz\n" for each in ("CT", "MR"))
    assert [case.id for case in Cohort.read(split(text)).cases] == ["CT_s0001_ct", "MR_s0001_ct"]


def test_scans_that_would_have_one_id(tmp_path, split):
    organs(tmp_path / "CT", liver=box(0, 2))
    for name in ("ct.nii", "a/ct.nii.gz", "a/ct.nii"):
        save(tmp_path / "CT" / name, IMAGE)
    text = "".join(f"CT/a/{name} CT/segmentations/liver.nii.gz\n" for name in ("ct.nii", "ct.nii.gz"))
    with pytest.raises(SegraftError, match=r"lines 1 and 2 of .* would both be the case CT_a_ct"):
        Cohort.read(split(text))


GOOD = "TS/s0000/ct.nii.gz TS/s0000/segmentations/liver.nii.gz\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "lists no cases"),
        ("# nothing\n\n", "lists no cases"),
        ("TS/s0000/ct.nii.gz\n", "line 1 of .* is 1 words"),
        (GOOD + "BDMAP_00000001\t\n", "line 2 of .* is 1 words"),
        (GOOD + "\n" + GOOD.strip() + " more\n", "line 3 of .* is 3 words"),
        (
            "elsewhere/s0000/ct.nii.gz elsewhere/s0000/segmentations\n",
            'folder above it holds "elsewhere/s0000/ct.nii.gz"',
        ),
        (GOOD + "TS/s9/ct.nii.gz TS/s9/segmentations\n", r"line 2 of .* names .*TS/s9/ct\.nii\.gz, which is not there"),
        (GOOD + "TS/s0002/ct.nii.gz TS/s0002/segmentations/x.nii.gz\n", r"line 2 .*x\.nii\.gz, which is not there"),
        (GOOD + "TS/s0002/ct.nii.gz TS/meta.csv\n", r"line 2 of .*meta\.csv, which is not a \.nii or \.nii\.gz file"),
        (GOOD + "TS/s0002/ct.nii.gz TS\n", r"line 2 of .* the folder .*TS, which holds no masks"),
        (GOOD + "\n" + GOOD, r"lines 1 and 3 of .* are of one image, .*s0000/ct\.nii\.gz: keep one"),
        (
            GOOD + "TS/s0002/ct.nii.gz TS/s0002/ct.nii.gz\n",
            r"a mask per organ \(line 1\) and masks of numbers \(line 2\)",
        ),
        (
            "TS/s0002/ct.nii.gz TS/s0002/ct.nii.gz\n",
            r"nothing says what the numbers .* write a dataset\.json beside it",
        ),
        (
            GOOD + "TS/../../out/ct.nii.gz TS/s0002/segmentations\n",
            'line 2 of .*out/ct.nii.gz", which leaves the data folder',
        ),
        (
            GOOD + "TS/s0002/ct.nii.gz /etc/hosts\n",
            'line 2 of .* names the file "/etc/hosts", which leaves the data folder',
        ),
        (GOOD + "TS/s0002/ct.nii.gz TS/link/x.nii.gz\n", "line 2 of .* which leaves the data folder"),
        (GOOD + "TS/a\0.nii TS/s0002/segmentations\n", "line 2 of .* no usable path"),
        ("../out/ct.nii.gz ../out/segmentations\n", 'neither .* nor a folder above it holds "../out/ct.nii.gz"'),
    ],
)
def test_bad_lists(total, split, tmp_path, tmp_path_factory, text, complaint):
    (total / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    organs(tmp_path.parent / "out", liver=box(0, 1))
    path = split(text)
    with pytest.raises(SegraftError, match=complaint) as caught:
        Cohort.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absolute_paths_stay_in_the_lists_folder(total, split):
    text = f"{total}/s0000/ct.nii.gz {total}/s0000/segmentations/liver.nii.gz\n"
    assert Cohort.read(split(text, "list.txt")).cases[0].id == "s0000"
    shutil.move(total, total.with_name("moved"))
    with pytest.raises(SegraftError, match="neither"):
        Cohort.read(split(text, "list.txt"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\xd8"])
def test_lists_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "split.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SegraftError, match=r"split\.txt cannot be read"):
        Cohort.read(path)


def test_data_sets_with_other_numbers_do_not_go_together(tmp_path, split):
    text = ""
    for task, labels in (("A", {"1": "liver"}), ("B", {"1": "liver"}), ("C", {"1": "spleen"})):
        save(tmp_path / f"{task}/image_{task}.nii.gz", IMAGE)
        save(tmp_path / f"{task}/mask_{task}.nii.gz", box(0, 2))
        (tmp_path / task / "dataset.json").write_text(json.dumps({"labels": labels, "training": []}))
        text += f"{task}/image_{task}.nii.gz {task}/mask_{task}.nii.gz\n"
    first_two = "".join(text.splitlines(keepends=True)[:2])
    assert Cohort.read(split(first_two)).labels == {1: "liver"}
    with pytest.raises(SegraftError, match=r"lines 1 and 3 of .*A/dataset\.json, .*C/dataset\.json"):
        Cohort.read(split(text))
    (tmp_path / "B/dataset.json").unlink()
    with pytest.raises(SegraftError, match=r"lines 1 and 2 of .*A/dataset\.json, no dataset\.json"):
        Cohort.read(split(first_two))
