"""Scans and lists that cannot serve: one sentence naming the file, and nothing is written."""

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

IMAGE, LABEL = "imagesTr/p1.nii.gz", "labelsTr/p1.nii.gz"


@pytest.fixture
def pretrain(refused, cohort, tmp_path):
    """pretrain(says=[…]): a training on the spoilt cohort is refused."""
    return lambda *more, says: refused("pretrain", "--data", cohort, "--out", tmp_path / "base", *more, says=says)


def change(path, edit):
    image = nib.load(path)
    data = edit(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(data, image.affine), path)


def with_nan(data):
    data[3, 3, 3] = np.nan
    return data


def with_infinity(data):
    data[3, 3, 3] = np.inf
    return data


BAD_IMAGES = {
    "NaN": with_nan,
    "infinite": with_infinity,
    "constant": np.zeros_like,
    "four axes": lambda data: np.stack([data, data], axis=-1),
    "two axes": lambda data: data[:, :, 0],
}
BAD_LABELS = {
    "another shape": lambda data: data[:-1],
    "unlisted value": lambda data: np.where(data == 2, 7, data).astype(np.uint8),
    "negative": lambda data: data.astype(np.int16) - 1,
    "fractions": lambda data: data.astype(np.float32) / 2,
}


@pytest.mark.parametrize("edit", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_an_image_that_cannot_serve(pretrain, cohort, edit):
    change(cohort / IMAGE, edit)
    pretrain(says=[cohort / IMAGE])


@pytest.mark.parametrize("edit", BAD_LABELS.values(), ids=BAD_LABELS)
def test_a_label_that_cannot_serve(pretrain, cohort, edit):
    change(cohort / LABEL, edit)
    pretrain(says=[cohort / LABEL])


def test_a_label_of_the_same_shape_elsewhere(pretrain, cohort):
    label = nib.load(cohort / LABEL)
    nib.save(nib.Nifti1Image(np.asanyarray(label.dataobj), np.diag([2, 1, 1.5, 1])), cohort / LABEL)
    pretrain(says=[cohort / LABEL, cohort / IMAGE, "different grids"])


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def cut_inside(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-2000]))


def folder(path):
    path.unlink()
    path.mkdir()


SPOILT = {
    "missing": lambda path: path.unlink(),
    "cut gzip": cut,
    "cut inside": cut_inside,
    "empty": lambda path: path.write_bytes(b""),
    "not NIfTI": lambda path: path.write_bytes(gzip.compress(b"no scan " * 200)),
    "text": lambda path: path.write_text("no scan"),
    "not readable": folder,
}


@pytest.mark.parametrize("file", [IMAGE, LABEL], ids=["image", "label"])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_file_that_cannot_be_read(pretrain, cohort, spoil, file):
    spoil(cohort / file)
    pretrain(says=[cohort / file])


@pytest.mark.parametrize("spoil", [spoil for spoil in SPOILT.values() if spoil is not folder])
def test_a_scan_that_cannot_be_read(refused, work, cohort, tmp_path, spoil):
    spoil(cohort / IMAGE)
    refused("predict", work / "run", cohort / IMAGE, "-o", tmp_path / "mask.nii.gz", says=[cohort / IMAGE])


@pytest.mark.parametrize("edit", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_scan_that_cannot_be_segmented(refused, work, cohort, tmp_path, edit):
    change(cohort / IMAGE, edit)
    refused("predict", work / "run", cohort / IMAGE, "-o", tmp_path / "masks", says=[cohort / IMAGE])


@pytest.mark.parametrize("edit", BAD_LABELS.values(), ids=BAD_LABELS)
def test_a_label_that_cannot_be_measured_against(refused, work, cohort, tmp_path, edit):
    change(cohort / LABEL, edit)
    refused("evaluate", work / "run", "--data", cohort, "--out", tmp_path / "scores", says=[cohort / LABEL])


def test_a_label_absent_from_every_case(pretrain, cohort):
    for path in (cohort / "labelsTr").iterdir():
        change(path, lambda data: np.where(data == 2, 0, data).astype(np.uint8))
    pretrain("--labels", "2", says=["rim", cohort / "dataset.json"])


LISTINGS = {
    "no JSON": "{",
    "no object": "[]",
    "no labels": json.dumps({"training": []}),
    "no cases": json.dumps({"labels": {"1": "core"}, "training": []}),
    "label of a wrong type": json.dumps({"labels": {"1": 3.5}, "training": []}),
}


@pytest.mark.parametrize("text", LISTINGS.values(), ids=LISTINGS)
def test_a_list_that_cannot_be_read(pretrain, cohort, text):
    (cohort / "dataset.json").write_text(text)
    pretrain(says=[cohort / "dataset.json"])


def test_no_list(pretrain, cohort):
    (cohort / "dataset.json").unlink()
    pretrain(says=[cohort / "dataset.json"])


@pytest.mark.parametrize("path", ["../secret.nii.gz", "/etc/hostname", "imagesTr/../../secret.nii.gz"])
def test_a_path_that_leaves_the_folder(pretrain, cohort, make_cohort, tmp_path, path):
    shutil.copy(cohort / IMAGE, tmp_path / "secret.nii.gz")
    make_cohort(cohort, ["p0"], training=[{"image": path, "label": LABEL}])
    pretrain(says=[cohort / "dataset.json", path])


def test_a_case_without_label(pretrain, cohort, make_cohort):
    make_cohort(cohort, ["p0"], training=[{"image": IMAGE}])
    pretrain(says=[cohort / IMAGE])


@pytest.mark.data
def test_a_real_label_on_a_larger_grid(refused, real_data, tmp_path):
    """TotalSegmentator's heart of a report lies on a larger grid than the crop it comes with."""
    models = real_data / "totalsegmentator_examples" / "pulmonary_report" / "models"
    image = next(models.glob("ct_cropped*.nii.gz"))
    (tmp_path / "D").mkdir()
    shutil.copyfile(image, tmp_path / "D" / "ct.nii.gz")
    shutil.copyfile(models / "heart.nii.gz", tmp_path / "D" / "heart.nii.gz")
    listing = {"labels": {"1": "heart"}, "training": [{"image": "ct.nii.gz", "label": "heart.nii.gz"}]}
    (tmp_path / "D" / "dataset.json").write_text(json.dumps(listing))
    says = ["ct.nii.gz", "heart.nii.gz", "different grids"]
    refused("pretrain", "--data", tmp_path / "D", "--out", tmp_path / "base", says=says)
