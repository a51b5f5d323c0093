"""Networks by name and by path, and the parts of those from elsewhere."""

import re
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import SegResNet
from torch import nn

from segraft.adapters import AdapterSpec, adapter_tensors, graft, parts_of, require_gradients
from segraft.adapters.selection import NAMED, base_parameters
from segraft.errors import SegraftError
from segraft.networks import NETWORKS, UNet, build
from segraft.networks.registry import FOREIGN_PARTS, size_multiple, spatial_dims, usual_names

SMALL = {
    "monai.networks.nets.segresnet.SegResNet": {"init_filters": 8},
    "monai.networks.nets.basic_unet.BasicUNet": {"features": (4, 4, 8, 8, 8, 4)},
    "monai.networks.nets.dynunet.DynUNet": {
        "spatial_dims": 3,
        "kernel_size": (3, 3, 3),
        "strides": (1, 2, 2),
        "upsample_kernel_size": (2, 2),
        "filters": (4, 8, 8),
    },
    "monai.networks.nets.swin_unetr.SwinUNETR": {"feature_size": 12},
    "monai.networks.nets.unetr.UNETR": {
        "img_size": (64, 32, 32),
        "feature_size": 4,
        "hidden_size": 24,
        "mlp_dim": 32,
        "num_heads": 2,
    },
}
SEGRESNET = "monai.networks.nets:SegResNet"


def nnunet_arguments(path: str) -> dict[str, object]:
    """A small network as nnU-Net's plans say it."""
    blocks = "n_conv_per_stage" if path.endswith("PlainConvUNet") else "n_blocks_per_stage"
    settings = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        blocks: [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin_kwargs": {"inplace": True},
    }
    classes = {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "dropout_op": None,
        "nonlin": "torch.nn.LeakyReLU",
    }
    return {"architecture": path, "settings": settings, "classes": classes}


def foreign(path: str) -> nn.Module:
    module, _, name = path.rpartition(".")
    if module.startswith("dynamic_network_architectures"):
        return build("nnunet", in_channels=1, out_channels=2, arguments=nnunet_arguments(path))
    return build(f"{module}:{name}", in_channels=1, out_channels=2, arguments=SMALL[path])


class NoArguments(nn.Module):
    """Takes no channels."""


@pytest.mark.parametrize("path", FOREIGN_PARTS)
def test_parts_of_foreign_networks_cover_every_parameter_once(path):
    net = foreign(path)
    assert parts_of(net) == FOREIGN_PARTS[path]
    prefixes = [prefix for part in parts_of(net).values() for prefix in part]
    assert len(set(prefixes)) == len(prefixes)
    assert set(prefixes) <= {name for name, _ in net.named_modules()}
    for name, *_ in base_parameters(net):
        assert sum(name.startswith(f"{prefix}.") for prefix in prefixes) == 1, name


@pytest.mark.parametrize("path", FOREIGN_PARTS)
@pytest.mark.parametrize("part", ["encoder", "decoder", "head"])
def test_parts_of_foreign_networks_can_be_trained(path, part):
    net = graft(foreign(path), AdapterSpec("none", train=part))
    trained = adapter_tensors(net, "default")
    assert trained
    assert all(name.startswith(tuple(f"{prefix}." for prefix in FOREIGN_PARTS[path][part])) for name in trained)


@pytest.mark.parametrize("path", FOREIGN_PARTS)
def test_foreign_networks_adapt_from_where_they_are(path):
    """The fresh adapter changes nothing, and every factor takes part in a training step."""
    net = foreign(path).eval().requires_grad_(requires_grad=False)
    image = torch.rand(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    before = net(image)
    graft(net, AdapterSpec("dora_c", rank=2))
    with torch.no_grad():
        torch.testing.assert_close(net(image), before, rtol=0, atol=1e-6)
    after = net(image)  # as in training, where sums are rounded otherwise
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    after.square().mean().backward()
    require_gradients(net)


def test_parts_of_foreign_networks_do_not_enter_the_state_dict():
    net = foreign("monai.networks.nets.basic_unet.BasicUNet")
    assert not any("parts" in key for key in net.state_dict())


def test_names():
    assert isinstance(build("unet", in_channels=1, out_channels=1), UNet)
    net = build("unet3d", in_channels=2, out_channels=3)
    assert net.encoder[0][0].weight.shape == (32, 2, 3, 3, 3)
    assert net.head.weight.shape == (3, 32, 1, 1, 1)
    assert isinstance(net.encoder[0][1], nn.InstanceNorm3d)


def test_arguments_win_over_the_entry_and_the_channels():
    net = build("unet3d", in_channels=2, out_channels=3, arguments={"widths": (4, 6), "norm": None, "out_channels": 5})
    assert len(net.encoder) == 1
    assert net.head.weight.shape == (5, 4, 1, 1, 1)
    assert NETWORKS["unet3d"].arguments["widths"] == (32, 64, 128, 256)


def test_by_path_equals_the_class_itself():
    net = build(SEGRESNET, in_channels=3, out_channels=2, arguments={"init_filters": 8})
    peer = SegResNet(in_channels=3, out_channels=2, init_filters=8)
    assert type(net) is SegResNet
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}


def test_channels_are_passed_only_where_they_are_taken():
    assert isinstance(build("torch.nn:Identity", in_channels=3, out_channels=2), nn.Identity)
    net = build("torch.nn:Conv2d", in_channels=3, out_channels=2, arguments={"kernel_size": 1})
    assert net.weight.shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ("unot", {}, "unknown network 'unot': choose unet, unet3d"),
        ("no_such_package.nets:Net", {}, "cannot be imported"),
        ("torch.nn:NoSuchLayer", {}, "cannot be imported"),
        ("torch.nn:", {}, "cannot be imported"),
        (":Conv2d", {}, "cannot be imported"),
        ("os:path", {}, "is no class of torch.nn.Module"),
        ("segraft.networks.unet:CONV", {}, "is no class of torch.nn.Module"),
        ("fractions:Fraction", {}, "is no class of torch.nn.Module"),
        (SEGRESNET, {"no_such_argument": 1}, "refused its arguments"),
        ("torch.nn:Conv2d", {"kernel_size": "wide"}, "refused its arguments"),
        ("unet", {"depth": 3}, "refused its arguments"),
        ("unet", {"widths": (8,)}, "at least two positive widths"),
    ],
)
def test_what_cannot_be_built(network, arguments, message):
    with pytest.raises(SegraftError, match=re.escape(message)) as caught:
        build(network, in_channels=1, out_channels=1, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_only_module_classes_are_called(tmp_path):
    """A file may come from anywhere, and names the network that it is built on."""
    with pytest.raises(SegraftError, match="is no class of torch"):
        build("os:mkdir", in_channels=1, out_channels=1, arguments={"path": str(tmp_path / "made")})
    assert not (tmp_path / "made").exists()


def test_a_missing_optional_package_is_one_sentence(monkeypatch):
    class Needy(nn.Module):
        def __init__(self) -> None:
            raise ImportError("from einops (No module named 'einops').\n\nOriginal traceback:\n…")

    monkeypatch.setattr(nn, "Needy", Needy, raising=False)
    with pytest.raises(SegraftError, match="needs a package that is not there") as caught:
        build("torch.nn:Needy", in_channels=1, out_channels=1)
    assert "einops" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("net", "dims", "multiple"),
    [
        (UNet(widths=(2, 3)), 2, 2),
        (UNet(widths=(2, 3, 4), spatial_dims=3), 3, 4),
        (nn.Conv3d(1, 1, 3), 3, 32),
        (nn.ConvTranspose3d(1, 1, 2), 3, 32),
        (nn.Sequential(nn.Conv2d(1, 1, 3)), 2, 32),
    ],
    ids=["unet", "unet3d", "conv3d", "transposed3d", "conv2d"],
)
def test_dimensions_and_size_multiple(net, dims, multiple):
    assert spatial_dims(net) == dims
    assert size_multiple(net) == multiple


@pytest.mark.parametrize("path", [path for path in FOREIGN_PARTS if path.endswith(("SegResNet", "BasicUNet"))])
def test_the_default_size_multiple_suits_networks_from_elsewhere(path):
    net = foreign(path).eval()
    size = size_multiple(net)
    with torch.inference_mode():
        assert net(torch.zeros(1, 1, size, size, size)).shape == (1, 2, size, size, size)


def test_own_parts_of_a_network_are_kept(monkeypatch):
    """A class that names its parts wins over the table."""
    path = f"{NoArguments.__module__}.{NoArguments.__qualname__}"
    monkeypatch.setitem(NAMED["parts"], path, {"head": ("theirs",)})
    monkeypatch.setattr(nn, "Own", NoArguments, raising=False)
    assert parts_of(build("torch.nn:Own", in_channels=1, out_channels=1)) == {"head": ("theirs",)}
    monkeypatch.setattr(NoArguments, "parts", {"head": ("ours",)}, raising=False)
    assert parts_of(build("torch.nn:Own", in_channels=1, out_channels=1)) == {"head": ("ours",)}


def test_an_object_with_parts_of_another_kind_has_none():
    assert parts_of(SimpleNamespace(parts=["head"])) == {}


@pytest.mark.parametrize(
    ("network", "arguments", "expected"),
    [
        ("monai.networks.nets:SegResNet", {"in_chans": 2, "init_filters": 8}, {"in_chans": 2, "init_filters": 8}),
        ("unet", {"num_classes": 2}, {"num_classes": 2}),  # it takes out_channels: the constructor refuses the other
        ("monai.networks.nets:ViT", {"num_classes": 2, "in_channels": 1}, {"out_channels": 2, "in_channels": 1}),
    ],
)
def test_the_usual_names_of_arguments(network, arguments, expected):
    assert usual_names(network, arguments) == expected
