"""`segraft adapt --base unet_channelwise --weights …`: what was trained on one channel, for scans of two."""

import json
import shutil

import pytest

from segraft.adapters import read_header

UNET = json.dumps({"spatial_dims": 3, "widths": [4, 8], "norm": "instance"})
SHORT = ("--epochs", 1, "--device", "cpu", "--volumes", 2, "--patches", 1)
TRAINED = ("--method", "rs_lora", "--rank", 2, "--train", "decoder", "--train", "head", *SHORT)


@pytest.fixture(scope="module")
def one(make_cohort, tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("one") / "D", [f"s{number}" for number in range(4)], seed=3)


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same scans twice, as two channels."""
    folder = tmp_path_factory.mktemp("two") / "D"
    shutil.copytree(one, folder)
    listing = json.loads((folder / "dataset.json").read_text())
    for entry in listing["training"]:
        entry["image"] = {"T1": entry["image"], "T2": entry["image"]}
    (folder / "dataset.json").write_text(json.dumps(listing | {"modality": {"0": "T1", "1": "T2"}}))
    return folder


def predicted(fresh, run, folder, tmp_path):
    """A mask from a process that knows nothing but the files."""
    image = folder / "imagesTr" / "s3.nii.gz"
    mask = tmp_path / "mask.nii.gz"
    told = fresh("predict", run, "--channel", f"T1={image}", "--channel", f"T2={image}", "-o", mask, "--device", "cpu")
    assert told.code == 0, told.err
    assert mask.is_file()


def test_a_base_for_one_channel(segraft, fresh, one, two, tmp_path):
    made = segraft("pretrain", "--network", "unet", "--network-args", UNET, "--data", one, "--labels", 1,
                   "--patch", 16, 16, 16, *SHORT, "--out", tmp_path / "base")  # fmt: skip
    assert made.code == 0, made.err
    adapt = ("adapt", "--base", "unet_channelwise", "--weights", tmp_path / "base", "--network-args", UNET,
             "--data", two, "--labels", 1, "--patch", 16, 16, 16)  # fmt: skip
    made = segraft(*adapt, *TRAINED, "--out", tmp_path / "run", "--json")
    assert made.code == 0, made.err
    assert any("at their start: fusion (4)" in note for note in made.json["notes"])
    predicted(fresh, tmp_path / "run", two, tmp_path)


@pytest.mark.parametrize("network", ["unetr_channelwise", "monai.networks.nets:UNETR"])
def test_an_encoder_needs_no_sizes(segraft, fresh, one, two, tmp_path, network):
    """They are taken from its file, and so is the patch."""
    sizes = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "decoder_layers": 1, "img_size": [16, 16, 32]}
    made = segraft("pretrain", "--mae", "--network", "vit_small", "--network-args", json.dumps(sizes), "--data", one,
                   "--mask", 0.5, *SHORT, "--out", tmp_path / "encoder")  # fmt: skip
    assert made.code == 0, made.err
    data = two if network == "unetr_channelwise" else one
    made = segraft("adapt", "--base", network, "--weights", tmp_path / "encoder",
                   "--network-args", '{"feature_size": 4}', "--data", data, "--labels", 1, *TRAINED,
                   "--out", tmp_path / "run", "--json")  # fmt: skip
    assert made.code == 0, made.err
    (note,) = [note for note in made.json["notes"] if note.startswith(f"arguments of {network} that are as")]
    assert "num_heads 2, img_size [16, 16, 32]" in note
    record = read_header(tmp_path / "run" / "adapter.safetensors").record
    assert record["base"]["arguments"]["img_size"] == [16, 16, 32]
    assert record["preparation"]["patch"] == [16, 16, 32]
    if data is two:
        predicted(fresh, tmp_path / "run", two, tmp_path)
