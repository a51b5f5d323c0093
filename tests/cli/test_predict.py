"""Masks: on the scan's own grid, the same in every process, wherever the files are moved."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

COS, SIN = np.cos(0.3), np.sin(0.3)
TURNED = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]])
AFFINES = {
    "plain": np.eye(3),
    "flipped": np.diag([-1.0, -1.0, 1.0]),
    "permuted": np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "permuted and flipped": np.array([[0.0, -1, 0], [0, 0, 2], [-1, 0, 0]]),
    "oblique": TURNED,
    "anisotropic": np.diag([0.5, 0.5, 5.0]),
    "oblique and anisotropic": TURNED @ np.diag([0.7, -0.9, 4.0]),
}


def affine(matrix: np.ndarray) -> np.ndarray:
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = matrix, (-30.5, 12.25, 7)
    return whole


@pytest.mark.parametrize("matrix", AFFINES.values(), ids=AFFINES)
def test_the_mask_lies_on_the_scan(segraft, work, tmp_path, save_nifti, matrix):
    rng = np.random.default_rng(0)
    data = rng.integers(-1000, 1000, (12, 17, 9)).astype(np.int16)
    scan = save_nifti(tmp_path / "scan.nii.gz", data, affine(matrix))
    outcome = segraft("predict", work / "run", scan, "-o", tmp_path / "mask.nii", "--json")
    assert outcome.code == 0, outcome.err
    image, mask = nib.load(scan), nib.load(tmp_path / "mask.nii")
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, image.affine)
    values = np.asanyarray(mask.dataobj)
    assert set(np.unique(values)) <= {0, 2}
    expected = np.count_nonzero(values) * abs(np.linalg.det(matrix)) / 1000
    assert outcome.json["masks"][0]["volumes_ml"]["rim"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("permutation", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_how_a_scan_is_stored_does_not_change_its_mask(segraft, work, tmp_path, permutation, flips):
    """The same head, its axes stored in another order and direction: the same mask, stored the same way."""
    original = nib.load(work / "D" / "imagesTr" / "p7.nii.gz")
    turn = np.array([[axis, flip] for axis, flip in zip(np.argsort(permutation), flips, strict=True)])
    nib.save(original.as_reoriented(turn), tmp_path / "scan.nii.gz")
    nib.save(original, tmp_path / "plain.nii.gz")
    for name in ("plain", "scan"):
        told = segraft("predict", work / "run", tmp_path / f"{name}.nii.gz", "-o", tmp_path / f"{name}_mask.nii.gz")
        assert told.code == 0, told.err
    plain, turned = (nib.load(tmp_path / f"{name}_mask.nii.gz") for name in ("plain", "scan"))
    assert np.count_nonzero(plain.dataobj)
    np.testing.assert_array_equal(plain.as_reoriented(turn).dataobj, turned.dataobj)


def test_a_fresh_process_gives_the_same_mask(segraft, fresh, work, tmp_path):
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    here = segraft("predict", work / "run", scan, "-o", tmp_path / "here.nii", "--json")
    there = fresh("predict", work / "run" / "adapter.safetensors", scan, "-o", tmp_path / "there.nii", "--json")
    assert there.code == 0, there.err
    assert here.json["masks"][0]["volumes_ml"] == there.json["masks"][0]["volumes_ml"]
    assert (tmp_path / "here.nii").read_bytes() == (tmp_path / "there.nii").read_bytes()


def test_adapter_and_base_move_together(segraft, work, tmp_path):
    for name in ("base", "run"):
        shutil.copytree(work / name, tmp_path / "elsewhere" / name)
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    assert segraft("predict", work / "run", scan, "-o", tmp_path / "before.nii").code == 0
    moved = tmp_path / "elsewhere"
    told = segraft("predict", moved / "run", scan, "-o", tmp_path / "after.nii")
    assert told.code == 0, told.err
    assert (tmp_path / "before.nii").read_bytes() == (tmp_path / "after.nii").read_bytes()


@pytest.mark.parametrize("given", ["base", "base/base.safetensors", "renamed.safetensors"])
def test_a_base_that_moved_alone_is_named(segraft, refused, work, tmp_path, given):
    shutil.copytree(work / "run", tmp_path / "away" / "run")
    shutil.copytree(work / "base", tmp_path / "there" / "base")
    shutil.copy(work / "base" / "base.safetensors", tmp_path / "there" / "renamed.safetensors")
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    arguments = ("predict", tmp_path / "away" / "run", scan, "-o", tmp_path / "mask.nii")
    refused(*arguments, says=["--base", "base.safetensors"])
    assert segraft(*arguments, "--base", tmp_path / "there" / given).code == 0
    assert (tmp_path / "mask.nii").is_file()


def test_a_base_predicts_alone(segraft, work, tmp_path):
    told = segraft("predict", work / "base", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "m.nii", "--json")
    assert list(told.json["masks"][0]["volumes_ml"]) == ["core"]
    assert set(np.unique(nib.load(tmp_path / "m.nii").dataobj)) <= {0, 1}


def test_bf16_is_close(segraft, work, tmp_path):
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    masks = []
    for precision in ("32", "bf16"):
        path = tmp_path / f"{precision}.nii"
        assert segraft("predict", work / "run", scan, "-o", path, "--precision", precision).code == 0
        masks.append(np.asanyarray(nib.load(path).dataobj))
    assert np.mean(masks[0] != masks[1]) < 0.1


class TestOutputPaths:
    @pytest.fixture
    def scan(self, work, tmp_path):
        path = tmp_path / "scans" / "head.nii.gz"
        path.parent.mkdir()
        return shutil.copy(work / "D" / "imagesTr" / "p7.nii.gz", path)

    def test_the_scan_itself(self, refused, work, scan):
        refused("predict", work / "run", scan, "-o", scan, says=[scan, "another output path"])

    def test_the_folder_of_the_scan(self, refused, work, scan):
        refused("predict", work / "run", scan, "-o", scan.parent, says=[scan])

    def test_a_link_to_the_folder_of_the_scan(self, refused, work, scan, tmp_path):
        (tmp_path / "link").symlink_to(scan.parent)
        refused("predict", work / "run", scan, "-o", tmp_path / "link", says=[scan])

    def test_one_file_for_several_scans(self, refused, work, scan, tmp_path):
        shutil.copy(scan, scan.with_name("other.nii.gz"))
        refused("predict", work / "run", scan.parent, "-o", tmp_path / "mask.nii.gz", says=["folder", "mask.nii.gz"])

    def test_two_scans_of_one_name(self, refused, work, scan, tmp_path):
        (tmp_path / "more").mkdir()
        other = shutil.copy(scan, tmp_path / "more" / scan.name)
        refused("predict", work / "run", scan, other, "-o", tmp_path / "masks", says=[scan.name])

    @pytest.mark.parametrize("below", ["", "deeper"])
    def test_a_file_where_the_folder_should_be(self, refused, work, scan, tmp_path, below):
        (tmp_path / "taken").write_text("")
        refused("predict", work / "run", scan, "-o", tmp_path / "taken" / below, says=[tmp_path / "taken"])

    def test_a_folder_where_nothing_can_be_written(self, refused, work, scan):
        refused("predict", work / "run", scan, "-o", "/proc/segraft", says=["/proc/segraft"])

    def test_a_folder_without_scans(self, refused, work, tmp_path):
        (tmp_path / "empty").mkdir()
        refused("predict", work / "run", tmp_path / "empty", "-o", tmp_path / "masks", says=[tmp_path / "empty"])

    def test_no_such_scan(self, refused, work, tmp_path):
        refused(
            "predict", work / "run", tmp_path / "no.nii.gz", "-o", tmp_path / "m.nii", says=[tmp_path / "no.nii.gz"]
        )


def test_a_bad_scan_among_good_ones_leaves_no_masks(refused, work, tmp_path, save_nifti):
    """Readable, but without contrast between the percentiles: only preparing it shows that."""
    empty = np.zeros((16, 16, 16), np.float32)
    empty[0, 0, 0] = 1
    bad = save_nifti(tmp_path / "z.nii.gz", empty)
    good = work / "D" / "imagesTr" / "p0.nii.gz"
    refused("predict", work / "run", good, bad, "-o", tmp_path / "masks", says=[bad, "percentiles"])


def test_names_are_shown_as_they_are(segraft, work, tmp_path):
    """Brackets are markup to the library that draws the tables."""
    mask = tmp_path / "[old]" / "m.nii.gz"
    shown = segraft("predict", work / "run", work / "D" / "imagesTr" / "p0.nii.gz", "-o", mask)
    assert "[old]" in shown.out
    assert mask.is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="precision 16 is for GPUs, and here is one")
def test_half_precision_without_a_gpu(refused, work, tmp_path):
    scan = work / "D" / "imagesTr" / "p0.nii.gz"
    refused("predict", work / "run", scan, "-o", tmp_path / "m.nii.gz", "--precision", "16", says=["bf16"])


def test_patches_overlap_as_the_preparation_says(segraft, work, tmp_path, monkeypatch):
    from segraft.jobs import model

    seen = []
    sliding = model.sliding_scores

    def spy(*arguments, **options):
        seen.append(options["overlap"])
        return sliding(*arguments, **options)

    monkeypatch.setattr(model, "sliding_scores", spy)
    options = ("--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "1", "--epochs", "1")
    assert segraft("adapt", *options, "--device", "cpu", "--overlap", "0.25", "--out", tmp_path / "run").code == 0
    scan = next((work / "D" / "imagesTr").iterdir())
    for file, wanted in ((tmp_path / "run", 0.25), (work / "base", 0.5)):
        assert segraft("predict", file, scan, "--out", tmp_path / "mask.nii.gz").code == 0
        assert seen.pop() == wanted
    refused = segraft("adapt", *options, "--overlap", "1", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "overlap" in refused.err
