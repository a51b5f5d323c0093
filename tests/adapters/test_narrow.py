"""Matrix products over few channels against torch's own convolutions and their gradients."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters.drawn import CONVOLVE, draw

from segraft.adapters import narrow
from segraft.adapters.narrow import (
    Window,
    correlation,
    folded_convolution,
    overlap,
    pointwise,
    scattered_product,
    slabs,
    unfolded_correlation,
)


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


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("n", [1 << 10, 1 << 12, 3 << 16])
@pytest.mark.parametrize("rows", [8, 24, 32])
def test_correlation_of_long_rows_in_float32(rows, n, batch):
    """Both ways round, whichever side is the wide one."""
    g, x = draw(batch, rows, n), draw(batch, 40, n, seed=1)
    expected = torch.einsum("bon,bin->oi", g, x)
    g, x = g.float(), x.float()
    for found in (correlation(g, x), correlation(x, g).t()):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * n**0.5)


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


@st.composite
def windows(draw_from):
    """A window and an image in which it has outputs."""
    dims = draw_from(st.integers(1, 3))

    def each(low, high):
        return tuple(draw_from(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, stride = each(1, 3), each(1, 3), each(1, 3)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw_from(st.integers(-2, r)) for r in reach)
    # As large as it must be that something is left of it, and that the kernel fits.
    sizes = [max(1, 1 - 2 * p, r - 2 * p) + more for p, r, more in zip(padding, reach, each(0, 4), strict=True)]
    return Window(kernel, padding, dilation, stride), sizes


@given(windows(), st.booleans())
def test_a_window_sees_the_image_with_zeros_around_it(given_window, dense):
    window, sizes = given_window
    space = window.outputs(sizes)
    x = draw(2, 3, *sizes) if dense else draw(2, *sizes, 6).movedim(-1, 1)[:, ::2]
    found = window.view(x, space)
    assert found.shape == (2, 3, *window.kernel, *space)
    for position in itertools.product(*map(range, window.kernel)):
        for output in itertools.product(*map(range, space)):
            there = [
                n * s + k * d - p
                for n, s, k, d, p in zip(output, window.stride, position, window.dilation, window.padding, strict=True)
            ]
            inside = all(0 <= n < size for n, size in zip(there, sizes, strict=True))
            expected = x[(slice(None), slice(None), *there)] if inside else torch.zeros(2, 3).double()
            assert torch.equal(found[(slice(None), slice(None), *position, *output)], expected)


@given(windows())
def test_offsets_say_where_each_position_of_a_kernel_lies(given_window):
    window, _ = given_window
    found = dict(window.offsets())
    assert list(found) == list(itertools.product(*map(range, window.kernel)))
    for position, offset in found.items():
        geometry = zip(position, window.dilation, window.padding, strict=True)
        assert offset == tuple(k * d - p for k, d, p in geometry)


@given(windows())
def test_a_window_has_as_many_outputs_as_torchs_convolution(given_window):
    window, sizes = given_window
    inner = [n + 2 * p for n, p in zip(sizes, window.padding, strict=True)]  # torch pads by no negative number
    y = CONVOLVE[len(sizes)](
        torch.zeros(1, 1, *inner), torch.zeros(1, 1, *window.kernel), stride=window.stride, dilation=window.dilation
    )
    assert window.outputs(sizes) == list(y.shape[2:])


@given(windows())
def test_the_opposite_window_leads_back(given_window):
    window, sizes = given_window
    assert window.opposite().opposite() == window
    window = replace(window, stride=(1,) * len(sizes))
    assert window.opposite().outputs(window.outputs(sizes)) == sizes
    # With the kernel reversed, what was seen from an output sees that output.
    back = dict(window.opposite().offsets())
    for position, offset in window.offsets():
        reversed_position = tuple(k - 1 - at for k, at in zip(window.kernel, position, strict=True))
        assert back[reversed_position] == tuple(-n for n in offset)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 500))
def test_slabs_cover_the_first_dimension_once_and_keep_to_the_limit(space, channels, limit):
    found = list(slabs(space, channels, limit))
    assert [n for slab in found for n in range(slab.start, slab.stop)] == list(range(space[0]))
    for slab in found:
        count = slab.stop - slab.start
        assert count == 1 or count * channels * math.prod(space[1:]) <= limit


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(narrow, "COPIES", 40)
    monkeypatch.setattr(narrow, "PARTS", 40)


GEOMETRIES = [
    ((9,), (3,), (1,), (1,)),
    ((12,), (4,), (0,), (2,)),
    ((7, 5), (3, 3), (1, 1), (1, 1)),
    ((8, 6), (2, 3), (3, 0), (2, 1)),
    ((6, 5, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((5, 6, 7), (1, 2, 3), (0, 2, 1), (1, 2, 3)),
]


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("space", "kernel", "padding", "dilation"), GEOMETRIES)
def test_folded_convolution_in_slabs(space, kernel, padding, dilation, batch):
    window = Window(kernel, padding, dilation, (1,) * len(space))
    x, weight = draw(batch, 17, *space), draw(3, 17, *kernel, seed=1)
    expected = CONVOLVE[len(space)](x, weight, padding=padding, dilation=dilation)
    assert len(list(slabs(space, 3 * math.prod(kernel), narrow.PARTS))) > 1
    found = folded_convolution(x, weight, window, window.outputs(space))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("space", "kernel", "padding", "dilation"), GEOMETRIES)
def test_scattered_product(space, kernel, padding, dilation, batch):
    """Against the gradient of the input."""
    window, x = Window(kernel, padding, dilation, (1,) * len(space)), draw(batch, 4, *space).requires_grad_()
    weight = draw(7, 4, *kernel, seed=1)
    y = CONVOLVE[len(space)](x, weight, padding=padding, dilation=dilation)
    g = draw(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(scattered_product(g, weight, window, x.shape), expected)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("space", "kernel", "padding", "dilation"), GEOMETRIES)
def test_unfolded_correlation_in_slabs(space, kernel, padding, dilation, batch, strided):
    """Against the gradient of the weight, of which it is the transpose."""
    stride = tuple(range(2, 2 + len(space))) if strided else (1,) * len(space)
    window, x = Window(kernel, padding, dilation, stride), draw(batch, 3, *space)
    weight = draw(17, 3, *kernel, seed=1).requires_grad_()
    y = CONVOLVE[len(space)](x, weight, stride=stride, padding=padding, dilation=dilation)
    g = draw(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, weight, g)
    torch.testing.assert_close(unfolded_correlation(x, g, window), expected.movedim(0, -1))
