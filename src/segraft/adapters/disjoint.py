"""Transposed convolutions whose outputs' patches do not overlap (kernel = stride, as in U-Nets), differentiated.

Each position of the input makes one patch of the output by a matrix; so with the patches as columns both gradients are
products of matrices, which on a CPU take half the time of oneDNN's deconvolutions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from segraft.adapters.narrow import stacked
from segraft.adapters.products import product


def patches(g: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """[B, o, *(space · kernel)] -> of each image [o · positions of the kernel, positions of space]."""
    sizes = [size for whole, k in zip(g.shape[2:], kernel, strict=True) for size in (whole // k, k)]
    within, onward = range(2, 1 + len(sizes), 2), range(1, 1 + len(sizes), 2)
    rows = g.shape[1] * math.prod(kernel)
    return [each.view(-1, *sizes).permute(0, *within, *onward).reshape(rows, -1) for each in g]


def input_gradient(columns: Sequence[Tensor], weight: Tensor, shape: torch.Size) -> Tensor:
    """Of the input, of this shape [B, i, *space]; from the patches of g and the weight [i, o, *kernel]."""
    return stacked([product(weight.flatten(1), each) for each in columns]).view(shape)


def weight_gradient(columns: Sequence[Tensor], x: Tensor, shape: torch.Size) -> Tensor:
    """Of the weight, of this shape [i, o, *kernel]; from the patches of g and x [B, i, *space]."""
    first, *others = (product(each_x.flatten(1), each.t()) for each_x, each in zip(x, columns, strict=True))
    return sum(others, start=first).view(shape)
