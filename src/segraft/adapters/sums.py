"""Sums over all but the channels of two tensors at once, reading each only once."""

import math

import torch
from torch import Tensor

from segraft.adapters.layers import composing_dtype

BLOCKS = 16
"""So many parts of a channel are summed apart, which is more exact, and as many cores have work with few channels."""


MANY = 1 << 14


def products_and_sums(g: Tensor, y: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ g·(y − shift) and Σ g over all dimensions but the second: two of [C], in at least float32.

    On a CPU by the backward pass of batch normalisation with fixed statistics, which is just that: mean `shift` and
    variance one, without a tensor of the products.

    Args:
        g: [B, C, …].
        y: like g.
        shift: [C]; None: zero.
    """
    channels, dtype = g.shape[1], composing_dtype(g.dtype)
    if g.device.type != "cpu" or g.dtype != dtype or y.dtype != dtype or (g.ndim == 2 and channels < BLOCKS):
        others = [d for d in range(g.ndim) if d != 1]
        sums = g.sum(others, dtype=dtype)
        products = (g * y).sum(others, dtype=dtype)
        return products if shift is None else products - shift * sums, sums
    parts = 1
    if g.ndim > 2 and g.is_contiguous() and y.is_contiguous():
        positions = math.prod(g.shape[2:])
        parts = math.gcd(positions, BLOCKS) if positions >= MANY else 1
        g, y = (each.view(each.shape[0], channels * parts, -1) for each in (g, y))
    mean = g.new_zeros(channels * parts) if shift is None else shift.to(dtype)
    if parts > 1 and shift is not None:
        mean = mean.repeat_interleave(parts)
    statistics = (mean, g.new_ones(channels * parts), None, None)
    outputs = [False, True, True]
    training, eps = False, 0.0
    _, products, sums = torch.ops.aten.native_batch_norm_backward(g, y, None, *statistics, training, eps, outputs)
    return products.view(channels, parts).sum(1), sums.view(channels, parts).sum(1)
