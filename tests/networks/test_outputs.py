"""Parts of networks that others built level inside level, and outputs on top of networks whose own are fixed."""

import pytest
import torch
from monai.networks.nets import UNETR, AttentionUnet, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet
from torch import nn

from segraft.adapters import AdapterSpec, graft, require_gradients
from segraft.adapters.selection import modules_by_name, parts_of
from segraft.networks import build, load_checkpoint
from segraft.networks.heads import find_head
from segraft.networks.outputs import PATH, exchangeable
from segraft.training.strategies import STRATEGIES

SIZES = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
LEVELS = {"channels": (4, 8, 16, 32), "strides": (2, 2, 2)}
NETWORKS = {
    "unet": lambda: UNet(**SIZES, **LEVELS),
    "residual unet": lambda: UNet(**SIZES, **LEVELS, num_res_units=2),
    "attention unet": lambda: AttentionUnet(**SIZES, **LEVELS),
    "dynunet": lambda: DynUNet(
        **SIZES, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 8, 16)
    ),
    "segresnet": lambda: SegResNet(**SIZES, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    "basic unet": lambda: BasicUNet(**SIZES, features=(4, 4, 8, 8, 8, 4)),
    "unetr": lambda: UNETR(1, 3, img_size=32, feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2),
    "swin": lambda: SwinUNETR(in_channels=1, out_channels=3, feature_size=12),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_cover_each_network_once(name):
    """Every parameter lies in one of encoder, decoder and head, and the head in front of the outputs is one of them."""
    net = NETWORKS[name]()
    parts = parts_of(net)
    assert set(parts) == {"encoder", "decoder", "head"}
    names = modules_by_name(net)
    for module, known in names.items():
        if module._parameters:
            inside = [
                part
                for part, prefixes in parts.items()
                if any(each == prefix or each.startswith(f"{prefix}.") for each in known for prefix in prefixes)
            ]
            assert len(inside) == 1, (known, inside)
    for prefixes in parts.values():
        for prefix in prefixes:
            net.get_submodule(prefix)


@pytest.mark.parametrize("name", ["residual unet", "attention unet", "dynunet"])
def test_what_decoder_and_head_train_is_behind_the_encoder(name):
    """No gradient of the encoder's is needed for them: where the encoder ends, activations are as good as an input."""
    net = graft(NETWORKS[name](), AdapterSpec("none", train=STRATEGIES["decoder"]))
    net(torch.rand(1, 1, 32, 32, 32)).sum().backward()
    trained = {key for key, value in net.named_parameters() if value.requires_grad}
    assert trained
    assert all(value.grad is not None for value in net.parameters() if value.requires_grad)
    prefixes = parts_of(net)["encoder"]
    assert not [key for key in trained if any(key.startswith(f"{prefix}.") for prefix in prefixes)]


@pytest.mark.parametrize("name", ["unet", "residual unet", "attention unet"])
def test_nested_networks_adapt_from_where_they_are(name):
    net = NETWORKS[name]().eval().requires_grad_(requires_grad=False)
    image = torch.rand(1, 1, 16, 16, 16)
    before = net(image)
    graft(net, AdapterSpec("dora_c", rank=2))
    after = net(image)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    after.square().mean().backward()
    require_gradients(net)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("unet", False), ("residual unet", False), ("attention unet", True), ("dynunet", True), ("segresnet", True)],
)
def test_exchangeable(name, expected):
    net = NETWORKS[name]()
    head = find_head(net)
    arguments = {
        "unet": LEVELS,
        "residual unet": LEVELS | {"num_res_units": 2},
        "attention unet": LEVELS,
        "dynunet": {
            "kernel_size": (3,) * 3,
            "strides": (1, 2, 2),
            "upsample_kernel_size": (2, 2),
            "filters": (4, 8, 8),
        },
        "segresnet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
    }[name]
    path = f"{type(net).__module__}:{type(net).__name__}"
    assert exchangeable(path, {**SIZES, **arguments}, () if head is None else head.keys) is expected


def on_top(outputs: int, labels: int) -> nn.Module:
    arguments = {"spatial_dims": 3, **LEVELS, "num_res_units": 1}
    inner = {"network": "monai.networks.nets:UNet", "outputs": outputs, "arguments": arguments}
    return build(PATH, in_channels=1, out_channels=labels, arguments=inner)


def test_outputs_on_top(tmp_path):
    """Weights of the network alone load, and labels take its outputs by their names, less the background's."""
    inner = UNet(**SIZES, **LEVELS, num_res_units=1).eval()
    torch.save({f"module.{key}": value for key, value in inner.state_dict().items()}, tmp_path / "w.pt")
    net = on_top(3, 2)
    loaded = load_checkpoint(net, tmp_path / "w.pt", labels=("b", "new"), names=("background", "a", "b"))
    assert loaded.outputs is not None
    assert (loaded.outputs.rows, loaded.outputs.background) == ((2, None), 0)
    image = torch.rand(1, 1, 16, 16, 16)
    found, plain = net.eval()(image), inner(image)
    torch.testing.assert_close(found[:, 0], plain[:, 2] - plain[:, 0], rtol=1e-4, atol=1e-5)
    same = on_top(3, 3)
    assert load_checkpoint(same, tmp_path / "w.pt").outputs is None
    torch.testing.assert_close(same.eval()(image), plain)
    torch.save(same.state_dict(), tmp_path / "whole.pt")  # and its own weights load as any
    load_checkpoint(on_top(3, 3), tmp_path / "whole.pt")
    assert parts_of(net)["head"] == ("net.model.2", "head")
