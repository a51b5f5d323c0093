"""Other networks through the whole chain: slices, a network by its dotted path, weights from elsewhere."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import SegResNet

from segraft.networks import build

SEGRESNET = ("--network-args", '{"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}')
CHAINS = {
    "slices": ("unet", "--network-args", '{"widths": [4, 8]}', "--patch", "16", "16", "1"),
    "dotted": ("monai.networks.nets:SegResNet", *SEGRESNET, "--patch", "16", "16", "16"),
}


@pytest.mark.parametrize("network", CHAINS.values(), ids=CHAINS)
def test_pretrain_adapt_predict(segraft, work, tmp_path, network):
    short = ("--data", work / "D", "--epochs", "1", "--device", "cpu")
    made = segraft("pretrain", *short, "--labels", "1", "--cases", "2", "--out", tmp_path / "b", "--network", *network)
    assert made.code == 0, made.err
    adapted = segraft(
        "adapt", *short, "--base", tmp_path / "b", "--labels", "2", "--shots", "2", "--out", tmp_path / "r"
    )
    assert adapted.code == 0, adapted.err
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    told = segraft("predict", tmp_path / "r", scan, "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err
    mask = nib.load(tmp_path / "mask.nii")
    assert mask.shape == nib.load(scan).shape
    assert set(np.unique(mask.dataobj)) <= {0, 2}


@pytest.mark.parametrize("wrapped", [False, True], ids=["state dict", "checkpoint of a trainer"])
def test_a_base_from_elsewhere(segraft, work, tmp_path, wrapped):
    torch.manual_seed(3)
    net = SegResNet(spatial_dims=3, in_channels=1, out_channels=1, init_filters=8, blocks_down=[1, 1], blocks_up=[1])
    state = net.state_dict()
    torch.save(
        {"state_dict": {f"net.{key}": value for key, value in state.items()}} if wrapped else state, tmp_path / "w.pt"
    )
    made = segraft(
        *("adapt", "--base", "monai.networks.nets:SegResNet", *SEGRESNET, "--weights", tmp_path / "w.pt"),
        *("--data", work / "D", "--labels", "rim", "--shots", "2", "--patch", "16", "16", "16", "--epochs", "1"),
        *("--train", "head", "--out", tmp_path / "run", "--json"),
    )
    assert made.code == 0, made.err
    told = segraft("predict", tmp_path / "run", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err
    assert segraft("inspect", tmp_path / "run", "--json").json["base"]["path"] == "../w.pt"


def test_several_labels_at_once(segraft, work, tmp_path, tiny):
    made = segraft("pretrain", "--data", work / "D", "--labels", "2,core", "--out", tmp_path / "b", *tiny, "--json")
    assert list(made.json["labels"]) == ["2", "1"]
    told = segraft("predict", tmp_path / "b", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "m.nii", "--json")
    values = np.asanyarray(nib.load(tmp_path / "m.nii").dataobj)
    for name, value in (("core", 1), ("rim", 2)):
        expected = np.count_nonzero(values == value) * 1.5 / 1000
        assert told.json["masks"][0]["volumes_ml"][name] == pytest.approx(expected)


THREE_OUTPUTS = ("--base", "unet3d", "--network-args", '{"widths": [4, 8]}')


@pytest.fixture
def three(tmp_path):
    """Weights of a U-Net with three outputs."""
    torch.manual_seed(3)
    net = build("unet3d", in_channels=1, out_channels=3, arguments={"widths": [4, 8]})
    torch.save({"net": net.state_dict(), "epoch": 3, "best_acc": np.float64(0.8)}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_outputs_of_weights_from_elsewhere_by_name(segraft, work, tmp_path, three):
    made = segraft(
        *("adapt", *THREE_OUTPUTS, "--weights", three, "--base-labels", "liver,Rim,spleen", "--method", "lora"),
        *("--data", work / "D", "--labels", "core,rim", "--shots", "2", "--epochs", "1", "--device", "cpu"),
        *("--out", tmp_path / "run"),
    )
    assert made.code == 0, made.err
    assert "note: w.pt: " in made.err
    assert "outputs of the base that go on under their names: rim." in made.err
    assert "outputs that start new, as the base has none of their names: core." in made.err
    assert segraft("inspect", tmp_path / "run", "--json").json["base"]["outputs"] == [None, 1]
    told = segraft("predict", tmp_path / "run", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--exclude", "head"), ["core", "rim", "--train head", "--train decoder"]),
        (("--train", "bitfit", "--method", "none"), ["core", "--train head"]),
        (("--base-labels", "core"), ["w.pt", "1 labels", "3 outputs"]),
        (("--base-labels", "core,rim,Core"), ["two outputs", "Core"]),
        (("--network-args", '{"widths": [4, 8, 16]}'), ["w.pt", "do not fit UNet"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_outputs_that_cannot_be_taken(refused, work, tmp_path, three, options, says):
    refused(
        *("adapt", *THREE_OUTPUTS, "--weights", three, "--data", work / "D", "--labels", "core,rim"),
        *("--epochs", "1", "--device", "cpu", "--out", tmp_path / "run", *options),
        says=says,
    )


def test_a_base_keeps_its_own_arguments(refused, work, tmp_path):
    refused(
        *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "1", "--network-args", '{"a": 1}'),
        *("--out", tmp_path / "run"),
        says=["--network-args", "--weights"],
    )


def test_a_base_for_one_more_label(segraft, work, tmp_path):
    made = segraft(
        *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "rim,core", "--shots", "2"),
        *("--epochs", "1", "--device", "cpu", "--out", tmp_path / "run", "--json"),
    )
    assert made.code == 0, made.err
    assert segraft("inspect", tmp_path / "run", "--json").json["base"]["outputs"] == [None, 0]


def test_weights_of_others_become_a_base_that_segments(segraft, work, tmp_path):
    """`segraft import` of a base's own tensors, as a checkpoint of elsewhere: zero-shot, the same as the base."""
    import torch
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(work / "base" / "base.safetensors")}, tmp_path / "w.pt")
    options = ("--network", "unet3d", "--network-args", '{"widths": [4, 8]}', "--labels", "core", "--patch", 16, 16, 16)
    made = segraft("import", tmp_path / "w.pt", *options, "--out", tmp_path / "base")
    assert made.code == 0, made.err
    assert "tensors loaded" in made.err
    assert "1 outputs (core)" in made.out
    for model, out in ((work / "base", "theirs"), (tmp_path / "base", "ours")):
        done = segraft("evaluate", model, "--data", work / "D", "--labels", "1", "--out", tmp_path / out)
        assert done.code == 0, done.err
    again = segraft("import", tmp_path / "w.pt", *options, "--out", tmp_path / "base")
    assert again.code == 2
    assert "exists" in again.err
    bare = segraft("import", tmp_path / "w.pt", *options[:-4], "--out", tmp_path / "bare")
    assert bare.code == 0
    refused = segraft("evaluate", tmp_path / "bare", "--data", work / "D", "--labels", "1")
    assert refused.code == 2
    assert "import it again with how they are" in refused.err
