"""DICOM SEG: what is written, and what a series must say for it."""

import sys

import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes
from tests.data.dicom_segs import LABELS, MADE, ORIGIN, REGIONS, SHAPE, change, mask_of, read, series, write

from segraft import __version__
from segraft.data.dicom_seg_writing import Found, Origin, require_writable
from segraft.data.labels import Labels
from segraft.errors import SegraftError


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
