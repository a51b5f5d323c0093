"""Gradients of transposed convolutions with kernel = stride against autograd."""

import math

import pytest
import torch
from torch import nn

from segraft.adapters import convolution, disjoint, products
from segraft.adapters.convolution import Convolution

TRANSPOSED = [nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d]
GEOMETRIES = [
    ((7,), (2,)),
    ((1,), (5,)),
    ((5, 4), (2, 2)),
    ((3, 5), (1, 3)),
    ((1, 1), (2, 3)),
    ((4, 3, 2), (2, 2, 2)),
    ((2, 3, 4), (1, 2, 3)),
    ((3, 2, 2), (4, 1, 2)),
    ((3, 4, 2), (1, 1, 1)),
]
CHANNELS = [(6, 3), (3, 6), (1, 1), (20, 5)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(batch, channels, space, kernel):
    """x, weight and g of a layer, and the gradients of the first two by autograd."""
    i, o = channels
    x, weight = draw(batch, i, *space).requires_grad_(), draw(i, o, *kernel, seed=1).requires_grad_()
    y = TRANSPOSED[len(space) - 1](x, weight, stride=kernel)
    g = draw(*y.shape, seed=2)
    return x.detach(), weight.detach(), g, torch.autograd.grad(y, (x, weight), g)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("space", "kernel"), GEOMETRIES)
def test_gradients_of_a_transposed_convolution(space, kernel, channels, batch):
    x, weight, g, (of_x, of_weight) = layer(batch, channels, space, kernel)
    columns = disjoint.patches(g, kernel)
    torch.testing.assert_close(disjoint.input_gradient(columns, weight, x.shape), of_x)
    torch.testing.assert_close(disjoint.weight_gradient(columns, x, weight.shape), of_weight)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("space", "kernel"), GEOMETRIES)
def test_patches_are_the_columns_of_each_image(space, kernel, batch):
    g = draw(batch, 4, *(n * k for n, k in zip(space, kernel, strict=True)))
    found = disjoint.patches(g, kernel)
    assert len(found) == batch
    for each, of_image in zip(found, g, strict=True):
        assert each.shape == (4 * math.prod(kernel), math.prod(space))
        columns = each.view(4, *kernel, *space)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in space)).reshape(-1, len(space)).tolist():
            patch = of_image[(slice(None), *(slice(n * k, (n + 1) * k) for n, k in zip(at, kernel, strict=True)))]
            assert torch.equal(columns[(..., *at)], patch)


@pytest.mark.parametrize("of", ["weight", "x"])
@pytest.mark.parametrize(("space", "kernel"), GEOMETRIES)
def test_gradients_of_what_lies_with_channels_last(space, kernel, of):
    x, weight, g, (of_x, of_weight) = layer(2, (6, 3), space, kernel)

    def channels_last(tensor):
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)

    columns = disjoint.patches(g, kernel)
    x, weight = (channels_last(x), weight) if of == "x" else (x, channels_last(weight))
    torch.testing.assert_close(disjoint.input_gradient(columns, weight, x.shape), of_x)
    torch.testing.assert_close(disjoint.weight_gradient(columns, x, weight.shape), of_weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_operator_gives_the_same_gradients_by_patches(monkeypatch, batch, layout):
    """In either memory format, in float64 as if products of it were fast."""
    monkeypatch.setattr(convolution, "is_fast", lambda x: x.device.type == "cpu")
    x, weight, g, expected = layer(batch, (20, 5), (4, 3, 2), (2, 1, 3))
    operator = Convolution((2, 1, 3), (0, 0, 0), (1, 1, 1), (0, 0, 0), transposed=True)
    x, g = x.contiguous(memory_format=layout), g.contiguous(memory_format=layout)
    torch.testing.assert_close(operator.gradients(g, x, weight, of_x=True), expected)
    torch.testing.assert_close(operator.input_gradient(g, weight, x), expected[0])
    torch.testing.assert_close(operator.weight_gradient(g, x, weight), expected[1])


@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_in_float32_of_a_size_that_onednn_serves(monkeypatch, batch):
    monkeypatch.setattr(products, "ENOUGH", 1)
    x, weight, g, expected = layer(batch, (20, 5), (6, 5, 4), (2, 2, 2))
    columns = disjoint.patches(g.float(), (2, 2, 2))
    assert products.serves(weight.float().flatten(1), columns[0]) == products.HAS_ONEDNN
    found = (
        disjoint.input_gradient(columns, weight.float(), x.shape),
        disjoint.weight_gradient(columns, x.float(), weight.shape),
    )
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
