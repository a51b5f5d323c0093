"""Networks that encode channels one at a time, from weights for one channel: what is written is what is read again."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segraft.adapters import AdapterSpec, fingerprint, read_header
from segraft.errors import SegraftError
from segraft.jobs import adapt, import_base, load_model, pretrain
from segraft.jobs.base_source import BaseSource
from segraft.jobs.bases import load_base_of, named_as_loaded
from segraft.networks import Loaded, build, load_base, read_base, save_base
from segraft.networks.swin import PATH, OriginalSwinUNETR, merges_as_before
from segraft.training.settings import TrainingSettings

SWIN = {"feature_size": 12, "depths": [2, 1, 1, 1], "window_size": 2}
SWIN_PREPARED = {"patch": (64, 32, 32)}
UNET = {"spatial_dims": 3, "widths": [4, 8], "norm": "instance"}
UNETR = {"img_size": [16, 32, 16], "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
SHORT = TrainingSettings(epochs=1, device="cpu", volumes=1, patches=1, augmentation="none")
TRAINED = AdapterSpec("rs_lora", rank=2, train=("decoder", "head"))


@pytest.fixture
def scans(tmp_path) -> Path:
    """Three scans of two channels with one label."""
    rng, folder = np.random.default_rng(0), tmp_path / "D"
    folder.mkdir()
    for name in "abc":
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:12, 4:12, 4:12] = 1
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{name}_seg.nii")
        for channel in (0, 1):
            image = rng.normal(0, 1, label.shape).astype(np.float32) + 3 * label
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{name}_000{channel}.nii")
    entries = [
        {"image": {"T1": f"{name}_0000.nii", "T2": f"{name}_0001.nii"}, "label": f"{name}_seg.nii"} for name in "abc"
    ]
    listing = {"name": "Two", "modality": {"0": "T1", "1": "T2"}, "labels": {"1": "core"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A small checkpoint of MONAI's self-supervised SwinUNETR encoder."""
    torch.manual_seed(1)
    state = build("swin_unetr", in_channels=1, out_channels=1, arguments=SWIN).state_dict()
    state = {f"module.{k.removeprefix('swinViT.')}": v for k, v in state.items() if k.startswith("swinViT.")}
    torch.save({"state_dict": state}, tmp_path / "ssl.pt")
    return tmp_path / "ssl.pt"


# --- how tokens are joined is written down


@pytest.mark.parametrize(("network", "channels"), [("swin_unetr", 1), ("swin_unetr_channelwise", 2)])
@pytest.mark.parametrize("job", ["import", "pretrain"])
def test_what_is_made_of_weights_trained_before_is_read_again(tmp_path, scans, encoder, network, channels, job):
    arguments = {**SWIN, "in_channels": channels}
    if job == "import":
        path = import_base(
            encoder, tmp_path / "base", network=network, network_arguments=arguments, labels=["core"]
        ).path
    else:
        if channels == 1:
            listing = json.loads((scans / "dataset.json").read_text())
            for entry in listing["training"]:
                entry["image"] = entry["image"]["T1"]
            (scans / "dataset.json").write_text(json.dumps(listing | {"modality": {"0": "T1"}}))
        path = pretrain(
            scans, tmp_path / "base", network=network, network_arguments=SWIN, weights=encoder, cases=["a"],
            preparation=SWIN_PREPARED, settings=SHORT,
        ).path  # fmt: skip
    net, info = load_base(path)
    assert fingerprint(net) == info.fingerprint
    assert merges_as_before(net)
    plain = build("swin_unetr" if channels == 1 else network, in_channels=channels, out_channels=1, arguments=SWIN)
    plain.load_state_dict(net.state_dict())
    image = torch.rand(1, channels, 64, 32, 32)
    with torch.inference_mode():
        assert not torch.allclose(net.eval()(image), plain.eval()(image), atol=1e-4)
    assert info.network == (PATH if channels == 1 else network)
    assert info.arguments.get("original_merging", False) == (channels > 1)
    if job == "pretrain":
        assert load_model(path).segment(load_model(path).case("a", [scans / f"a_000{c}.nii" for c in range(channels)]))


class Mine(OriginalSwinUNETR):
    """A network of somebody else's."""


def test_a_network_that_cannot_be_built_so_is_refused():
    original = Loaded(Path("w.pt"), "", 1, original_merging=True)
    with pytest.raises(SegraftError, match=r"my\.nets:Mine joins its tokens as MONAI since 1\.5 whenever it is built"):
        named_as_loaded(Mine(1, 1, **SWIN), "my.nets:Mine", {}, original)


# --- adapting


def adapted(source: BaseSource, scans: Path, out: Path, **options):
    made = adapt(source, scans, out, **{"spec": TRAINED, "settings": SHORT, "shots": ["a", "b"], **options})
    header = read_header(made.path)
    net, _ = load_base_of(header, None)
    assert fingerprint(net) == header.fingerprint
    load_model(made.path)
    return made, header, net


@pytest.fixture
def unet(tmp_path) -> Path:
    """A base of the U-Net for one channel."""
    torch.manual_seed(1)
    net, arguments = build("unet", in_channels=1, out_channels=1, arguments=UNET), {"in_channels": 1, "out_channels": 1}
    record = {"labels": {"1": "core"}}
    return save_base(net, tmp_path / "unet", network="unet", arguments={**arguments, **UNET}, record=record).path


def test_a_base_for_one_channel_becomes_one_for_two(tmp_path, scans, unet):
    source = BaseSource("unet_channelwise", unet.parent, UNET)
    made, header, net = adapted(source, scans, tmp_path / "run", preparation={"patch": (16, 16, 16)})
    assert type(net).__name__ == "ChannelwiseUNet", "not the network that the file of its weights describes"
    assert header.record["base"]["network"] == "unet_channelwise"
    given = load_base(unet)[0].state_dict()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in given.items())
    assert "the fusion starts at random: train it, with --train fusion." in made.notes


def test_what_sees_all_channels_must_be_trained(tmp_path, scans, unet):
    def refuse(source, spec, says, prepared):
        with pytest.raises(SegraftError, match=says):
            adapt(source, scans, tmp_path / "no", spec=spec, settings=SHORT, preparation={"patch": prepared})
        assert not (tmp_path / "no").exists()

    source = BaseSource("unet_channelwise", unet, UNET)
    head = AdapterSpec("rs_lora", rank=2, train=("head",))
    refuse(source, head, "no trained fusion, .*--train fusion", (16, 16, 16))
    torch.manual_seed(1)
    state = build("monai.networks.nets:UNETR", in_channels=1, out_channels=1, arguments=UNETR).state_dict()
    torch.save(state, tmp_path / "unetr.pt")
    torch.save({key: value for key, value in state.items() if key.startswith("vit.")}, tmp_path / "vit.pt")
    fusion = AdapterSpec("rs_lora", rank=2, train=("fusion",))
    whole, alone = (BaseSource("unetr_channelwise", tmp_path / f"{name}.pt", UNETR) for name in ("unetr", "vit"))
    refuse(whole, AdapterSpec("rs_lora", rank=2, train=("head",)), "trained fusion, .*--train decoder", (16, 32, 16))
    refuse(whole, fusion, r"no trained encoder1\.layer\.conv1\.conv, .*--train decoder", (16, 32, 16))
    refuse(alone, AdapterSpec("rs_lora", rank=2, train=("fusion", "head")), "no trained decoder", (16, 32, 16))
    made, _, net = adapted(whole, scans, tmp_path / "run")
    assert all(
        torch.equal(net.state_dict()[key], value) for key, value in state.items() if "encoder1.layer.conv" not in key
    )
    assert any("encoder1.layer.conv1.conv" in note for note in made.notes)
    adapted(alone, scans, tmp_path / "alone")


def test_an_imported_base_says_which_layers_were_never_trained(tmp_path, scans):
    torch.manual_seed(1)
    state = build("swin_unetr", in_channels=1, out_channels=1, arguments=SWIN).state_dict()
    torch.save(state, tmp_path / "swin.pt")
    options = {"network": "swin_unetr_channelwise", "network_arguments": {**SWIN, "in_channels": 2}, "labels": ["core"]}
    made = import_base(tmp_path / "swin.pt", tmp_path / "base", **options)
    layers = ["encoder1.layer.conv1.conv", "encoder1.layer.conv3.conv"]
    assert read_base(made.path).record["untrained"] == {"outputs": [], "parts": ["fusion", *layers]}
    with pytest.raises(SegraftError, match=r"start at random \(fusion; encoder1\.layer\.conv1\.conv"):
        load_model(made.path)
    prepared = {"preparation": SWIN_PREPARED, "settings": SHORT}
    fusion = AdapterSpec("rs_lora", rank=2, train=("fusion",))
    with pytest.raises(SegraftError, match=r"no trained encoder1\.layer\.conv1\.conv"):
        adapt(tmp_path / "base", scans, tmp_path / "no", spec=fusion, **prepared)
    adapted(BaseSource(tmp_path / "base"), scans, tmp_path / "run", **prepared)
