import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.data.nifti import list_scans, load_nifti, same_grid, write_mask
from segraft.errors import SegraftError

DATA = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def save(path: Path, image: nib.Nifti1Image) -> Path:
    nib.save(image, path)
    return path


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("trailing", [(), (1,), (1, 1)])
def test_load(tmp_path, kind, name, trailing):
    affine = np.diag([-2.0, 3, 4, 1])
    path = save(tmp_path / name, kind(DATA.reshape(*DATA.shape, *trailing), affine))
    image = load_nifti(path)
    assert type(image) is kind
    assert image.shape == DATA.shape
    np.testing.assert_array_equal(image.get_fdata(), DATA)
    np.testing.assert_array_equal(image.affine, affine)


def test_load_applies_the_scale_of_the_header(tmp_path):
    image = nib.Nifti1Image(DATA, np.eye(4))
    image.header.set_slope_inter(2, -1024)
    path = save(tmp_path / "a.nii", nib.Nifti1Image(DATA * 2.0 - 1024, np.eye(4), image.header))
    np.testing.assert_allclose(load_nifti(path).get_fdata(), DATA * 2.0 - 1024, atol=1e-2)


@pytest.mark.parametrize("kept", [0.3, 0.9, -1])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_cut_short(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 1000, (9, 9, 9)).astype(np.int16)
    path = save(tmp_path / name, nib.Nifti1Image(noise, np.eye(4)))
    raw = path.read_bytes()
    path.write_bytes(raw[: kept if kept < 0 else int(len(raw) * kept)])
    with pytest.raises(SegraftError, match=rf"{name}.*cut short"):
        load_nifti(path)


def test_damaged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 1000, (9, 9, 9)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", nib.Nifti1Image(noise, np.eye(4)))
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(SegraftError, match="damaged"):
        load_nifti(path)


@given(content=st.binary(max_size=700), zipped=st.booleans())
def test_rubbish(tmp_path_factory, content, zipped):
    path = tmp_path_factory.getbasetemp() / "rubbish.nii.gz"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(SegraftError, match=r"rubbish\.nii\.gz"):
        load_nifti(path)


@given(where=st.integers(0, 351), value=st.integers(0, 255))
def test_one_wrong_header_byte_is_answered_in_a_sentence(tmp_path_factory, where, value):
    raw = bytearray(nib.Nifti1Image(DATA, np.eye(4)).to_bytes())
    raw[where] = value
    path = tmp_path_factory.getbasetemp() / "header.nii"
    path.write_bytes(raw)
    try:
        assert load_nifti(path).ndim == 3
    except SegraftError as error:
        assert "header.nii" in str(error)  # noqa: PT017 - either outcome is right, nothing else is


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (nib.Nifti1Image(np.zeros((2, 3, 4, 2), np.uint8), np.eye(4)), "three axes are expected: split"),
        (nib.Nifti1Image(np.zeros((2, 3), np.uint8), np.eye(4)), "three axes are expected: store"),
        (nib.Nifti1Image(DATA.astype(np.complex64), np.eye(4)), "one number per voxel"),
    ],
)
def test_refused(tmp_path, image, complaint):
    path = save(tmp_path / "a.nii", image)
    with pytest.raises(SegraftError, match=complaint) as caught:
        load_nifti(path, what="label")
    assert str(caught.value).startswith(f"the label {path}")


@pytest.mark.parametrize("value", [0, np.nan])
def test_singular_affine(tmp_path, value):
    header = nib.Nifti1Image(DATA, np.eye(4)).header
    header["srow_y"] = value
    header["sform_code"] = 1
    path = tmp_path / "a.nii"
    path.write_bytes(header.structarr.tobytes() + bytes(4) + DATA.tobytes(order="F"))
    with pytest.raises(SegraftError, match=r"a\.nii has a singular affine"):
        load_nifti(path)


@pytest.mark.parametrize("name", ["missing.nii", "folder"])
def test_unreadable(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SegraftError, match=f"{name} cannot be read"):
        load_nifti(tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "shift", "same"),
    [((2, 3, 4), 0, True), ((2, 3, 4), 5e-4, True), ((2, 3, 4), 2e-3, False), ((2, 4, 3), 0, False)],
)
@pytest.mark.parametrize("entry", [(0, 3), (1, 0)])
def test_same_grid(shape, shift, same, entry):
    affine = np.diag([1.0, 2, 3, 1])
    moved = affine.copy()
    moved[entry] += shift
    a, b = nib.Nifti1Image(DATA, affine), nib.Nifti1Image(np.zeros(shape, np.uint8), moved)
    assert same_grid(a, b) is same


def oblique() -> np.ndarray:
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) * [0.7, 0.8, 5], [10, -20, 30])
    return np.asarray(affine, dtype=np.float32).astype(float)


@pytest.mark.parametrize("codes", [(1, 2), (1, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_write_mask_keeps_the_geometry(tmp_path, codes, name):
    scan = nib.Nifti1Image(DATA.astype(np.float32), oblique())
    scan.set_qform(oblique(), code=codes[0])
    scan.set_sform(oblique(), code=codes[1])
    scan.header.set_xyzt_units("mm", "sec")
    scan.header["cal_max"] = 1000
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    scan = load_nifti(save(tmp_path / "scan.nii", scan))
    write_mask(DATA > 3, scan, tmp_path / name)
    mask = nib.load(tmp_path / name)
    np.testing.assert_array_equal(mask.get_fdata(), DATA > 3)
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)
    assert mask.get_data_dtype() == np.uint8
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == codes
    np.testing.assert_allclose(mask.header.get_zooms(), scan.header.get_zooms())
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    assert mask.header["cal_max"] == 0
    assert b"Jane" not in mask.to_bytes()
    assert same_grid(mask, scan)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize(("largest", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_write_mask_type(tmp_path, largest, dtype):
    write_mask(np.full((2, 3, 4), largest, np.int64), nib.Nifti1Image(DATA, np.eye(4)), tmp_path / "m.nii.gz")
    written = nib.load(tmp_path / "m.nii.gz")
    assert written.get_data_dtype() == dtype
    assert written.get_fdata().max() == largest


@pytest.mark.parametrize(
    ("mask", "name", "complaint"),
    [
        (DATA, "m.png", "end in"),
        (DATA[:1], "m.nii", "shape"),
        (DATA - 1, "m.nii", "whole numbers"),
        (DATA + 65_530.0, "m.nii", "whole numbers"),
        (DATA * 0.5, "m.nii", "whole numbers"),
        (DATA * np.nan, "m.nii", "whole numbers"),
    ],
)
def test_write_mask_refuses(tmp_path, mask, name, complaint):
    with pytest.raises(SegraftError, match=complaint):
        write_mask(mask.astype(float), nib.Nifti1Image(DATA, np.eye(4)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_list_scans(tmp_path):
    for name in ["b.nii", "a.nii.gz", "._a.nii.gz", "notes.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "sub.nii").mkdir()
    extra = tmp_path / "notes.txt"
    assert list_scans([extra, tmp_path]) == [extra, tmp_path / "a.nii.gz", tmp_path / "b.nii"]
    with pytest.raises(SegraftError, match=r"sub\.nii holds no"):
        list_scans([tmp_path / "sub.nii"])
    with pytest.raises(SegraftError, match="does not exist"):
        list_scans([tmp_path / "c.nii"])
