"""The multi-view U-Net: its blocks as the paper describes them, shapes, parts, adapters."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from segraft.adapters import (
    PRESETS,
    AdapterSpec,
    adapter_tensors,
    fingerprint,
    graft,
    merge,
    parameter_table,
    require_gradients,
)
from segraft.adapters.selection import base_parameters
from segraft.errors import SegraftError
from segraft.networks import MultiViewUNet, build
from segraft.networks.registry import size_multiple, spatial_dims

BLOCKS = ["M1.1", "M1.2", "M1.3", "M1.4", "M1.5", "M2.1", "M2.2", "M3"]


def attribute(block: str) -> str:
    return block.replace(".", "_")


def parameters_of(w: int, inputs: int, outputs: int, dims: int) -> dict[str, int]:
    """By formula: a convolution from a to b channels has b·(a·k^d + 1) parameters."""

    def convolutions(*channels: int, kernel: int = 3) -> int:
        return sum(b * (a * kernel**dims + 1) for a, b in pairwise(channels))

    return {
        "M1.1": convolutions(inputs, w, w),
        "M1.2": convolutions(w, 2 * w, 2 * w),
        "M1.3": convolutions(2 * w, 4 * w, 4 * w),
        "M1.4": convolutions(4 * w + 2 * 2 * w, 2 * w, 2 * w),  # from below, and M2.2's input and output
        "M1.5": convolutions(2 * w + 2 * w, w, w),
        "M2.1": convolutions(w, w, w, w),
        "M2.2": convolutions(2 * w, 2 * w, 2 * w, 2 * w),
        "M3": convolutions(w, w, w) + convolutions(w, outputs, kernel=1),
    }


@pytest.mark.parametrize(
    ("width", "inputs", "outputs", "dims"), [(64, 1, 1, 2), (3, 2, 4, 2), (2, 1, 2, 3), (4, 1, 1, 1)]
)
def test_parameters_by_formula(width, inputs, outputs, dims):
    net = MultiViewUNet(inputs, outputs, width=width, spatial_dims=dims)
    expected = parameters_of(width, inputs, outputs, dims)
    found = {block: sum(p.numel() for p in getattr(net, attribute(block)).parameters()) for block in BLOCKS}
    assert found == expected
    assert parameter_table(net).total == sum(expected.values())  # no block but these has parameters: table 2's "All"


def test_the_sizes_of_the_defaults():
    """Worked out by hand for w = 64."""
    assert parameters_of(64, 1, 1, 2) == {
        "M1.1": 640 + 36_928,
        "M1.2": 73_856 + 147_584,
        "M1.3": 295_168 + 590_080,
        "M1.4": 589_952 + 147_584,
        "M1.5": 147_520 + 36_928,
        "M2.1": 3 * 36_928,
        "M2.2": 3 * 147_584,
        "M3": 2 * 36_928 + 65,
    }
    assert parameter_table(MultiViewUNet()).total == 2_693_697


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 3)])
def test_logits_lie_on_the_grid_of_the_image(dims, inputs, outputs):
    net = MultiViewUNet(inputs, outputs, width=2, spatial_dims=dims)
    sizes = (8, 12, 4)[:dims]
    logits = net(torch.rand(2, inputs, *sizes))
    assert logits.shape == (2, outputs, *sizes)
    assert size_multiple(net) == 4
    assert spatial_dims(net) == (3 if dims == 3 else 2)


@pytest.mark.parametrize("shape", [(1, 1, 8, 10), (1, 1, 7, 8), (1, 1, 8), (1, 1, 8, 8, 8), (1, 8, 8)])
def test_sizes_that_do_not_fit(shape):
    with pytest.raises(SegraftError, match="multiples of 4") as caught:
        MultiViewUNet(width=2)(torch.rand(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("arguments", [{"width": 0}, {"spatial_dims": 4}, {"spatial_dims": 0}, {"norm": "group"}])
def test_impossible_networks(arguments):
    with pytest.raises(SegraftError, match="give a positive width"):
        MultiViewUNet(**arguments)


def test_by_name():
    net = build("multi_view_unet", in_channels=2, out_channels=3, arguments={"width": 4})
    assert isinstance(net, MultiViewUNet)
    assert net.M1_1[0].weight.shape == (4, 2, 3, 3)
    assert net.M3[-1].weight.shape == (3, 4, 1, 1)
    with pytest.raises(SegraftError, match="refused its arguments"):
        build("multi_view_unet", in_channels=1, out_channels=1, arguments={"widths": [4, 8]})


# --- the blocks


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.startswith("M1")])
def test_m1_is_two_convolutions_with_relu(block):
    layers = list(getattr(MultiViewUNet(width=2), attribute(block)))
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
    assert {(layer.kernel_size, layer.dilation) for layer in layers[::2]} == {((3, 3), (1, 1))}


@pytest.mark.parametrize("block", ["M2.1", "M2.2"])
def test_m2_is_three_dilated_convolutions_beside_its_input(block):
    module = getattr(MultiViewUNet(width=2), attribute(block))
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3)] * 3
    assert [layer.dilation for layer in convolutions] == [(1, 1), (2, 2), (4, 4)]
    channels = convolutions[0].in_channels
    image = torch.rand(2, channels, 8, 8)
    given = image.clone()
    out = module(image)
    assert out.shape == (2, 2 * channels, 8, 8)
    assert torch.equal(out[:, :channels], given)
    seen = given
    for layer, dilation in zip(convolutions, (1, 2, 4), strict=True):
        seen = nn.functional.conv2d(seen, layer.weight, layer.bias, padding=dilation, dilation=dilation).relu()
    assert torch.equal(out[:, channels:], seen)


def test_m3_is_two_convolutions_and_one_of_a_single_pixel():
    convolutions = [layer for layer in MultiViewUNet(width=2).M3 if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3), (3, 3), (1, 1)]


@pytest.mark.parametrize("dims", [1, 2])
def test_m2_sees_exactly_as_far_as_its_dilations_say(dims):
    """1 + 2 + 4 = 7 pixels to each side, and every pixel in between."""
    module = MultiViewUNet(width=2, spatial_dims=dims).M2_1
    for value in module.parameters():
        nn.init.ones_(value)
    image = torch.ones(1, 2, *(33,) * dims, requires_grad=True)
    module(image)[(0, 2, *(16,) * dims)].backward()
    reached = image.grad[0, 0] != 0
    expected = torch.zeros_like(reached)
    expected[(slice(16 - 7, 16 + 8),) * dims] = True
    assert torch.equal(reached, expected)


def test_the_network_sees_as_far_as_its_blocks_say():
    """The farthest way is through the bottom or M2.2; both are worked out in pixels of the image."""
    net = MultiViewUNet(width=1, spatial_dims=1)
    net.pool = nn.AvgPool1d(2)  # of a maximum only one pixel would get a gradient
    for value in net.parameters():
        nn.init.ones_(value)
    image = torch.ones(1, 1, 256, requires_grad=True)
    place = 128
    net(image)[0, 0, place].backward()
    reached = torch.nonzero(image.grad[0, 0]).squeeze()

    def farthest(first: int, last: int) -> tuple[int, int]:
        """Pixels of the image behind those of the last layer, from M3 back to the image, by the widest way."""
        first, last = first - 4, last + 4  # M3 and M1.5
        straight = (first - 7 - 2, last + 7 + 2)  # M2.1 and M1.1
        first, last = first // 2 - 2, last // 2 + 2  # upsampling, M1.4
        middle = (first - 7, last + 7)  # M2.2
        bottom = ((first // 2 - 2) * 2, (last // 2 + 2) * 2 + 1)  # upsampling, M1.3, pooling
        first, last = min(middle[0], bottom[0]) - 2, max(middle[1], bottom[1]) + 2  # M1.2
        return min(straight[0], 2 * first - 2), max(straight[1], 2 * last + 1 + 2)  # pooling, M1.1

    assert (int(reached.min()), int(reached.max())) == farthest(place, place)


def test_the_forward_pass_written_out():
    """Base files hold weights for this very order: the skip before what comes up."""
    net, image, functional = MultiViewUNet(1, 2, width=2), torch.rand(1, 1, 8, 8), nn.functional
    fine = net.M1_1(image)
    coarse = net.M1_2(functional.max_pool2d(fine, 2))
    bottom = net.M1_3(functional.max_pool2d(coarse, 2))
    up = bottom.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    coarse = net.M1_4(torch.cat([net.M2_2(coarse), up], dim=1))
    up = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(net(image), net.M3(net.M1_5(torch.cat([net.M2_1(fine), up], dim=1))))


def test_every_block_reaches_the_output():
    net = MultiViewUNet(width=4)
    net(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for name, value in net.named_parameters() if name.endswith("weight"))


# --- parts


@pytest.mark.parametrize("names", [BLOCKS, ["encoder", "decoder", "head"]])
def test_parts_cover_every_parameter_once(names):
    net = MultiViewUNet(width=2)
    assert set(net.parts) == {*BLOCKS, "encoder", "bottleneck", "decoder", "head"}
    assert net.parts["bottleneck"] == net.parts["M1.3"]
    assert net.parts["head"] == net.parts["M3"]
    for name, *_ in base_parameters(net):
        assert sum(name.split(".")[0] in net.parts[part] for part in names) == 1, name


def trained(net: nn.Module, *places: str) -> set[str]:
    """Modules of which something is trained whole."""
    graft(net, AdapterSpec("none", train=places))
    return {key.split(".")[0] for key in adapter_tensors(net, "default")}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_trained_by_its_name(block):
    net = MultiViewUNet(width=2)
    assert trained(net, block) == {attribute(block)}
    whole = sum(value.numel() for value in getattr(MultiViewUNet(width=2), attribute(block)).parameters())
    assert parameter_table(net).trainable == whole


@pytest.mark.parametrize("kind", ["1", "2"])
def test_the_papers_expression_for_all_blocks_of_a_kind(kind):
    assert trained(MultiViewUNet(width=2), f"M{kind}.*") == {
        attribute(block) for block in BLOCKS if block.startswith(f"M{kind}")
    }


class Ambiguous(nn.Module):
    """Its part `M1.1` is, as an expression, the name of another module, and, as a name, of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.M1x1 = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
        self.M1 = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)])
        self.parts = {"M1.1": ("first",), "M1.1.weight": ("M1x1",)}


def test_the_name_of_a_part_goes_before_an_expression_and_a_module():
    assert trained(Ambiguous(), "M1.1") == {"first"}
    assert trained(Ambiguous(), "bias:M1.1") == {"first"}
    assert trained(Ambiguous(), "M1.1.weight") == {"M1x1"}
    assert trained(Ambiguous(), r"M1[.]1\.weight") == {"M1"}
    net = graft(Ambiguous(), AdapterSpec("lora", rank=1, targets="M1.1"))
    assert {key.split(".")[0] for key in adapter_tensors(net, "default")} == {"first"}


# --- adapters


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", [method for method in PRESETS if PRESETS[method].factorisation])
def test_every_method_grafts_and_receives_gradients(method, dims):
    net = MultiViewUNet(1, 2, width=4, spatial_dims=dims)
    image = torch.rand(2, 1, *(8,) * dims)
    mark, before = fingerprint(net), net(image).detach()
    graft(net, AdapterSpec(method, rank=2))
    out = net(image)
    torch.testing.assert_close(out, before, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    require_gradients(net)
    convolutions = {name for name, module in net.named_modules() if isinstance(module, CONVOLUTIONS[dims])}
    assert len(convolutions) == 5 * 2 + 2 * 3 + 3
    factors = adapter_tensors(net, "default")
    assert {key.rsplit(".weight", 1)[0] for key in factors} == convolutions
    with torch.no_grad():
        for value in factors.values():
            value.add_(0.02 * torch.randn(value.shape))
    assert fingerprint(net) == mark
    adapted = net.eval()(image)
    assert not torch.allclose(adapted, before)
    torch.testing.assert_close(merge(net)(image), adapted)


CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.parametrize(("norm", "kind"), [("instance", nn.InstanceNorm2d), ("batch", nn.BatchNorm2d)])
def test_each_small_convolution_is_normalised(norm, kind):
    net = MultiViewUNet(width=2, norm=norm)
    three = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(three) == sum(isinstance(module, kind) for module in net.modules()) == 18
    assert all(module.bias is None for module in three)
    assert net(torch.rand(2, 1, 8, 12)).shape == (2, 1, 8, 12)
