"""Checkpoints as others publish them: the right tensors in the right place, all of them, and a report."""

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR
from safetensors.torch import save_file
from torch import nn

from segraft.adapters import fingerprint, parts_of
from segraft.errors import SegraftError
from segraft.networks import build, load_checkpoint, load_weights
from segraft.networks.heads import Outputs
from segraft.networks.layouts import BTCV, FSEFT, KNOWN_LABELS
from segraft.networks.swin import PATH, OriginalPatchMerging, OriginalSwinUNETR, merge_as_before

SMALL = {"feature_size": 12, "window_size": 4}
SOFTMAX = 14


def swin(outputs: int = 2, seed: int = 0, network: str = "swin_unetr", **arguments: object) -> nn.Module:
    torch.manual_seed(seed)
    return build(network, in_channels=1, out_channels=outputs, arguments={**SMALL, **arguments})


def encoder_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in `model_swinvit.pt`: without the encoder's name, and with the MLP's old names."""
    return {
        key.removeprefix("swinViT.").replace("mlp.linear", "mlp.fc"): value
        for key, value in state.items()
        if key.startswith("swinViT.")
    }


def self_supervised(net: nn.Module) -> dict[str, object]:
    heads = {
        "norm.weight": torch.ones(192),
        "norm.bias": torch.zeros(192),
        "rotation_head.weight": torch.zeros(4, 192),
        "rotation_head.bias": torch.zeros(4),
        "contrastive_head.weight": torch.zeros(512, 192),
        "contrastive_head.bias": torch.zeros(512),
        "convTrans3d.weight": torch.zeros(192, 1, 2, 2, 2),
        "convTrans3d.bias": torch.zeros(1),
    }
    state = {f"module.{key}": value for key, value in {**encoder_keys(net.state_dict()), **heads}.items()}
    return {"state_dict": OrderedDict(state), "epoch": 100, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}


def pretrained_by_script(net: nn.Module) -> dict[str, object]:
    """As SwinUNETR/Pretrain/main.py writes it on one GPU."""
    state = {
        key.replace("swinViT.", "swin_vit."): value
        for key, value in net.state_dict().items()
        if key.startswith("swinViT.")
    }
    state |= {"rotation_head.weight": torch.zeros(4, 192), "conv.0.weight": torch.zeros(96, 192, 3, 3, 3)}
    return {"global_step": 3, "state_dict": state, "optimizer": {}}


def universal(net: nn.Module) -> dict[str, object]:
    state = {f"backbone.{key}": value for key, value in net.state_dict().items() if not key.startswith("out.")}
    state |= {
        "organ_embedding": torch.zeros(32, 512),
        "precls_conv.0.weight": torch.zeros(12),
        "precls_conv.2.weight": torch.zeros(8, 12, 1, 1, 1),
        "GAP.0.weight": torch.zeros(192),
        "GAP.3.weight": torch.zeros(256, 192, 1, 1, 1),
        "controller.weight": torch.zeros(153, 512, 1, 1, 1),
        "controller.bias": torch.zeros(153),
        "text_to_vision.weight": torch.zeros(256, 512),
    }
    scheduler = {"warmup_epochs": 20, "max_epochs": 800, "base_lrs": [1e-4], "last_epoch": 3, "_last_lr": [1e-5]}
    state = {f"module.{key}": value for key, value in state.items()}
    return {"net": state, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "scheduler": scheduler, "epoch": 3}


def backbone_alone(net: nn.Module) -> dict[str, object]:
    return {"net": {key: value for key, value in net.state_dict().items() if not key.startswith("out.")}, "epoch": 3}


def fseft(net: nn.Module) -> dict[str, object]:
    return {f"module.{key.replace('out.conv.conv.', 'classifier.')}": value for key, value in net.state_dict().items()}


def fine_tuned(net: nn.Module) -> dict[str, object]:
    """As SwinUNETR/BTCV/trainer.py writes it: the score is a NumPy number."""
    old = {f"{block}.layer.conv3.conv.weight": torch.zeros(1) for block in ("encoder2", "encoder3", "encoder10")}
    return {"epoch": 3, "best_acc": np.float64(0.8), "state_dict": {**net.state_dict(), **old}}


WRITTEN = {
    "self-supervised": (self_supervised, 2),
    "pre-training script": (pretrained_by_script, 2),
    "universal": (universal, 2),
    "backbone": (backbone_alone, 2),
    "fseft": (fseft, len(FSEFT)),
    "fine-tuned": (fine_tuned, SOFTMAX),
}


@pytest.fixture
def write(tmp_path):
    """write(kind, net) -> path"""

    def made(kind: str, net: nn.Module) -> Path:
        path = tmp_path / "weights.pt"
        torch.save(WRITTEN[kind][0](net), path)
        return path

    return made


def same(net: nn.Module, other: nn.Module, prefix: str = "") -> bool:
    ours, theirs = net.state_dict(), other.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith(prefix))


def in_part(net: nn.Module, part: str) -> int:
    return sum(key.startswith(tuple(f"{prefix}." for prefix in parts_of(net)[part])) for key in net.state_dict())


# --- what is loaded


def test_the_self_supervised_encoder_is_what_monai_loads(write):
    path = write("self-supervised", swin(seed=1))
    net, peer = swin(seed=2), swin(seed=2)
    peer.load_from(torch.load(path, weights_only=True))
    loaded = load_checkpoint(net, path)
    assert same(net, peer, "swinViT.")
    assert same(net, peer, "encoder")
    assert same(net, peer, "decoder")
    assert loaded.layout == "self-supervised SwinUNETR encoder (MONAI)"
    assert loaded.tensors == in_part(net, "encoder")
    assert loaded.unused == {"norm": 2, "rotation_head": 2, "contrastive_head": 2, "reconstruction": 2}
    assert loaded.kept == {"decoder": in_part(net, "decoder"), "head": 2}
    assert loaded.outputs == Outputs((None, None))
    notes = loaded.notes(["liver", "spleen"])
    assert "rotation_head (2)" in notes[0]
    assert f"decoder ({loaded.kept['decoder']})" in notes[0]
    assert "the decoder starts at random: train it, with --train decoder." in notes
    assert any("start new" in note and "liver, spleen" in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "parts", "unused"),
    [
        ("pre-training script", ["encoder"], {"rotation_head": 1, "reconstruction": 1}),
        (
            "universal",
            ["encoder", "decoder"],
            {"organ_embedding": 1, "precls_conv": 2, "GAP": 2, "controller": 2, "text_to_vision": 1},
        ),
        ("backbone", ["encoder", "decoder"], {}),
        ("fseft", ["encoder", "decoder", "head"], {}),
        ("fine-tuned", ["encoder", "decoder", "head"], {"residual convolutions of MONAI 0.8, never run": 3}),
    ],
)
def test_published_layouts(write, kind, parts, unused):
    outputs = WRITTEN[kind][1]
    source, net, start = swin(outputs, 1), swin(outputs, 2), swin(outputs, 2)
    loaded = load_checkpoint(net, write(kind, source))
    for part, prefixes in parts_of(net).items():
        origin = source if part in parts else start
        assert all(same(net, origin, prefix) for prefix in prefixes) == (part in parts or part == "decoder"), part
    assert loaded.tensors == sum(in_part(net, part) for part in parts)
    assert loaded.unused == unused
    assert set(loaded.kept) == {"encoder", "decoder", "head"} - set(parts)
    assert not loaded.reshaped


def test_what_starts_new_does_not_depend_on_the_network(write):
    """The head is drawn by itself: only the decoder follows the seed that the network was built from."""
    path = write("backbone", swin(seed=1))
    nets = [swin(seed=seed) for seed in (2, 3)]
    for net in nets:
        load_checkpoint(net, path)
    assert fingerprint(nets[0]) == fingerprint(nets[1])
    row = nets[0].out.conv.conv.weight.detach()
    assert row.abs().max() <= 12**-0.5
    assert row.std().item() == pytest.approx(12**-0.5 / 3**0.5, rel=0.4)
    assert not torch.equal(row[0], row[1])


def test_safetensors_have_layouts_too(tmp_path):
    source = swin(len(FSEFT), 1)
    save_file(fseft(source), tmp_path / "w.safetensors")
    net = swin(len(FSEFT), 2)
    assert load_checkpoint(net, tmp_path / "w.safetensors").layout.startswith("foundation model")
    assert same(net, source)


def test_labels_take_the_rows_of_their_names(write):
    source, net = swin(len(FSEFT), 1), swin(3, 2)
    loaded = load_checkpoint(net, write("fseft", source), labels=["kidney_left", "heart_myocardium", "gallbladder"])
    rows = [FSEFT.index("left kidney"), None, FSEFT.index("gallbladder")]
    assert loaded.outputs == Outputs(tuple(rows))
    assert loaded.reshaped["out.conv.conv.weight"] == ((29, 12, 1, 1, 1), (3, 12, 1, 1, 1))
    for place, row in enumerate(rows):
        for name in ("weight", "bias"):
            ours, theirs = (getattr(n.out.conv.conv, name) for n in (net, source))
            assert row is None or torch.equal(ours[place], theirs[row])
    assert loaded.notes(["kidney_left", "heart_myocardium", "gallbladder"])[-2:] == (
        "outputs of the base that go on under their names: kidney_left, gallbladder.",
        "outputs that start new, as the base has none of their names: heart_myocardium.",
    )
    again = swin(3, 3)
    load_checkpoint(again, write("fseft", source), outputs=loaded.outputs)
    assert fingerprint(again) == fingerprint(net)


def test_fourteen_outputs_are_not_taken_for_those_of_btcv(write):
    """FLARE's 13 organs with a background have the same shapes in another order."""
    source, net = swin(SOFTMAX, 1), swin(1, 2)
    path = write("fine-tuned", source)
    loaded = load_checkpoint(net, path, labels=["liver"])
    assert loaded.outputs == Outputs((None,))
    assert "what its 14 outputs stand for is not known" in " ".join(loaded.notes(["liver"]))
    assert load_checkpoint(net, path, labels=["liver"], names=["btcv"]).outputs == Outputs((BTCV.index("liver"),), 0)


def test_a_softmax_head_gives_the_same_mask(write):
    """With its background off the others a sigmoid is at least 0.5, and the largest, where the softmax is largest."""
    source, net = swin(SOFTMAX, 1), swin(SOFTMAX - 1, 2)
    load_checkpoint(net, write("fine-tuned", source), labels=BTCV[1:], names=BTCV)
    with torch.inference_mode():
        image = torch.rand(1, 1, 64, 32, 32)
        wanted, logits = source.eval()(image).argmax(1), net.eval()(image)
        largest, place = logits.sigmoid().max(1)
    assert torch.equal(torch.where(largest >= 0.5, place + 1, 0), wanted)
    assert len(wanted.unique()) > 3


@pytest.mark.parametrize("name", KNOWN_LABELS)
def test_known_labels_name_each_output_once(name):
    assert len(set(KNOWN_LABELS[name])) == len(KNOWN_LABELS[name])


def test_the_published_numbers_of_structures():
    assert (len(BTCV), len(FSEFT)) == (14, 29)
    numbers = {"spleen": 1, "left kidney": 3, "liver": 6, "aorta": 8, "pancreas": 11, "duodenum": 14, "colon tumor": 29}
    assert {name: FSEFT.index(name) + 1 for name in numbers} == numbers


# --- how tokens are joined


def joined_before(tokens: torch.Tensor) -> torch.Tensor:
    """What MONAI 1.4 joins: two of the eight tokens of a block twice, two never."""
    offsets = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    return torch.cat([tokens[:, x::2, y::2, z::2] for x, y, z in offsets], -1)


def test_published_weights_compute_as_they_were_trained(write):
    path = write("fseft", swin(len(FSEFT), 1))
    net, now, named = (swin(len(FSEFT), 2, network) for network in ("swin_unetr", "swin_unetr", PATH))
    loaded = load_checkpoint(net, path)
    for other in (now, named):
        other.load_state_dict(net.state_dict())
    assert loaded.original_merging
    image = torch.rand(1, 1, 64, 32, 32)
    with torch.inference_mode():
        before, since, by_name = (each.eval()(image) for each in (net, now, named))
    assert torch.equal(before, by_name)
    assert not torch.allclose(before, since, atol=1e-3)


def test_merging_as_before():
    torch.manual_seed(0)
    merging = next(m for m in swin(network=PATH).modules() if isinstance(m, OriginalPatchMerging))
    tokens = torch.rand(1, 4, 6, 2, 12)
    assert torch.equal(merging(tokens), merging.reduction(merging.norm(joined_before(tokens))))
    filled = torch.zeros(1, 4, 6, 2, 12)
    filled[:, :3, :5, :1] = tokens[:, :3, :5, :1]
    assert torch.equal(merging(tokens[:, :3, :5, :1]), merging(filled))


def test_only_monais_own_merging_is_exchanged():
    net = SwinUNETR(in_channels=1, out_channels=1, feature_size=12, downsample="mergingv2")
    assert not merge_as_before(net)
    assert merge_as_before(SwinUNETR(in_channels=1, out_channels=1, feature_size=12))
    assert set(OriginalSwinUNETR.parts) == {"encoder", "decoder", "head"}


def test_another_way_that_the_user_asks_for_is_told(write):
    loaded = load_checkpoint(swin(29, 2, downsample="mergingv2"), write("fseft", swin(29, 1)))
    assert not loaded.original_merging
    assert any("downsample" in note for note in loaded.notes())


def test_a_swin_unetr_under_its_own_keys_is_told_of_both(write):
    loaded = load_checkpoint(swin(SOFTMAX, 2), write("fine-tuned", swin(SOFTMAX, 1)))
    assert not loaded.original_merging
    assert any("original_swin_unetr" in note for note in loaded.notes())
    assert not any(
        "original_swin_unetr" in n
        for n in load_checkpoint(swin(SOFTMAX, 2, PATH), write("fine-tuned", swin(14))).notes()
    )


# --- what is refused, changing nothing


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("self-supervised", {"feature_size": 24}, ["feature size 12", "this network 24", '{"feature_size": 12}']),
        ("universal", {"feature_size": 24}, ["feature size 12", "this network 24"]),
        ("fseft", {"window_size": 7}, ["window size 4", "this network 7", '{"window_size": 4}']),
        ("fine-tuned", {"in_channels": 4}, ["in channels 1", "this network 4"]),
        ("fine-tuned", {"depths": [2, 2, 2, 1]}, ["unexpected"]),
        ("self-supervised", {"depths": [2, 2, 2, 3]}, ["missing", "swinViT.layers4.0.blocks.2"]),
    ],
)
def test_another_network_is_refused(write, kind, arguments, says):
    outputs = WRITTEN[kind][1]
    path, net = write(kind, swin(outputs, 1)), swin(outputs, 2, **arguments)
    before = fingerprint(net)
    with pytest.raises(SegraftError) as caught:
        load_checkpoint(net, path)
    for word in ("do not fit SwinUNETR", str(path), *says):
        assert word in str(caught.value)
    assert str(caught.value).endswith(".")
    assert fingerprint(net) == before


LACKS = {
    "encoder": ("layers2.0.blocks.1.attn.qkv.bias", None, "1 tensors are missing, such as swinViT.layers2"),
    "decoder": ("decoder2.conv_block.conv1.conv.weight", None, "1 tensors are missing, such as decoder2"),
    "unknown": (None, "prompt.weight", "1 tensors are unexpected, such as"),
}
ENCODER_ONLY = ("self-supervised", "pre-training script")


@pytest.mark.parametrize(
    ("kind", "drop", "add", "says"),
    [
        pytest.param(kind, *what, id=f"{kind}, {name}")
        for kind in WRITTEN
        for name, what in LACKS.items()
        if not (kind in ENCODER_ONLY and name == "decoder")
    ],
)
def test_no_layout_is_loaded_in_part(write, kind, drop, add, says):
    outputs = WRITTEN[kind][1]
    path = write(kind, swin(outputs, 1))
    content = torch.load(path, weights_only=False)
    state = next((content[key] for key in ("state_dict", "net") if key in content), content)
    for key in [key for key in state if drop and key.endswith(drop)]:
        del state[key]
    if add:
        prefix = "module." if all(key.startswith("module.") for key in state) else ""
        state[prefix + add] = torch.zeros(2)
    torch.save(content, path)
    net = swin(outputs, 2)
    before = fingerprint(net)
    with pytest.raises(SegraftError, match=r"do not fit SwinUNETR") as caught:
        load_checkpoint(net, path)
    assert says in str(caught.value)
    assert fingerprint(net) == before


def test_weights_of_a_swin_unetr_for_another_network(write):
    with pytest.raises(SegraftError, match=r"self-supervised.*network is UNet: name the network swin_unetr"):
        load_checkpoint(build("unet3d", in_channels=1, out_channels=1), write("self-supervised", swin()))


def test_another_number_of_outputs_without_labels(write):
    with pytest.raises(SegraftError, match=r"have another shape, such as out\.conv\.conv\.bias"):
        load_checkpoint(swin(2), write("fseft", swin(29, 1)))


def test_names_that_are_not_those_of_the_outputs(write):
    with pytest.raises(SegraftError, match=r"weights\.pt: 2 labels of the base are named, but it has 14 outputs"):
        load_checkpoint(swin(1), write("fine-tuned", swin(14, 1)), labels=["liver"], names=["liver", "spleen"])


def test_a_file_that_is_no_longer_what_it_was(write):
    with pytest.raises(SegraftError, match="has 14 outputs, none with the number 20"):
        load_checkpoint(swin(1), write("fine-tuned", swin(14, 1)), outputs=Outputs((20,)))


# --- what pickles may hold


class Mine:
    pass


@pytest.mark.parametrize(
    "beside",
    [
        Namespace(lr=1e-4, roi=(96, 96, 96), name="run"),
        np.float64(0.8),
        np.float32(0.8),
        np.int64(3),
        {"last_epoch": 3, "base_lrs": [1e-4]},
        torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict(),
        torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), 3).state_dict(),
        OrderedDict(a=1),
        None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_trainings_numbers_and_arguments_are_data(tmp_path, beside):
    net, other = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    torch.save({"state_dict": net.state_dict(), "beside": beside}, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert same(net, other)


def test_what_numpy_1_wrote_is_read(tmp_path):
    """It had the maker of scalars in another module."""
    net = nn.Conv2d(1, 1, 1)
    content = {"state_dict": net.state_dict(), "best_acc": np.float64(0.8)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pt").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "old.pt").write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    load_weights(net, tmp_path / "old.pt")


def test_other_objects_are_named_with_what_to_do(tmp_path):
    torch.save({"state_dict": nn.Linear(1, 1).state_dict(), "args": Mine()}, tmp_path / "w.pt")
    with pytest.raises(SegraftError, match=rf"\({Mine.__module__}\.Mine\), which could run code.*weights_only=False"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.pt")
