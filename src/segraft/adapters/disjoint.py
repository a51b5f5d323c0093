"""Transposed convolutions whose outputs' patches do not overlap (kernel = stride, as in U-Nets), differentiated.

Each position of the input makes one patch of the output by a matrix; so with the patches as columns both gradients are
products of matrices, which on a CPU take half the time of oneDNN's deconvolutions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from segraft.adapters.products import product


def patches(g: Tensor, kernel: Sequence[int], space: Sequence[int]) -> Tensor:
    """[o, *(space · kernel)] -> [o · positions of the kernel, positions of space]."""
    dims = len(kernel)
    apart = g.view(len(g), *(size for pair in zip(space, kernel, strict=True) for size in pair))
    within, onward = range(2, 2 + 2 * dims, 2), range(1, 1 + 2 * dims, 2)
    return apart.permute(0, *within, *onward).reshape(len(g) * math.prod(kernel), -1)


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """[B, i, *space] from g [B, o, *(space · kernel)] and the weight [i, o, *kernel]."""
    kernel = weight.shape[2:]
    space = [size // k for size, k in zip(g.shape[2:], kernel, strict=True)]
    found = [product(weight.flatten(1), patches(each, kernel, space)) for each in g]
    return torch.stack(found).view(len(g), -1, *space)


def weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """[i, o, *kernel] from g and x [B, i, *space]; of the weight only its shape matters."""
    pairs = zip(g, x, strict=True)
    found = [product(each_x.flatten(1), patches(each_g, weight.shape[2:], x.shape[2:]).t()) for each_g, each_x in pairs]
    return sum(found[1:], start=found[0]).view(weight.shape)
