"""Minimal filtering against torch's convolutions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from segraft.adapters import AdapterSpec, choosing, graft, winograd
from segraft.adapters.choosing import cheapest
from segraft.adapters.operators import Convolution, operator_of
from segraft.adapters.products import HAS_ONEDNN
from segraft.adapters.stages import chain
from segraft.adapters.winograd import Filtering, dimension

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
        pytest.param((4, 512, 8, 8, 8), (512, 512, 3, 3, 3), (1, 1, 1), (1, 1, 1), 0, id="in-a-batch-enough"),
        pytest.param((1, 64, 48, 48, 48), (64, 64, 3, 3, 3), (2, 2, 2), (2, 2, 2), None, id="dilated"),
        pytest.param((1, 64, 48, 48, 48), (64, 64, 3, 3, 3), (0, 0, 0), (1, 1, 1), None, id="valid"),
        pytest.param((1, 64, 50, 50, 48), (64, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1), None, id="never-the-last"),
        pytest.param((1, 512, 4096), (512, 512, 3), (1,), (1,), None, id="1d"),
    ],
)
def test_where_it_pays(shape, weight, padding, dilation, expected):
    assert dimension(shape, weight, padding, dilation) == expected


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


def test_transforms_say_what_they_are_derived_from():
    """G is that of the points 0, ±1, ±2, ∞: of the polynomial w0 + w1·p + w2·p², each divided by a constant."""
    for row, point in zip(winograd.G, (0, 1, -1, 2, -2), strict=False):
        first = row[0]
        assert all(math.isclose(value, first * point**power) for power, value in enumerate(row))
    assert winograd.G[-1] == (0, 0, 1)
