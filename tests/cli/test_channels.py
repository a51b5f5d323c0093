"""Scans of several channels and overlapping regions, through the commands."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.adapters import read_header
from segraft.evaluation.metrics import dice
from segraft.networks import read_base

WT = "WT=1+2,core=2"
NET = ("--network-args", '{"widths": [4, 8]}', "--epochs", "2", "--device", "cpu", "--learning-rate", "3e-2")


@pytest.fixture(scope="module")
def cohort(make_cohort, save_nifti, tmp_path_factory) -> Path:
    """Two channels (files); label 2 lies within label 1 and is seen in the second channel alone. p4 lacks it."""
    folder = tmp_path_factory.mktemp("channels")
    rng = np.random.default_rng(0)
    entries = []
    for number in range(6):
        name, shape = f"p{number}", (16, 16, 16)
        where = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - rng.integers(6, 10, 3), axis=-1)
        label = (where < 5).astype(np.uint8) + (where < 3)
        files = {"FLAIR": f"imagesTr/{name}_0000.nii.gz", "T1gd": f"imagesTr/{name}_0001.nii.gz"}
        for place, (file, least) in enumerate(zip(files.values(), (1, 2), strict=True)):
            if (number, place) != (4, 1):
                image = rng.normal(100, 10, shape) * 10**place + 100 * 10**place * (label >= least)
                save_nifti(folder / file, image.astype(np.float32))
        save_nifti(folder / "labelsTr" / f"{name}.nii.gz", label)
        entries.append({"image": files["FLAIR"], "label": f"labelsTr/{name}.nii.gz"})
    listing = {"name": "Two", "modality": {"0": "FLAIR", "1": "T1gd"}, "labels": {"1": "rim", "2": "core"}}
    (folder / "dataset.json").write_text(json.dumps(listing | {"training": entries}))
    return folder


@pytest.fixture(scope="module")
def whole(cohort, tmp_path_factory) -> Path:
    """The same, without the case that lacks a channel."""
    folder = shutil.copytree(cohort, tmp_path_factory.mktemp("whole") / "D")
    listing = json.loads((folder / "dataset.json").read_text())
    listing["training"].pop(4)
    (folder / "dataset.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture(scope="module")
def trained(segraft, whole, tmp_path_factory) -> Path:
    """A base and an adapter for two overlapping regions."""
    work = tmp_path_factory.mktemp("trained")
    common = ("--data", whole, "--labels", WT, "--patches", "2", "--volumes", "2")
    made = segraft("pretrain", *common, *NET, "--epochs", "80", "--cases", "2", "--out", work / "base", "--json")
    assert made.code == 0, made.err
    made = segraft("adapt", "--base", work / "base", *common, "--rank", "2", "--shots", "1", "--epochs", "2",
                   "--device", "cpu", "--out", work / "run", "--json")  # fmt: skip
    assert made.code == 0, made.err
    return work


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def test_the_record_says_which_channels_and_regions(trained):
    from segraft.adapters import read_header

    header = read_header(trained / "run" / "adapter.safetensors")
    assert header.record["channels"] == ["FLAIR", "T1gd"]
    assert header.record["labels"] == {"1": "WT", "2": "core"}
    assert header.record["regions"] == {"1": [1, 2], "2": [2]}
    assert header.record["base"]["arguments"]["in_channels"] == 2
    assert all(len(digest) == 33 for digest in header.record["cases"].values())


def test_a_scan_in_whatever_form_gives_one_mask(segraft, whole, trained, tmp_path, save_nifti):
    files = [whole / f"imagesTr/p3_000{place}.nii.gz" for place in (0, 1)]
    four = save_nifti(tmp_path / "four.nii.gz", np.stack([nib.load(file).get_fdata() for file in files], axis=-1))
    shutil.copy(files[0], tmp_path / "f.nii.gz")
    shutil.copy(files[1], tmp_path / "t.nii.gz")
    told = {
        "first": (files[0],),
        "second": (files[1],),
        "both": files,
        "4D": (four,),
        "named": ("--channel", f"t1GD={tmp_path / 't.nii.gz'}", "--channel", f"FLAIR={tmp_path / 'f.nii.gz'}"),
    }
    masks = {}
    for name, given in told.items():
        outcome = segraft("predict", trained / "base", *given, "-o", tmp_path / f"{name}.nii", "--json")
        assert outcome.code == 0, outcome.err
        masks[name] = read(tmp_path / f"{name}.nii")
    assert masks["first"].shape == (16, 16, 16)
    assert set(np.unique(masks["first"])) == {0, 1, 2}
    for mask in masks.values():
        np.testing.assert_array_equal(mask, masks["first"])
    volumes = outcome.json["masks"][0]["volumes_ml"]
    assert volumes["core"] == pytest.approx((masks["first"] == 2).sum() * 1.5e-3)
    assert volumes["WT"] <= (masks["first"] > 0).sum() * 1.5e-3 + 1e-9


def test_a_folder_gives_a_mask_per_scan(segraft, whole, trained, tmp_path):
    outcome = segraft("predict", trained / "run", whole / "imagesTr", "-o", tmp_path / "masks", "--json")
    # p4, whose second channel is not there, is in the folder too
    assert outcome.code == 2
    assert "p4 lacks its channel T1gd" in outcome.err
    shutil.copytree(whole / "imagesTr", tmp_path / "scans")
    (tmp_path / "scans" / "p4_0000.nii.gz").unlink()
    outcome = segraft("predict", trained / "run", tmp_path / "scans", "-o", tmp_path / "masks", "--json")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [f"p{k}.nii.gz" for k in (0, 1, 2, 3, 5)]


def test_intensities_by_the_channel(segraft, whole, tmp_path):
    """The second channel's values are about ten times the first's."""
    made = segraft(
        *("pretrain", "--data", whole, "--labels", WT, *NET, "--percentiles", 1, 99, "--intensity"),
        *("T1gd=window:-20:3500.5", "--out", tmp_path / "base"),
    )
    assert made.code == 0, made.err
    first = {"kind": "percentiles", "lower": 1.0, "upper": 99.0}
    second = {"kind": "window", "low": -20.0, "high": 3500.5}
    assert read_base(tmp_path / "base").record["preparation"]["intensity"] == [first, second]
    made = segraft(
        *("adapt", "--base", tmp_path / "base", "--data", whole, "--labels", WT, "--epochs", 1, "--device", "cpu"),
        *("--intensity", "0=window:0:300", "--method", "lora_c", "--rank", 1, "--out", tmp_path / "run"),
    )
    assert made.code == 0, made.err
    recorded = read_header(tmp_path / "run" / "adapter.safetensors").record["preparation"]["intensity"]
    assert recorded == [{"kind": "window", "low": 0.0, "high": 300.0}, second]
    scan = whole / "imagesTr" / "p0_0000.nii.gz"
    assert segraft("predict", tmp_path / "run", scan, "-o", tmp_path / "m.nii.gz").code == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("T2=window:0:3",), ['no channel "T2"', "0 (FLAIR), 1 (T1gd)", "dataset.json"]),
        (("FLAIR=window:0",), ["FLAIR=window:0", "CHANNEL=KIND:LOW:HIGH"]),
        (("FLAIR=gamma:0:1",), ["FLAIR=gamma:0:1", "CHANNEL=KIND:LOW:HIGH"]),
        (("window:0:1",), ["CHANNEL=KIND:LOW:HIGH"]),
        (("FLAIR=window:0:x",), ["CHANNEL=KIND:LOW:HIGH"]),
        (("FLAIR=window:3:0",), ["low (3) must be below high (0)"]),
        (("FLAIR=window:0:nan",), ["intensity", "finite"]),
        (("FLAIR=window:0:1", "FLAIR=window:0:2"), ["FLAIR is given twice"]),
        (("FLAIR=window:0:1", "flair=window:0:2"), ["FLAIR and flair are one channel"]),
    ],
)
def test_intensities_given_wrongly(refused, whole, tmp_path, given, says):
    options = [word for each in given for word in ("--intensity", each)]
    refused("pretrain", "--data", whole, *NET, *options, "--out", tmp_path / "base", says=says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--channel", "FLAIR=f.nii.gz"), ["f.nii.gz does not exist"]),
        (("--channel", "T2=f.nii.gz"), ["takes each of the channels FLAIR, T1gd once", "T2"]),
        (("--channel", "FLAIR"), ["is not NAME=FILE"]),
        (("--channel", "FLAIR=a", "--channel", "FLAIR=b"), ["given twice"]),
        ((), ["nothing to segment"]),
    ],
)
def test_channels_given_wrongly(refused, trained, tmp_path, given, says):
    refused("predict", trained / "run", *given, "-o", tmp_path / "m.nii.gz", says=says)


def test_channels_for_a_network_of_one(refused, work, tmp_path):
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    refused("predict", work / "run", "--channel", f"CT={scan}", "-o", tmp_path / "m.nii.gz", says=["one channel"])


def test_scans_and_channels(refused, trained, whole, tmp_path):
    scan = whole / "imagesTr" / "p3_0000.nii.gz"
    refused("predict", trained / "run", scan, "--channel", f"FLAIR={scan}", "-o", tmp_path / "m.nii.gz",
            says=["too much"])  # fmt: skip


def test_a_channel_that_is_missing(refused, cohort, trained, tmp_path):
    says = ["the case p4 lacks its channel T1gd", "add the file"]
    refused("adapt", "--base", trained / "base", "--data", cohort, "--out", tmp_path / "run", says=says)
    refused("pretrain", "--data", cohort, *NET, "--out", tmp_path / "base", says=says)
    refused("evaluate", trained / "base", "--data", cohort, "--out", tmp_path / "e", says=says)


def test_a_network_of_another_number_of_channels(refused, work, whole, trained, tmp_path):
    says = ["takes images of 1 channel", "have 2 channels (FLAIR, T1gd)"]
    refused("adapt", "--base", work / "base", "--data", whole, "--labels", "1", "--out", tmp_path / "run", says=says)
    refused("evaluate", work / "base", "--data", whole, "--out", tmp_path / "e", says=["1 channel", "2 channels"])
    refused("adapt", "--base", trained / "base", "--data", work / "D", "--out", tmp_path / "run",
            says=["takes images of 2 channels", "have 1 channel"])  # fmt: skip
    four = ("--network-args", '{"widths": [4, 8], "in_channels": 4}')
    refused("pretrain", "--data", whole, *four, "--out", tmp_path / "b", says=["of 4 channels", "have 2 channels"])
    outcome = refused("predict", trained / "run", work / "D/imagesTr/p0.nii.gz", "-o", tmp_path / "m.nii.gz")
    assert "2 channels FLAIR, T1gd are expected" in outcome


def renamed(folder: Path, out: Path, names: list[str]) -> Path:
    shutil.copytree(folder, out)
    listing = json.loads((out / "dataset.json").read_text())
    listing["modality"] = {str(place): name for place, name in enumerate(names)}
    (out / "dataset.json").write_text(json.dumps(listing))
    return out


def test_channels_listed_in_another_order_or_of_other_names(segraft, refused, whole, trained, tmp_path):
    turned = renamed(whole, tmp_path / "turned", ["T1gd", "FLAIR"])
    for file in sorted((turned / "imagesTr").glob("*_0000.nii.gz")):
        other = file.with_name(file.name.replace("_0000", "_0001"))
        if other.exists():
            file.rename(file.with_name("aside.nii.gz"))
            other.rename(file)
            file.with_name("aside.nii.gz").rename(other)
    found = [segraft("evaluate", trained / "base", "--data", each, "--out", tmp_path / "e", "--json")
             for each in (whole, turned)]  # fmt: skip
    assert found[0].code == found[1].code == 0, found[1].err
    assert found[0].json["cases"] == found[1].json["cases"], "channels go by name"
    others = renamed(whole, tmp_path / "others", ["FLAIR", "T2"])
    refused("evaluate", trained / "base", "--data", others, "--out", tmp_path / "e2", says=["FLAIR, T2", "T1gd"])
    refused("adapt", "--base", trained / "base", "--data", turned, "--labels", WT, "--out", tmp_path / "run",
            says=["was trained on the channels FLAIR, T1gd", "in the order T1gd, FLAIR"])  # fmt: skip


def test_evaluation_is_per_region(segraft, whole, trained, tmp_path):
    """Against a computation from the written masks: nested regions come back from what they were painted with."""
    outcome = segraft("evaluate", trained / "base", "--data", whole, "--out", tmp_path, "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["cases"]) == 6, "two regions of three cases that did not train it"
    rows = {(row["case"], row["name"]): row for row in outcome.json["cases"]}
    for case in {name for name, _ in rows}:
        mask = tmp_path / f"{case}.nii.gz"
        told = segraft("predict", trained / "base", whole / f"imagesTr/{case}_0000.nii.gz", "-o", mask, "--json")
        found, truth = read(mask), read(whole / f"labelsTr/{case}.nii.gz")
        assert rows[case, "core"]["dice"] == pytest.approx(dice(found == 2, truth == 2))
        # the whole is a plane of its own, so the mask, where the core lies above, holds at least as much
        assert rows[case, "WT"]["truth_ml"] == pytest.approx((truth > 0).sum() * 1.5e-3)
        assert rows[case, "WT"]["volume_ml"] == pytest.approx(told.json["masks"][0]["volumes_ml"]["WT"])
        assert rows[case, "WT"]["volume_ml"] <= (found > 0).sum() * 1.5e-3 + 1e-9
        assert rows[case, "WT"]["dice"] > 0.5


def test_labels_that_a_cohort_lists_as_regions(segraft, refused, whole, trained, tmp_path):
    shutil.copytree(whole, tmp_path / "D")
    listing = json.loads((tmp_path / "D/dataset.json").read_text())
    listing |= {"labels": {"background": 0, "WT": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    (tmp_path / "D/dataset.json").write_text(json.dumps(listing))
    found = [segraft("evaluate", trained / "base", "--data", each, "--out", tmp_path / "e", "--json")
             for each in (whole, tmp_path / "D")]  # fmt: skip
    assert found[1].code == 0, found[1].err
    assert found[0].json["cases"] == found[1].json["cases"]
    listing["labels"] = {"background": 0, "all of it": [1, 2], "middle": 2}
    (tmp_path / "D/dataset.json").write_text(json.dumps(listing))
    again = segraft("evaluate", trained / "base", "--data", tmp_path / "D", "--out", tmp_path / "e", "--json")
    assert again.code == 0, "its own regions are of values in the masks"
    assert [row["dice"] for row in again.json["cases"]] == [row["dice"] for row in found[0].json["cases"]]
    made = segraft("pretrain", "--data", whole, "--labels", "1", *NET, "--cases", "2", "--out", tmp_path / "rim")
    assert made.code == 0, made.err
    refused("evaluate", tmp_path / "rim", "--data", tmp_path / "D", "--out", tmp_path / "e2", says=["rim", "--labels"])


def test_the_picture_shows_each_channel(segraft, cohort, whole, tmp_path):
    told = segraft("prepare", "--data", whole, "--labels", WT, "--show", tmp_path / "s.png", "--json")
    assert told.code == 0, told.err
    names = [step["name"] for step in told.json["steps"]]
    assert names == ["FLAIR: as read", "T1gd: as read", "FLAIR: scaled", "T1gd: scaled"]
    told = segraft("prepare", "--data", cohort, "--case", "p4", "--show", tmp_path / "s.png", "--json")
    assert [step["name"] for step in told.json["steps"]] == ["FLAIR: as read", "FLAIR: scaled"]


def test_a_network_that_takes_missing_channels(segraft, cohort, tmp_path):
    """Trained with and without, tested on a scan that lacks one; nothing is NaN on the way."""
    small = ("--epochs", "2", "--device", "cpu", "--patches", "1", "--volumes", "2", "--patch", "8", "8", "8")
    net = (
        "--network",
        "unet_channelwise",
        "--network-args",
        '{"spatial_dims": 3, "widths": [4, 8], "norm": "instance"}',
    )
    made = segraft("pretrain", "--data", cohort, "--labels", "1", *net, *small, "--out", tmp_path / "base", "--json")
    assert made.code == 0, made.err
    assert np.isfinite(made.json["training"]["losses"]).all()
    made = segraft("adapt", "--base", tmp_path / "base", "--data", cohort, "--labels", "1", "--method", "rs_lora",
                   "--rank", "2", "--train", "decoder", *small, "--out", tmp_path / "run", "--json")  # fmt: skip
    assert made.code == 0, made.err
    assert np.isfinite(made.json["training"]["losses"]).all()
    told = segraft("predict", tmp_path / "run", cohort / "imagesTr/p4_0000.nii.gz", "-o", tmp_path / "m.nii", "--json")
    assert told.code == 0, told.err
    second = shutil.copy(cohort / "imagesTr/p3_0001.nii.gz", tmp_path / "who_t1gd.nii.gz")
    for given, name in ((("--channel", f"T1gd={second}"), "who"), ((cohort / "imagesTr/p3_0000.nii.gz",), "p3")):
        told = segraft("predict", tmp_path / "run", *given, "-o", tmp_path / "masks")
        assert told.code == 0, told.err
        assert (tmp_path / "masks" / f"{name}.nii.gz").is_file()
    told = segraft("evaluate", tmp_path / "base", "--data", cohort, "--out", tmp_path, "--json")
    assert told.code == 0, told.err
    assert "p4" in {row["case"] for row in told.json["cases"]}


@pytest.mark.data
def test_four_channels_of_real_brains(segraft, real_data, tmp_path):
    """Two patients: a picture of the preparation, a base from one, an adapter from the other, a mask."""
    entries = []
    for patient in ("patient07", "patient26"):
        files = {
            kind: next((real_data / "open_ms" / patient).glob(f"{kind}_N4*"))
            for kind in ("FLAIR", "T1", "T1POST", "T2", "GOLD_STANDARD")
        }
        for file in files.values():
            (tmp_path / "D" / patient).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "D" / patient)
        named = {kind: f"{patient}/{file.name}" for kind, file in files.items()}
        entries.append({"label": named.pop("GOLD_STANDARD"), "image": named})
    listing = {
        "name": "MS",
        "modality": {"0": "FLAIR", "1": "T1", "2": "T1POST", "3": "T2"},
        "labels": {"1": "lesion"},
        "training": entries,
    }
    (tmp_path / "D" / "dataset.json").write_text(json.dumps(listing))
    told = segraft("prepare", "--data", tmp_path / "D", "--show", tmp_path / "steps.png", "--json")
    assert told.code == 0, told.err
    assert (told.json["case"], len(told.json["steps"])) == ("patient07", 8)
    short = ("--epochs", "1", "--patches", "1", "--volumes", "1", "--patch", "48", "48", "48",
             "--spacing", "2", "2", "2", "--crop-foreground", "--device", "cpu")  # fmt: skip
    net = ("--network", "monai.networks.nets:SegResNet", "--network-args", '{"init_filters": 8}')
    made = segraft("pretrain", "--data", tmp_path / "D", *net, *short, "--cases", "1", "--out", tmp_path / "base")
    assert made.code == 0, made.err
    made = segraft("adapt", "--base", tmp_path / "base", "--data", tmp_path / "D", "--shots", "1", "--method", "lora",
                   *short[:6], "--device", "cpu", "--out", tmp_path / "run", "--json")  # fmt: skip
    assert made.code == 0, made.err
    folder = tmp_path / "D" / made.json["cases"][0]
    named = [("--channel", f"{kind}={next(folder.glob(f'{kind}_N4*'))}") for kind in ("T2", "T1", "T1POST", "FLAIR")]
    told = segraft("predict", tmp_path / "run", *(word for pair in named for word in pair), "-o", tmp_path / "m.nii.gz")
    assert told.code == 0, told.err
    scan = nib.load(next(folder.glob("FLAIR_N4*")))
    mask = nib.load(tmp_path / "m.nii.gz")
    assert mask.shape == scan.shape
    np.testing.assert_array_equal(mask.affine, scan.affine)
