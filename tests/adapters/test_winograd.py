"""Minimal filtering against torch's convolutions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from segraft.adapters import AdapterSpec, choosing, graft, winograd
from segraft.adapters.choosing import cheapest
from segraft.adapters.convolution import Convolution
from segraft.adapters.execution import execution
from segraft.adapters.functions import FrozenLayer
from segraft.adapters.products import HAS_ONEDNN
from segraft.adapters.stages import chain
from segraft.adapters.stock import operator_of
from segraft.adapters.winograd import ENOUGH_FORWARD, Filtering, dimension

CASES = {
    "2d": ((8, 5), 0, (3, 3), (1, 1), (1, 1)),
    "2d-one-tile": ((4, 6), 0, (3, 3), (1, 1), (1, 1)),
    "2d-kernel-3x5": ((12, 7), 0, (3, 5), (1, 2), (1, 1)),
    "2d-dilated-beside": ((8, 9), 0, (3, 3), (1, 2), (1, 2)),
    "2d-valid-beside": ((8, 9), 0, (3, 3), (1, 0), (1, 1)),
    "3d": ((8, 5, 6), 0, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "3d-second": ((5, 12, 6), 1, (1, 3, 3), (0, 1, 1), (1, 1, 1)),
    "3d-second-of-27": ((6, 8, 5), 1, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
}


def problem(name, batch=2, channels=(3, 5), dtype=torch.float64):
    space, d, kernel, padding, dilation = CASES[name]
    torch.manual_seed(0)
    i, o = channels
    x = torch.randn(batch, i, *space, dtype=dtype, requires_grad=True)
    weight = torch.randn(o, i, *kernel, dtype=dtype, requires_grad=True)
    convolve = functional.conv2d if len(space) == 2 else functional.conv3d
    y = convolve(x, weight, padding=padding, dilation=dilation)
    return x, weight, y, Filtering(d, padding, dilation)


@pytest.mark.parametrize("slab", [1, 400, 1 << 20])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_convolution_and_its_gradients(name, batch, slab, monkeypatch):
    monkeypatch.setattr(winograd, "SLAB", slab)
    x, weight, y, filtering = problem(name, batch)
    g = torch.randn_like(y)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), g)
    with torch.no_grad():
        torch.testing.assert_close(filtering.convolution(x, weight), y.detach())
        bias = torch.randn(weight.shape[0], dtype=torch.float64)
        biased = y.detach() + bias.view(-1, *(1 for _ in y.shape[2:]))
        torch.testing.assert_close(filtering.convolution(x, weight, bias), biased)
        torch.testing.assert_close(filtering.input_gradient(g, weight, x.shape), of_x)
        both = filtering.gradients(g, x, weight)
        alone = filtering.gradients(g, x, weight, of_x=False)
    torch.testing.assert_close(both, (of_x, of_weight))
    assert alone[0] is None
    torch.testing.assert_close(alone[1], of_weight)
    assert both[0].is_contiguous()
    assert both[1].is_contiguous()


def test_what_is_read_is_left_as_it_was():
    x, weight, y, filtering = problem("3d")
    g = torch.randn_like(y)
    before = [t.detach().clone() for t in (g, x, weight)]
    with torch.no_grad():
        filtering.gradients(g, x, weight)
        filtering.convolution(x, weight)
    assert all(torch.equal(t, kept) for t, kept in zip((g, x, weight), before, strict=True))


@pytest.mark.parametrize(
    ("shape", "weight", "padding", "dilation", "expected"),
    [
        pytest.param((1, 64, 48, 48, 48), (64, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1), 0, id="3d"),
        pytest.param((1, 256, 64, 64), (256, 256, 3, 3), (1, 1), (1, 1), 0, id="2d"),
        pytest.param((1, 64, 10, 48, 48), (64, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1), 1, id="first-not-in-tiles"),
        pytest.param((1, 256, 9, 48, 48), (256, 256, 1, 3, 3), (0, 1, 1), (1, 1, 1), 1, id="anisotropic"),
        pytest.param((1, 64, 256, 256), (64, 64, 3, 3), (1, 1), (1, 1), None, id="too-few-channels"),
        pytest.param((1, 64, 48, 48, 48), (60, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="not-in-vectors"),
        pytest.param((1, 512, 8, 8, 8), (512, 512, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="too-few-positions"),
        pytest.param((1, 192, 8, 8, 8), (192, 192, 3, 3, 3), (1, 1, 1), (1, 1, 1), 0, id="few-but-left-to-torch"),
        pytest.param((1, 192, 8, 8, 8), (192, 384, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="few-and-not-left"),
        pytest.param((1, 256, 8, 8, 8), (256, 256, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="too-few-for-this-weight"),
        pytest.param((4, 256, 8, 8, 8), (256, 256, 3, 3, 3), (1, 1, 1), (1, 1, 1), 0, id="in-a-batch-enough"),
        pytest.param(
            (1, 512, 12, 12, 12), (512, 512, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="too-few-for-its-weight"
        ),
        pytest.param((1, 512, 16, 16, 16), (512, 512, 3, 3, 3), (1, 1, 1), (1, 1, 1), 0, id="enough-for-its-weight"),
        pytest.param((1, 64, 48, 48, 48), (64, 64, 3, 3, 3), (1, 1, 1), (2, 2, 2), None, id="dilated"),
        pytest.param((1, 64, 48, 48, 48), (64, 64, 3, 3, 3), (0, 0, 0), (1, 1, 1), None, id="valid"),
        pytest.param((1, 64, 50, 50, 48), (64, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="never-the-last"),
        pytest.param((1, 512, 4096), (512, 512, 3), (1,), (1,), None, id="1d"),
    ],
)
def test_where_it_pays(shape, weight, padding, dilation, expected):
    assert dimension(shape, weight, padding, dilation) == expected


@pytest.mark.parametrize(
    ("shape", "weight", "expected"),
    [
        pytest.param((1, 256, 64, 64), (256, 256, 3, 3), 0, id="2d-wide"),
        pytest.param((1, 128, 128, 128), (128, 128, 3, 3), None, id="2d-narrower"),
        pytest.param((1, 64, 48, 48, 48), (64, 64, 3, 3, 3), 0, id="3d"),
    ],
)
def test_where_a_forward_pass_pays(shape, weight, expected):
    ones = (1,) * (len(shape) - 2)
    assert dimension(shape, weight, ones, ones, ENOUGH_FORWARD) == expected


SHAPES = {
    "adapted": AdapterSpec("dora_c", rank=2, exclude=["1"]),
    "plain": AdapterSpec("conv_lora", rank=2, exclude=["1"]),
    "frozen": AdapterSpec("lora_c", rank=2, exclude=["0"]),
}


@pytest.mark.skipif(not HAS_ONEDNN, reason="filtering pays where oneDNN computes the convolutions")
@pytest.mark.parametrize("way", ["weight", "chain", "parallel"])
@pytest.mark.parametrize("name", SHAPES)
def test_training_filters_and_evaluation_does_not(name, way, monkeypatch):
    """What is trained is next to what is evaluated, bias and magnitude included; that has torch's bits."""
    used, plain = [], Filtering.convolution
    monkeypatch.setattr(Filtering, "convolution", lambda *a, **k: (used.append(0), plain(*a, **k))[1])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(32, 64, 3, padding=1), nn.Conv3d(64, 32, 3, padding=1))
    graft(net, SHAPES[name])
    for value in net.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn_like(value) / 10)
    x = torch.randn(1, 32, 12, 12, 12, requires_grad=True)
    with execution(way):
        y = net(x)
    assert len(used) == 2
    with torch.no_grad():
        evaluated = net(x)
        again = nn.functional.conv3d(x, net[0].weight, net[0].bias, padding=1)
        again = nn.functional.conv3d(again, net[1].weight, net[1].bias, padding=1)
    assert len(used) == 2
    torch.testing.assert_close(evaluated, again, rtol=0, atol=0)
    assert error(y.detach(), evaluated.double()) < 2e-6


@pytest.mark.parametrize("shape", [(1, 16, 12, 12, 12), (1, 32, 1024, 2, 1)], ids=["channels", "too-small"])
def test_what_does_not_fit_is_refused_in_torchs_words(shape):
    net, x = nn.Sequential(nn.Conv3d(32, 64, 3, padding=(1, 0, 1))), torch.zeros(shape)
    with pytest.raises(RuntimeError) as expected:
        net(x)
    graft(net, AdapterSpec("lora_c", rank=2))
    with pytest.raises(RuntimeError) as found:
        net(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.skipif(not HAS_ONEDNN, reason="filtering pays where oneDNN computes the convolutions")
def test_operators_filter_and_stay_exact(monkeypatch):
    """In float32: next to float64's result as the sums of any fast convolution are."""
    used = []
    for name in ("input_gradient", "gradients", "convolution"):
        plain = getattr(Filtering, name)
        monkeypatch.setattr(Filtering, name, lambda *a, _f=plain, _n=name, **k: (used.append(_n), _f(*a, **k))[1])
    torch.manual_seed(0)
    x, g = torch.randn(1, 32, 12, 12, 12), torch.randn(1, 64, 12, 12, 12)
    weight = torch.randn(64, 32, 3, 3, 3) / 30
    operator = Convolution((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y = functional.conv3d(*exact, padding=1)
    exact_x, exact_weight = torch.autograd.grad(y, exact, g.double())
    of_x, of_weight = operator.gradients(g, x, weight, of_x=True)
    found = {
        exact_x: (of_x, operator.input_gradient(g, weight, x)),
        exact_weight: (of_weight, operator.weight_gradient(g, x, weight)),
        y.detach(): (operator.through(x, weight),),
    }
    assert used == ["gradients", "input_gradient", "gradients", "convolution"]
    torchs = [t.clone().requires_grad_() for t in (x, weight)]
    plain_y = functional.conv3d(*torchs, padding=1)
    plain = (*torch.autograd.grad(plain_y, torchs, g), plain_y.detach())
    for (right, several), torch_found in zip(found.items(), plain, strict=True):
        for each in several:
            assert error(each, right) < min(8 * error(torch_found, right), 2e-6)


def error(found, right):
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.double(), id="float64"),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last_3d), id="channels-last"),
    ],
)
def test_operators_leave_others_to_torch(change):
    operator = Convolution((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3)
    assert operator._filtering(change(torch.zeros(1, 64, 12, 12, 12)), torch.zeros(64, 64, 3, 3, 3)) is None


@pytest.mark.parametrize(("fast", "expected"), [(True, "weight"), (False, "chain")])
def test_the_chooser_counts_what_is_saved(fast, expected, monkeypatch):
    """At a large rank the chain has hardly less to do than the whole weight's gradient."""
    monkeypatch.setattr(choosing, "HAS_ONEDNN", fast)
    choosing._cheapest.cache_clear()
    net = graft(nn.Sequential(nn.Conv3d(128, 64, 3, padding=1)), AdapterSpec("lora_c", rank=64))
    edit, x = net[0].segraft["default"]["weight"], torch.zeros(1).expand(1, 128, 48, 48, 48)
    operator, _ = operator_of(net[0], x)
    ways = cheapest(operator, chain(edit.contraction), 64, x, tuple(net[0].weight.shape), magnitude=False)
    choosing._cheapest.cache_clear()
    assert ways[0] == expected


@pytest.mark.skipif(not HAS_ONEDNN, reason="filtering pays where oneDNN computes the convolutions")
@pytest.mark.parametrize(
    ("operator", "size", "weight"),
    [
        pytest.param(Convolution((2,) * 3, (1,) * 3, (1,) * 3, (0,) * 3), 24, (64, 32, 3, 3, 3), id="stride"),
        pytest.param(Convolution((1,) * 3, (2,) * 3, (2,) * 3, (0,) * 3), 12, (64, 32, 3, 3, 3), id="dilation"),
        pytest.param(Convolution((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3, groups=2), 12, (64, 32, 3, 3, 3), id="groups"),
        pytest.param(
            Convolution((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3, transposed=True), 12, (32, 64, 3, 3, 3), id="t"
        ),
        pytest.param(Convolution((2,) * 3, (1,) * 3, (1,) * 3, (0,) * 3), 4, (256, 256, 3, 3, 3), id="few-strided"),
    ],
)
def test_what_neither_filters_nor_scatters(operator, size, weight):
    """In float32, at sizes that would be served."""
    torch.manual_seed(0)
    channels = weight[0] if operator.transposed else weight[1] * operator.groups
    x = torch.randn(1, channels, *(size,) * 3, requires_grad=True)
    w = (torch.randn(weight) / 30).requires_grad_()
    y = operator.forward(x, w, None)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, w), g)
    with torch.no_grad():
        found = operator.gradients(g, x.detach(), w.detach(), of_x=True)
        torch.testing.assert_close(operator.input_gradient(g, w.detach(), x.detach()), expected[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


SERVED = {"filtered": ((1, 32, 12, 12, 12), (64, 32, 3, 3, 3)), "scattered": ((1, 256, 2, 2, 2), (256, 256, 3, 3, 3))}


@pytest.mark.parametrize("name", SERVED)
def test_many_gradients_at_once_are_left_to_torch(name):
    """As torch.autograd's vectorised Jacobians ask for: it knows no such functions."""
    shape, weight = SERVED[name]
    operator = Convolution((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3)
    x = torch.randn(shape, requires_grad=True)
    y = FrozenLayer.apply(operator, x, None, torch.randn(weight))
    several = torch.randn(3, *y.shape)
    (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    for g, each in zip(several, found, strict=True):
        (alone,) = torch.autograd.grad(y, x, g, retain_graph=True)
        torch.testing.assert_close(each, alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("way", ["weight", "chain", "parallel"])
def test_a_backward_pass_within_autocast_keeps_its_precision(name, way):
    shape, weight = SERVED[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(weight[1], weight[0], 3, padding=1))
    x = torch.randn(shape, requires_grad=True)
    graft(net, AdapterSpec("dora_c", rank=2))
    trained, found = [p for p in net.parameters() if p.requires_grad], []
    for within in (False, True):
        with execution(way):
            y = net(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            found.append(torch.autograd.grad(y, [x, *trained], torch.ones_like(y)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_transforms_say_what_they_are_derived_from():
    """G is that of the points 0, ±1, ±2, ∞: of the polynomial w0 + w1·p + w2·p², each divided by a constant."""
    for row, point in zip(winograd.G, (0, 1, -1, 2, -2), strict=False):
        first = row[0]
        assert all(math.isclose(value, first * point**power) for power, value in enumerate(row))
    assert winograd.G[-1] == (0, 0, 1)
