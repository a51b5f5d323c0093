"""Parts of convolutions with few channels on one side, as matrix products over memory as it lies.

torch's own bring the wide side into a layout of theirs, which at these sizes costs more than the product, and pad the
few channels to a vector's length. Here the wide side is read once, in place; only the narrow one is shifted about.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from segraft.adapters.layers import composing_dtype

Offset = tuple[int, ...]


def pointwise(matrix: Tensor, x: Tensor) -> Tensor:
    """[o, i] applied to the channels of x [B, i, *space]."""
    return torch.stack([wide_product(matrix, each) for each in x.flatten(2)]).view(len(x), -1, *x.shape[2:])


def wide_product(matrix: Tensor, x: Tensor) -> Tensor:
    """[o, i] @ [i, n] for few rows and very many columns: [o, n].

    In blocks of columns, which spreads it better over the cores of a CPU.
    """
    n = x.shape[1]
    blocks = math.gcd(n, 32)
    if x.device.type != "cpu" or n // blocks < 256:
        return matrix @ x
    parts = torch.bmm(matrix.expand(blocks, *matrix.shape), x.view(x.shape[0], blocks, -1).transpose(0, 1))
    return parts.transpose(0, 1).reshape(matrix.shape[0], n)


def opposite(offsets: Sequence[Offset]) -> list[Offset]:
    """Where the output's position lies from each position of the kernel."""
    return [tuple(-each for each in offset) for offset in offsets]


def gather(x: Tensor, offsets: Sequence[Offset], space: Sequence[int], stride: Offset | None = None) -> Tensor:
    """[B, k·C + c, n] = x[c, n·stride + offset_k], what lies outside being zero; n counts the positions of `space`."""
    if len(offsets) == 1 and not any(offsets[0]) and tuple(space) == tuple(x.shape[2:]) and x.is_contiguous():
        return x.flatten(2)
    copies = x.new_zeros(x.shape[0], len(offsets), x.shape[1], *space)
    for k, offset in enumerate(offsets):
        there, here = overlap(offset, x.shape[2:], space, stride)
        copies[:, k][here].copy_(x[there])
    return copies.view(x.shape[0], len(offsets) * x.shape[1], -1)


def overlap(
    offset: Offset, there: Sequence[int], here: Sequence[int], stride: Offset | None = None
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of [B, C, *there] and of [B, C, *here] such that position n here meets n·stride + offset there."""
    source, target = [slice(None)] * 2, [slice(None)] * 2
    for off, n_there, n_here, step in zip(offset, there, here, stride or (1,) * len(offset), strict=True):
        first = max(0, -(off // step))  # the smallest n with n·step + off >= 0
        last = min(n_here - 1, (n_there - 1 - off) // step)
        count = max(0, last - first + 1)
        begin = first * step + off
        target.append(slice(first, first + count))
        source.append(slice(begin, begin + (count - 1) * step + 1, step) if count else slice(0, 0))
    return tuple(source), tuple(target)


def correlation(g: Tensor, x: Tensor) -> Tensor:
    """Σ over batch and positions of g [B, o, n] times x [B, i, n]: [o, i].

    In blocks of positions: as one product, a result so small would leave most cores idle.
    """
    if g.shape[1] > x.shape[1]:
        return correlation(x, g).t()
    n, dtype = g.shape[2], composing_dtype(g.dtype)
    blocks = math.gcd(n, 64)
    if n // blocks < 256:
        return torch.bmm(g, x.transpose(1, 2)).sum(0, dtype=dtype)
    total = g.new_zeros(g.shape[1], x.shape[1], dtype=dtype)
    for each_g, each_x in zip(g, x, strict=True):
        block_g = each_g.view(each_g.shape[0], blocks, -1).permute(1, 0, 2)
        block_x = each_x.view(each_x.shape[0], blocks, -1).permute(1, 2, 0)
        total += torch.bmm(block_g, block_x).sum(0, dtype=dtype)
    return total
