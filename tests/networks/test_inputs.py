"""First layers for other channels: which they take, how new ones start, in which layers, and when they cannot be."""

import pytest
import torch
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, graft
from segraft.errors import SegraftError
from segraft.jobs.bases import build_from_start, with_inputs
from segraft.networks.inputs import STARTS, Inputs, input_weights, match_inputs, take_inputs, unseen

NETWORKS = {
    "unet": ("unet", {"widths": [4, 8]}, {"encoder.0.0.weight"}, 2),
    "multi_view_unet": ("multi_view_unet", {"width": 4}, {"M1_1.0.weight"}, 2),
    "SegResNet": (
        "monai.networks.nets:SegResNet",
        {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
        {"convInit.conv.weight"},
        3,
    ),
    "DynUNet": (
        "monai.networks.nets:DynUNet",
        {
            "spatial_dims": 3,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [4, 8, 8],
            "res_block": True,
        },
        {
            "input_block.conv1.conv.weight",
            "input_block.conv3.conv.weight",
            "skip_layers.downsample.conv1.conv.weight",
            "skip_layers.downsample.conv3.conv.weight",
        },
        3,
    ),
    "BasicUNet": (
        "monai.networks.nets:BasicUNet",
        {"features": [4, 4, 4, 8, 8, 4]},
        {"conv_0.conv_0.conv.weight"},
        3,
    ),
    "UNet with residuals": (
        "monai.networks.nets:UNet",
        {"spatial_dims": 3, "channels": [8, 8, 16], "strides": [2, 2], "num_res_units": 1},
        {"model.0.conv.unit0.conv.weight", "model.0.residual.weight"},
        3,
    ),
    "UNETR": (
        "monai.networks.nets:UNETR",
        {"img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2},
        {
            "vit.patch_embedding.patch_embeddings.weight",
            "encoder1.layer.conv1.conv.weight",
            "encoder1.layer.conv3.conv.weight",
        },
        3,
    ),
    "SwinUNETR": (
        "swin_unetr",
        {"feature_size": 12},
        {
            "swinViT.patch_embed.proj.weight",
            "encoder1.layer.conv1.conv.weight",
            "encoder1.layer.conv3.conv.weight",
        },
        3,
    ),
}
"""Name or path, arguments, the weights that see the image (where they are few), dimensions."""


def base_of(name: str, channels: int) -> tuple[nn.Module, str, dict[str, object]]:
    network, arguments, _, _ = NETWORKS[name]
    arguments = {**arguments, "in_channels": channels, "out_channels": 2}
    return build_from_start(network, arguments).eval(), network, arguments


def image(name: str, channels: int) -> Tensor:
    sizes = (64 if name == "SwinUNETR" else 32, *(32,) * (NETWORKS[name][3] - 1))
    return torch.randn(1, channels, *sizes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_channel_adds(name):
    """Kept channels go on, a new one that starts at zero changes nothing, and shares add up to the whole."""
    net, network, arguments = base_of(name, 2)
    scan = image(name, 2)
    with torch.inference_mode():
        expected = net(scan)
        more, keys = with_inputs(net, network, arguments, Inputs((1, None, 0), "zero"))
        three = torch.cat([scan[:, 1:], image(name, 1) * 5, scan[:, :1]], 1)
        torch.testing.assert_close(more.eval()(three), expected, rtol=1e-4, atol=1e-4)
        only = scan[:, :1].expand(-1, 2, *scan.shape[2:])
        fresh, _ = with_inputs(net, network, arguments, Inputs((None,) * 5, "share"))
        same = fresh.eval()(scan[:, :1].expand(-1, 5, *scan.shape[2:]))
        torch.testing.assert_close(same, net(only), rtol=1e-4, atol=1e-4)
        turned, _ = with_inputs(net, network, arguments, Inputs((1, 0), "share"))
        torch.testing.assert_close(turned.eval()(scan.flip(1)), expected, rtol=1e-4, atol=1e-4)
    assert set(keys) == NETWORKS[name][2]


def test_weights_before_1_5_go_on_as_they_were_trained():
    from segraft.networks.swin import merge_as_before, merges_as_before

    net, network, arguments = base_of("SwinUNETR", 1)
    merge_as_before(net)
    two, _ = with_inputs(net, network, arguments, Inputs((0, None), "zero"))
    assert merges_as_before(two)
    scan = image("SwinUNETR", 1)
    with torch.inference_mode():
        torch.testing.assert_close(two.eval()(scan.repeat(1, 2, 1, 1, 1)), net(scan), rtol=1e-4, atol=1e-4)


# --- starts, by hand

WEIGHT = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 60.0]])  # two outputs, three channels
A, B, C = ([1.0, 10.0], [2.0, 20.0], [6.0, 60.0])


@pytest.mark.parametrize(
    ("rows", "start", "expected"),
    [
        ((2, 0), "share", [C, A]),
        ((0, None, 2), "share", [A, B, C]),  # what the second had
        ((None, None, 2), "share", [[1.5, 15.0], [1.5, 15.0], C]),
        ((0, 1, 2, None), "share", [A, B, C, [0.0, 0.0]]),
        ((None,), "share", [[9.0, 90.0]]),  # timm's sum
        ((None,) * 6, "share", [[1.5, 15.0]] * 6),
        ((0, None), "zero", [A, [0.0, 0.0]]),
        ((0, 1, 2, None), "mean", [A, B, C, [2.25, 22.5]]),  # 9 / 4
        ((None, None), "mean", [[4.5, 45.0]] * 2),
    ],
)
def test_starts(rows, start, expected):
    assert Inputs(rows, start).taken_from(WEIGHT).T.tolist() == expected


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rows", [(1, None), (None, None, 0, 1, 2), (2,)])
def test_channels_that_stay_keep_their_weights_to_the_bit(rows, start):
    weight = torch.randn(4, 3, 3, 3, 3)
    made = Inputs(rows, start).taken_from(weight)
    assert made.shape == (4, len(rows), 3, 3, 3)
    for place, row in enumerate(rows):
        assert row is None or torch.equal(made[:, place], weight[:, row])


# --- names


@pytest.mark.parametrize(
    ("channels", "names", "count", "expected"),
    [
        (["flair", "t1"], ["flair", "t1"], 2, None),
        (["t1", "flair"], ["flair", "t1"], 2, (1, 0)),
        (["t1"], ["flair", "t1"], 2, (1,)),
        (["flair", "t1", "t2"], ["flair", "t1"], 2, (0, 1, None)),
        (["adc", "dwi"], ["flair", "t1"], 2, (None, None)),
        (["t1", "t2"], [], 2, None),  # of unknown names, as many
        (["t1", "t2"], [], 1, (None, None)),
        (["t1", "t2"], [""], 1, (None, None)),
        (["t1", "t2"], ["t2"], 1, (None, 0)),
        ([""], ["t1", "t2"], 2, (None,)),
    ],
)
def test_which_channels_are_taken(channels, names, count, expected):
    found = match_inputs(channels, names, count, "share")
    assert found == (None if expected is None else Inputs(expected, "share"))


@pytest.mark.parametrize(
    ("names", "start", "says"),
    [
        (["flair"], "share", "1 channels of the base are named, but it has 2"),
        (["t1", "t1"], "share", "are the same"),
        (["adc", "dwi"], "zero", "share or mean"),
        (["flair", "t1"], "ones", "choose share, zero, mean"),
    ],
)
def test_names_that_do_not_tell(names, start, says):
    with pytest.raises(SegraftError, match=says):
        match_inputs(["t1", "t2"], names, 2, start)


def test_the_record_gives_them_back():
    inputs = Inputs((1, None), "mean")
    assert Inputs.of({"path": "base", **inputs.record()}) == inputs
    assert Inputs.of({"path": "base"}) is None


# --- networks that cannot be given other channels


class Network(nn.Module):
    def __init__(self, layers: str, channels: int) -> None:
        super().__init__()
        make = {
            "grouped": lambda: nn.Conv2d(channels, 4 * channels, 3, groups=channels),
            "norm first": lambda: nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, 4, 3)),
            "joined": lambda: nn.Conv2d(5 + channels, 4, 3),
            "linear": lambda: nn.Linear(8 * channels, 4),
            "transposed": lambda: nn.ConvTranspose2d(channels, 4, 3),
            "fixed": lambda: nn.Conv2d(2, 4, 3),
            "some": lambda: nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(channels))),
        }
        self.first = make[layers]()


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("grouped", "'first.bias' depends on their number otherwise"),
        ("norm first", "'first.0.weight'"),
        ("joined", "'first.weight'"),
        ("linear", "'first.weight'"),
        ("transposed", "'first.weight'"),
        ("fixed", "no layer of it depends on their number"),
        ("some", "is there for some numbers of channels alone"),
    ],
)
def test_layers_whose_channels_cannot_be_told(layers, says):
    keys = r"Network cannot be given other channels, as .*"
    with pytest.raises(SegraftError, match=keys + says.replace("first.bias", r"first\.(bias|weight)")):
        input_weights(Network(layers, 2), Network(layers, 3), (2, 3))


def test_a_patch_embedding_of_whole_patches():
    net, network, arguments = base_of("UNETR", 1)
    arguments["proj_type"] = "perceptron"
    net = build_from_start(network, arguments)
    with pytest.raises(SegraftError, match=r"patch_embeddings.1.weight' depends on their number otherwise"):
        with_inputs(net, network, arguments, Inputs((0, None), "zero"))


def test_networks_that_encode_channels_one_by_one():
    arguments = {"in_channels": 2, "out_channels": 1, "widths": [4, 8]}
    net = build_from_start("unet_channelwise", arguments)
    with pytest.raises(SegraftError, match="encodes its channels one by one"):
        with_inputs(net, "unet_channelwise", arguments, Inputs((0,), "share"))


def test_a_layer_under_several_names():
    class Shared(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(channels, 2, 1)
            self.all = nn.ModuleList([self.first])

    net, rebuilt = Shared(1), Shared(2)
    keys = input_weights(net, rebuilt, (1, 2))
    assert set(keys) == {"first.weight", "all.0.weight"}
    take_inputs(net, rebuilt, keys, Inputs((0, None), "mean"))
    assert torch.equal(rebuilt.first.weight[:, 1], net.first.weight[:, 0] / 2)
    assert rebuilt.all[0] is rebuilt.first


# --- what trains a channel


@pytest.mark.parametrize(
    ("spec", "still"),
    [
        (AdapterSpec("lora", rank=2), []),
        (AdapterSpec("dora_c", rank=2), []),
        (AdapterSpec("cp_lora", rank=2), []),
        (AdapterSpec("none", train="encoder"), []),
        (AdapterSpec("lora", rank=2, exclude="encoder"), [1]),
        (AdapterSpec("none", train="bias:.*"), [1]),
        (AdapterSpec("none", train="decoder"), [1]),
    ],
    ids=str,
)
def test_channels_that_nothing_sees(spec, still):
    base, network, arguments = base_of("unet", 1)
    net, keys = with_inputs(base, network, arguments, Inputs((0, None), "zero"))
    assert len(keys) == 1
    graft(net, spec)
    assert unseen(net, keys[0], (1,)) == still
    with torch.no_grad():  # as it may be called
        assert unseen(net, keys[0], (1,)) == still


def test_channels_that_start_with_something_are_seen():
    base, network, arguments = base_of("unet", 1)
    net, keys = with_inputs(base, network, arguments, Inputs((0, None), "mean"))
    graft(net, AdapterSpec("none", train="head"))
    assert unseen(net, keys[0], (1,)) == []
