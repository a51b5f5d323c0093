"""DICOM SEG: what is written is read the same by the standard, by highdicom, by GDCM, and by ourselves."""

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.sr.codedict import codes
from scipy.spatial.transform import Rotation

from segraft import __version__
from segraft.data.case import Case
from segraft.data.dicom import read_series
from segraft.data.dicom_files import holds_series
from segraft.data.dicom_seg import is_segmentation, read_segments, segmentation_file
from segraft.data.dicom_seg_writing import Found, Origin, require_writable, write_segmentation
from segraft.data.dicom_writing import write_series
from segraft.data.labels import Labels
from segraft.errors import SegraftError

AFFINE = np.array([[0.5, 0, 0, -7.0], [0, 0.75, 0, 3.0], [0, 0, 4.0, -20.0], [0, 0, 0, 1]])
SHAPE = (5, 6, 4)
LABELS = Labels({1: "liver", 4: "left kidney", 300: "Hämatom"})
REGIONS = Labels({1: "whole", 2: "core"}, {1: (1, 2), 2: (2,)})
ORIGIN = Origin("adapter.safetensors", "0123456789abcdef" * 4)
MADE = datetime(2024, 2, 29, 12, 34, 56, tzinfo=UTC)


def series(folder: Path, shape=SHAPE, affine=AFFINE, seed=0) -> Path:
    data = np.random.default_rng(seed).integers(-1024, 3071, shape).astype(np.int16)
    write_series(nib.Nifti1Image(data, affine), folder, patient="Doe^Jane")
    return folder


def mask_of(shape=SHAPE, values=(0, 1, 4, 300), seed=1) -> np.ndarray:
    return np.random.default_rng(seed).choice(values, shape)


def write(found: Found, folder: Path, path: Path, **options) -> Path:
    write_segmentation(found, folder, path, **{"origin": ORIGIN, "made": MADE, **options})
    return path


def read(path: Path, labels: Labels, scan: Path, asked=None) -> np.ndarray:
    return np.asanyarray(read_segments(path, labels, asked, read_series(scan), scan).dataobj)


def change(path: Path, **tags) -> None:
    dataset = pydicom.dcmread(path)
    for tag, value in tags.items():
        if value is None:
            delattr(dataset, tag)
        else:
            setattr(dataset, tag, value)
    dataset.save_as(path)


@pytest.fixture
def scan(tmp_path) -> Path:
    return series(tmp_path / "scan")


@pytest.fixture
def seg(scan, tmp_path) -> Path:
    return write(Found(LABELS, mask_of(), {}), scan, tmp_path / "seg.dcm")


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


def test_what_is_written(scan, seg):
    """The attributes that docs/dicom.md promises."""
    dataset = pydicom.dcmread(seg)
    sources = [pydicom.dcmread(file) for file in sorted(scan.iterdir())]
    assert dataset.SOPClassUID == pydicom.uid.SegmentationStorage
    assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert (dataset.Modality, dataset.SegmentationType, dataset.SegmentsOverlap) == ("SEG", "BINARY", "NO")
    for tag in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[tag].value == sources[0][tag].value
    assert dataset.PatientName == "Doe^Jane"
    assert dataset.SeriesInstanceUID not in {sources[0].SeriesInstanceUID, dataset.StudyInstanceUID}
    (referenced,) = dataset.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == sources[0].SeriesInstanceUID
    instances = {each.ReferencedSOPInstanceUID for each in referenced.ReferencedInstanceSequence}
    assert instances == {each.SOPInstanceUID for each in sources}
    positions = {each.SOPInstanceUID: each.ImagePositionPatient for each in sources}
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert groups.PlanePositionSequence[0].ImagePositionPatient == positions[source]
    assert (dataset.Manufacturer, dataset.SoftwareVersions) == ("Segraft", __version__)
    assert dataset.DeviceSerialNumber == ORIGIN.digest[:16]
    assert (dataset.ContentDate, dataset.ContentTime) == ("20240229", "123456")
    assert dataset.SeriesNumber == 1001
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.SpacingBetweenSlices, list(measures.PixelSpacing)) == (4, [0.75, 0.5])
    liver, kidney, haematoma = dataset.SegmentSequence
    assert [each.SegmentNumber for each in dataset.SegmentSequence] == [1, 2, 3]
    assert [each.SegmentLabel for each in dataset.SegmentSequence] == list(LABELS.values())
    assert [each.SegmentDescription for each in dataset.SegmentSequence] == ["label 1", "label 4", "label 300"]
    for each in dataset.SegmentSequence:
        assert (each.SegmentAlgorithmType, each.SegmentAlgorithmName) == ("AUTOMATIC", "Segraft")
        (algorithm,) = each.SegmentationAlgorithmIdentificationSequence
        assert algorithm.AlgorithmVersion == __version__
        assert ORIGIN.digest in algorithm.AlgorithmParameters

    def coded(sequence):
        return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator

    def of(concept):
        return concept.value, "SCT"

    assert coded(liver.SegmentedPropertyTypeCodeSequence) == of(codes.SCT.Liver)
    assert coded(liver.SegmentedPropertyCategoryCodeSequence) == of(codes.SCT.AnatomicalStructure)
    assert coded(kidney.SegmentedPropertyTypeCodeSequence) == of(codes.SCT.Kidney)
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert coded(side) == of(codes.SCT.Left)
    assert coded(haematoma.SegmentedPropertyTypeCodeSequence) == of(codes.SCT.Tissue)


def test_frames_without_a_voxel_are_left_out(scan, tmp_path):
    mask = np.zeros(SHAPE, int)
    mask[1, 2, 3], mask[0, 0, 1], mask[0, 1, 1] = 1, 1, 4
    path = write(Found(LABELS, mask, {}), scan, tmp_path / "seg.dcm")
    assert pydicom.dcmread(path).NumberOfFrames == 3
    assert len(pydicom.dcmread(path).SegmentSequence) == 3
    np.testing.assert_array_equal(read(path, LABELS, scan), mask)


@pytest.mark.parametrize("labels", [LABELS, REGIONS])
def test_nothing_found(scan, tmp_path, labels):
    nothing = np.zeros(SHAPE, int)
    planes = dict.fromkeys(labels, nothing > 0) if labels.regions else {}
    path = write(Found(labels, nothing, planes), scan, tmp_path / "seg.dcm")
    assert pydicom.dcmread(path).NumberOfFrames == len(labels) * SHAPE[2]
    assert not read(path, labels, scan).any()


def test_a_single_slice(tmp_path):
    scan = series(tmp_path / "one", (5, 6, 1))
    mask = mask_of((5, 6, 1))
    np.testing.assert_array_equal(read(write(Found(LABELS, mask, {}), scan, tmp_path / "s.dcm"), LABELS, scan), mask)


def test_regions_overlap(scan, tmp_path):
    whole = mask_of() > 0
    core = whole & (mask_of(seed=2) > 0)
    path = write(Found(REGIONS, np.zeros(SHAPE, int), {1: whole, 2: core}), scan, tmp_path / "seg.dcm")
    assert pydicom.dcmread(path).SegmentsOverlap == "YES"
    np.testing.assert_array_equal(read(path, REGIONS, scan), whole.astype(int) + core)
    plain = Labels(dict(REGIONS))
    with pytest.raises(SegraftError, match="are in whole and core together"):
        read(path, plain, scan)
    np.testing.assert_array_equal(read(path, plain, scan, asked=[1]), whole)


def test_the_same_gives_the_same_file_and_nothing_else_does(scan, tmp_path):
    found = Found(LABELS, mask_of(), {})
    first = write(found, scan, tmp_path / "a.dcm").read_bytes()
    assert write(found, scan, tmp_path / "b.dcm").read_bytes() == first
    others = [
        write(found, scan, tmp_path / "c.dcm", made=MADE.replace(second=57)),
        write(found, scan, tmp_path / "d.dcm", origin=Origin("other", "f" * 64)),
        write(Found(LABELS, mask_of(seed=9), {}), scan, tmp_path / "e.dcm"),
        write(found, series(tmp_path / "other", seed=5), tmp_path / "f.dcm"),
        tmp_path / "a.dcm",
    ]
    for tag in ("SOPInstanceUID", "SeriesInstanceUID"):
        uids = {pydicom.dcmread(path)[tag].value for path in others}
        assert len(uids) == 5


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"StudyInstanceUID": None}, r"slice_0002.dcm has no StudyInstanceUID, which a DICOM SEG"),
        ({"SOPInstanceUID": "", "FrameOfReferenceUID": None}, r"has no SOPInstanceUID, FrameOfReferenceUID"),
    ],
)
def test_what_a_series_must_say(scan, tmp_path, tags, says):
    change(scan / "slice_0002.dcm", **tags)
    with pytest.raises(SegraftError, match=says):
        require_writable(scan, LABELS, ORIGIN)
    with pytest.raises(SegraftError, match=says):
        write(Found(LABELS, mask_of(), {}), scan, tmp_path / "s.dcm")
    assert not (tmp_path / "s.dcm").exists()


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"StudyInstanceUID": "1.2.3"}, "StudyInstanceUID"),
        ({"FrameOfReferenceUID": "1.2.3"}, "FrameOfReferenceUID"),
        ({"PatientID": "secret"}, "PatientID"),
        ({"PatientName": "secret"}, "PatientName"),
        ({"PatientName": None}, "PatientName"),
    ],
)
def test_what_all_slices_must_say_alike(scan, tmp_path, tags, says):
    change(scan / "slice_0002.dcm", **tags)
    for refused in (
        lambda: require_writable(scan, LABELS, ORIGIN),
        lambda: write(Found(LABELS, mask_of(), {}), scan, tmp_path / "s.dcm"),
    ):
        with pytest.raises(SegraftError, match=f"slice_0002.dcm has another {says} than .*slice_0000.dcm") as told:
            refused()
        assert "secret" not in str(told.value)


def test_each_slice_is_an_instance_of_its_own(scan):
    change(scan / "slice_0002.dcm", SOPInstanceUID=pydicom.dcmread(scan / "slice_0001.dcm").SOPInstanceUID)
    with pytest.raises(SegraftError, match=r"slice_0002.dcm has the SOPInstanceUID of .*slice_0001.dcm"):
        require_writable(scan, LABELS, ORIGIN)


def test_directions_that_are_rounded_differently(tmp_path):
    """As much as `read_series` takes; with names in the other order, as which slice is the first must not matter."""
    shape = (401, 3, 3)
    scan, mask = series(tmp_path / "scan", shape), mask_of(shape)
    for k, file in enumerate(sorted(scan.iterdir())):
        change(file, ImageOrientationPatient=[-1, 0.0004 * k, 0, 0, -1, 0])
        file.rename(file.with_name(f"{9 - k}.dcm"))
    require_writable(scan, LABELS, ORIGIN)
    np.testing.assert_array_equal(read(write(Found(LABELS, mask, {}), scan, tmp_path / "s.dcm"), LABELS, scan), mask)


def test_what_a_series_may_leave_out(scan, tmp_path):
    for file in scan.iterdir():
        change(file, **dict.fromkeys(("PatientID", "PatientSex", "StudyDate", "StudyID", "AccessionNumber")))
        change(file, SliceThickness=None)
    require_writable(scan, LABELS, ORIGIN)
    dataset = pydicom.dcmread(write(Found(LABELS, mask_of(), {}), scan, tmp_path / "s.dcm"))
    assert dataset.PatientID == dataset.AccessionNumber == ""
    assert dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 4


@pytest.mark.parametrize(("tag", "value"), [("PatientSex", "WX"), ("PatientBirthDate", "SECRETDATE")])
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_what_highdicom_refuses_is_told_without_its_value(scan, caplog, tag, value):
    for file in scan.iterdir():
        change(file, **{tag: value})
    caplog.clear()
    with pytest.raises(SegraftError, match=f"scan has a {tag} that a DICOM SEG cannot take over") as told:
        require_writable(scan, LABELS, ORIGIN)
    assert value not in f"{told.value} {caplog.text}"
    assert told.value.__suppress_context__


def test_what_breaks_the_rules_but_can_be_copied_is_logged(scan, tmp_path, caplog):
    for file in scan.iterdir():
        with pytest.warns(UserWarning, match="maximum length of 64"):
            change(file, PatientID="secret" * 12)
    caplog.clear()
    require_writable(scan, LABELS, ORIGIN)
    path = write(Found(LABELS, mask_of(), {}), scan, tmp_path / "s.dcm")
    told = [record.getMessage() for record in caplog.records if record.name.startswith("segraft")]
    assert len(told) == 1
    assert "exceeds the maximum length of 64" in told[0]
    assert b"secret" * 12 in path.read_bytes()
    assert "secret" not in caplog.text


@pytest.mark.parametrize("name", ["l" * 65, "left\\right"])
def test_names_that_no_segment_can_have(scan, name):
    with pytest.raises(SegraftError, match="cannot name a segment"):
        require_writable(scan, Labels({1: name}), ORIGIN)


def test_a_patients_name_is_copied_and_never_logged(scan, tmp_path, caplog):
    for file in scan.iterdir():
        change(file, PatientName="onepart", SpecificCharacterSet="ISO_IR 100")
    path = write(Found(LABELS, mask_of(), {}), scan, tmp_path / "s.dcm")
    assert pydicom.dcmread(path).PatientName == "onepart"
    assert "onepart" not in caplog.text


@pytest.mark.parametrize("of", ["write", "read"])
def test_without_highdicom(scan, seg, monkeypatch, of):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(SegraftError, match=r"highdicom, which is not installed .*pip install 'segraft\[dicom\]'"):
        require_writable(scan, LABELS, ORIGIN) if of == "write" else read(seg, LABELS, scan)


def rename(path: Path, *names: str) -> None:
    dataset = pydicom.dcmread(path)
    for segment, name in zip(dataset.SegmentSequence, names, strict=True):
        segment.SegmentLabel = name
    dataset.save_as(path)


def test_names_before_numbers(scan, seg):
    rename(seg, "Liver", "kidney_left", "hämatom")
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())


def test_several_segments_of_one_name_are_one_label(scan, seg):
    rename(seg, "liver", "liver", "left kidney")
    mask = read(seg, LABELS, scan)
    np.testing.assert_array_equal(mask == 1, np.isin(mask_of(), (1, 4)))
    np.testing.assert_array_equal(mask == 4, mask_of() == 300)


def test_numbers_where_no_name_is_known(scan, seg, caplog):
    rename(seg, "GREEN", "RED", "BLUE")
    for _ in range(2):
        mask = read(seg, Labels({1: "a", 2: "b", 3: "c"}), scan)
    for number, value in enumerate(LABELS, start=1):
        np.testing.assert_array_equal(mask == number, mask_of() == value)
    (told,) = caplog.messages
    assert 'segment 2 ("RED") is b' in told


GENERIC = [
    ("", "", ""),
    ("Segment 1", "segment_2", "Segment-3"),
    ("Segment_1", "Label 2", "ROI3"),
    ("Light Blue", "DARK_GREEN", "yellow"),
    ("1", "2", "03"),
    ("myth", "foo", "bar"),
]


@pytest.mark.parametrize("names", GENERIC)
def test_names_that_say_nothing_go_by_number(scan, seg, names):
    rename(seg, *names)
    labels = ("liver", "spleen", "myocardium") if names != GENERIC[-1] else ("a", "b", "c")
    mask = read(seg, Labels(dict(enumerate(labels, start=1))), scan)
    np.testing.assert_array_equal(mask == 2, mask_of() == 4)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("myocardium", "liver"),
        ("liver", "myocardium"),
        ("vertebrae L1", "liver"),
        ("liver", "vertebrae L1"),
        ("prostate or uterus", "spleen"),
        ("psv", "left kidney"),
        ("Segment of liver", "liver"),
    ],
)
def test_what_is_known_on_either_side_is_not_taken_by_its_number(scan, seg, name, label):
    rename(seg, name, "foo", "bar")
    with pytest.raises(SegraftError, match=f'segment 1 of .* is "{name}", and label 1 is "{label}"'):
        read(seg, Labels({1: label, 2: "b", 3: "c"}), scan)


@pytest.mark.parametrize("names", [("left kidney", "kidney_left"), ("LKidney", "Left-Kidney")])
def test_labels_that_are_one_by_name(scan, seg, names):
    rename(seg, names[0], names[1], names[0])
    with pytest.raises(SegraftError, match=f'labels 1 "{names[0]}" and 2 "{names[1]}" are one structure'):
        read(seg, Labels(dict(enumerate(names, start=1))), scan)


@pytest.mark.parametrize(
    ("names", "labels", "says"),
    [
        (("liver", "RED", "Hämatom"), LABELS, r'segment 2 \("RED"\) of .* is none of the labels .*, though others are'),
        (("GREEN", "RED", "BLUE"), LABELS, r'such as 1 \("GREEN"\), are none of the labels .* by name or by number'),
        (
            ("GREEN", "spleen", "x"),
            Labels({1: "a", 2: "liver", 3: "c"}),
            r'segment 2 .* "spleen", and label 2 is "liver"',
        ),
    ],
)
def test_segments_that_are_no_labels(scan, seg, names, labels, says):
    rename(seg, *names)
    with pytest.raises(SegraftError, match=says):
        read(seg, labels, scan)


def test_a_seg_among_the_slices(scan, seg):
    shutil.copy(seg, scan / "slice_0009.dcm")
    with pytest.raises(SegraftError, match=r"slice_0009.dcm is a SEG, no slice of a scan: move it out of the folder"):
        read_series(scan)


def test_another_series(seg, tmp_path):
    with pytest.raises(SegraftError, match=r"refers to the series .* give the series it was drawn on"):
        read(seg, LABELS, series(tmp_path / "other", seed=7))


def test_no_reference(scan, seg, tmp_path):
    """Then the frame of reference must be the same."""
    change(seg, ReferencedSeriesSequence=None)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    change(seg, FrameOfReferenceUID="1.2.3")
    with pytest.raises(SegraftError, match="FrameOfReferenceUID is not that of its image"):
        read(seg, LABELS, scan)


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


def other_type(scan: Path, path: Path, kind: str, values: np.ndarray) -> Path:
    """By highdicom, as another tool would write it: slices in the order of their files."""
    concept = codes.SCT.Tissue
    description = highdicom.seg.SegmentDescription(
        *(1, "liver", concept, concept, "MANUAL"),
    )
    sources = [pydicom.dcmread(file) for file in sorted(scan.iterdir())]
    for each in sources:
        each.PatientName = None
    uid = pydicom.uid.generate_uid
    made = highdicom.seg.Segmentation(
        sources,
        np.moveaxis(values, 2, 0).transpose(0, 2, 1),
        kind,
        [description],
        uid(),
        1,
        uid(),
        1,
        "M",
        "N",
        "1",
        "2",
    )
    made.save_as(path)
    return path


def test_label_maps(scan, tmp_path):
    path = other_type(scan, tmp_path / "s.dcm", "LABELMAP", (mask_of() == 1).astype(np.uint8))
    np.testing.assert_array_equal(read(path, LABELS, scan), mask_of() == 1)


def test_fractions(scan, tmp_path):
    """0 and the largest value are no fractions."""
    path = other_type(scan, tmp_path / "s.dcm", "FRACTIONAL", (mask_of() == 1).astype(np.float32))
    np.testing.assert_array_equal(read(path, LABELS, scan), mask_of() == 1)
    path = other_type(scan, tmp_path / "s.dcm", "FRACTIONAL", (mask_of() == 1).astype(np.float32) * 0.6)
    with pytest.raises(SegraftError, match=r"holds fractions .* threshold it"):
        read(path, LABELS, scan)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def strip_positions(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    del dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    dataset.save_as(path)


def unknown_segment(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    groups = dataset.PerFrameFunctionalGroupsSequence[0]
    groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut, r"seg.dcm"),
        (strip_positions, r"seg.dcm is damaged .*0020,9113"),
        (unknown_segment, r"segment 9"),
        (lambda path: change(path, SegmentSequence=None), "seg.dcm is damaged"),
        (lambda path: change(path, PerFrameFunctionalGroupsSequence=None), "seg.dcm is damaged"),
        (lambda path: path.write_bytes(b"\0" * 500), "no DICOM file"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damaged(scan, seg, spoil, says):
    spoil(seg)
    with pytest.raises(SegraftError, match=says):
        read(seg, LABELS, scan)


def without_groups(dataset: pydicom.Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-3]


def with_fewer_frames(dataset: pydicom.Dataset) -> None:
    without_groups(dataset)
    dataset.NumberOfFrames -= 3


def with_more_frames(dataset: pydicom.Dataset) -> None:
    dataset.NumberOfFrames = 2**31 - 1


def with_fewer_rows(dataset: pydicom.Dataset) -> None:
    dataset.Rows -= 1


def with_many_rows(dataset: pydicom.Dataset) -> None:
    dataset.Rows = dataset.Columns = 60_000


def with_fewer_pixels(dataset: pydicom.Dataset) -> None:
    dataset.PixelData = dataset.PixelData[:-2]


def of_another_type(dataset: pydicom.Dataset) -> None:
    dataset.SegmentationType = "LABELMAP"


def of_no_type(dataset: pydicom.Dataset) -> None:
    dataset.SegmentationType = "OTHER"


def with_wider_pixels(dataset: pydicom.Dataset) -> None:
    dataset.BitsAllocated = 8


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_groups, "9 of 12 frames"),
        (with_more_frames, "12 of 2147483647 frames"),
        (with_fewer_frames, r"\d+ bytes of pixels, and 9 frames"),
        (with_fewer_rows, r"\d+ bytes of pixels, and 12 frames of 5 rows"),
        (with_many_rows, r"\d+ bytes of pixels, and 12 frames of 60000 rows"),
        (with_fewer_pixels, r"\d+ bytes of pixels, and 12 frames"),
        (with_wider_pixels, "BINARY with 8 as"),
        (of_another_type, "LABELMAP with 1 as"),
        (of_no_type, "OTHER with 1 as"),
    ],
)
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"])
def test_frames_that_are_not_all_there(scan, seg, spoil, says, syntax):
    """Where frames have no groups, or others than their pixels are for, no part of them is read."""
    dataset = pydicom.dcmread(seg)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.save_as(seg, implicit_vr=syntax == "1.2.840.10008.1.2", little_endian=True)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    dataset = pydicom.dcmread(seg)
    spoil(dataset)
    dataset.save_as(seg)
    with pytest.raises(SegraftError, match=f"seg.dcm .*{says}.*: export it again"):
        read(seg, LABELS, scan)


def test_compressed_frames_that_are_not_all_there(scan, tmp_path):
    path = other_type(scan, tmp_path / "s.dcm", "LABELMAP", (mask_of() == 1).astype(np.uint8))
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(path)
    np.testing.assert_array_equal(read(path, LABELS, scan), mask_of() == 1)
    change(path, NumberOfFrames=3)
    with pytest.raises(SegraftError, match="4 of 3 frames"):
        read(path, LABELS, scan)


def test_dicom_that_is_no_seg(scan):
    with pytest.raises(SegraftError, match="is DICOM of CT, no SEG"):
        read(scan / "slice_0000.dcm", LABELS, scan)


def test_folders(scan, seg, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SegraftError, match="a folder of 0 DICOM files"):
        segmentation_file(folder)
    shutil.copy(seg, folder / "IM1")
    (folder / "notes.txt").write_text("")
    assert segmentation_file(folder) == folder / "IM1"
    assert is_segmentation(folder)
    assert is_segmentation(folder / "IM1")
    assert not is_segmentation(tmp_path / "label.nii.gz")
    with pytest.raises(SegraftError, match="a folder of 4 DICOM files"):
        segmentation_file(scan)


@pytest.mark.parametrize("name", ["DICOMDIR", "._slice_0000.dcm", "AAA.txt"])
def test_what_is_no_slice_beside_the_slices(scan, seg, tmp_path, name):
    """Nor is it asked which series it is, nor does it count among the files of a label's folder."""
    other = series(tmp_path / "other", seed=7) / "slice_0000.dcm"
    shutil.copy(other, scan / name)
    np.testing.assert_array_equal(read(seg, LABELS, scan), mask_of())
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(other, folder / name)
    assert not holds_series(folder)
    shutil.copy(seg, folder / "seg.dcm")
    assert segmentation_file(folder) == folder / "seg.dcm"


def test_a_case_is_known_by_its_segments_and_what_they_are_taken_for(seg, scan, tmp_path):
    def digest(path: Path, labels: Labels) -> str:
        return Case("p", "p", (scan,), path, segment_labels=labels).label_digest([1])

    shutil.copy(seg, tmp_path / "copy.dcm")
    other = write(Found(LABELS, mask_of(seed=3), {}), scan, tmp_path / "other.dcm")
    first = digest(seg, LABELS)
    assert digest(tmp_path / "copy.dcm", LABELS) == first
    assert len({first, digest(other, LABELS), digest(seg, Labels({4: "liver", 1: "left kidney", 300: "Hämatom"}))}) == 3


@pytest.mark.data
class TestReal:
    """dcmqi's: a CT of three slices, SEGs of one and five segments, and the label maps that they were made of."""

    @pytest.fixture
    def folder(self, real_data) -> Path:
        return real_data / "dicom_seg_rtstruct" / "dcmqi"

    def truth(self, folder: Path, name: str) -> np.ndarray:
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"{name}.nrrd"))).T

    def test_one_segment(self, folder):
        mask = read(folder / "liver.dcm", Labels({1: "liver"}), folder / "ct-3slice")
        np.testing.assert_array_equal(mask, self.truth(folder, "liver_seg"))

    def test_five_segments(self, folder, caplog):
        """Three label maps, as some of them overlap."""
        names = ("green", "orange", "purple", "light blue", "dark blue")
        labels = Labels(dict(enumerate(names, start=1)))
        truth = [self.truth(folder, f"partial_overlaps-{number}") for number in (1, 2, 3)]
        for value in labels:
            mask = read(folder / "partial_overlaps.dcm", labels, folder / "ct-3slice", asked=[value])
            np.testing.assert_array_equal(mask == value, np.any([each == value for each in truth], axis=0))
        with pytest.raises(SegraftError, match=r"\d+ voxels of .* are in .* together"):
            read(folder / "partial_overlaps.dcm", labels, folder / "ct-3slice")
        numbers = Labels(dict.fromkeys(range(1, 6), "") | {n: f"colour {n}" for n in range(1, 6)})
        read(folder / "partial_overlaps.dcm", numbers, folder / "ct-3slice", asked=[4])
        assert 'segment 4 ("LIGHT_BLUE") is colour 4' in caplog.text

    def test_written_on_a_real_series(self, folder, tmp_path, seg_by_hand):
        scan, truth = folder / "ct-3slice", self.truth(folder, "liver_spine_seg")
        labels = Labels({1: "liver", 2: "spine"})
        path = write(Found(labels, truth, {}), scan, tmp_path / "seg.dcm")
        np.testing.assert_array_equal(read(path, labels, scan), truth)
        image = read_series(scan)
        by_hand = seg_by_hand(path, image.affine, image.shape)
        np.testing.assert_array_equal(by_hand["spine"], truth == 2)
        theirs, ours = (pydicom.dcmread(each) for each in (folder / "liver.dcm", path))
        for tag in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert theirs[tag].value == ours[tag].value
        instances = [
            {each.ReferencedSOPInstanceUID for each in dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
            for dataset in (theirs, ours)
        ]
        assert instances[0] == instances[1]


@pytest.mark.data
def test_a_real_series_compressed_and_without_identifiers(real_data, tmp_path):
    """JPEG 2000, stripped of its UIDs: refused with all that it lacks; with them, a mask of 31 classes comes back."""
    folder = real_data / "totalsegmentator_examples"
    with pytest.raises(SegraftError, match="has no StudyInstanceUID, SeriesInstanceUID"):
        require_writable(folder / "example_ct_dicom", LABELS, ORIGIN)
    for number, file in enumerate(sorted((folder / "example_ct_dicom").iterdir())):
        dataset = pydicom.dcmread(file)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
        dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.6.{number}"
        (tmp_path / "scan").mkdir(exist_ok=True)
        dataset.save_as(tmp_path / "scan" / file.name)
    image = read_series(tmp_path / "scan")
    mask = nib.load(folder / "example_seg_dicom.nii.gz")
    turn = nib.orientations.io_orientation(np.linalg.inv(image.affine) @ mask.affine)
    values = np.asanyarray(mask.as_reoriented(turn).dataobj).astype(int)
    labels = Labels({int(value): f"structure {value}" for value in np.unique(values) if value})
    path = write(Found(labels, values, {}), tmp_path / "scan", tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read(path, labels, tmp_path / "scan"), values)
    frames = sum(int((values == value).any(axis=(0, 1)).sum()) for value in labels)
    assert pydicom.dcmread(path, stop_before_pixels=True).NumberOfFrames == frames
