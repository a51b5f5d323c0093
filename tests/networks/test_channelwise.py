"""Networks whose encoder sees one channel at a time: folding, fusing, missing channels, the paper's sizes."""

import copy

import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR
from torch import Tensor, nn

from segraft.adapters import (
    AdapterSpec,
    adapter_tensors,
    fingerprint,
    graft,
    load,
    parts_of,
    require_gradients,
    routed,
    save,
)
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
from segraft.adapters.selection import base_parameters
from segraft.errors import SegraftError
from segraft.networks import UNet, build, load_base, load_checkpoint, save_base
from segraft.networks.registry import outline, size_multiple
from segraft.training.recomputation import recomputing

C = 3
VIT = {"hidden_size": 24, "mlp_dim": 32, "num_heads": 2, "num_layers": 4, "feature_size": 4}
NETS = {
    "unetr_channelwise": (VIT | {"img_size": (32, 16, 16), "patch_size": 8}, (32, 16, 16)),
    "swin_unetr_channelwise": ({"feature_size": 12, "depths": (2, 1, 1, 1), "window_size": 2}, (64, 32, 32)),
    "unet_channelwise": ({"widths": (4, 6, 8), "norm": "instance", "spatial_dims": 3}, (8, 16, 8)),
}
EVERY = pytest.mark.parametrize("name", NETS)
SMALL = pytest.mark.parametrize("name", ["unetr_channelwise", "unet_channelwise"])


def make(name: str, **more) -> nn.Module:
    torch.manual_seed(0)
    arguments, _ = NETS[name]
    return build(name, in_channels=C, out_channels=2, arguments=arguments | more)


def adapted(name: str, **more) -> nn.Module:
    net = graft(make(name, **more), AdapterSpec("rs_lora", rank=2, channels=C, train=("decoder", "head")))
    with torch.no_grad():
        for key, value in adapter_tensors(net, "default").items():
            if "_channel" in key:
                value.add_(0.2 * torch.randn_like(value))
    return net


def image(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, C, *NETS[name][1], generator=torch.Generator().manual_seed(1))


def by_switching(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of a network whose encoder is given one channel after the other."""
    module, name = {"vit": (net, "vit"), "swinViT": (net, "swinViT")}.get(parts_of(net)["encoder"][0], (net, "encoder"))
    if name == "encoder":
        return _unet_by_switching(net, x)
    whole = getattr(module, name)

    class OneByOne(nn.Module):
        def forward(self, volumes: Tensor, *others: bool) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
            outputs = []
            for channel, own in enumerate(volumes.chunk(C)):
                with routed([channel]):
                    outputs.append(whole(own, *others))
            if name == "vit":
                lasts, states = zip(*outputs, strict=True)
                return torch.cat(lasts), [torch.cat(each) for each in zip(*states, strict=True)]
            return [torch.cat(each) for each in zip(*outputs, strict=True)]

    module._modules[name] = OneByOne()
    y = net(x)
    module._modules[name] = whole
    return y


def _unet_by_switching(net: nn.Module, x: Tensor) -> Tensor:
    by_channel = []
    for channel in range(C):
        states, state = [], x[:, channel : channel + 1]
        with routed([channel]):
            for level in net.encoder:
                states.append(level(state))
                state = net.pool(states[-1])
            states.append(net.bottleneck(state))
        by_channel.append(states)
    *skips, up = (
        fuse(torch.cat(states, 1)) for fuse, states in zip(net.fusion, zip(*by_channel, strict=True), strict=True)
    )
    for widen, level, skip in zip(net.upsampling, net.decoder, reversed(skips), strict=True):
        up = level(torch.cat([skip, widen(up)], 1))
    return net.head(up)


@EVERY
def test_one_pass_is_dynamic_switching(name):
    net, x = adapted(name), image(name, 1 if "swin" in name else 2)
    found, gradients = [], []
    for run in (net, lambda x: by_switching(net, x)):
        net.zero_grad()
        y = run(x)
        y.square().mean().backward()
        require_gradients(net)
        found.append(y.detach())
        gradients.append({key: value.grad.clone() for key, value in adapter_tensors(net, "default").items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    for key, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], value, rtol=1e-3, atol=1e-5)
    assert any("_channel2" in key for key in gradients[0])


@EVERY
def test_what_it_says_of_itself(name):
    net = make(name)
    assert (net.image_channels, net.takes_missing_channels) == (C, True)
    assert set(parts_of(net)) >= {"encoder", "fusion", "decoder", "head"}
    assert set(net.parts["fusion"]) < set(net.parts["decoder"])
    for full, *_ in base_parameters(net):
        owners = {part for part, prefixes in net.parts.items() if full.split(".")[0] in prefixes}
        assert owners - {"bottleneck"} in ({"encoder"}, {"fusion", "decoder"}, {"decoder"}, {"head"}), full
    multiple = size_multiple(net)
    assert all(size % multiple == 0 for size in NETS[name][1])
    assert net.eval()(image(name)).shape == (2, 2, *NETS[name][1])


@EVERY
def test_adapters_are_on_the_encoder_alone(name):
    net = make(name)
    before = net.eval()(image(name)).detach()
    graft(net, AdapterSpec("rs_lora", rank=2, channels=C))
    torch.testing.assert_close(net(image(name)), before, rtol=0, atol=1e-6)
    prefixes = net.parts["encoder"]
    held = [layer for layer, module in grafted_layers(net) if grafts_of(module).channel_edits()]
    assert held
    assert all(layer.startswith(tuple(f"{prefix}." for prefix in prefixes)) for layer in held)
    with pytest.raises(SegraftError, match=f"takes images of {C} channels"):
        graft(make(name), AdapterSpec("rs_lora", channels=C + 1))


@SMALL
def test_arena_per_channel(name):
    """The projections that the network names, or all of its encoder where it names none."""
    net = graft(make(name), AdapterSpec("arena", rank=2, channels=C))
    net(image(name)).square().mean().backward()
    require_gradients(net)
    held = {layer for layer, module in grafted_layers(net) if grafts_of(module).channel_edits()}
    assert all(layer.endswith("qkv") for layer in held) == (name == "unetr_channelwise")


@EVERY
def test_missing_channels_count_for_nothing(name):
    """NaN in a channel: as zero states and a zero skip, whatever else is in the batch."""
    net, x = adapted(name).eval(), image(name)
    x[0, 1] = torch.nan
    y = net(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:1], net(x[:1]), rtol=1e-4, atol=1e-5)  # there the whole batch lacks it
    torch.testing.assert_close(y[1:], net(x[1:]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y[:1], net(torch.nan_to_num(x[:1])))  # an encoded plane of zeros is something else
    y.square().mean().backward()
    require_gradients(net)
    assert all(torch.isfinite(value.grad).all() for value in net.parameters() if value.grad is not None)


@SMALL
def test_channels_that_the_whole_batch_lacks_are_not_encoded(name):
    net, x, seen = adapted(name), image(name), []
    first = next(module for layer, module in grafted_layers(net) if layer.startswith(net.parts["encoder"][0]))
    first.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    x[:, [0, 2]] = torch.nan
    net(x).square().mean().backward()
    assert seen == [2]
    for key, value in adapter_tensors(net, "default").items():
        assert value.grad is not None, key
        if "_channel" in key:
            assert bool(value.grad.abs().sum() > 0) == ("_channel1" in key), key


@SMALL
def test_what_is_no_missing_channel(name):
    net, x = make(name), image(name)
    x[1, 2].view(-1)[:-1] = torch.nan
    with pytest.raises(SegraftError, match="channel 2 of image 1 of the batch is NaN in part"):
        net(x)
    x = image(name)
    x[1] = torch.nan
    with pytest.raises(SegraftError, match="has no channel at all"):
        net(x)
    with pytest.raises(SegraftError, match=rf"takes \[batch, {C} channels, sizes\]"):
        net(x[:, :2])


@SMALL
def test_channel_dropout(name):
    """In training alone, never all channels, and of those that are there; the seed decides."""
    net, x = make(name, channel_dropout=0.7), image(name, 1).repeat(64, 1, 1, 1, 1)
    x[::2, 0] = torch.nan
    assert net.eval().folded(x).present.equal(~x[:, :, 0, 0, 0].isnan())
    net.train()
    torch.manual_seed(1)
    present = net.folded(x).present
    torch.manual_seed(1)
    assert net.folded(x).present.equal(present)
    assert not net.folded(x).present.equal(present)
    assert present.any(1).all()
    assert not present[::2, 0].any()
    counts = torch.cat([net.folded(x[1::2]).present for _ in range(64)])
    share, p = counts.float().mean().item(), 0.7
    assert share == pytest.approx((1 - p) + p**3 / 3, abs=0.02)  # one of three stays where all would go
    folded = net.folded(x)
    assert (folded.image[~folded.present] == 0).all()


@SMALL
def test_without_dropout_no_random_number_is_drawn(name):
    net, state = make(name).train(), torch.get_rng_state()
    net(image(name))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [{"channel_dropout": 1.0}, {"channel_dropout": -0.1}])
@SMALL
def test_impossible_dropout(name, arguments):
    with pytest.raises(SegraftError, match="channel_dropout is"):
        make(name, **arguments)


@SMALL
def test_recomputed(name):
    """Outside of `routed`, whole encoders or what is in them."""
    net, x = adapted(name), image(name)
    net(x).square().mean().backward()
    wanted = {key: value.grad.clone() for key, value in adapter_tensors(net, "default").items()}
    for places in (
        ["encoder"],
        [r"vit\.blocks\.\d+"] if name == "unetr_channelwise" else [r"encoder\.0", "bottleneck"],
    ):
        net.zero_grad()
        with recomputing(net, places):
            net(x).square().mean().backward()
        for key, value in adapter_tensors(net, "default").items():
            assert torch.equal(value.grad, wanted[key]), key


def test_networks_that_recompute_by_themselves():
    """As MONAI's SwinUNETR does when it is asked to."""
    x, found = image("swin_unetr_channelwise", 1), []
    for recompute in (False, True):
        net = adapted("swin_unetr_channelwise", use_checkpoint=recompute)
        net(x).square().mean().backward()
        found.append({key: value.grad for key, value in adapter_tensors(net, "default").items()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled():
    torch.compiler.reset()
    net, x = adapted("unet_channelwise"), image("unet_channelwise")
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@SMALL
def test_files(name, tmp_path):
    arguments, _ = NETS[name]
    net = make(name)
    save_base(net, tmp_path, network=name, arguments=arguments | {"in_channels": C, "out_channels": 2})
    again, _ = load_base(tmp_path)
    assert fingerprint(again) == fingerprint(net)
    trained = adapted(name)
    save(trained, tmp_path / "adapter.safetensors")
    load(again, tmp_path / "adapter.safetensors")
    assert torch.equal(again.eval()(image(name)), trained.eval()(image(name)))


def test_the_papers_sizes():
    net = outline("unetr_channelwise", in_channels=4, out_channels=3, arguments={"img_size": (128, 128, 48)})
    encoder = sum(value.numel() for value in net.vit.parameters())
    assert encoder == 88_322_304
    assert sum(value.numel() for value in net.parameters()) - encoder == 54_577_347
    assert net.taps == (3, 6, 9, 12)
    assert next(net.parameters()).is_meta


def like_monai() -> tuple[nn.Module, nn.Module]:
    """MONAI's UNETR, and ours of one channel with the same weights and maps that fuse nothing."""
    arguments = {"img_size": (32, 16, 48), "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
    theirs = UNETR(in_channels=1, out_channels=2, **arguments)
    raw = {"taps": (4, 7, 10, 12), "tap_norm": "none"}
    ours = build("unetr_channelwise", in_channels=1, out_channels=2, arguments=arguments | raw)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert {key.split(".")[0] for key in missing} == {"fusion"}
    assert unexpected == []
    with torch.no_grad():
        for fuse in ours.fusion:
            fuse.weight.copy_(torch.eye(24)), fuse.bias.zero_()
    return theirs, ours


def test_with_one_channel_it_is_monais_unetr():
    theirs, ours = like_monai()
    x = torch.randn(2, 1, 32, 16, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def test_with_one_channel_it_is_monais_swin_unetr(tmp_path):
    theirs = SwinUNETR(in_channels=1, out_channels=2, feature_size=12).eval()
    ours = build("swin_unetr_channelwise", in_channels=1, out_channels=2, arguments={"feature_size": 12}).eval()
    torch.save(theirs.state_dict(), tmp_path / "swin.pt")
    assert load_checkpoint(ours, tmp_path / "swin.pt").kept == {"fusion": 10}
    with torch.no_grad():
        for level, fuse in enumerate(ours.fusion):
            fuse.weight.copy_(torch.eye(12 * 2**level)[..., None, None, None]), fuse.bias.zero_()
    x = torch.randn(1, 1, 64, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_with_one_channel_it_is_the_unet(tmp_path):
    theirs, ours = (
        UNet(widths=(4, 6, 8)),
        build("unet_channelwise", in_channels=1, out_channels=1, arguments={"widths": (4, 6, 8)}),
    )
    torch.save(theirs.state_dict(), tmp_path / "unet.pt")
    assert load_checkpoint(ours, tmp_path / "unet.pt").kept == {"fusion": 6}
    with torch.no_grad():
        for width, fuse in zip((4, 6, 8), ours.fusion, strict=True):
            fuse.weight.copy_(torch.eye(width)[..., None, None]), fuse.bias.zero_()
    x = torch.randn(2, 1, 8, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_norms_that_nothing_reaches_are_no_parameters():
    """They keep their names, so that weights of MONAI's own load."""
    _, ours = like_monai()
    unused = [key for key in ours.state_dict() if "norm_cross_attn" in key]
    assert len(unused) == 2 * 12
    assert not set(unused) & dict(ours.named_parameters()).keys()
    copy.deepcopy(ours)(torch.randn(1, 1, 32, 16, 48)).sum().backward()
    require_gradients(ours.requires_grad_(requires_grad=False))


def test_another_size_than_its_own():
    net = make("unetr_channelwise")
    with pytest.raises(SegraftError, match=r"exactly 32×16×16 voxels, .* given 32×32×16: choose --patch 32 16 16"):
        net(torch.zeros(1, C, 32, 32, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 12}, "power of two of at least 4"),
        ({"patch_size": 2}, "power of two of at least 4"),
        ({"img_size": (32, 20, 16)}, "multiples of the patch_size, 8"),
        ({"img_size": (32,)}, "two or three sizes"),
        ({"taps": (1, 2)}, "must be 3 growing numbers of blocks, the last 4"),
        ({"taps": (2, 1, 4)}, "growing"),
        ({"num_layers": 2}, "growing"),
    ],
)
def test_impossible_unetrs(arguments, message):
    with pytest.raises(SegraftError, match=message):
        make("unetr_channelwise", **arguments)


def test_slices():
    net = make("unetr_channelwise", img_size=(32, 16))
    assert net(torch.randn(2, C, 32, 16)).shape == (2, 2, 32, 16)
    assert make("unet_channelwise", spatial_dims=2)(torch.randn(1, C, 8, 8)).shape == (1, 2, 8, 8)


def test_batch_norms_are_refused():
    with pytest.raises(SegraftError, match="whose statistics would mix the channels"):
        make("unet_channelwise", norm="batch")
    with pytest.raises(SegraftError, match="in_channels is 0"):
        build("unet_channelwise", in_channels=0, out_channels=1)
    with pytest.raises(SegraftError, match="multiples of 4"):
        make("unet_channelwise")(torch.zeros(1, C, 8, 8, 6))
