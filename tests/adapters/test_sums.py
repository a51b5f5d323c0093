"""Sums of channels against the formula in float64."""

from functools import cache

import pytest
import torch

from segraft.adapters import sums
from segraft.adapters.sums import FEW, MOST, ROWS, products_and_sums

SHAPES = [
    (7, 20),
    (7, 3),
    (1, 16),
    (1, 1),
    (3, 5, 9),
    (2, 20, 7, 6),
    (1, 1, 5, 4),
    (2, 3, 4, 5, 6),
    (1, 20, 1, 1, 1),
    (2, 3, 400),
    (2, 1, 12, 29),
    (1, 2, 31, 27),
    (1, 40, 29, 29),
    (2, 3, 6, 6, 10),
    (1, 3, 7, 5, 15),
]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "channels first of all": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "part of the channels": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "space backwards": lambda x: x.permute(0, 1, *range(x.ndim - 1, 1, -1)).contiguous().permute(
        0, 1, *range(x.ndim - 1, 1, -1)
    ),
}  # fmt: skip


@cache
def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(g, y, shift):
    """In float64, with the sizes of what was added up."""
    g, y = g.double(), y.double()
    if shift is not None:
        y = y - shift.double().view(-1, *(1 for _ in range(y.ndim - 2)))
    exact = torch.einsum("bc...,bc...->c", g, y), torch.einsum("bc...->c", g)
    return exact, (torch.einsum("bc...,bc...->c", g.abs(), y.abs()), torch.einsum("bc...->c", g.abs()))


def assert_right(g, y, shift, tolerance):
    found = products_and_sums(g, y, shift)
    for value, exact, size in zip(found, *expected(g, y, shift), strict=True):
        assert value.shape == (g.shape[1],)
        assert value.dtype == torch.promote_types(g.dtype, torch.float32)
        assert bool(((value.double() - exact).abs() <= tolerance * size).all())


@pytest.fixture
def parts_of_small_channels(monkeypatch):
    monkeypatch.setattr(sums, "FEW", 20)
    monkeypatch.setattr(sums, "ALONE", 40)


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.usefixtures("parts_of_small_channels")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_y", LAYOUTS)
@pytest.mark.parametrize("of_g", LAYOUTS)
def test_sums_are_right_however_both_lie_in_memory(of_g, of_y, dtype, shifted):
    for shape in SHAPES:
        if len(shape) > 3 or of_g == of_y == "contiguous":
            g, y = LAYOUTS[of_g](draw(*shape).to(dtype)), LAYOUTS[of_y](draw(*shape, seed=1).to(dtype))
            shift = draw(shape[1], seed=2).to(dtype) if shifted else None
            assert_right(g, y, shift, TOLERANCE[dtype])


@pytest.mark.usefixtures("parts_of_small_channels")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype, shape, shifted):
    g, y = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)
    shift = draw(shape[1], seed=2).float() if shifted else None
    found = products_and_sums(g, y, shift)
    assert [each.dtype for each in found] == [torch.float32, torch.float32]
    (products, total), size = expected(g, y, None)
    # Products are rounded each to the dtype, sums are not.
    assert bool(((found[1].double() - total).abs() <= 2e-6 * size[1]).all())
    exact = products if shift is None else products - shift.double() * total
    bound = TOLERANCE[dtype] * size[0] + 2e-6 * (0 if shift is None else shift.double().abs() * size[1])
    assert bool(((found[0].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("shape", [(6, 20), (6, 3), (2, 3, 7), (2, 3, 16, 32), (1, 20, 15, 29)])
@pytest.mark.usefixtures("parts_of_small_channels")
def test_sums_of_what_has_no_memory_of_its_own(shape):
    """Such as the gradient of a sum."""
    one, shift = torch.full((), 1.5, dtype=torch.float64), draw(shape[1])
    for g in (one.expand(shape), draw(*shape[:2], *(1 for _ in shape[2:])).expand(shape)):
        assert_right(g, draw(*shape, seed=1), shift, 1e-12)
        assert_right(draw(*shape, seed=1), g, shift, 1e-12)


def test_other_tensors_are_left_as_they_are():
    g, y, shift = torch.ones(2, 3, 128, 128), torch.ones(2, 3, 128, 128), torch.ones(3)
    products, total = products_and_sums(g, y, shift)
    products.fill_(7)
    total.fill_(7)
    for each in (g, y, shift):
        assert torch.equal(each, torch.ones_like(each))


@cache
def near_a_thousand(*shape):
    """g, y and for each shift what their sums are in float64: numbers that differ by one around a large offset."""
    g, y = (draw(*shape) + 10).float(), (draw(*shape, seed=1) + 1000).float()
    return g, y, [(shift, expected(g, y, shift)) for shift in (None, torch.full((shape[1],), 1000.5))]


@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 1024, 1024), (1, 2, 1023, 1025), (16, 2, 256, 256)])
def test_float32_stays_near_float64_over_a_million_numbers_with_a_large_offset(shape, of):
    """Whether or not the offset is taken off."""
    g, y, known = near_a_thousand(*shape)
    for shift, (exact, size) in known:
        found = products_and_sums(LAYOUTS[of](g), LAYOUTS[of](y), shift)
        for value, precise, summed in zip(found, exact, size, strict=True):
            assert bool(((value.double() - precise).abs() <= 1e-4 * summed).all())


@pytest.mark.parametrize("positions", [FEW - 1, FEW, 2 * FEW, 2 * FEW + 2, MOST, MOST + 1, 2 * MOST, 6 * MOST])
def test_around_the_size_from_which_on_channels_are_summed_in_parts(positions):
    for channels in (1, 3, ROWS):
        g, y = draw(2, channels, positions).float(), draw(2, channels, positions, seed=1).float()
        assert_right(g, y, draw(channels, seed=2).float(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [(1_000_001, 16), (16_383, 64), (1, 8, 127, 127, 63), (2, 3, 2**18)])
def test_odd_sizes_are_summed_as_exactly(shape):
    g, y = torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.ones(shape)
    for found in products_and_sums(g, y, None):
        exact = g.double().sum([d for d in range(g.ndim) if d != 1])
        assert bool(((found.double() - exact).abs() <= 5e-6 * exact).all())


def test_empty_sums_are_zero():
    for shape in ((0, 20), (0, 20, 4, 5), (2, 20, 0)):
        products, total = products_and_sums(torch.zeros(shape), torch.zeros(shape), torch.ones(20))
        assert torch.equal(products, torch.zeros(20))
        assert torch.equal(total, torch.zeros(20))


def test_tokens_and_small_images_are_not_summed_one_by_one(monkeypatch):
    """Part of the features of many, as of queries beside keys and values."""
    halves = [draw(*shape)[:, : shape[1] // 2] for shape in [(500, 64), (40, 32, 6, 6)]]
    several = [products_and_sums(half, half.contiguous(), None)[0] for half in halves]
    monkeypatch.setattr(sums, "products_and_sums", None)  # by which they would
    for half, expected in zip(halves, several, strict=True):
        torch.testing.assert_close(products_and_sums(half, half.contiguous(), None)[0], expected)
