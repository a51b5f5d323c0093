"""An exported folder gives, in PEFT itself, the outputs that Segraft gives."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterSpec
from segraft.errors import SegraftError
from segraft.jobs import export
from segraft.networks import load_base


def in_peft(base: nn.Module, folder, image):
    """What PEFT computes with the folder on the base."""
    net = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return net(image)


def check(made, folder):
    """Export, and hold PEFT against Segraft; the notes."""
    result = export(made.path, folder, format="peft")
    expected = made.logits()
    close = 1e-5 * max(1, expected.abs().max().item())
    torch.testing.assert_close(in_peft(made.plain(), folder, made.image), expected, rtol=0, atol=close)
    with torch.no_grad():
        assert (made.plain()(made.image) - expected).abs().max() > 100 * close
    return " ".join(result.notes)


METHODS = {
    "lora": AdapterSpec("lora", rank=3),
    "rs_lora": AdapterSpec("rs_lora", rank=3, alpha=5),
    "dora": AdapterSpec("dora", rank=3, alpha=1.5),
    "rs_dora": AdapterSpec("conv_dora", rank=3, scale="alpha/sqrt(r)"),
    "lora_c": AdapterSpec("lora_c", rank=2),
    "lora_c above what is spread out": AdapterSpec("lora_c", rank=40),
    "dora_c": AdapterSpec("dora_c", rank=2),
    "cp_dora": AdapterSpec("cp_dora", rank=3),
    "tucker": AdapterSpec("lora", rank=3, factorisation="tucker"),
    "arena": AdapterSpec("arena", rank=3),
    "ada_lora": AdapterSpec("ada_lora", rank=3),
    "gated dora_c": AdapterSpec("dora_c", rank=3, gate="uniform", control="proximal"),
    "ranks by layer": AdapterSpec("lora", rank=3, ranks={"encoder": 5, "head": 1}),
    "ranks by layer and one alpha": AdapterSpec("rs_lora", rank=3, alpha=4, ranks={"encoder": 5}),
    "trained biases": AdapterSpec("lora", rank=2, bias="train"),
    "biases with factors": AdapterSpec("dora", rank=2, bias="low_rank"),
    "all biases": AdapterSpec("lora", rank=2, train="bias:.*"),
    "a head": AdapterSpec("dora_c", rank=2, train="head"),
    "factors on a trained head": AdapterSpec("lora", rank=2, train="head", targets=("head", "encoder")),
    "no factors": AdapterSpec("none", train="head"),
    "magnitudes by the first dimension": AdapterSpec("dora_c", rank=2, magnitude_dim=0),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods(make, tmp_path, method):
    check(make("unet", METHODS[method]), tmp_path / "out")


@pytest.mark.parametrize(
    ("network", "spec", "says"),
    [
        ("unet3d", AdapterSpec("dora_c", rank=2, train="norm:.*"), "ConvTranspose3d: upsampling.0"),
        ("multi_view_unet", AdapterSpec("dora_c", rank=2), "have no dilation: M2_1.2"),
        ("segresnet", AdapterSpec("conv_lora", rank=2), ""),
        ("swin_unetr", AdapterSpec("arena", rank=2, train="head"), "gates are multiplied into PEFT's B"),
        ("swin_unetr", AdapterSpec("dora", rank=2, targets=("query", "value"), train="norm:encoder"), ""),
        ("unetr", AdapterSpec("dora_c", rank=2, targets=("key", "head", "decoder")), "ConvTranspose3d"),
    ],
    ids=["unet3d", "multi_view_unet", "segresnet", "swin-arena", "swin-rows-dora", "unetr"],
)
def test_networks(make, tmp_path, network, spec, says):
    assert says in check(make(network, spec), tmp_path / "out")


def test_a_network_of_nnunet(make, tmp_path):
    """It holds each convolution as `conv` and in `all_modules`, and calls the latter; PEFT would replace the former."""
    pytest.importorskip("dynamic_network_architectures")
    made = make(f"{__name__}:OfNnUNet", AdapterSpec("dora_c", rank=2))
    assert "holds it under several names, of which PEFT would replace one" in check(made, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".lora")[0] for key in tensors if "lora" in key} == {
        f"base_model.model.net.decoder.seg_layers.{level}" for level in (0, 1)
    }


class OfNnUNet(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        from dynamic_network_architectures.architectures.unet import PlainConvUNet

        norm = {"eps": 1e-5, "affine": True}
        self.net = PlainConvUNet(
            *(in_channels, 3, (4, 8, 16), nn.Conv3d, 3, [1, 2, 2], [2, 2, 2], out_channels, [2, 2], True),
            *(nn.InstanceNorm3d, norm, None, None, nn.LeakyReLU, {"inplace": True}),
        )

    def forward(self, image):
        return self.net(image)


def test_a_channel_of_zeros(make, tmp_path):
    """PEFT's DoRA divides by the channel's norm, and gives NaN; Segraft leaves it zero."""

    def dead(net):
        with torch.no_grad():
            net.encoder[0][2].segraft["default"]["weight"].m[1] = 0

    made = make("unet", AdapterSpec("dora", rank=2, train="head"), change=dead)
    assert "a channel of it is zero throughout" in check(made, tmp_path / "out")


def test_a_rank_above_the_weights_own_is_not_written(make, tmp_path):
    """Three directions of LoRA-C at three kernel positions are nine of LoRA, and the weight has four channels."""
    check(make("unet", AdapterSpec("dora_c", rank=3, targets="encoder")), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.encoder.0.2.lora_A.weight"].shape == (4, 4, 3, 3)


def test_batch_norms_and_their_statistics(make, tmp_path):
    made = make("unet", AdapterSpec("dora_c", rank=2), norm="batch")
    check(made, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert {"encoder.0.1", "encoder.0.4"} <= set(saved)


def test_parameters_of_modules_that_hold_layers(make, tmp_path):
    """A window attention's table of positions: its module is saved whole, with the layers in it."""
    made = make("swin_unetr", AdapterSpec("lora", rank=2, train=r".*relative_position_bias_table"))
    check(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "swinViT.layers1.0.blocks.0.attn" in config["modules_to_save"]
    assert not [name for name in config["target_modules"] if ".attn." in name]
    assert [name for name in config["target_modules"] if ".mlp." in name]


class Awkward(nn.Module):
    """Layers that PEFT mistakes: under two names, of names that end in others, read past their factors, grouped."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding="same")
        self.twice = nn.Conv2d(4, 4, 1)
        self.all_modules = nn.Sequential(self.twice, nn.ReLU())
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.more = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "pre_last": nn.Conv2d(4, 4, 1)})
        self.last = nn.Conv2d(4, out_channels, 1)

    def forward(self, image):
        x = self.reflected(self.grouped(self.all_modules(self.conv(image))))
        x = self.more["pre_last"](self.more["conv"](x))
        tokens = x.flatten(2).mT
        return self.last(x + self.attention(tokens, tokens, tokens)[0].mT.reshape(x.shape))


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec("dora", rank=2),
        AdapterSpec("lora", rank=2, targets="conv", train=r"last\..*"),
        AdapterSpec("lora", rank=2, targets=("conv", "twice")),
        AdapterSpec("lora", rank=2, targets=("conv", "attention")),
        AdapterSpec("lora", rank=2, targets=("conv", r"more\.pre_last"), train=r"last\..*"),
    ],
    ids=["all", "name-ends", "two-names", "attention", "factors-under-a-name-end"],
)
def test_layers_that_peft_mistakes(make, tmp_path, spec):
    made = make(f"{__name__}:Awkward", spec, patch=(8, 8, 1))
    check(made, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.conv.lora_A.weight" in tensors
    assert "base_model.model.more.conv.lora_A.weight" not in tensors or spec.targets is None


def test_a_tensor_of_the_network_itself_is_refused(make, tmp_path):
    made = make(f"{__name__}:Rooted", AdapterSpec("lora", rank=2, train="scale"), patch=(8, 8, 1))
    with pytest.raises(SegraftError, match="PEFT adapts modules, and scale is a tensor of the network itself"):
        export(made.path, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_a_name_that_peft_finds_in_its_own_modules_is_refused(make, tmp_path):
    """`out` is the end of `lora_dropout`, and PEFT goes by the ends of names."""
    made = make(f"{__name__}:Outward", AdapterSpec("lora", rank=2, train=r"out\..*"), patch=(8, 8, 1))
    with pytest.raises(SegraftError, match="would take lora_dropout, a module of its own, for out"):
        export(made.path, tmp_path / "out", format="peft")


class Outward(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 1)
        self.out = nn.Conv2d(4, out_channels, 1)

    def forward(self, image):
        return self.out(self.conv(image))


class Rooted(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, image):
        return self.conv(image) * self.scale


def test_an_adapter_without_low_rank_in_peft_is_refused(make, tmp_path):
    made = make("unet", AdapterSpec("lora", rank=2, targets=r"upsampling\..*"))
    with pytest.raises(SegraftError, match=r"no layer that is of low rank in PEFT \(PEFT has no factors for ConvT"):
        export(made.path, tmp_path / "out", format="peft")


def test_an_adapter_per_channel_is_refused(make, tmp_path):
    made = make("unet_channelwise", AdapterSpec("lora", rank=2, channels=2), channels=2, widths=[4, 8], spatial_dims=3)
    with pytest.raises(SegraftError, match="factors of its own for each of 2 channels"):
        export(made.path, tmp_path / "out", format="peft")


def test_directions_out_of_use_are_left_out(make, tmp_path):
    def close(net):
        with torch.no_grad():
            net.encoder[0][0].segraft["default"]["weight"].v[1:] = 0
            net.encoder[0][2].segraft["default"]["weight"].v.zero_()

    check(make("unet", AdapterSpec("arena", rank=3), change=close), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.encoder.0.0.lora_A.weight"].shape[0] == 1
    assert "base_model.model.encoder.0.2.lora_A.weight" not in tensors
    assert tensors["base_model.model.bottleneck.0.lora_A.weight"].shape[0] == 3


@pytest.mark.parametrize("network", ["unet", "swin_unetr"])
def test_the_readme_loads_both_without_segraft_or_with(make, tmp_path, network):
    """Its code is run as it stands, in the folder; a network of MONAI then needs no Segraft."""
    made = make(network, AdapterSpec("dora", rank=2))
    export(made.path, tmp_path / "out", format="peft")
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    if network == "swin_unetr":
        code = "import sys; sys.modules['segraft'] = None\n" + code
    torch.save((made.image, made.logits()), tmp_path / "expected.pt")
    code += (
        "\nimport torch\nimage, expected = torch.load('../expected.pt')\n"
        "with torch.no_grad():\n    torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert adapters.fingerprint(made.plain()) in text


def test_a_base_with_other_outputs_is_written_beside(make, tmp_path):
    """A task that takes one of the base's two outputs: the base's file alone is not what the adapter is on."""
    made = make("unet", AdapterSpec("dora", rank=2))
    from segraft.jobs.bases import with_outputs
    from segraft.networks.heads import Outputs

    net, info = load_base(made.base)
    outputs = Outputs((1, None))
    net = with_outputs(net, info, outputs)
    adapters.graft(net, AdapterSpec("dora", rank=2, train="head"))
    record = dict(adapters.read_header(made.path).record)
    record["base"] |= outputs.record()
    adapters.save(net, made.path, record=record)
    adapters.ungraft(net)
    result = export(made.path, tmp_path / "out", format="peft")
    assert (tmp_path / "out" / "base_model.safetensors") in result.files
    written = load_file(tmp_path / "out" / "base_model.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in net.state_dict().items())
    assert "load_file('base_model.safetensors')" in (tmp_path / "out" / "README.md").read_text()


def test_peft_warns_of_nothing_and_knows_every_setting(make, tmp_path):
    """Warnings are errors here, such as that of PEFT for settings it does not know."""
    made = make("unet", AdapterSpec("dora_c", rank=2, train="head"))
    export(made.path, tmp_path / "out", format="peft")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert config.use_dora
    assert config.peft_type == "LORA"
