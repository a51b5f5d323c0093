"""Frozen weights in oneDNN's own order: the same numbers, and never those of a weight that was."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segraft.adapters import AdapterSpec, activate, graft, merge, ungraft
from segraft.adapters.execution import execution
from segraft.adapters.grafted import base_tensor, grafts_of
from segraft.adapters.packed import HAS_PACKING, Packed, pays_to_pack
from segraft.adapters.stock import operator_of

pytestmark = pytest.mark.skipif(not HAS_PACKING, reason="for oneDNN")

WIDE = (336, 352)
"""Channels of a 3×3 layer with just enough weights."""


def layer(**options):
    torch.manual_seed(0)
    return nn.Conv2d(*WIDE, 3, **{"padding": 1, **options})


def adapted(of, method="dora_c"):
    net = graft(nn.Sequential(of), AdapterSpec(method, rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in net.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return net


def image(*space, batch=1):
    return torch.randn(batch, WIDE[0], *space, generator=torch.Generator().manual_seed(2))


def step(net, x, way):
    """The output, and the gradients of the image and of all that is trained."""
    x = x.clone().requires_grad_()
    with execution(way):
        y = net(x)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found = torch.autograd.grad((y * weights).sum(), [x, *(p for p in net.parameters() if p.requires_grad)])
    return [y.detach(), *found]


def packed_of(net):
    derived = grafts_of(net[0]).derived.get("weight")
    return next((value for value in derived.values.values() if isinstance(value, Packed)), None) if derived else None


def is_packed(net):
    return packed_of(net) is not None


@pytest.mark.parametrize("method", ["conv_lora", "dora_c", "cp_dora"])
@pytest.mark.parametrize("options", [{}, {"padding": 0}, {"padding": 2}, {"bias": False}], ids=str)
def test_the_same_as_the_composed_weight(method, options):
    net, x = adapted(layer(**options), method), image(7, 9)
    for found, expected in zip(step(net, x, "parallel"), step(net, x, "composed"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert is_packed(net)


def test_a_packed_weight_serves_images_of_other_sizes():
    net = adapted(layer())
    step(net, image(8, 8), "parallel")
    packed = packed_of(net)
    for x in (image(5, 6), image(9, 9), image(4, 4, batch=3)):
        for found, expected in zip(step(net, x, "parallel"), step(net, x, "composed"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert packed_of(net) is packed


def test_a_weight_that_changes_is_packed_again(overwrite):
    net, x = adapted(layer()), image(6, 6)
    step(net, x, "parallel")
    base = base_tensor(net[0], "weight")
    new = torch.randn_like(base) * 0.02
    overwrite(net, new)
    for found, expected in zip(step(net, x, "parallel"), step(net, x, "composed"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("of", "shape", "pays"),
    [
        (layer(), (1, WIDE[0], 8, 8), True),
        (layer(), (1, WIDE[0], 64, 64), False),  # more activations than weights
        (layer(), (40, WIDE[0], 8, 8), False),
        (layer(stride=2), (1, WIDE[0], 8, 8), False),
        (layer(dilation=2, padding=2), (1, WIDE[0], 8, 8), False),
        (layer(groups=2), (1, WIDE[0], 8, 8), False),
        (layer(padding=3), (1, WIDE[0], 8, 8), False),  # without an adjoint
        (layer(padding=0), (1, WIDE[0], 2, 2), False),  # torch refuses it, in its words
        (nn.Conv2d(64, 64, 3), (1, 64, 4, 4), False),  # small
        (nn.ConvTranspose2d(*WIDE, 3), (1, WIDE[0], 8, 8), False),
        (nn.Conv3d(128, 320, 3), (1, 128, 3, 3, 3), False),
        (nn.Linear(1024, 1024), (1, 1024), False),
    ],
    ids=str,
)
def test_what_is_packed(of, shape, pays):
    x = torch.zeros(shape)
    operator, x = operator_of(of, x)
    assert pays_to_pack(operator, of.weight.detach(), x) is pays
    assert not pays_to_pack(operator, of.weight.detach().double(), x.double())
    with torch.inference_mode():
        assert not pays_to_pack(operator, of.weight.clone(), x)


@pytest.mark.parametrize("leave", [ungraft, merge, lambda net: activate(net, None)], ids=["ungraft", "merge", "switch"])
def test_a_packed_weight_is_let_go(leave):
    net = adapted(layer())
    step(net, image(6, 6), None)
    assert is_packed(net)
    packed = weakref.ref(packed_of(net).weight)
    assert not is_packed(copy.deepcopy(net))
    leave(net)
    gc.collect()
    assert packed() is None


@pytest.mark.parametrize("method", ["conv_lora", "dora_c"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_channel_that_is_overwritten_without_a_version_is_noticed(method, dim):
    net, x = adapted(layer(), method), image(6, 6)
    base = base_tensor(net[0], "weight")
    step(net, x, "parallel")
    base.data.select(dim, 101).zero_()
    for found, expected in zip(step(net, x, "parallel"), step(net, x, "composed"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_counts_operations_counts_them():
    net, x = adapted(layer()), image(6, 6).requires_grad_()
    with execution("parallel"):
        y = net(x)
    assert is_packed(net)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() >= 2 * 9 * WIDE[0] * WIDE[1] * 36


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_by_itself(memory_format):
    of, x = layer(), image(6, 5, batch=2).contiguous(memory_format=memory_format).requires_grad_()
    operator, _ = operator_of(of, x)
    weight, y = of.weight.detach(), of(x)
    g = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (of_x,) = torch.autograd.grad(y, x, g)
    packed = Packed.of(operator, weight, x.shape)
    for each in (g, g.contiguous(memory_format=torch.channels_last), torch.cat([g, g], 1)[:, : g.shape[1]]):
        found = packed.input_gradient(each)
        assert found.is_contiguous()
        torch.testing.assert_close(found, of_x, rtol=1e-5, atol=1e-4)
    assert pays_to_pack(operator, weight, x.detach()) is (memory_format == torch.contiguous_format)
