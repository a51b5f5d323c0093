"""Sums over all but the channels of two tensors at once, reading each only once."""

import math

import torch
from torch import Tensor

from segraft.adapters.layers import composing_dtype

FEW, MOST, ROWS = 1 << 10, 1 << 14, 16
"""Numbers of a channel summed together in float32, at least and at most; and how many channels rows must have."""

LARGE = 1 << 23
"""Of something this large no copy is made only to add it up."""

ALONE = 1 << 20
"""Numbers of an image that is worth a call of its own."""


def products_and_sums(g: Tensor, y: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ g·(y − shift) and Σ g over all dimensions but the second: two of [C], in at least float32.

    On a CPU by the backward pass of batch normalisation with fixed statistics, which is just that: mean `shift` and
    variance one, without a tensor of the products.

    Args:
        g: [B, C, …].
        y: like g.
        shift: [C]; None: zero.
    """
    channels, positions = g.shape[1], math.prod(g.shape[2:]) if g.ndim > 2 else len(g)
    parts = math.gcd(positions, 1 << max(0, (positions // FEW).bit_length() - 1))
    if _are_parts_of_images(g, y):
        several = zip(g.chunk(len(g)), y.chunk(len(g)), strict=True)
        found = [products_and_sums(each_g, each_y, shift) for each_g, each_y in several]
        products, sums = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
        return products, sums
    if not _can_be_read_once(g, y, positions // parts):
        return _one_by_one(g, y, shift)
    dtype = composing_dtype(g.dtype)
    mean = g.new_zeros(channels) if shift is None else shift.to(dtype)
    if parts > 1:
        apart = (len(g), channels * parts, -1) if g.ndim > 2 else (-1, parts * channels)
        g, y = g.view(apart), y.view(apart)
        mean = mean.repeat_interleave(parts) if g.ndim > 2 else mean.repeat(parts)
    statistics, training, eps = (mean, g.new_ones(channels * parts), None, None), False, 0.0
    wanted = [False, True, True]
    _, *found = torch.ops.aten.native_batch_norm_backward(g, y, None, *statistics, training, eps, wanted)
    products, sums = found
    if parts == 1:
        return products, sums
    if g.ndim > 2:
        return products.view(channels, parts).sum(1), sums.view(channels, parts).sum(1)
    return products.view(parts, channels).sum(0), sums.view(parts, channels).sum(0)


def _are_parts_of_images(g: Tensor, y: Tensor) -> bool:
    """Whether these are part of the channels of a batch of large images: dense each by itself, not together."""
    large = g.ndim > 2 and len(g) > 1 and g[0].numel() >= ALONE and g.device.type == "cpu"
    together = g.is_contiguous() and y.is_contiguous()
    return large and not together and g[0].is_contiguous() and y[0].is_contiguous()


def _can_be_read_once(g: Tensor, y: Tensor, part: int) -> bool:
    """On a CPU, densely, channels first or as rows: else that backward pass adds up long sums inexactly."""
    alike = g.dtype == y.dtype == composing_dtype(g.dtype) and g.device.type == "cpu" and g.numel() > 0
    dense = g.is_contiguous() and y.is_contiguous() and (g.ndim > 2 or g.shape[1] >= ROWS)
    return alike and dense and (part <= MOST or g.dtype == torch.float64)


def _one_by_one(g: Tensor, y: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    others, dtype = [d for d in range(g.ndim) if d != 1], composing_dtype(g.dtype)
    sums = g.sum(others, dtype=dtype)
    if g.ndim > 2 and g.numel() >= LARGE and g.is_contiguous() and y.is_contiguous():
        blocks = math.prod(g.shape[:2]) * math.gcd(math.prod(g.shape[2:]), 64)
        found = torch.bmm(g.view(blocks, 1, -1), y.view(blocks, -1, 1)).view(*g.shape[:2], -1).sum((0, 2), dtype=dtype)
    elif shift is not None and y.dtype == dtype:  # before they are multiplied: they may nearly cancel
        return (y - shift.to(dtype).view(-1, *(1 for _ in range(y.ndim - 2)))).mul_(g).sum(others, dtype=dtype), sums
    else:
        found = (g * y).sum(others, dtype=dtype)
    return found if shift is None else found - shift * sums, sums
