"""DICOM series: every voxel where the standard puts it, in HU, and a clear refusal of what is no volume."""

import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.pixels import apply_modality_lut
from pydicom.uid import MPEG2MPML, JPEGLosslessSV1
from scipy.spatial.transform import Rotation

from segraft.data.dicom import read_series
from segraft.data.dicom_files import holds_series
from segraft.data.dicom_writing import write_series
from segraft.errors import SegraftError

AFFINE = np.array([[0.5, 0, 0, -7.0], [0, 0.75, 0, 3.0], [0, 0, 4.0, -20.0], [0, 0, 0, 1]])


def volume(shape=(5, 6, 4), affine=AFFINE, seed=0) -> nib.Nifti1Image:
    data = np.random.default_rng(seed).integers(-1024, 3071, shape).astype(np.int16)
    return nib.Nifti1Image(data, affine)


@pytest.fixture
def series(tmp_path) -> Path:
    write_series(volume(), tmp_path / "series")
    return tmp_path / "series"


def change(file: Path, **tags) -> None:
    """Set tags; None removes one."""
    dataset = pydicom.dcmread(file)
    for tag, value in tags.items():
        if value is None:
            delattr(dataset, tag)
        else:
            setattr(dataset, tag, value)
    dataset.save_as(file)


def change_all(folder: Path, **tags) -> None:
    for file in sorted(folder.iterdir()):
        change(file, **tags)


@settings(max_examples=30)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-400, 400)] * 3),
    order=st.randoms(use_true_random=False),
)
def test_voxels_lie_where_the_standard_puts_them(tmp_path_factory, angles, spacing, origin, order):
    """Positions by hand from the tags, as in PS3.3 C.7.6.2.1.1: P = S + column·Δcolumn·X + row·Δrow·Y."""
    folder = tmp_path_factory.mktemp("series")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    files = write_series(volume((4, 3, 3), affine), folder / "s")
    names = [f"f{number}.dcm" for number in range(3)]
    order.shuffle(names)  # the order of names says nothing
    for file, name in zip(files, names, strict=True):
        file.rename(file.with_name(name))
    image = read_series(folder / "s")
    data = np.asanyarray(image.dataobj)
    for file in (folder / "s").iterdir():
        dataset = pydicom.dcmread(file)
        corner, cosines = np.array(dataset.ImagePositionPatient), np.array(dataset.ImageOrientationPatient)
        row_spacing, column_spacing = dataset.PixelSpacing
        for row, column in ((0, 0), (2, 1), (1, 3)):
            lps = corner + column * column_spacing * cosines[:3] + row * row_spacing * cosines[3:]
            ras = lps * [-1, -1, 1]
            i, j, k = np.linalg.solve(image.affine[:3, :3], ras - image.affine[:3, 3])
            np.testing.assert_allclose([i, j], [column, row], atol=1e-3)
            assert abs(k - round(k)) < 1e-3
            assert data[column, row, round(k)] == dataset.pixel_array[row, column]


def test_a_series_comes_back_bit_for_bit(series):
    image = read_series(series)
    np.testing.assert_array_equal(image.dataobj, volume().dataobj)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-9)
    assert image.get_data_dtype() == np.int16
    assert image.header.get_xyzt_units()[0] == "mm"


def test_the_same_image_gives_the_same_files(tmp_path):
    first, second, other = (tmp_path / name for name in "abc")
    write_series(volume(), first)
    write_series(volume(), second)
    write_series(volume(seed=1), other)
    assert [file.read_bytes() for file in sorted(first.iterdir())] == [
        file.read_bytes() for file in sorted(second.iterdir())
    ]
    uids = {pydicom.dcmread(folder / "slice_0000.dcm").SeriesInstanceUID for folder in (first, second, other)}
    assert len(uids) == 2


def test_each_slice_has_its_own_rescaling(series):
    change(series / "slice_0001.dcm", RescaleSlope=2, RescaleIntercept=-1000)
    change(series / "slice_0002.dcm", RescaleSlope=0.5)
    data, stored = np.asanyarray(read_series(series).dataobj), np.asanyarray(volume().dataobj).astype(float)
    assert data.dtype == np.float32
    np.testing.assert_array_equal(data[..., 0], stored[..., 0])
    np.testing.assert_array_equal(data[..., 1], stored[..., 1] * 2 - 1000)
    np.testing.assert_array_equal(data[..., 2], stored[..., 2] / 2)


def test_how_it_is_displayed_does_not_change_hu(series):
    change_all(series, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_series(series).dataobj, volume().dataobj)


def test_overlapping_slices_lie_at_their_positions(tmp_path):
    write_series(volume(), tmp_path / "s", thickness_mm=8)
    assert read_series(tmp_path / "s").header.get_zooms()[2] == 4


def test_a_single_slice_is_as_thick_as_it_says(tmp_path):
    write_series(volume((5, 6, 1)), tmp_path / "s", thickness_mm=2.5)
    assert read_series(tmp_path / "s").header.get_zooms() == (0.5, 0.75, 2.5)
    change_all(tmp_path / "s", SliceThickness=None)
    with pytest.raises(SegraftError, match="has no SliceThickness"):
        read_series(tmp_path / "s")


@pytest.mark.parametrize("name", ["DICOMDIR", "notes.txt", ".hidden", "README"])
def test_what_is_plainly_not_dicom_is_left_out(series, name):
    (series / name).write_text("no image")
    assert read_series(series).shape == (5, 6, 4)


@pytest.mark.parametrize("name", ["slice_0009.dcm", "IM0001", "mask.nii.gz"])
def test_what_may_be_an_image_is_not(series, name):
    (series / name).write_bytes(b"\0" * 200)
    with pytest.raises(SegraftError, match=f"{name} is not a DICOM file"):
        read_series(series)


def test_a_gap(series):
    (series / "slice_0002.dcm").unlink()
    write_more = volume((5, 6, 6))
    shutil.rmtree(series)
    write_series(write_more, series)
    (series / "slice_0002.dcm").unlink()
    with pytest.raises(SegraftError, match=r"slice_0001.dcm and slice_0003.dcm .* 8 mm apart, the others 4 mm"):
        read_series(series)


@pytest.mark.parametrize(("moved", "fine"), [(0.009, True), (0.03, True), (0.06, False), (-1.5, False)])
def test_spacing_may_be_off_by_one_percent(series, moved, fine):
    change(series / "slice_0003.dcm", ImagePositionPatient=[7, -3, -8 + moved])
    if fine:
        assert read_series(series).shape == (5, 6, 4)
    else:
        with pytest.raises(SegraftError, match="mm apart, the others 4 mm"):
            read_series(series)


def test_a_duplicate(series):
    shutil.copy(series / "slice_0001.dcm", series / "copy.dcm")
    with pytest.raises(SegraftError, match="lie at the same place: keep one of them"):
        read_series(series)


def test_two_series(series):
    change(series / "slice_0002.dcm", SeriesInstanceUID="1.2.3")
    first = pydicom.dcmread(series / "slice_0000.dcm").SeriesInstanceUID
    with pytest.raises(SegraftError, match="mixes the series") as caught:
        read_series(series)
    assert "1.2.3" in str(caught.value)
    assert first in str(caught.value)


def test_a_tilted_gantry(series):
    for k, file in enumerate(sorted(series.iterdir())):
        change(file, ImagePositionPatient=[7, -3 + 4 * k * np.tan(np.radians(12)), -20 + 4 * k])
    with pytest.raises(SegraftError, match=r"gantry tilted by 12\.0°"):
        read_series(series)


def test_one_slice_beside_the_others(series):
    change(series / "slice_0001.dcm", ImagePositionPatient=[9, -3, -16])
    with pytest.raises(SegraftError, match=r"slice_0001.dcm lies 2 mm beside the line"):
        read_series(series)


@pytest.mark.parametrize(
    ("tags", "complaint"),
    [
        ({"ImagePositionPatient": None}, "has no ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "has no ImageOrientationPatient"),
        ({"PixelSpacing": None}, "has no PixelSpacing"),
        ({"RescaleIntercept": None}, "has no RescaleIntercept"),
        ({"RescaleType": "EDW"}, "holds values in EDW, not HU"),
        ({"PixelSpacing": [0.75, 0]}, "PixelSpacing that is not above 0"),
        ({"PixelSpacing": [0.75, 0.6]}, "have different pixel spacings"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "have different orientations"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not perpendicular unit vectors"),
        ({"NumberOfFrames": 2}, "several frames .* dcm2niix"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "is RGB, no grey image"),
        ({"PixelData": None}, r"\(CT\) holds no image"),
        ({"PixelData": b"\0\0"}, "pixels of .* cannot be read"),
    ],
)
def test_files_that_are_no_slice_of_the_volume(series, tags, complaint):
    change(series / "slice_0002.dcm", **tags)
    with pytest.raises(SegraftError, match=complaint) as caught:
        read_series(series)
    assert "slice_0002.dcm" in str(caught.value)


def test_a_slice_of_another_size(series, tmp_path):
    write_series(volume((6, 6, 4)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "slice_0003.dcm", series / "slice_0003.dcm")
    change(series / "slice_0003.dcm", SeriesInstanceUID=pydicom.dcmread(series / "slice_0000.dcm").SeriesInstanceUID)
    with pytest.raises(SegraftError, match="have different sizes"):
        read_series(series)


def test_a_file_cut_short(series):
    file = series / "slice_0001.dcm"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SegraftError, match=r"slice_0001.dcm"):
        read_series(series)


@pytest.mark.parametrize(
    ("syntax", "says"), [(JPEGLosslessSV1, "pylibjpeg-libjpeg"), (MPEG2MPML, "no way to store CT")]
)
def test_compressions_without_a_decoder(series, monkeypatch, syntax, says):
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder

    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    for file in series.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(file)
    with pytest.raises(SegraftError, match=says):
        read_series(series)


def test_without_pydicom(series, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SegraftError, match=r"install segraft\[dicom\]"):
        read_series(series)


def test_what_pydicom_warns_of_is_logged_once(series, caplog):
    """Identifiers with letters and pixel data longer than the image: against the rules, but readable."""
    uid = str(pydicom.dcmread(series / "slice_0000.dcm").SeriesInstanceUID).encode()
    for file in series.iterdir():
        change(file, PixelData=pydicom.dcmread(file).PixelData + b"\0" * 8)
        file.write_bytes(file.read_bytes().replace(uid, b"1.2.x" + uid[5:]))
    for _ in range(2):
        np.testing.assert_array_equal(read_series(series).dataobj, volume().dataobj)
    told = [record.getMessage() for record in caplog.records if record.name == "segraft.data.dicom_tools"]
    assert len(told) == 2
    assert "Invalid value for VR UI" in told[0]
    assert "8 bytes of excess padding" in told[1]
    assert all(line.startswith(str(series)) for line in told)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (nib.Nifti1Image(np.full((3, 3, 3), 0.5, np.float32), AFFINE), "whole HU"),
        (nib.Nifti1Image(np.full((3, 3, 3), 40_000, np.int32), AFFINE), "whole HU"),
        (volume(affine=AFFINE + np.array([[0, 0.3, 0, 0]] + [[0] * 4] * 3)), "not perpendicular"),
    ],
)
def test_what_cannot_be_written(tmp_path, image, complaint):
    with pytest.raises(SegraftError, match=complaint):
        write_series(image, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_series_is_not_written_into_another(series):
    with pytest.raises(SegraftError, match=r"slice_0003.dcm, which is not of this series"):
        write_series(volume((5, 6, 3)), series)


def test_holds_series(series, tmp_path):
    assert holds_series(series)
    assert not holds_series(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("place", ["totalsegmentator_examples/example_ct_dicom", "dicom_seg_rtstruct/dcmqi/ct-3slice"])
def test_real_series(real_data, place):
    folder = real_data / place
    image = read_series(folder)
    data = np.asanyarray(image.dataobj)
    files = [pydicom.dcmread(file) for file in folder.iterdir()]
    assert data.shape == (512, 512, len(files))
    for dataset in files:
        corner = np.array(dataset.ImagePositionPatient, dtype=float) * [-1, -1, 1]
        i, j, k = np.linalg.solve(image.affine[:3, :3], corner - image.affine[:3, 3])
        np.testing.assert_allclose([i, j, k], [0, 0, round(k)], atol=1e-6)
        np.testing.assert_array_equal(data[..., round(k)].T, apply_modality_lut(dataset.pixel_array, dataset))


@pytest.mark.data
def test_a_real_series_agrees_with_the_mask_that_another_tool_drew_on_it(real_data):
    """The mask's grid is the same but for the direction of its second axis."""
    image = read_series(real_data / "totalsegmentator_examples" / "example_ct_dicom")
    mask = nib.load(real_data / "totalsegmentator_examples" / "example_seg_dicom.nii.gz")
    np.testing.assert_allclose(nib.as_closest_canonical(image).affine, nib.as_closest_canonical(mask).affine, atol=1e-4)


@pytest.mark.data
def test_a_folder_with_a_structure_set(real_data):
    with pytest.raises(SegraftError, match=r"rtss.dcm \(RTSTRUCT\) holds no image"):
        read_series(real_data / "dicom_seg_rtstruct" / "dicompyler")
