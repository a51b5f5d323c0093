"""Batch norms over the shares of several processes.

PyTorch's `SyncBatchNorm` is for GPUs alone and takes the place of a layer, which would end what is grafted onto it.
Here a layer keeps its identity, and its `forward` is replaced for the length of a training, as in `recomputation`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from segraft.errors import SegraftError
from segraft.training.distributed import Together

FORWARD = "forward"


@contextmanager
def batch_norms_together(net: nn.Module, together: Together | None) -> Iterator[None]:
    """Within the `with` block, batch norms take their statistics over the batch of all processes.

    Running statistics then are the same in every process, and those of one process with the whole batch.

    Args:
        net: grafted or not; changed for the length of the block.
        together: the shared batch; None, for one process, changes nothing.

    Raises:
        SegraftError: an instance norm tracks running statistics, which would come to differ between processes.
    """
    if together is None:
        yield
        return
    tracking = [
        name for name, each in net.named_modules() if isinstance(each, _InstanceNorm) and each.track_running_stats
    ]
    if tracking:
        raise SegraftError(
            f"instance norm {tracking[0]!r} tracks running statistics, which several processes cannot share: use "
            "--devices 1, or a network without."
        )
    norms = [each for each in net.modules() if isinstance(each, _BatchNorm)]
    for norm in norms:
        norm.__dict__[FORWARD] = _Forward(norm, together)
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__[FORWARD]


class _Forward:
    """Stands in for the `forward` of a batch norm."""

    def __init__(self, norm: _BatchNorm, together: Together) -> None:
        self.norm, self.together = norm, together

    def __call__(self, image: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            result: Tensor = type(norm).forward(norm, image)
            return result
        if image.shape[2:].numel() * sum(self.together.sizes) <= 1:
            raise ValueError(f"expected more than 1 value per channel when training, got input size {image.shape}")
        output, mean, variance, count = _Normalised.apply(  # type: ignore[no-untyped-call]
            image, norm.weight, norm.bias, norm.eps, self.together.idle
        )
        if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked or 1)
            norm.running_mean.mul_(1 - share).add_(share * mean)
            norm.running_var.mul_(1 - share).add_(share * variance * (count / (count - 1)))
        normalised: Tensor = output
        return normalised


class _Normalised(torch.autograd.Function):
    """(x − mean) / √(variance + ε) · weight + bias, per channel, over all processes, in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        idle: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, ctx.shape, ctx.idle = [0, *range(2, image.dim())], (1, -1, *[1] * (image.dim() - 2)), idle
        wide = image.to(torch.promote_types(image.dtype, torch.float32))
        counted = wide.new_tensor([image.numel() / image.shape[1]])
        sums = _total(torch.cat([wide.sum(axes), counted]), idle=idle)
        mean, ctx.count = sums[:-1] / sums[-1], sums[-1]
        centred = wide - mean.view(ctx.shape)
        variance = _total(centred.square().sum(axes), idle=idle) / ctx.count
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(image, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance, ctx.count)
        output = centred.mul_(scale.view(ctx.shape))
        if weight is not None and bias is not None:
            output = output * weight.view(ctx.shape) + bias.view(ctx.shape)
        return output.to(image.dtype), mean, variance, ctx.count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        image, weight, mean, scale = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        axes = [0, *range(2, image.dim())]
        normalised = (image.to(mean.dtype) - mean.view(ctx.shape)) * scale.view(ctx.shape)
        for_bias, for_weight = gradient.sum(axes), (gradient * normalised).sum(axes)
        sums = _total(torch.stack([for_bias, for_weight]), idle=ctx.idle) / ctx.count
        passed = gradient - sums[0].view(ctx.shape) - normalised * sums[1].view(ctx.shape)
        passed = passed * (scale if weight is None else scale * weight).view(ctx.shape)
        if ctx.idle:
            passed.zero_()
        affine = (for_weight, for_bias) if weight is not None else (None, None)
        return passed.to(image.dtype), *affine, None, None


def _total(mine: Tensor, *, idle: bool) -> Tensor:
    """The sum over all processes that have a share of the batch."""
    if idle:
        mine.zero_()
    dist.all_reduce(mine)
    return mine
