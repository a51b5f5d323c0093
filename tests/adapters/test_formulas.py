"""Factorisations: what each computes, how many parameters it has, and how its factors start."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segraft.adapters import FORMULAS, AdapterSpec, graft
from segraft.adapters.formulas import contraction, initial_factors

SIZES = st.integers(1, 4)


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(SIZES, min_size=2, max_size=5).map(tuple), rank=SIZES, seed=st.integers(0, 9))
def test_stepwise_contraction_equals_one_einsum(name, shape, rank, seed):
    formula = contraction(name, len(shape) - 2)
    generator = torch.Generator().manual_seed(seed)
    shapes = formula.shapes(shape, rank)
    factors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    assert len(formula.names) == len(formula.factors) == len(set(formula.names))
    expected = torch.einsum(f"{','.join(formula.factors)}->{'oixyz'[: len(shape)]}", *factors)
    assert expected.shape == shape
    torch.testing.assert_close(formula(factors), expected)


@pytest.mark.parametrize(
    ("name", "kernel", "factors"),
    [
        ("lora", 0, ("or", "ri")),
        ("lora", 2, ("or", "rixy")),
        ("lora", 3, ("or", "rixyz")),
        ("lora_c", 0, ("or", "ri")),
        ("lora_c", 1, ("or", "rix")),
        ("lora_c", 2, ("oxr", "riy")),
        ("lora_c", 3, ("oxyr", "riz")),
        ("cp", 0, ("or", "ir")),
        ("cp", 1, ("or", "ir", "xr")),
        ("cp", 2, ("or", "ir", "xr", "yr")),
        ("cp", 3, ("or", "ir", "xr", "yr", "zr")),
        ("tucker", 2, ("op", "pqxy", "iq")),
    ],
)
def test_factors(name, kernel, factors):
    assert contraction(name, kernel).factors == factors


# Rows of the papers' table of parameters per layer, for o outputs, i inputs and a kernel of k in each direction.
COUNTS = {
    "lora_c": lambda o, i, k, R: (i + o) * k * R,
    "conv_lora": lambda o, i, k, R: (i * k**2 + o) * R,
    "cp_lora": lambda o, i, k, R: (i + o + 2 * k) * R,
}
COUNTS |= {
    "dora_c": lambda o, i, k, R: COUNTS["lora_c"](o, i, k, R) + o,
    "conv_dora": lambda o, i, k, R: COUNTS["conv_lora"](o, i, k, R) + o,
    "cp_dora": lambda o, i, k, R: COUNTS["cp_lora"](o, i, k, R) + o,
}


@pytest.mark.parametrize("name", COUNTS)
@settings(max_examples=15, deadline=None)
@given(o=SIZES, i=SIZES, k=SIZES, R=SIZES)
def test_parameters_per_layer(name, o, i, k, R):
    net = graft(nn.Conv2d(i, o, k), AdapterSpec(name, rank=R))
    assert sum(value.numel() for value in net.parameters() if value.requires_grad) == COUNTS[name](o, i, k, R)


def test_table_3_of_the_haemorrhage_paper():
    """Σ over the 23 layers of its U-Net, at rank 1: 40,964 (LoRA-C), 64,138 (convLoRA), 14,784 (CP)."""
    widths = [64, 128, 256, 512, 1024]
    layers = [nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 1, 1)]
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3), nn.Conv2d(wide, wide, 3), nn.ConvTranspose2d(wide, narrow, 2)]
        layers += [nn.Conv2d(wide, narrow, 3), nn.Conv2d(narrow, narrow, 3)]
    assert len(layers) == 23

    def sizes(name):
        return sum(
            math.prod(shape) for layer in layers for shape in contraction(name, 2).shapes(tuple(layer.weight.shape), 1)
        )

    assert sizes("lora_c") == 40_964
    assert sizes("lora") == 64_138
    assert sizes("cp") == 14_784


def loops(o, i, kernel, rank, term):
    """ΔW by the sum of the papers, one number at a time."""
    delta = torch.zeros(o, i, *kernel, dtype=torch.float64)
    for index in product(range(o), range(i), *map(range, kernel)):
        delta[index] = sum(term(index, r) for r in range(rank))
    return delta


def lora_c_2d(f, index, r):
    o, i, h, w = index
    return f["B"][o, h, r] * f["A"][r, i, w]


def lora_c_3d(f, index, r):
    """The output factor takes all kernel modes but the last, the input factor the last."""
    o, i, d, h, w = index
    return f["B"][o, d, h, r] * f["A"][r, i, w]


def lora_c_1d(f, index, r):
    o, i, w = index
    return f["B"][o, r] * f["A"][r, i, w]


def cp_1d(f, index, r):
    o, i, w = index
    return f["a"][o, r] * f["b"][i, r] * f["c"][w, r]


def cp_2d(f, index, r):
    o, i, h, w = index
    return f["a"][o, r] * f["b"][i, r] * f["c"][h, r] * f["d"][w, r]


def cp_3d(f, index, r):
    o, i, d, h, w = index
    return f["a"][o, r] * f["b"][i, r] * f["c"][d, r] * f["d"][h, r] * f["e"][w, r]


def conv_lora_2d(f, index, r):
    o, i, h, w = index
    return f["B"][o, r] * f["A"][r, i, h, w]


@pytest.mark.parametrize(
    ("method", "term", "layer"),
    [
        ("conv_lora", conv_lora_2d, lambda: nn.Conv2d(2, 3, (3, 2))),
        ("lora_c", lora_c_1d, lambda: nn.Conv1d(2, 3, 3)),
        ("lora_c", lora_c_2d, lambda: nn.Conv2d(2, 3, (3, 2))),
        ("lora_c", lora_c_3d, lambda: nn.Conv3d(2, 3, (3, 2, 1))),
        ("cp_lora", cp_1d, lambda: nn.Conv1d(2, 3, 3)),
        ("cp_lora", cp_2d, lambda: nn.Conv2d(2, 3, (3, 2))),
        ("cp_lora", cp_3d, lambda: nn.Conv3d(2, 3, (3, 2, 1))),
        ("dora_c", lora_c_2d, lambda: nn.Conv2d(2, 3, (3, 2))),
        ("dora_c", lora_c_3d, lambda: nn.Conv3d(2, 3, (1, 2, 3))),
        ("cp_dora", cp_2d, lambda: nn.Conv2d(2, 3, (3, 2))),
        ("cp_dora", cp_3d, lambda: nn.Conv3d(2, 3, (1, 2, 3))),
    ],
)
def test_weights_by_plain_loops(method, term, layer, randomise):
    torch.manual_seed(0)
    rank, alpha = 3, 5.0
    net = layer()
    w0 = net.weight.detach().double()
    randomise(graft(net, AdapterSpec(method, rank=rank, alpha=alpha)))
    f = {name: value.detach().double() for name, value in net.segraft["default"]["weight"].named_parameters()}
    o, i, *kernel = w0.shape
    expected = w0 + alpha / rank * loops(o, i, kernel, rank, lambda index, r: term(f, index, r))
    if "m" in f:
        for channel in range(o):
            expected[channel] *= f["m"][channel] / math.sqrt(sum(v**2 for v in expected[channel].flatten().tolist()))
    torch.testing.assert_close(net.weight.double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, i, *(size + 2 for size in kernel))
    reference = nn.functional.conv1d if x.ndim == 3 else nn.functional.conv2d if x.ndim == 4 else nn.functional.conv3d
    torch.testing.assert_close(net(x), reference(x, expected.float(), net.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(6, 40), (6, 40, 3), (6, 40, 3, 3), (6, 20, 2, 3, 4)], ids=str)
def test_factors_start_at_no_update_with_the_input_side_as_wide_as_loras(name, shape):
    """LoRA draws A uniformly within 1/√fan-in: its variance is 1/(3·fan-in)."""
    formula, rank = contraction(name, len(shape) - 2), 400
    factors = initial_factors(formula, shape, rank, torch.Generator().manual_seed(0))
    assert [tuple(f.shape) for f in factors] == list(formula.shapes(shape, rank))
    assert not formula(factors).any()
    assert all(f.all() for f in factors[1:])
    # What is left of the formula without its first factor, one value of it per rank.
    rest = "".join(letter for letter in "oixyz"[: len(shape)] if letter not in formula.factors[0])
    inner = next(letter for letter in formula.factors[0] if letter in "rp")
    side = torch.einsum(f"{','.join(formula.factors[1:])}->{inner}{rest}", *factors[1:])
    fan_in = math.prod(side.shape[1:])
    assert side.var().item() == pytest.approx(1 / (3 * fan_in), rel=0.15)
    assert side.mean().item() == pytest.approx(0, abs=0.01)
