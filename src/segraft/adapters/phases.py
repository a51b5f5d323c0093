"""Convolutions with few channels as the CPU computes them best.

oneDNN computes 16 output channels at a time; with R = 4 of them three quarters of the work is for nothing. Here
p = 16/R outputs in a row along the first spatial dimension are p·R channels of one convolution with stride p, whose
kernel holds the small one p times, each a step further: (k + p − 1)/(p·k) of the work. And for depthwise kernels in
three dimensions it has no fast code, so few channels go through a dense kernel, and its gradient through planes.
"""

import torch
from torch import Tensor

from segraft.adapters.narrow import overlap
from segraft.adapters.products import LANES

convolve = torch.ops.aten.convolution.default
convolution_backward = torch.ops.aten.convolution_backward.default


def phase_count(channels: int, kernel: int) -> int:
    """How many outputs in a row pay, for so many channels and this size of the kernel in the first dimension."""
    return max(1, LANES // channels) if kernel > 1 else 1


def phases_for(x: Tensor, y_size: int, channels: int, kernel: int) -> int:
    """How many can be had for this input and size of the output in the first dimension; 1: none."""
    if x.device.type != "cpu" or not x.is_contiguous() or x.dtype == torch.float64:
        return 1
    return next((p for p in range(phase_count(channels, kernel), 0, -1) if y_size % p == 0), 1)


def convolve_in_phases(
    x: Tensor, weight: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...], p: int
) -> Tensor:
    """[B, i, *space] ∗ [R, i, *kernel] -> [B, R, *space] with stride 1, and dilation 1 in the first dimension."""
    stride, none = (p, *(1 for _ in padding[1:])), [0] * len(padding)
    y: Tensor = convolve(x, _staggered(weight, p), None, stride, padding, dilation, False, none, 1)  # noqa: FBT003
    return y.view(y.shape[0], p, -1, *y.shape[2:]).movedim(1, 3).flatten(2, 3)


def weight_gradient_in_phases(
    g: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...], p: int
) -> Tensor:
    """Of that weight, from g [B, R, *space]."""
    stride, none = (p, *(1 for _ in padding[1:])), [0] * len(padding)
    g = g.reshape(*g.shape[:2], -1, p, *g.shape[3:]).movedim(3, 1).flatten(1, 2).contiguous()
    shape = (p * weight.shape[0], weight.shape[1], weight.shape[2] + p - 1, *weight.shape[3:])
    geometry = (stride, padding, dilation, False, none, 1)
    _, found, _ = convolution_backward(g, x, weight.new_empty(shape), None, *geometry, [False, True, False])
    total: Tensor = sum(each[:, :, j : j + weight.shape[2]] for j, each in enumerate(found.chunk(p)))
    return total


def _staggered(weight: Tensor, p: int) -> Tensor:
    """[p·R, i, k + p − 1, …]: the kernel p times, each a step further."""
    rank, i, k, *others = weight.shape
    staggered = weight.new_zeros(p, rank, i, k + p - 1, *others)
    for j in range(p):
        staggered[j, :, :, j : j + k] = weight
    return staggered.flatten(0, 1)


def depthwise_as_dense(weight: Tensor) -> Tensor:
    """[R, 1, *kernel] -> [R, R, *kernel], on the diagonal."""
    return torch.diag_embed(weight.squeeze(1).movedim(0, -1)).movedim((-2, -1), (0, 1)).contiguous()


def depthwise_weight_gradient(
    g: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Of a depthwise weight [R, 1, k, *kernel] with stride 1 in three dimensions, plane by plane.

    Every plane of every channel is a channel of a depthwise convolution in two dimensions, which is fast.
    """
    rank, _, size, *kernel = weight.shape
    slices = []
    for position in range(size):
        there, here = overlap((position * dilation[0] - padding[0],), x.shape[2:3], g.shape[2:3])
        planes_x, planes_g = (each[where].flatten(0, 2).unsqueeze(0) for each, where in ((x, there), (g, here)))
        planes = planes_g.shape[1]
        if planes == 0:
            slices.append(weight.new_zeros(rank, *kernel))
            continue
        geometry = ([1, 1], padding[1:], dilation[1:], False, [0, 0], planes)
        dummy = weight.new_empty(planes, 1, *kernel)
        _, found, _ = convolution_backward(planes_g, planes_x, dummy, None, *geometry, [False, True, False])
        slices.append(found.view(x.shape[0], rank, -1, *kernel).sum((0, 2)))
    return torch.stack(slices, 1).unsqueeze(1)
