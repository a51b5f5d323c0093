"""The arithmetic of layers against torch's own, and which way it takes."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.drawn import CONVOLVE, FORMATS, TRANSPOSED, draw
from torch import nn

from segraft.adapters import convolution, disjoint
from segraft.adapters.convolution import Convolution
from segraft.adapters.execution import execution
from segraft.adapters.linear import Dense

CHANNELS = [(1, 4), (4, 1), (40, 40), (2, 35), (35, 2), (3, 3)]
EITHER_SIDE_OF_A_VECTOR = [(20, 3), (3, 20), (16, 8), (20, 20), (3, 3)]


@pytest.mark.parametrize("fast", [False, True])
@settings(max_examples=150)
@given(st.data())
def test_every_gradient_of_a_convolution(fast, data):
    """With few channels on either side and with many, in every geometry and both memory formats."""
    dims = data.draw(st.integers(1, 3))

    def each(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride = each(1, 3), data.draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    dilation = data.draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    padding = tuple(data.draw(st.integers(0, d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True))
    transposed = data.draw(st.booleans())
    apart = transposed and data.draw(st.booleans())  # patches of the output neither overlap nor leave gaps
    if apart:
        stride, dilation, padding = kernel, (1,) * dims, (0,) * dims
    sizes = tuple(
        max(1, n + d * (k - 1) - 2 * p)
        for n, k, d, p in zip(each(1, 5), kernel, dilation, padding, strict=True)
    )  # fmt: skip
    i, o = data.draw(st.sampled_from(EITHER_SIDE_OF_A_VECTOR if fast else CHANNELS))
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    if apart:
        extra = (0,) * dims
    if transposed:
        padding = tuple(min(p, d * (k - 1) // 2) for p, k, d in zip(padding, kernel, dilation, strict=True))
    operator = Convolution(stride, padding, dilation, extra if transposed else (0,) * dims, transposed)
    x = draw(2, i, *sizes).requires_grad_()
    weight = draw(*((i, o) if transposed else (o, i)), *kernel, seed=1).requires_grad_()
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    if transposed:
        y = TRANSPOSED[dims](x, weight, output_padding=extra, **options)
    else:
        y = CONVOLVE[dims](x, weight, **options)
    g, bias = draw(*y.shape, seed=2), draw(o, seed=3)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), g, retain_graph=True)
    y = y.detach()
    sums, products = torch.einsum("bo...->o", g), torch.einsum("bo...,bo...->o", g, y)
    with pytest.MonkeyPatch.context() as patch:
        if fast:
            patch.setattr(convolution, "is_fast", as_if_fast)
        for layout in (torch.contiguous_format, FORMATS[dims + 2]):
            entering, leaving, w = (each.detach().contiguous(memory_format=layout) for each in (x, g, weight))
            torch.testing.assert_close(operator.forward(entering, w, None), y)
            torch.testing.assert_close(operator.through(entering, w), y)
            torch.testing.assert_close(operator.input_gradient(leaving, w, entering), of_x)
            torch.testing.assert_close(operator.weight_gradient(leaving, entering, w), of_weight)
            both = operator.gradients(leaving, entering, w, of_x=True)
            torch.testing.assert_close(both, (of_x, of_weight))
            assert operator.gradients(leaving, entering, w, of_x=False)[0] is None
            torch.testing.assert_close(operator.channel_sum(leaving), sums)
            torch.testing.assert_close(operator.channel_products(leaving, y, None), (products, sums))
            torch.testing.assert_close(operator.channel_products(leaving, y, bias), (products - bias * sums, sums))
        # What a broadcast sum hands back has no memory of its own.
        flat = torch.ones(()).double().expand(g.shape)
        torch.testing.assert_close(operator.channel_products(flat, y, bias)[1], torch.einsum("bo...->o", flat))
        found = operator.input_gradient(flat, weight.detach(), x.detach())
        found_of_weight = operator.weight_gradient(flat, x.detach(), weight.detach())
    # The expected ones once more, by torch.
    again = TRANSPOSED[dims](x, weight, output_padding=extra, **options) if transposed else CONVOLVE[dims](
        x, weight, **options
    )  # fmt: skip
    of_x, of_weight = torch.autograd.grad(again, (x, weight), flat)
    torch.testing.assert_close(found, of_x)
    torch.testing.assert_close(found_of_weight, of_weight)


def as_if_fast(x):
    return x.device.type == "cpu"


@pytest.fixture
def spied(monkeypatch):
    """spied(name) -> a mock through which the operators call this function; the fast routes are open in float64."""
    monkeypatch.setattr(convolution, "is_fast", as_if_fast)

    def spy(name, of=convolution):
        mock = Mock(wraps=getattr(of, name))
        monkeypatch.setattr(of, name, mock)
        return mock

    return spy


def plane(stride=1, padding=0, transposed=False):
    return Convolution((stride,) * 2, (padding,) * 2, (1, 1), (0, 0), transposed)


def test_a_convolution_to_few_channels_is_folded(spied):
    spy = spied("folded_convolution")
    plane(padding=1).through(draw(1, 20, 6, 6), draw(3, 20, 3, 3))
    assert spy.call_count == 1
    plane(padding=1).through(draw(1, 3, 6, 6), draw(20, 3, 3, 3))
    plane(stride=2, padding=1).through(draw(1, 20, 6, 6), draw(3, 20, 3, 3))
    assert spy.call_count == 1


def test_the_input_gradient_of_few_channels_is_folded(spied):
    spy = spied("folded_convolution")
    plane(padding=1).input_gradient(draw(1, 20, 6, 6), draw(20, 3, 3, 3), draw(1, 3, 6, 6))
    assert spy.call_count == 1


@pytest.mark.parametrize(("o", "i"), [(20, 8), (8, 20)])
def test_the_weight_gradient_with_few_channels_on_a_side_is_a_correlation_with_what_is_unfolded(spied, o, i):
    """Of more copies than are worth it without fast products."""
    spy = spied("unfolded_correlation")
    plane(padding=1).weight_gradient(draw(1, o, 6, 6), draw(1, i, 6, 6), draw(o, i, 3, 3))
    assert spy.call_count == 1
    narrow, wide = spy.call_args.args[:2]
    assert (narrow.shape[1], wide.shape[1]) == (8, 20)


def test_the_weight_gradient_of_a_kernel_of_one_is_a_correlation(spied):
    spy = spied("correlation")
    plane().weight_gradient(draw(1, 20, 6, 6), draw(1, 40, 6, 6), draw(20, 40, 1, 1))
    assert spy.call_count == 1


def test_both_gradients_of_a_transposed_layer_share_its_patches(spied):
    patches, of_input, of_weight = (spied(name, disjoint) for name in ("patches", "input_gradient", "weight_gradient"))
    g, x, weight = draw(2, 10, 6, 6), draw(2, 20, 3, 3), draw(20, 10, 2, 2)
    plane(stride=2, transposed=True).gradients(g, x, weight, of_x=True)
    assert (patches.call_count, of_input.call_count, of_weight.call_count) == (1, 1, 1)
    plane(stride=2, transposed=True).gradients(g, x, weight, of_x=False)
    assert (patches.call_count, of_input.call_count, of_weight.call_count) == (2, 1, 2)


@pytest.mark.parametrize(
    "operator",
    [
        Convolution((2, 2), (1, 1), (1, 1), (0, 0), transposed=True),
        Convolution((2, 2), (0, 0), (1, 1), (1, 1), transposed=True),
        Convolution((2, 2), (0, 0), (2, 2), (0, 0), transposed=True),
        Convolution((2, 1), (0, 0), (1, 1), (0, 0), transposed=True),
        Convolution((2, 2), (0, 0), (1, 1), (0, 0), transposed=False),
    ],
)
def test_patches_that_overlap_or_are_cut_are_not_disjoint(spied, operator):
    spy = spied("patches", disjoint)
    x, weight = draw(1, 4, 6, 6), draw(4, 4, 2, 2)
    g = draw(*operator.forward(x, weight, None).shape)
    operator.gradients(g, x, weight, of_x=True)
    assert not spy.called


def test_where_products_are_not_fast_torchs_own_serve(monkeypatch):
    """Float64, as it is."""
    for name in ("folded_convolution", "unfolded_correlation", "correlation"):
        monkeypatch.setattr(convolution, name, Mock(side_effect=AssertionError))
    monkeypatch.setattr(disjoint, "patches", Mock(side_effect=AssertionError))
    plane(padding=1).through(draw(1, 20, 6, 6), draw(3, 20, 3, 3))
    plane(padding=1).weight_gradient(draw(1, 20, 6, 6), draw(1, 8, 6, 6), draw(20, 8, 3, 3))
    plane().weight_gradient(draw(1, 40, 6, 6), draw(1, 40, 6, 6), draw(40, 40, 1, 1))
    plane(stride=2, transposed=True).gradients(draw(1, 10, 6, 6), draw(1, 20, 3, 3), draw(20, 10, 2, 2), of_x=True)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 3, 4)])
def test_linear_maps(batch):
    x, weight = draw(*batch, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    y = nn.functional.linear(x, weight)
    g = draw(*y.shape, seed=2)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), g)
    operator = Dense()
    torch.testing.assert_close(operator.forward(x, weight, None), y)
    torch.testing.assert_close(operator.input_gradient(g, weight, x), of_x)
    torch.testing.assert_close(operator.weight_gradient(g, x, weight), of_weight)
    torch.testing.assert_close(operator.channel_sum(g), g.reshape(-1, 4).sum(0))
    y, bias = y.detach(), draw(4, seed=3)
    sums, products = g.reshape(-1, 4).sum(0), (g * y).reshape(-1, 4).sum(0)
    torch.testing.assert_close(operator.channel_products(g, y, None), (products, sums))
    torch.testing.assert_close(operator.channel_products(g, y, bias), (products - bias * sums, sums))
    both = operator.gradients(g, x.detach(), weight.detach(), of_x=True)
    torch.testing.assert_close(both, (of_x, of_weight))
    assert operator.gradients(g, x, weight, of_x=False)[0] is None


@pytest.mark.parametrize("method", ["conv_lora", "dora_c"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(1, 8, 3, padding=1), (2, 1, 130, 131)),
        (lambda: nn.Conv2d(8, 1, 1), (1, 8, 128, 130)),
        (lambda: nn.Conv3d(4, 3, 3, padding=1), (1, 4, 33, 32, 17)),
        (lambda: nn.Conv2d(16, 16, 3, padding=1, stride=2), (2, 16, 129, 128)),
    ],
)
def test_layers_on_images_of_real_size(make, shape, method):
    """Where products go in blocks, and odd sizes leave a rest."""
    from segraft.adapters import AdapterSpec, graft

    torch.manual_seed(0)
    net = graft(nn.Sequential(make()).double(), AdapterSpec(method, rank=2))
    with torch.no_grad():
        net[0].segraft["default"]["weight"].B.normal_()
    x = draw(*shape).requires_grad_()
    found = {}
    for way in ("composed", "weight", "chain", "parallel"):
        net.zero_grad()
        x.grad = None
        with execution(way):
            net(x).square().mean().backward()
        found[way] = [x.grad, *(value.grad for value in net.parameters() if value.requires_grad)]
    for way in ("weight", "chain", "parallel"):
        for value, expected in zip(found[way], found["composed"], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((1, 3, 2), (0, 1, 0), (1, 2, 1)), ((3, 1, 5), (2, 0, 1), (1, 1, 2))],
)
def test_the_input_gradient_of_few_channels_of_a_small_image_is_a_convolution(
    monkeypatch, kernel, padding, dilation, dtype
):
    """Torch would unfold it; three to ten times slower."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, 6, 8, 9, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(4, 24, *kernel, generator=generator, dtype=dtype)
    y = nn.functional.conv3d(x, weight, None, 1, padding, dilation)
    g = torch.randn(y.shape, generator=generator, dtype=dtype)
    (expected,) = torch.autograd.grad(y, x, g)
    monkeypatch.setattr(Convolution, "_backward", Mock(side_effect=AssertionError))
    monkeypatch.setattr(Convolution, "_phases", lambda *_: 1)
    monkeypatch.setattr(Convolution, "_pays_to_fold", lambda *_: False)
    found = Convolution((1, 1, 1), padding, dilation, (0, 0, 0)).input_gradient(g, weight, x.detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("o", "i", "size", "mirrored"),
    [
        (32, 32, (256, 256), True),
        (48, 32, (16, 4096), True),
        (32, 32, (250, 256), False),
        (24, 32, (256, 256), False),
        (128, 160, (64, 64), True),
        (128, 160, (60, 64), False),
        (1280, 160, (64, 64), False),
        (128, 160, (64, 64, 1), False),
    ],
)
def test_the_input_gradient_of_wide_images_is_a_convolution_with_the_mirrored_kernel(monkeypatch, o, i, size, mirrored):
    """In two dimensions, unless mirroring the weight takes what is saved."""
    operator = Convolution((1,) * len(size), (1,) * len(size), (1,) * len(size), (0,) * len(size))
    monkeypatch.setattr(Convolution, "forward", Mock(return_value="mirrored"))
    for name in ("_backward", "_filtering"):
        monkeypatch.setattr(Convolution, name, Mock(return_value=None))
    g, x, weight = torch.empty(1, o, *size), torch.empty(1, i, *size), torch.empty(o, i, *(3 for _ in size))
    assert (operator.input_gradient(g, weight, x) == "mirrored") == mirrored


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1)), ((1, 3), (0, 1), (1, 1)), ((2, 5), (0, 3), (1, 2)), ((3, 3), (0, 2), (1, 2))],
)
def test_gradients_with_the_mirrored_kernel(monkeypatch, kernel, padding, dilation):
    monkeypatch.setattr(convolution, "MIRRORED_LARGE", 1)
    spy = Mock(wraps=convolution.mirror)
    monkeypatch.setattr(convolution, "mirror", spy)
    x, weight = draw(2, 32, 12, 9).float().requires_grad_(), draw(40, 32, *kernel, seed=1).float()
    y = nn.functional.conv2d(x, weight, None, 1, padding, dilation)
    g = draw(*y.shape, seed=2).float()
    (expected,) = torch.autograd.grad(y, x, g)
    found = Convolution((1, 1), padding, dilation, (0, 0)).input_gradient(g, weight, x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert spy.called == all(d * (k - 1) >= p for k, p, d in zip(kernel, padding, dilation, strict=True))


def test_the_input_gradient_at_few_positions_is_a_product_with_the_weight_as_it_lies(spied):
    spy = spied("scattered_product")
    space = Convolution((1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3)
    g, weight = draw(2, 256, 2, 3, 2), draw(256, 260, 3, 3, 3)
    found = space.input_gradient(g, weight, draw(2, 260, 2, 3, 2))
    torch.testing.assert_close(found, nn.functional.conv_transpose3d(g, weight, padding=1))
    assert spy.call_count == 1
    space.input_gradient(draw(4, 256, 4, 5, 3), weight, draw(4, 260, 4, 5, 3))  # 240 positions
    space.input_gradient(draw(1, 256, 2, 3, 2), draw(256, 100, 3, 3, 3), draw(1, 100, 2, 3, 2))  # narrow
    assert spy.call_count == 1
