"""Other networks through the whole chain: slices, a network by its dotted path, weights from elsewhere."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import SegResNet

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
