"""The weight of a low-rank edit from two matrices, and back: W = γ V, V = W0 + left @ right, γ = m / ‖V‖.

For execution, outside autograd's graph; `LowRank.forward` says the same in it. Weight-sized passes are what an adapter
costs where images are small, so each is one call that keeps the weight's own memory format.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segraft.adapters.layers import WeightSlot, channel_norm, composing_dtype
from segraft.adapters.narrow import correlation, wide_product
from segraft.adapters.products import is_traced, product, served_product, serves
from segraft.adapters.stages import SPREAD, Matrices


@dataclass(frozen=True)
class Layout:
    """A weight [o, i, *kernel] as a matrix of which `left @ right` is the update.

    Attributes:
        order: of the dimensions; the first `split` make the rows of the matrix, the others its columns.
        split: 1, or more where rows count kernel positions too.
    """

    order: tuple[int, ...]
    split: int

    @classmethod
    def of(cls, weight: Tensor, held: tuple[int, ...] = ()) -> "Layout":
        """Rows count o and the dimensions `held`; columns lie as in the memory of `weight`."""
        rest = [d for d in range(2, weight.ndim) if d not in held]
        return cls((0, *held, *((1, *rest) if channels_first(weight) else (*rest, 1))), 1 + len(held))

    def matrix(self, tensor: Tensor) -> Tensor:
        """[rows, columns] of a weight, or of a `right`, which has size 1 in the dimensions held; a view if it can."""
        sizes = [tensor.shape[d] for d in self.order]
        # Both are named: a tensor of rank 0 has no -1.
        return tensor.permute(self.order).reshape(math.prod(sizes[: self.split]), math.prod(sizes[self.split :]))

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`: a view."""
        inverse = [self.order.index(d) for d in range(len(shape))]
        return matrix.view([shape[d] for d in self.order]).permute(inverse)


def channels_first(tensor: Tensor) -> bool:
    """Whether memory holds [o, i, *kernel] rather than [o, *kernel, i]."""
    return tensor.ndim < 3 or tensor.is_contiguous() or not tensor.movedim(1, -1).is_contiguous()


def compose(
    base: Tensor, update: Matrices, m: Tensor | None, slot: WeightSlot, magnitude_dim: int | None
) -> tuple[Tensor, Tensor | None]:
    """W [o, i, *kernel] in the dtype of the composition and the memory format of W0; n = ‖V‖ with a magnitude.

    Differentiable where a gradient is wanted, by BLAS, and to rounding the same where none is.

    Args:
        base: W0 [o, i, *kernel].
        update: ΔW, scaled.
        m: magnitudes [channels]; None without.
        slot: says where the channels of W are.
        magnitude_dim: of the spec.
    """
    dtype = composing_dtype(base.dtype)
    update = update.spread(base.shape, SPREAD)
    base, left, right = base.to(dtype), update.left.to(dtype), update.right.to(dtype)
    layout = Layout.of(base, update.held)
    if update.held:
        weight = _sum(base, layout.tensor(product(left, layout.matrix(right)), base.shape), update.held)
    else:
        weight = layout.tensor(_sum_and_product(layout.matrix(base), left, layout.matrix(right)), base.shape)
    if m is None:
        return weight, None
    norm = channel_norm(weight, slot, magnitude_dim)
    gain = m.to(dtype) / norm
    if slot.groups > 1:
        view = slot.by_output_channel(weight, magnitude_dim)
        return (gain.view(view.shape[0], 1, -1, 1) * view).reshape(weight.shape), norm
    dim = slot.channel_dim(magnitude_dim)
    if weight.requires_grad or gain.requires_grad:
        return weight * along(gain, weight, dim), norm
    rows, gain = by_rows(weight, gain, dim)
    rows.mul_(gain)
    return weight, norm


def _sum(base: Tensor, delta: Tensor, held: tuple[int, ...]) -> Tensor:
    """Base + delta in the memory format of base; delta [o, i, *kernel] lies with the dimensions `held` before i."""
    differentiated = base.requires_grad or delta.requires_grad
    if differentiated or not (base.is_cpu and channels_first(base)) or is_traced(base, delta):
        return base + delta
    # Position by position, as otherwise what lies in a row together is no more than a kernel's.
    weight = torch.empty_like(base)
    for position in itertools.product(*(range(base.shape[d]) for d in held)):
        at: list[slice | int] = [slice(None)] * base.ndim
        for d, index in zip(held, position, strict=True):
            at[d] = index
        torch.add(base[tuple(at)], delta[tuple(at)], out=weight[tuple(at)])
    return weight


def _sum_and_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Base + left @ right; by BLAS in blocks of rows, which spread so flat a product better over the cores of a CPU."""
    if serves(left, right):
        return served_product(left, right).add_(base)
    if base.device.type != "cpu" or base.numel() < 1 << 20 or len(base) % BLOCKS:
        return torch.addmm(base, left, right)
    base, left = base.view(BLOCKS, -1, base.shape[1]), left.reshape(BLOCKS, -1, left.shape[1])
    return torch.baddbmm(base, left, right.expand(BLOCKS, *right.shape)).flatten(0, 1)


BLOCKS = 32


def along(values: Tensor, weight: Tensor, channel_dim: int) -> Tensor:
    """[channels] shaped to be broadcast over `weight`."""
    return values.view([-1 if d == channel_dim else 1 for d in range(weight.ndim)])


def by_rows(weight: Tensor, values: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """A weight and values [channels], shaped to be broadcast over it.

    Where the channels are the second dimension, both as rows, if memory lies like that: what is done to the few
    positions of a kernel at a time, between channels, is slow.
    """
    if channel_dim == 1 and weight.ndim > 2 and weight.is_contiguous():
        return weight.flatten(1), values.repeat_interleave(weight.shape[2:].numel())
    return weight, along(values, weight, channel_dim)


def contract(
    gradient: Tensor, update: Matrices, shrink: Tensor | None = None, channel_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """The gradients of left and right from that of ΔW [o, i, *kernel], multiplied by `shrink` [channels]."""
    if shrink is not None and channel_dim == 1:
        shrink = along(shrink, update.right, 1)
        of_left, of_right = contract(gradient, replace(update, right=update.right * shrink))
        return of_left, of_right * shrink
    spread = update.spread(gradient.shape, SPREAD)
    layout = Layout.of(gradient, spread.held)
    matrix, right = layout.matrix(gradient), layout.matrix(spread.right)
    left = spread.left if shrink is None else by_row(spread.left, shrink)
    of_left = correlation(matrix.unsqueeze(0), right.unsqueeze(0))
    of_right = layout.tensor(wide_product(left.t(), matrix), spread.right.shape)
    return update.gathered(of_left if shrink is None else by_row(of_left, shrink), of_right)


def by_row(left: Tensor, values: Tensor) -> Tensor:
    """`left` [o·…, ρ] with the rows of each output channel multiplied by its value [o]."""
    return (left.reshape(len(values), -1) * values.unsqueeze(1)).view(left.shape)
