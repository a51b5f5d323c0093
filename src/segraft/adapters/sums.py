"""Sums over all but the channels of two tensors at once, reading each only once."""

import math

import torch
from torch import Tensor

from segraft.adapters.layers import composing_dtype

BLOCKS, MANY = 16, 1 << 14
"""So many parts of a channel with so many numbers are summed apart, which is more exact, and keeps cores at work."""


def products_and_sums(g: Tensor, y: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ g·(y − shift) and Σ g over all dimensions but the second: two of [C], in at least float32.

    On a CPU by the backward pass of batch normalisation with fixed statistics, which is just that: mean `shift` and
    variance one, without a tensor of the products.

    Args:
        g: [B, C, …].
        y: like g.
        shift: [C]; None: zero.
    """
    dtype = composing_dtype(g.dtype)
    if not _can_be_read_once(g, y, dtype):
        others = [d for d in range(g.ndim) if d != 1]
        sums = g.sum(others, dtype=dtype)
        if shift is not None and y.dtype == dtype:  # before they are multiplied: they may nearly cancel
            y, shift = y - shift.to(dtype).view(-1, *(1 for _ in range(y.ndim - 2))), None
        products = (g * y).sum(others, dtype=dtype)
        return products if shift is None else products - shift * sums, sums
    channels, positions = g.shape[1], math.prod(g.shape[2:]) if g.ndim > 2 else len(g)
    parts = math.gcd(positions, BLOCKS) if positions >= MANY else 1
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


def _can_be_read_once(g: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """On a CPU, densely, channels first or as rows: in other orders that backward pass adds up inexactly."""
    alike = g.dtype == y.dtype == dtype and g.device.type == "cpu" and g.numel() > 0
    return alike and g.is_contiguous() and y.is_contiguous() and (g.ndim > 2 or g.shape[1] >= BLOCKS)
