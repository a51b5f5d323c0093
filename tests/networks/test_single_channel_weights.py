"""Weights of networks for one channel in networks that encode several, one at a time: what is loaded, what not."""

import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR, ViT, ViTAutoEnc
from torch import Tensor, nn

from segraft.adapters import fingerprint, parts_of
from segraft.errors import SegraftError
from segraft.networks import build, load_checkpoint, save_base
from segraft.networks.heads import Outputs
from segraft.networks.swin import merges_as_before

C = 3
LABELS = ("a", "b")
SIZES = {"img_size": (32, 16, 16), "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
UNETR_ARGUMENTS = {"feature_size": 4, **SIZES}
SWIN = {"feature_size": 12, "depths": (2, 1, 1, 1), "window_size": 2}
UNET = {"spatial_dims": 3, "widths": (4, 6, 8), "norm": "instance"}
WHOLE = {
    "unet_channelwise": (lambda: build("unet", in_channels=1, out_channels=2, arguments=UNET), UNET),
    "unetr_channelwise": (lambda: UNETR(in_channels=1, out_channels=2, **UNETR_ARGUMENTS), UNETR_ARGUMENTS),
    "swin_unetr_channelwise": (lambda: SwinUNETR(in_channels=1, out_channels=2, **SWIN), SWIN),
}  # fmt: skip
FULL_SIZE = ("encoder1.layer.conv1.conv", "encoder1.layer.conv3.conv")
SEES_ALL = {"unet_channelwise": (), "unetr_channelwise": FULL_SIZE, "swin_unetr_channelwise": FULL_SIZE}
EVERY = pytest.mark.parametrize("name", WHOLE)


def whole(name: str) -> nn.Module:
    """The network for one channel."""
    torch.manual_seed(1)
    return WHOLE[name][0]()


def channelwise(name: str, channels: int = C, **more: object) -> nn.Module:
    torch.manual_seed(2)
    return build(name, in_channels=channels, out_channels=2, arguments={**WHOLE[name][1], **more})


def copied(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def below(net: nn.Module, part: str) -> set[str]:
    prefixes = tuple(f"{prefix}." for prefix in parts_of(net)[part])
    return {key for key in net.state_dict() if key.startswith(prefixes)}


@EVERY
def test_all_but_the_fusion_and_what_sees_every_channel_is_loaded(name, tmp_path):
    theirs, ours, layers = whole(name), channelwise(name), SEES_ALL[name]
    before, given = copied(ours), theirs.state_dict()
    torch.save(given, tmp_path / "w.pt")
    loaded = load_checkpoint(ours, tmp_path / "w.pt", labels=LABELS)
    start = below(ours, "fusion") | {f"{layer}.weight" for layer in layers}
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key] if key in start else given[key]), key
    assert loaded.tensors == len(ours.state_dict()) - len(start)
    assert loaded.kept == {"fusion": len(below(ours, "fusion"))}
    assert (loaded.layers, loaded.untrained) == (layers, ("fusion", *layers))
    assert (loaded.unused, loaded.outputs) == ({}, None)
    notes = loaded.notes(LABELS)
    assert f"not in the file and at their start: fusion ({len(below(ours, 'fusion'))})" in notes[0]
    cure = "decoder" if layers else "fusion"  # the decoder has the fusion in it
    assert f"the fusion starts at random: train it, with --train {cure}." in notes
    told = [note for note in notes if note.startswith("what sees all channels of the image starts at random")]
    assert len(told) == bool(layers)
    assert all(layer in note and "--train decoder" in note for note in told for layer in layers)


@EVERY
def test_one_channel_alone_is_no_reason_to_start_anew(name, tmp_path):
    torch.save(whole(name).state_dict(), tmp_path / "w.pt")
    assert load_checkpoint(channelwise(name, 1), tmp_path / "w.pt").layers == ()


@EVERY
def test_a_fusion_that_is_there_must_be_whole(name, tmp_path):
    """It is then no network for one channel."""
    state = channelwise(name).state_dict()
    del state["fusion.1.bias"]
    torch.save(state, tmp_path / "w.pt")
    net = channelwise(name)
    before = fingerprint(net)
    with pytest.raises(SegraftError, match=r"1 tensors are missing, such as fusion\.1\.bias"):
        load_checkpoint(net, tmp_path / "w.pt")
    assert fingerprint(net) == before


@EVERY
def test_channels_of_another_channelwise_network_are_not_forgotten(name, tmp_path):
    torch.save(channelwise(name, C + 1).state_dict(), tmp_path / "w.pt")
    with pytest.raises(SegraftError, match="another shape"):
        load_checkpoint(channelwise(name), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("unet_channelwise", "decoder.0.0.weight"),
        ("unetr_channelwise", "decoder2."),
        ("unetr_channelwise", "encoder1.layer.conv1."),
        ("swin_unetr_channelwise", "encoder10."),
    ],
)
def test_the_decoder_of_a_whole_network_must_be_there(name, dropped, tmp_path):
    state = {key: value for key, value in whole(name).state_dict().items() if not key.startswith(dropped)}
    assert len(state) < len(whole(name).state_dict())
    torch.save(state, tmp_path / "w.pt")
    net = channelwise(name)
    before = fingerprint(net)
    with pytest.raises(SegraftError, match="missing"):
        load_checkpoint(net, tmp_path / "w.pt")
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("unetr_channelwise", lambda: UNETR(in_channels=2, out_channels=2, feature_size=4, **SIZES)),
        ("swin_unetr_channelwise", lambda: SwinUNETR(in_channels=2, out_channels=2, **SWIN)),
    ],
)
def test_an_encoder_of_several_channels_is_refused(name, make, tmp_path):
    torch.save(make().state_dict(), tmp_path / "w.pt")
    says = r"in channels 2, this network 1 \(this network encodes channels one at a time: give it weights for one"
    with pytest.raises(SegraftError, match=says) as caught:
        load_checkpoint(channelwise(name), tmp_path / "w.pt")
    assert "in_channels" not in str(caught.value)


def vit() -> nn.Module:
    return ViT(in_channels=1, patch_size=16, **SIZES)


ENCODERS = {
    "of a UNETR": (
        lambda: {f"vit.{key}": value for key, value in vit().state_dict().items()},
        "encoder of a UNETR",
        {},
    ),
    "bare": (lambda: vit().state_dict(), "vision transformer (MONAI)", {}),
    "in a wrapper": (
        lambda: {"state_dict": {f"module.{key}": value for key, value in vit().state_dict().items()}},
        "vision transformer (MONAI)",
        {},
    ),
    "classifying": (
        lambda: ViT(in_channels=1, patch_size=16, classification=True, **SIZES).state_dict(),
        "vision transformer (MONAI)",
        {"class token and head": 3},
    ),
    "auto-encoder": (
        lambda: ViTAutoEnc(in_channels=1, patch_size=(16, 16, 16), **SIZES).state_dict(),
        "vision transformer (MONAI)",
        {"reconstruction": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", ["unetr_channelwise", "monai.networks.nets:UNETR"])
def test_vision_transformers(kind, name, tmp_path):
    torch.manual_seed(3)
    make, layout, unused = ENCODERS[kind]
    content = make()
    torch.save(content, tmp_path / "w.pt")
    arguments, channels = {"feature_size": 4, **SIZES}, C if name == "unetr_channelwise" else 1
    net = build(name, in_channels=channels, out_channels=2, arguments=arguments)
    before = copied(net)
    loaded = load_checkpoint(net, tmp_path / "w.pt", labels=LABELS)
    assert (loaded.layout, loaded.unused, loaded.outputs) == (layout, unused, Outputs((None, None)))
    rest = content.get("state_dict", content)
    for key, value in rest.items():
        full = f"vit.{key.removeprefix('module.').removeprefix('vit.')}"
        assert full not in before or torch.equal(net.state_dict()[full], value)
    assert loaded.tensors == sum(key.startswith("vit.") for key in before)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items() if key.startswith("decoder"))
    assert set(loaded.kept) == {"decoder", "head"} | ({"fusion"} if name == "unetr_channelwise" else set())
    (told,) = [note for note in loaded.notes(LABELS) if "does not tell of what shape" in note]
    assert "images of 32×16×16 voxels, 2 heads are taken" in told


def test_the_transformer_of_a_transformer_is_itself(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "w.pt")
    arguments = {"patch_size": 16, **SIZES}
    net = build("monai.networks.nets:ViT", in_channels=1, out_channels=1, arguments=arguments)
    loaded = load_checkpoint(net, tmp_path / "w.pt")
    assert (loaded.layout, loaded.tensors, loaded.kept) == ("", len(net.state_dict()), {})


def test_half_a_transformer_is_refused(tmp_path):
    state = vit().state_dict()
    del state["blocks.3.attn.qkv.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SegraftError, match=r"missing, such as vit\.blocks\.3\.attn\.qkv\.weight"):
        load_checkpoint(channelwise("unetr_channelwise"), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["unetr_channelwise", "monai.networks.nets:UNETR"])
def test_files_of_before_there_were_norms_that_nothing_runs(name, tmp_path):
    """MONAI has them since 1.4."""
    state = {
        key: value for key, value in whole("unetr_channelwise").state_dict().items() if "norm_cross_attn" not in key
    }
    torch.save(state, tmp_path / "w.pt")
    net = build(name, in_channels=1, out_channels=2, arguments=UNETR_ARGUMENTS)
    loaded = load_checkpoint(net, tmp_path / "w.pt")
    assert loaded.kept.pop("norms of a cross attention that is not there") == 24
    assert set(loaded.kept) == ({"fusion"} if name == "unetr_channelwise" else set())
    assert loaded.untrained == tuple(loaded.kept)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def test_other_taps_than_the_decoder_was_trained_on_are_told(tmp_path):
    torch.save(whole("unetr_channelwise").state_dict(), tmp_path / "w.pt")
    loaded = load_checkpoint(channelwise("unetr_channelwise"), tmp_path / "w.pt")
    (told,) = [note for note in loaded.notes() if "taps" in note]
    assert "blocks 4, 7, 10, 12" in told
    assert "those after blocks 3, 6, 9, 12" in told
    same = load_checkpoint(channelwise("unetr_channelwise", taps=(4, 7, 10, 12)), tmp_path / "w.pt")
    assert not [note for note in same.notes() if "taps" in note]


def test_tokens_are_joined_as_they_were(tmp_path):
    """A base says it; of a bare state dict it is told how to say it."""
    torch.manual_seed(1)
    net = build("original_swin_unetr", in_channels=1, out_channels=2, arguments=SWIN)
    arguments = {**SWIN, "in_channels": 1, "out_channels": 2}
    base = save_base(net, tmp_path, network="original_swin_unetr", arguments=arguments)
    ours = channelwise("swin_unetr_channelwise")
    assert load_checkpoint(ours, base.path).original_merging
    assert merges_as_before(ours)
    one = channelwise("swin_unetr_channelwise", 1, original_merging=True)
    arguments = {**SWIN, "in_channels": 1, "out_channels": 2, "original_merging": True}
    again = save_base(one, tmp_path / "one", network="swin_unetr_channelwise", arguments=arguments)
    assert load_checkpoint(channelwise("swin_unetr_channelwise", 1), again.path).original_merging
    torch.save(net.state_dict(), tmp_path / "w.pt")
    bare = load_checkpoint(channelwise("swin_unetr_channelwise"), tmp_path / "w.pt")
    assert not bare.original_merging
    assert any("--network-args '{\"original_merging\": true}'" in note for note in bare.notes())
    asked = load_checkpoint(channelwise("swin_unetr_channelwise", original_merging=True), tmp_path / "w.pt")
    assert not any("original_merging" in note for note in asked.notes())
