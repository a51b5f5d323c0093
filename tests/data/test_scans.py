"""One way to read a scan, whatever it is stored as."""

import json

import nibabel as nib
import numpy as np
import pytest

from segraft.data.checks import check_image, load_case
from segraft.data.cohort import Cohort
from segraft.data.dicom_writing import write_series
from segraft.data.nifti import list_scans, same_grid, write_mask
from segraft.data.scans import load_scan, mask_name
from segraft.errors import SegraftError

DATA = np.random.default_rng(0).integers(-1024, 2000, (6, 5, 4)).astype(np.int16)
IMAGE = nib.Nifti1Image(DATA, np.diag([0.5, 0.75, 5.0, 1.0]))


@pytest.fixture
def stored(tmp_path):
    """The same scan both ways, in one folder."""
    write_series(IMAGE, tmp_path / "a_series")
    nib.save(IMAGE, tmp_path / "b.nii.gz")
    return tmp_path


@pytest.mark.parametrize("name", ["a_series", "b.nii.gz"])
def test_both_ways_are_the_same_scan(stored, name):
    scan = load_scan(stored / name)
    np.testing.assert_array_equal(scan.dataobj, DATA)
    assert same_grid(scan, IMAGE)
    np.testing.assert_array_equal(check_image(stored / name).dataobj, DATA)


def test_a_case_is_recognised_in_either(stored):
    (stored / "labels").mkdir()
    nib.save(nib.Nifti1Image((DATA > 0).astype(np.uint8), IMAGE.affine), stored / "labels" / "l.nii.gz")
    entries = [{"image": f"./{name}", "label": "./labels/l.nii.gz"} for name in ("a_series", "b.nii.gz")]
    (stored / "dataset.json").write_text(json.dumps({"labels": {"1": "bone"}, "training": entries}))
    series, file = Cohort.read(stored).cases
    assert (series.id, file.id) == ("a_series", "b")
    assert series.digest() == file.digest()
    scan, label = load_case(series)
    assert same_grid(scan.first, label)


def test_lists(stored):
    assert list_scans([stored]) == [stored / "a_series", stored / "b.nii.gz"]
    assert list_scans([stored / "a_series"]) == [stored / "a_series"]


@pytest.mark.parametrize("below", ["ct", "study/ct"])
def test_scans_deeper_down_are_not_passed_over(stored, below):
    folder, file = stored / "patient2" / below, "slice_0000.dcm"
    folder.mkdir(parents=True)
    (stored / "patient2" / "notes.txt").write_text("")
    (folder / file).write_bytes((stored / "a_series" / file).read_bytes())
    with pytest.raises(SegraftError, match=rf"patient2 is no scan, but holds DICOM deeper down \(.*{file}\)"):
        list_scans([stored])
    (folder / file).rename(folder / "masks.nii.gz")
    (folder / "masks.nii.gz").write_bytes((stored / "b.nii.gz").read_bytes())
    assert list_scans([stored]) == [stored / "a_series", stored / "b.nii.gz"]  # of an earlier run


def test_hidden_folders_are_passed_over(stored):
    (stored / "patient2" / ".cache").mkdir(parents=True)
    nib.save(IMAGE, stored / "patient2" / ".cache" / "x.nii.gz")
    (stored / "patient2" / "._x.nii.gz").write_bytes(b"")
    assert list_scans([stored]) == [stored / "a_series", stored / "b.nii.gz"]


@pytest.mark.parametrize("name", ["c.NII", "c.NII.GZ", "c.Nii.gz"])
def test_endings_in_any_case(stored, name):
    write_mask(DATA > 0, IMAGE, stored / name)
    assert [file.name for file in stored.iterdir() if file.name.startswith((".", "c"))] == [name]
    np.testing.assert_array_equal(load_scan(stored / name).dataobj, DATA > 0)
    assert ((stored / name).read_bytes()[:2] == b"\x1f\x8b") == name.lower().endswith(".gz")
    assert list_scans([stored]) == [stored / "a_series", stored / "b.nii.gz", stored / name]
    assert mask_name(stored / name) == name


def test_names_of_masks(stored):
    assert mask_name(stored / "a_series") == "a_series.nii.gz"
    assert mask_name(stored / "b.nii.gz") == "b.nii.gz"
    with pytest.raises(SegraftError, match="not named as a NIfTI file"):
        mask_name(stored / "b.img")


def test_what_is_neither(stored):
    (stored / "empty").mkdir()
    with pytest.raises(SegraftError, match="empty is a folder without DICOM files"):
        load_scan(stored / "empty")
    with pytest.raises(SegraftError, match="is a single DICOM file: give the folder of its series"):
        load_scan(stored / "a_series" / "slice_0000.dcm")
    with pytest.raises(SegraftError, match="cannot be read"):
        load_scan(stored / "missing.nii")
    with pytest.raises(SegraftError, match=r"holds no .nii or .nii.gz files and no DICOM series"):
        list_scans([stored / "empty"])


def test_a_mask_in_a_series_folder_is_no_slice(stored):
    nib.save(IMAGE, stored / "a_series" / "mask.nii")
    with pytest.raises(SegraftError, match=r"mask.nii is not a DICOM file .* move it out of the folder"):
        load_scan(stored / "a_series")
