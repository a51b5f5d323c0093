"""Matrix products over few channels against torch's own convolutions and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segraft.adapters.execution import execution
from segraft.adapters.narrow import correlation, gather, opposite, overlap, pointwise
from segraft.adapters.operators import Convolution, Dense

CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
TRANSPOSED = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}
FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 5, 63, 64, 255, 256, 300, 16384, 20480]),
)
def test_correlation(batch, o, i, n):
    g, x = draw(batch, o, n), draw(batch, i, n, seed=1)
    torch.testing.assert_close(correlation(g, x), torch.einsum("bon,bin->oi", g, x))


@pytest.mark.parametrize("n", [7, 16384])
def test_correlation_of_what_is_no_block_of_memory(n):
    g, x = draw(2, n, 3).transpose(1, 2), draw(2, 5, 2 * n, seed=1)[..., ::2]
    expected = torch.einsum("bon,bin->oi", g, x)
    torch.testing.assert_close(correlation(g, x.contiguous()), expected)
    torch.testing.assert_close(correlation(g.contiguous(), x), expected)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_pointwise(batch, o, i, dims):
    matrix, x = draw(o, i), draw(batch, i, *range(2, 2 + dims), seed=1)
    torch.testing.assert_close(pointwise(matrix, x), torch.einsum("oi,bi...->bo...", matrix, x))


@given(st.integers(-6, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_overlap(offset, there, here, step):
    """Every position of `here` that meets one of `there` is in the slices, in order, and no other."""
    source, target = overlap((offset,), (there,), (here,), (step,))
    met = [n for n in range(here) if 0 <= n * step + offset < there]
    assert list(range(here))[target[2]] == met
    assert list(range(there))[source[2]] == [n * step + offset for n in met]


@given(st.data())
def test_gather(data):
    dims = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(1, 4)) for _ in range(dims)]
    space = [data.draw(st.integers(1, 4)) for _ in range(dims)]
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    offset = st.tuples(*[st.integers(-5, 5)] * dims)
    offsets = data.draw(st.lists(offset, min_size=1, max_size=4, unique=True))
    x = draw(2, 3, *sizes)
    found = gather(x, offsets, space, stride).view(2, len(offsets), 3, *space)
    for k, each in enumerate(offsets):
        for index in torch.cartesian_prod(*(torch.arange(size) for size in space)).reshape(-1, dims).tolist():
            there = [n * s + o for n, s, o in zip(index, stride, each, strict=True)]
            inside = all(0 <= position < size for position, size in zip(there, sizes, strict=True))
            expected = x[(slice(None), slice(None), *there)] if inside else torch.zeros(2, 3).double()
            assert torch.equal(found[(slice(None), k, slice(None), *index)], expected)
    assert opposite(opposite(offsets)) == offsets


@settings(max_examples=150)
@given(st.data())
def test_every_gradient_of_a_convolution(data):
    """With few channels on either side and with many, in every geometry and both memory formats."""
    dims = data.draw(st.integers(1, 3))

    def each(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride = each(1, 3), data.draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    dilation = data.draw(st.sampled_from([(1,) * dims, each(1, 3)]))
    padding = tuple(data.draw(st.integers(0, d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True))
    sizes = tuple(
        max(1, n + d * (k - 1) - 2 * p)
        for n, k, d, p in zip(each(1, 5), kernel, dilation, padding, strict=True)
    )  # fmt: skip
    transposed = data.draw(st.booleans())
    i, o = data.draw(st.sampled_from([(1, 4), (4, 1), (40, 40), (2, 35), (35, 2), (3, 3)]))
    extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
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
    g = draw(*y.shape, seed=2)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), g)
    for layout in (torch.contiguous_format, FORMATS[dims + 2]):
        entering, leaving, w = (each.detach().contiguous(memory_format=layout) for each in (x, g, weight))
        torch.testing.assert_close(operator.forward(entering, w, None), y.detach())
        torch.testing.assert_close(operator.through(entering, w), y.detach())
        torch.testing.assert_close(operator.input_gradient(leaving, w, entering), of_x)
        torch.testing.assert_close(operator.weight_gradient(leaving, entering, w), of_weight)
        torch.testing.assert_close(operator.channel_sum(leaving), torch.einsum("bo...->o", g))
        torch.testing.assert_close(operator.channel_dot(leaving, y.detach()), torch.einsum("bo...,bo...->o", g, y))
    # What a broadcast sum hands back has no memory of its own.
    flat = torch.ones(()).double().expand(g.shape)
    of_x, of_weight = torch.autograd.grad((y := CONVOLVE[dims](x, weight, **options)) if not transposed else
        (y := TRANSPOSED[dims](x, weight, output_padding=extra, **options)), (x, weight), flat)  # fmt: skip
    torch.testing.assert_close(operator.input_gradient(flat, weight.detach(), x.detach()), of_x)
    torch.testing.assert_close(operator.weight_gradient(flat, x.detach(), weight.detach()), of_weight)


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
    torch.testing.assert_close(operator.channel_dot(g, y), (g * y).reshape(-1, 4).sum(0))


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
