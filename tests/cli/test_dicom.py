"""DICOM in and out: a series in, the same mask as SEG and as NIfTI; SEGs as labels train and measure as NIfTI does."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from safetensors.numpy import load_file

from segraft.data.dicom import read_series
from segraft.data.dicom_seg_writing import Found, Origin, write_segmentation
from segraft.data.dicom_writing import write_series
from segraft.errors import SegraftError
from segraft.jobs.mask_formats import format_of

NAMES = {1: "core", 2: "rim"}


def to_dicom(cohort: Path, folder: Path, *, oblique: bool = True) -> Path:
    """A cohort as DICOM series and SEGs (`seg.json`), and the same series with NIfTI labels (`dataset.json`)."""
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]] if oblique else np.eye(2)
    entries = []
    for file in sorted((cohort / "imagesTr").iterdir()):
        name, image = file.name.removesuffix(".nii.gz"), nib.load(file)
        whole = np.rint(image.get_fdata()).astype(np.int16)
        write_series(nib.Nifti1Image(whole, turn @ image.affine), folder / name, patient=name)
        label = np.asanyarray(nib.load(cohort / "labelsTr" / file.name).dataobj)
        (folder / "labels").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(label, read_series(folder / name).affine), folder / "labels" / f"{name}.nii.gz")
        origin = Origin("by hand", "0" * 64)
        write_segmentation(Found(NAMES, label, {}), folder / name, folder / "seg" / f"{name}.dcm", origin=origin)
        entries.append({"image": name, "label": f"labels/{name}.nii.gz"})
    content = {"name": "Toy", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "core", "2": "rim"}}
    (folder / "dataset.json").write_text(json.dumps(content | {"training": entries}))
    for entry in entries:
        entry["label"] = f"seg/{entry['image']}.dcm"
    (folder / "seg.json").write_text(json.dumps(content | {"training": entries}))
    return folder


@pytest.fixture(scope="module")
def dicom(tmp_path_factory, make_cohort) -> Path:
    cohort = make_cohort(tmp_path_factory.mktemp("cohort"), ["q0", "q1", "q2", "q3"], seed=5)
    return to_dicom(cohort, tmp_path_factory.mktemp("dicom"))


@pytest.mark.parametrize("model", ["run", "base"])
def test_the_same_mask_as_nifti(segraft, work, dicom, tmp_path, seg_by_hand, model):
    told = [
        segraft("predict", work / model, dicom / "q0", "-o", tmp_path / f"mask{ending}", "--json")
        for ending in (".nii.gz", ".dcm")
    ]
    assert told[1].code == 0, told[1].err
    assert told[0].json["masks"][0]["volumes_ml"] == told[1].json["masks"][0]["volumes_ml"]
    mask = nib.load(tmp_path / "mask.nii.gz")
    values = np.asanyarray(mask.dataobj)
    ((name, value),) = {"run": {"rim": 2}, "base": {"core": 1}}[model].items()
    assert values.any()
    found = seg_by_hand(tmp_path / "mask.dcm", mask.affine, mask.shape)
    assert list(found) == [name]
    np.testing.assert_array_equal(found[name], values == value)


def test_regions_that_overlap(segraft, work, dicom, tmp_path, seg_by_hand):
    """Segments hold what a NIfTI mask cannot: where a region lies under another. And they serve as labels again."""
    adapt = (
        "adapt",
        "--base",
        work / "base",
        "--data",
        dicom / "seg.json",
        "--labels",
        "both=1+2,rim=2",
        "--shots",
        "2",
    )
    options = ("--train", "head", "--epochs", "6", "--learning-rate", "0.02", "--device", "cpu")
    told = segraft(*adapt, *options, "--out", tmp_path / "run")
    assert told.code == 0, told.err
    for ending in (".nii.gz", ".dcm"):
        assert segraft("predict", tmp_path / "run", dicom / "q0", "-o", tmp_path / f"mask{ending}").code == 0
    mask = nib.load(tmp_path / "mask.nii.gz")
    values, found = np.asanyarray(mask.dataobj), seg_by_hand(tmp_path / "mask.dcm", mask.affine, mask.shape)
    assert list(found) == ["both", "rim"]
    np.testing.assert_array_equal(np.select([found["rim"], found["both"]], [2, 1]), values)


def test_a_folder_of_series(segraft, work, dicom, tmp_path):
    for name in ("q0", "q1"):
        shutil.copytree(dicom / name, tmp_path / "scans" / name)
    told = segraft("predict", work / "run", tmp_path / "scans", "-o", tmp_path / "masks", "--format", "dicom-seg")
    assert told.code == 0, told.err
    for name in ("q0", "q1"):
        seg = pydicom.dcmread(tmp_path / "masks" / f"{name}.dcm")
        assert seg.PatientID == name
        assert (
            seg.SegmentSequence[0]
            .SegmentationAlgorithmIdentificationSequence[0]
            .AlgorithmParameters.startswith("model=adapter.safetensors")
        )
    assert len(list((tmp_path / "masks").iterdir())) == 2


class TestRefused:
    def test_nifti_among_the_scans(self, refused, work, dicom, tmp_path):
        scan = work / "D" / "imagesTr" / "p0.nii.gz"
        options = ("-o", tmp_path / "m", "--format", "dicom-seg")
        refused("predict", work / "run", dicom / "q0", scan, *options, says=[scan, "no DICOM series", "NIfTI"])

    def test_formats_that_contradict(self, refused, work, dicom, tmp_path):
        run, scan = work / "run", dicom / "q0"
        refused("predict", run, scan, "-o", tmp_path / "m.nii.gz", "--format", "dicom-seg", says=["m.nii.gz", ".dcm"])
        refused("predict", run, scan, "-o", tmp_path / "m.dcm", "--format", "nifti", says=["m.dcm", ".nii.gz"])
        refused("predict", run, scan, "-o", tmp_path / "m.dcm", "--format", "rtstruct", says=["dicom-seg"])

    def test_into_the_series(self, refused, work, dicom, tmp_path):
        scan = shutil.copytree(dicom / "q0", tmp_path / "q0")
        for name in ("result.dcm", "result.nii.gz"):
            refused("predict", work / "run", scan, "-o", scan / name, says=[scan, "among the files of its series"])

    @pytest.mark.parametrize(("kind", "below"), [("dicom-seg", ""), ("dicom-seg", "out"), ("nifti", "")])
    def test_into_a_folder_that_is_given(self, refused, work, dicom, tmp_path, kind, below):
        """Where the next run would take the masks for scans, or a SEG for the folder's series."""
        shutil.copytree(dicom / "q0", tmp_path / "scans" / "q0")
        out = tmp_path / "scans" / below
        options = ("-o", out, "--format", kind)
        refused("predict", work / "run", tmp_path / "scans", *options, says=["in the folder", tmp_path / "scans"])

    def test_slices_that_are_not_of_one_study(self, refused, work, dicom, tmp_path):
        bad = shutil.copytree(dicom / "q1", tmp_path / "bad")
        dataset = pydicom.dcmread(bad / "slice_0003.dcm")
        dataset.FrameOfReferenceUID = "1.2.3"
        dataset.save_as(bad / "slice_0003.dcm")
        options = ("-o", tmp_path / "masks", "--format", "dicom-seg")
        refused("predict", work / "run", dicom / "q0", bad, *options, says=["slice_0003.dcm", "FrameOfReferenceUID"])

    def test_a_bad_series_among_good_ones_leaves_no_masks(self, refused, work, dicom, tmp_path):
        bad = shutil.copytree(dicom / "q1", tmp_path / "bad")
        dataset = pydicom.dcmread(bad / "slice_0003.dcm")
        del dataset.FrameOfReferenceUID
        dataset.save_as(bad / "slice_0003.dcm")
        options = ("-o", tmp_path / "masks", "--format", "dicom-seg")
        refused("predict", work / "run", dicom / "q0", bad, *options, says=["slice_0003.dcm", "FrameOfReferenceUID"])

    def test_several_frames_in_a_file(self, refused, work, dicom, tmp_path):
        bad = shutil.copytree(dicom / "q1", tmp_path / "bad")
        dataset = pydicom.dcmread(bad / "slice_0003.dcm")
        dataset.NumberOfFrames = 2
        dataset.save_as(bad / "slice_0003.dcm")
        refused("predict", work / "run", bad, "-o", tmp_path / "m.dcm", says=["several frames"])

    def test_a_seg_of_another_scan(self, refused, work, dicom, tmp_path):
        shutil.copytree(dicom, tmp_path / "D")
        shutil.copy(dicom / "seg" / "q1.dcm", tmp_path / "D" / "seg" / "q0.dcm")
        data = tmp_path / "D" / "seg.json"
        refused("evaluate", work / "run", "--data", data, "--out", tmp_path / "e", says=["q0.dcm", "it was drawn on"])


def test_seg_labels_train_and_measure_as_nifti_labels_do(segraft, work, dicom, tmp_path):
    for name in ("dataset", "seg"):
        options = ("--labels", "core,rim", "--shots", "2", "--rank", "2", "--epochs", "2", "--device", "cpu")
        told = segraft(
            *("adapt", "--base", work / "base", "--data", dicom / f"{name}.json", *options, "--out", tmp_path / name)
        )
        assert told.code == 0, told.err
        told = segraft("evaluate", tmp_path / name, "--data", dicom / f"{name}.json", "--device", "cpu")
        assert told.code == 0, told.err
    nifti, seg = (load_file(tmp_path / name / "adapter.safetensors") for name in ("dataset", "seg"))
    assert nifti.keys() == seg.keys()
    for key, tensor in nifti.items():
        np.testing.assert_array_equal(tensor, seg[key])
    csv = [(tmp_path / name / "evaluation.csv").read_bytes() for name in ("dataset", "seg")]
    assert csv[0] == csv[1]


def test_results_serve_as_labels(segraft, work, dicom, tmp_path):
    """What was predicted as SEG, taken as the truth, is found again: Dice 1."""
    shutil.copytree(dicom, tmp_path / "D")
    data = json.loads((dicom / "seg.json").read_text())
    for entry in data["training"]:
        out = tmp_path / "D" / "found" / entry["image"] / "seg.dcm"
        assert segraft("predict", work / "run", tmp_path / "D" / entry["image"], "-o", out).code == 0
        entry["label"] = f"found/{entry['image']}"  # a folder with one SEG
    (tmp_path / "D" / "found.json").write_text(json.dumps(data))
    told = segraft("evaluate", work / "run", "--data", tmp_path / "D" / "found.json", "--out", tmp_path / "e", "--json")
    assert told.code == 0, told.err
    text = (tmp_path / "e" / "evaluation.csv").read_text().splitlines()
    place = text[0].split(",").index("dice")
    assert {float(line.split(",")[place]) for line in text[1:]} == {1.0}


@pytest.mark.parametrize(
    ("out", "asked", "ending"),
    [
        ("masks", None, ".nii.gz"),
        ("m.nii", None, ".nii.gz"),
        ("m.dcm", None, ".dcm"),
        ("m.DCM", None, ".dcm"),
        ("m.Nii.GZ", "nifti", ".nii.gz"),
        ("masks", "dicom-seg", ".dcm"),
        ("m.dcm", "dicom-seg", ".dcm"),
    ],
)
def test_formats(out, asked, ending):
    assert format_of(Path(out), asked).endings[-1] == ending


@pytest.mark.parametrize("name", ["r.DCM", "r.NII.GZ"])
def test_endings_in_any_case(segraft, work, dicom, tmp_path, name):
    told = segraft("predict", work / "run", dicom / "q0", "-o", tmp_path / name)
    assert told.code == 0, told.err
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_no_such_format():
    with pytest.raises(SegraftError, match='"rtstruct" is no format of masks: choose among nifti, dicom-seg'):
        format_of(Path("masks"), "rtstruct")


def test_several_channels(segraft, dicom, tmp_path, seg_by_hand):
    """The SEG lies on the first channel and refers to its series."""
    listing = json.loads((dicom / "seg.json").read_text()) | {"modality": {"0": "T1", "1": "T2"}}
    for entry in listing["training"]:
        entry["image"] = {"T1": entry["image"], "T2": entry["image"]}
    data = shutil.copytree(dicom, tmp_path / "D")
    (data / "dataset.json").write_text(json.dumps(listing))
    options = ("--labels", "1", "--cases", "2", "--epochs", "1", "--network-args", '{"widths": [4, 8]}')
    told = segraft("pretrain", "--data", data, *options, "--device", "cpu", "--out", tmp_path / "base")
    assert told.code == 0, told.err
    channels = ("--channel", f"T2={data / 'q3'}", "--channel", f"T1={data / 'q1'}")
    for name in ("m.dcm", "m.nii.gz"):
        assert segraft("predict", tmp_path / "base", *channels, "-o", tmp_path / name).code == 0
    mask = nib.load(tmp_path / "m.nii.gz")
    found = seg_by_hand(tmp_path / "m.dcm", mask.affine, mask.shape)
    np.testing.assert_array_equal(found["core"], np.asanyarray(mask.dataobj) == 1)
    (series,) = pydicom.dcmread(tmp_path / "m.dcm").ReferencedSeriesSequence
    assert series.SeriesInstanceUID == pydicom.dcmread(data / "q1" / "slice_0000.dcm").SeriesInstanceUID


def test_without_the_extra(work, dicom, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    refused("predict", work / "run", dicom / "q0", "-o", tmp_path / "m.dcm", says=["pip install 'segraft[dicom]'"])
