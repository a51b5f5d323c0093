"""ΔW as a product of two matrices, in both of its forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segraft.adapters import AdapterSpec, graft
from segraft.adapters.composing import Layout, contract
from segraft.adapters.execution import execution
from segraft.adapters.formulas import contraction
from segraft.adapters.stages import SPREAD, Matrices, matrices

FUNCTIONS = {"weight": "AdaptedLayerBackward", "chain": "AdaptedLayerBackward", "parallel": "ParallelLayerBackward"}
SHAPES = {"linear": (6, 5), "1D": (6, 5, 3), "2D": (6, 5, 3, 2), "3D": (6, 5, 2, 3, 4)}


def drawn(formula: str, shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, Matrices]:
    """ΔW as the formula says it, and its matrices."""
    found = contraction(formula, len(shape) - 2)
    factors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in found.shapes(shape, rank)]
    return found(factors), matrices(found, factors)


def multiplied(update: Matrices, shape: tuple[int, ...]) -> torch.Tensor:
    layout = Layout.of(torch.empty(shape), update.held)
    sizes = [n if d not in update.held else 1 for d, n in enumerate(shape)]
    right = update.right.expand(-1, *sizes[1:])
    return layout.tensor(update.left @ layout.matrix(right), torch.Size(shape))


@pytest.mark.parametrize("formula", ["lora", "lora_c", "cp", "tucker"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("is_spread", [False, True])
def test_their_product_is_the_update(formula, shape, rank, is_spread):
    torch.manual_seed(0)
    update, found = drawn(formula, shape, rank)
    if is_spread:
        found = found.spread(shape)
        assert not found.held
        assert found.left.shape[0] == shape[0]
    torch.testing.assert_close(multiplied(found, shape), update, rtol=1e-12, atol=1e-12)


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gradients_of_the_spread_ones_gathered_are_those_of_the_others(kind, rank, seed):
    torch.manual_seed(seed)
    shape = SHAPES[kind]
    _, found = drawn("lora_c", shape, rank)
    spread = found.spread(shape)
    of_left, of_right = torch.randn_like(spread.left), torch.randn_like(spread.right)
    expected = torch.autograd.grad([spread.left, spread.right], [found.left, found.right], [of_left, of_right])
    for got, want in zip(found.gathered(of_left, of_right), expected, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [3, 40], ids=["spread", "as they are"])
def test_contracting_a_gradient_gives_those_of_both(rank):
    torch.manual_seed(0)
    shape = (8, 7, 3, 3)
    _, found = drawn("lora_c", shape, rank)
    gradient = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(multiplied(found, shape), [found.left, found.right], gradient)
    with torch.no_grad():
        for got, want in zip(contract(gradient, found), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_those_that_would_be_too_many_stay_as_they_are():
    _, found = drawn("lora_c", (8, 7, 3, 3), 4)
    assert found.spread((8, 7, 3, 3), 11) is found
    assert found.spread((8, 7, 3, 3), 12).left.shape == (8, 12)


@pytest.mark.parametrize("way", ["weight", "chain", "parallel"])
@pytest.mark.parametrize("rank", [30, 40], ids=["spread", "as they are"])
@pytest.mark.parametrize("method", ["lora_c", "dora_c"])
def test_every_way_gives_the_composed_ones_gradients_on_both_sides_of_the_limit(method, rank, way):
    assert 3 * 30 <= SPREAD < 3 * 40
    torch.manual_seed(0)
    net = graft(nn.Sequential(nn.Conv2d(5, 6, 3, padding=1).double()), AdapterSpec(method, rank=rank))
    trained = [p for p in net.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    x, found = torch.randn(2, 5, 7, 6, dtype=torch.float64), {}
    for each in ("composed", way):
        with execution(each):
            y = net(x)
            assert type(y.grad_fn).__name__ == FUNCTIONS.get(each, "ConvolutionBackward0")
            found[each] = [y, *torch.autograd.grad(y.square().sum(), trained)]
    for got, want in zip(found[way], found["composed"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("method", ["lora_c", "dora_c", "conv_dora"])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.Conv3d])
def test_a_batch_of_gradients_at_once(make, method, rank):
    torch.manual_seed(0)
    net = graft(nn.Sequential(make(4, 6, 3, padding=1).double()), AdapterSpec(method, rank=rank))
    trained = [p for p in net.parameters() if p.requires_grad]
    x = torch.randn(2, 4, *(5, 4, 3)[: 2 if make is nn.Conv2d else 3], dtype=torch.float64)
    with execution("weight"):
        y = net(x)
        gs = torch.randn(3, *y.shape, dtype=torch.float64)
        together = torch.autograd.grad(y, trained, gs, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(y, trained, g, retain_graph=True) for g in gs]
    for got, want in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
