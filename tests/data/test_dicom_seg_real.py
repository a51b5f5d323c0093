"""DICOM SEG: real series, and SEGs that other tools made."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from tests.data.dicom_segs import LABELS, ORIGIN, read, write

from segraft.data.dicom import read_series
from segraft.data.dicom_seg_writing import Found, require_writable
from segraft.data.labels import Labels
from segraft.errors import SegraftError


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
