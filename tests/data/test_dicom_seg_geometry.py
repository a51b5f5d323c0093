"""DICOM SEG: every voxel comes back to where it was, by the standard, by highdicom, by GDCM, and by ourselves."""

from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from tests.data.dicom_segs import AFFINE, LABELS, ORIGIN, REGIONS, SHAPE, change, mask_of, read, series, write

from segraft.data.dicom import read_series
from segraft.data.dicom_seg import read_segments
from segraft.data.dicom_seg_writing import Found, require_writable
from segraft.errors import SegraftError


@settings(max_examples=25)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-400, 400)] * 3),
    order=st.randoms(use_true_random=False),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    axes=st.permutations([0, 1, 2]),
    overlap=st.booleans(),
)
def test_there_and_back(tmp_path_factory, seg_by_hand, angles, spacing, origin, order, flips, axes, overlap):
    """Any orientation, spacing and order of files; also onto the scan as NIfTI, its axes in any order and direction."""
    folder = tmp_path_factory.mktemp("seg")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    scan = series(folder / "scan", affine=affine)
    files, names = sorted(scan.iterdir()), [f"f{number}.dcm" for number in range(SHAPE[2])]
    order.shuffle(names)
    for file, name in zip(files, names, strict=True):
        file.rename(file.with_name(name))
    image = read_series(scan)
    mask = mask_of(values=(0, 0, 0, 1, 2) if overlap else (0, 0, 0, 1, 4, 300), seed=order.randrange(1000))
    labels = REGIONS if overlap else LABELS
    planes = {value: labels.plane(mask, value) for value in labels}
    path = write(Found(labels, mask, planes if overlap else {}), scan, folder / "seg.dcm")
    by_hand = seg_by_hand(path, image.affine, image.shape)
    for value, name in labels.items():
        np.testing.assert_array_equal(by_hand[name], planes[value])
    np.testing.assert_array_equal(read(path, labels, scan), mask)
    turned = image.as_reoriented(np.array(list(zip(axes, flips, strict=True))))
    expected = nib.Nifti1Image(mask.astype(np.int16), image.affine).as_reoriented(
        np.array(list(zip(axes, flips, strict=True)))
    )
    found = read_segments(path, labels, None, turned, folder / "scan.nii.gz")
    np.testing.assert_array_equal(found.dataobj, expected.dataobj)
    np.testing.assert_array_equal(found.affine, turned.affine)


def test_other_readers(tmp_path):
    """highdicom's volume, matched to the scan's geometry by itself, and GDCM's frames (of whole bytes alone)."""
    shape = (8, 6, 4)
    scan, mask = series(tmp_path / "scan", shape), mask_of(shape)
    seg = write(Found(LABELS, mask, {}), scan, tmp_path / "seg.dcm")
    image = read_series(scan)
    volume = highdicom.seg.segread(seg).get_volume(combine_segments=False, allow_missing_positions=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ image.affine
    whole = volume.match_geometry(highdicom.VolumeGeometry(lps, image.shape, coordinate_system="PATIENT"))
    for place, value in enumerate(LABELS):
        np.testing.assert_array_equal(whole.array[..., place] > 0, mask == value)
    dataset = pydicom.dcmread(seg)
    numbers = [
        each.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for each in dataset.PerFrameFunctionalGroupsSequence
    ]
    frames = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(seg)))
    for number, value in enumerate(LABELS, start=1):
        planes = [(mask[..., k] == value).T for k in range(shape[2])]
        mine = [frame > 0 for frame, of in zip(frames, numbers, strict=True) if of == number][::-1]  # the top is first
        np.testing.assert_array_equal(mine, [plane for plane in planes if plane.any()])


def test_a_single_slice(tmp_path):
    scan = series(tmp_path / "one", (5, 6, 1))
    mask = mask_of((5, 6, 1))
    np.testing.assert_array_equal(read(write(Found(LABELS, mask, {}), scan, tmp_path / "s.dcm"), LABELS, scan), mask)


def test_directions_that_are_rounded_differently(tmp_path):
    """As much as `read_series` takes; with names in the other order, as which slice is the first must not matter."""
    shape = (401, 3, 3)
    scan, mask = series(tmp_path / "scan", shape), mask_of(shape)
    for k, file in enumerate(sorted(scan.iterdir())):
        change(file, ImageOrientationPatient=[-1, 0.0004 * k, 0, 0, -1, 0])
        file.rename(file.with_name(f"{9 - k}.dcm"))
    require_writable(scan, LABELS, ORIGIN)
    np.testing.assert_array_equal(read(write(Found(LABELS, mask, {}), scan, tmp_path / "s.dcm"), LABELS, scan), mask)


@pytest.mark.parametrize(
    ("affine", "shape"),
    [
        (AFFINE + np.array([[0, 0, 0, 0.1]] + [[0] * 4] * 3), SHAPE),  # a fifth of a voxel aside
        (AFFINE @ np.diag([1, 1.1, 1, 1]), SHAPE),
        (AFFINE @ np.diag([1, 1, 0.5, 1]), (5, 6, 8)),  # thick slices on thin ones: every second would be empty
        (AFFINE @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), SHAPE),
    ],
)
def test_frames_beside_the_voxels(seg, affine, shape):
    image = nib.Nifti1Image(np.zeros(shape, np.int16), affine)
    with pytest.raises(SegraftError, match="do not lie on the voxels of its image"):
        read_segments(seg, LABELS, None, image, Path("scan.nii.gz"))


def sizes(path: Path, **tags) -> None:
    """Change Pixel Measures; None removes one."""
    dataset = pydicom.dcmread(path)
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    for tag, value in tags.items():
        if value is None:
            delattr(measures, tag)
        else:
            setattr(measures, tag, value)
    dataset.save_as(path)


@pytest.mark.parametrize("thickness", [0, 2, 4])
def test_thick_slices_by_where_they_lie(scan, seg, thickness):
    """Where nothing says how far apart they are: thick ones are not for a thin scan, whose own are."""
    sizes(seg, SpacingBetweenSlices=None, SliceThickness=thickness)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE)
    np.testing.assert_array_equal(read_segments(seg, LABELS, None, image, Path("scan.nii.gz")).dataobj, mask_of())
    thin = nib.Nifti1Image(np.zeros((5, 6, 8), np.int16), AFFINE @ np.diag([1, 1, 0.5, 1]))
    with pytest.raises(SegraftError, match="do not lie on the voxels of its image"):
        read_segments(seg, LABELS, None, thin, Path("scan.nii.gz"))


def test_a_single_frame_by_its_thickness(scan, tmp_path):
    mask = np.where(np.arange(SHAPE[2]) == 1, mask_of(values=(0, 1)), 0)
    seg = write(Found({1: "liver"}, mask, {}), scan, tmp_path / "seg.dcm")
    sizes(seg, SpacingBetweenSlices=None)
    thick, thin = (
        nib.Nifti1Image(np.zeros((5, 6, 4 * k), np.int16), AFFINE @ np.diag([1, 1, 1 / k, 1])) for k in (1, 2)
    )
    np.testing.assert_array_equal(read_segments(seg, LABELS, None, thick, Path("scan.nii.gz")).dataobj, mask)
    with pytest.raises(SegraftError, match="do not lie on the voxels of its image"):
        read_segments(seg, LABELS, None, thin, Path("scan.nii.gz"))
    sizes(seg, SliceThickness=0)
    with pytest.raises(SegraftError, match="says nowhere how thick its slices are"):
        read_segments(seg, LABELS, None, thick, Path("scan.nii.gz"))
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask)  # which it refers to


def test_a_part_of_the_scan(seg):
    """Frames may lie in a larger scan, but marks not outside of one."""
    larger = nib.Nifti1Image(np.zeros((5, 6, 9), np.int16), AFFINE @ nib.affines.from_matvec(np.eye(3), [0, 0, -2]))
    found = np.asanyarray(read_segments(seg, LABELS, None, larger, Path("scan.nii.gz")).dataobj)
    np.testing.assert_array_equal(found[..., 2:6], mask_of())
    assert not found[..., :2].any()
    assert not found[..., 6:].any()
    smaller = nib.Nifti1Image(np.zeros((5, 6, 3), np.int16), AFFINE)
    with pytest.raises(SegraftError, match="marks voxels outside its image"):
        read_segments(seg, LABELS, None, smaller, Path("scan.nii.gz"))
