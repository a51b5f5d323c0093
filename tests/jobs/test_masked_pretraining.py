"""Pre-training without labels: which scans it takes, the sizes it settles, and what it leaves behind."""

import json
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.evaluation.mae_figure import Shown, reconstruction_figure
from segraft.jobs.masked_pretraining import pretrain_masked
from segraft.jobs.unlabelled import read_unlabelled
from segraft.networks import load_base, read_base
from segraft.networks.encoder_files import require_segmenting
from segraft.training.mae import check_masked_settings

SMALL = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2, "decoder_layers": 1}


def scan(path: Path, seed: int = 0, shape: tuple[int, int, int] = (10, 12, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).normal(size=shape).astype(np.float32).cumsum(0)
    nib.save(nib.Nifti1Image(image, np.eye(4)), path)
    return path


def listing(folder: Path, **content) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unlabelled.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """A list of three scans without labels."""
    for number in range(3):
        scan(tmp_path / "D" / f"s{number}.nii.gz", number)
    return listing(tmp_path / "D", unlabelled=[f"s{number}.nii.gz" for number in range(3)])


def settings(**values):
    return check_masked_settings(**{"epochs": 2, "learning_rate": 0.01, "device": "cpu", **values})


def test_lists_of_scans_need_no_labels(tmp_path):
    content = {
        "name": "Many",
        "training": [{"image": "a.nii.gz", "label": "a_label.nii.gz"}, {"image": "b.nii.gz", "patient": 7}],
        "unlabelled": ["./c/d.nii.gz", {"image": "e.nii.gz"}],
        "test": ["f.nii.gz"],
        "numTraining": 2,
    }
    cohort = read_unlabelled(listing(tmp_path, **content))
    assert [case.id for case in cohort.cases] == ["a", "b", "d", "e"]
    assert [case.patient for case in cohort.cases] == ["a", "7", "d", "e"]
    assert [case.images for case in cohort.cases][2] == (tmp_path / "c" / "d.nii.gz",)
    assert {case.label for case in cohort.cases} == {None}
    assert (cohort.name, cohort.labels) == ("Many", {})


def test_the_list_of_a_folder_is_found_and_patients_are_told(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": "p1_a.nii"}, {"image": "p1_b.nii"}]}))
    cohort = read_unlabelled(tmp_path, r"(p\d)_")
    assert [case.patient for case in cohort.cases] == ["p1", "p1"]
    assert cohort.patient_pattern == r"(p\d)_"


def test_scans_of_several_channels_are_listed_in_each_way(tmp_path):
    content = {
        "modality": {"0": "T1", "1": "T2"},
        "training": [
            {"image": ["a1.nii.gz", "a2.nii.gz"]},
            {"image": {"T2": "b2.nii.gz"}},
            {"image": {"T1": "c1.nii.gz", "T2": None}},
        ],
    }
    cases = read_unlabelled(listing(tmp_path, **content)).cases
    names = [tuple(image and image.name for image in case.images) for case in cases]
    assert names == [("a1.nii.gz", "a2.nii.gz"), (None, "b2.nii.gz"), ("c1.nii.gz", None)]
    assert {case.channels for case in cases} == {("T1", "T2")}


def test_other_layouts_are_read_as_for_any_training(tmp_path):
    scan(tmp_path / "imagesTr" / "FLARE22_Tr_0001_0000.nii.gz")
    scan(tmp_path / "labelsTr" / "FLARE22_Tr_0001.nii.gz")
    assert [case.id for case in read_unlabelled(tmp_path).cases] == ["FLARE22_Tr_0001"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"training": []}, 'lists no scans under "training" or "unlabelled"'),
        ({"test": ["a.nii.gz"]}, "lists no scans"),
        ({"training": [{"label": "a.nii.gz"}]}, r"is no list of scans \(training.0"),
        ({"training": ["a.nii.gz", "a.nii.gz"]}, "lists the scan a more than once"),
        ({"unlabelled": ["../a.nii.gz"]}, "leaves its folder"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, content, says):
    with pytest.raises(SegraftError, match=says) as caught:
        read_unlabelled(listing(tmp_path / "D", **content))
    assert "unlabelled.json" in str(caught.value)


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SegraftError, match=r"none.json cannot be read"):
        read_unlabelled(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SegraftError, match=r"broken.json is not JSON"):
        read_unlabelled(tmp_path / "broken.json")


def test_it_leaves_an_encoder_with_its_record_and_a_picture(data, tmp_path):
    made = pretrain_masked(data, tmp_path / "out", network="vit_small", network_arguments=SMALL, settings=settings())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "base.safetensors",
        "reconstruction.png",
        "run.json",
    ]
    base = read_base(tmp_path / "out")
    assert (base.network, base.fingerprint) == ("vit_small", made.fingerprint)
    assert base.arguments == {"in_channels": 1, "out_channels": 1, "img_size": [12, 12, 12], **SMALL}
    assert made.img_size == (12, 12, 12)
    record = base.record
    assert record["encoder"] == {"prefix": "vit", "img_size": [12, 12, 12]}
    assert record["preparation"]["patch"] == [12, 12, 12]
    digests = {case.id: case.digest() for case in read_unlabelled(data).cases}
    assert record["cases"] == digests
    assert (made.cases, record["dataset"]) == (tuple(digests), "D")
    assert record["settings"]["mask"] == 0.75
    assert len(record["training"]["losses"]) == 2
    assert record["reconstruction"]["scans"] == 3
    net, _ = load_base(tmp_path / "out")
    assert made.parameters == sum(value.numel() for value in net.vit.parameters() if value.requires_grad)
    picture = matplotlib.image.imread(tmp_path / "out" / "reconstruction.png")
    assert picture.ndim == 3


def test_training_lowers_the_error_of_what_is_looked_at(data, tmp_path):
    chosen = settings(epochs=40, augmentation="none")
    made = pretrain_masked(data, tmp_path / "out", network="vit_small", network_arguments=SMALL, settings=chosen)
    found = made.reconstruction
    assert found.zero == pytest.approx(1, abs=0.35)  # padding costs nothing
    assert found.after < 0.95 * found.zero < found.before


def test_what_is_told_by_place_alone(tmp_path):
    """Of three scans that are the same nothing is left to tell; of a single one nothing is known."""
    for number in range(3):
        scan(tmp_path / "D" / f"s{number}.nii.gz", 7)
    for count, error in ((3, 0), (1, None)):
        entries = [{"image": f"s{number}.nii.gz"} for number in range(count)]
        data = listing(tmp_path / "D", training=entries)
        out = tmp_path / str(count)
        made = pretrain_masked(data, out, network="vit_small", network_arguments=SMALL, settings=settings(epochs=1))
        expected = made.reconstruction.zero if error is None else error
        assert made.reconstruction.place == pytest.approx(expected, abs=1e-6)


def test_labels_make_no_difference(tmp_path):
    """The same scans with and without labels, and with labels that are not there."""
    for number in range(2):
        scan(tmp_path / "D" / f"s{number}.nii.gz", number)
    plain = listing(tmp_path / "D", training=[{"image": f"s{number}.nii.gz"} for number in range(2)])
    found = []
    for out, content in (("a", {}), ("b", {"labels": {"0": "background", "1": "core"}})):
        entries = [{"image": f"s{number}.nii.gz", **({"label": "none.nii.gz"} if content else {})} for number in (0, 1)]
        plain.write_text(json.dumps({"training": entries, **content}))
        made = pretrain_masked(plain, tmp_path / out, network="vit_small", network_arguments=SMALL, settings=settings())
        found.append(made.fingerprint)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("preparation", "arguments", "size"),
    [
        ({"patch": (8, 4, 8)}, {}, (8, 4, 8)),
        (None, {"img_size": 8}, (8, 8, 8)),
        ({"patch": (8, 8, 8)}, {"img_size": [8, 8, 8]}, (8, 8, 8)),
        (Preparation(patch=(4, 8, 8)), {}, (4, 8, 8)),
    ],
)
def test_the_image_is_the_patch(data, tmp_path, preparation, arguments, size):
    made = pretrain_masked(
        data,
        tmp_path / "out",
        network="vit_small",
        network_arguments=SMALL | arguments,
        preparation=preparation,
        settings=settings(epochs=1),
    )
    base = read_base(made.path)
    assert made.img_size == size
    assert tuple(base.arguments["img_size"]) == size
    assert tuple(base.record["preparation"]["patch"]) == size


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preparation": {"patch": (8, 8, 8)}, "network_arguments": {"img_size": 12}}, "8×8×8 .* img_size of 12×12×12"),
        ({"preparation": Preparation(patch=(8, 8, 8)), "network_arguments": {"img_size": 12}}, "give one of the two"),
        ({"preparation": {"patch": (8, 8, 1)}}, "cannot be cut into patches of 4×4×4"),
        ({"network": "unet"}, "unet .UNet. is no masked auto-encoder: choose vit_base"),
        ({"network_arguments": {"hidden_size": 25}}, "hidden_size 25 does not divide among 2 heads"),
        ({"network_arguments": {"nonsense": 1}}, "refused its arguments"),
        ({"settings": {"mask": 0.999}}, "leaves none to look at"),
        ({"settings": {"recompute": ("nothing",)}}, "nothing"),
        ({"cases": 4}, "4 cases to pre-train on were asked for"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(data, tmp_path, changes, says):
    given = {"network": "vit_small", **changes}
    given["network_arguments"] = {} if given["network"] == "unet" else SMALL | changes.get("network_arguments", {})
    given["settings"] = settings(**changes.get("settings", {}))
    with pytest.raises(SegraftError, match=says):
        pretrain_masked(data, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_weights_of_an_encoder_go_on(data, tmp_path):
    first = pretrain_masked(data, tmp_path / "a", network="vit_small", network_arguments=SMALL, settings=settings())
    chosen = settings(epochs=1, learning_rate=1e-12, weight_decay=0)
    again = pretrain_masked(
        data, tmp_path / "b", network="vit_small", network_arguments=SMALL, settings=chosen, weights=first.path
    )
    one, other = load_file(first.path), load_file(again.path)
    for key, value in one.items():
        assert torch.allclose(other[key], value, atol=1e-6), key
    assert "tensors loaded" in again.notes[0]


def test_an_encoder_file_is_told_from_a_base_that_segments(data, tmp_path):
    made = pretrain_masked(data, tmp_path / "out", network="vit_small", network_arguments=SMALL, settings=settings())
    with pytest.raises(SegraftError, match=r"segments nothing by itself: give it as --weights .*\[12, 12, 12\]"):
        require_segmenting(made.path, read_base(made.path).record)
    require_segmenting("base.safetensors", {"labels": {"1": "core"}})


def test_a_picture_takes_scans_of_one_shape():
    volume = np.random.default_rng(0).random((8, 6, 4))
    shown = Shown("a $name$", volume, np.where(volume > 0.5, volume, np.nan), volume)
    assert reconstruction_figure([shown] * 2, note="of nothing").startswith(b"\x89PNG")
    with pytest.raises(SegraftError, match="of one shape"):
        reconstruction_figure([shown, Shown("b", volume[:4], volume[:4], volume[:4])])
    with pytest.raises(SegraftError, match="of one shape"):
        reconstruction_figure([])


@pytest.mark.data
def test_hippocampi_are_told_from_a_quarter(real_data, tmp_path):
    """40 scans of a real cohort for a few epochs: better than each patch's mean, which costs 1."""
    sizes = {"patch_size": 8, "hidden_size": 96, "mlp_dim": 384, "num_layers": 3, "num_heads": 3, "decoder_layers": 1}
    made = pretrain_masked(
        real_data / "hippocampus",
        tmp_path / "out",
        network="vit_small",
        network_arguments=sizes,
        cases=40,
        preparation={"patch": (32, 48, 32)},
        settings=settings(epochs=20, learning_rate=3e-3, volumes=4),
    )
    assert made.reconstruction.before > 1
    assert made.reconstruction.zero == pytest.approx(1, abs=0.01)
    assert made.reconstruction.after < 0.95
