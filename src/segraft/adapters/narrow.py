"""Parts of convolutions with few channels on one side, as matrix products over memory as it lies.

torch's own bring the wide side into a layout of theirs, which at these sizes costs more than the product, and pad the
few channels to a vector's length. Here the wide side is read once, in place; only the narrow one is shifted about.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from segraft.adapters.layers import composing_dtype
from segraft.adapters.products import LANES, product, served_product, serves

Offset = tuple[int, ...]


def pointwise(matrix: Tensor, x: Tensor) -> Tensor:
    """[o, i] applied to the channels of x [B, i, *space]."""
    return stacked([wide_product(matrix, each) for each in images(x.flatten(2))]).view(len(x), -1, *x.shape[2:])


def images(x: Tensor) -> Sequence[Tensor]:
    """Of a batch; torch's own iteration takes longer than a small product, and mostly there is one."""
    return (x[0],) if x.shape[0] == 1 else x.unbind()


def stacked(each: Sequence[Tensor]) -> Tensor:
    """A batch of these; of one alone no copy."""
    return each[0].unsqueeze(0) if len(each) == 1 else torch.stack(list(each))


def wide_product(matrix: Tensor, x: Tensor) -> Tensor:
    """[o, i] @ [i, n] for few rows and very many columns: [o, n].

    By BLAS in blocks of columns, which spreads it better over the cores of a CPU.
    """
    if serves(matrix, x):
        return served_product(matrix, x)
    n = x.shape[1]
    blocks = math.gcd(n, 32)
    if x.device.type != "cpu" or n // blocks < 256:
        return matrix @ x
    parts = torch.bmm(matrix.expand(blocks, *matrix.shape), x.view(x.shape[0], blocks, -1).transpose(0, 1))
    return parts.transpose(0, 1).reshape(matrix.shape[0], n)


@dataclass(frozen=True)
class Window:
    """Where the positions of a kernel lie in an image padded with zeros, one tuple entry per spatial dimension.

    Attributes:
        kernel: its sizes.
        padding: zeros on both sides; negative where that much is cut off.
        dilation: steps between its positions.
        stride: steps between outputs.
    """

    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]

    def offsets(self) -> Iterator[tuple[tuple[int, ...], Offset]]:
        """Each position of the kernel, and where it lies from the output's position."""
        for position in itertools.product(*map(range, self.kernel)):
            yield position, tuple(k * d - p for k, d, p in zip(position, self.dilation, self.padding, strict=True))

    def outputs(self, space: Sequence[int]) -> list[int]:
        """Sizes of the output for an image of these."""
        geometry = zip(space, self.kernel, self.padding, self.dilation, self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, d, s in geometry]

    def opposite(self) -> "Window":
        """Of the kernel reversed, from the output's side: where outputs lie from an input, with stride 1."""
        geometry = zip(self.kernel, self.dilation, self.padding, strict=True)
        return replace(self, padding=tuple(d * (k - 1) - p for k, d, p in geometry))

    def view(self, x: Tensor, space: Sequence[int]) -> Tensor:
        """[B, C, *kernel, *space]: x [B, C, …] as each position of the kernel sees it, without copies of it but one."""
        around = [side for padding in reversed(self.padding) for side in (padding, padding)]
        x = nn.functional.pad(x, around) if any(around) else x
        batch, channel, *steps = x.stride()
        within = [step * d for step, d in zip(steps, self.dilation, strict=True)]
        onward = [step * s for step, s in zip(steps, self.stride, strict=True)]
        return x.as_strided((*x.shape[:2], *self.kernel, *space), (batch, channel, *within, *onward))


COPIES, PARTS = 1 << 21, 1 << 23
"""So many numbers of unfolded copies, or of parts to be folded, at a time: what a cache holds, and little memory."""


def slabs(space: Sequence[int], channels: int, limit: int) -> Iterator[slice]:
    """Of the first spatial dimension, so thick that so many channels make no more than `limit` numbers."""
    size = max(1, limit // max(1, channels * math.prod(space[1:])))
    for start in range(0, space[0], size):
        yield slice(start, min(space[0], start + size))


def unfolded_correlation(narrow: Tensor, wide: Tensor, window: Window) -> Tensor:
    """Σ over batch and space of narrow [B, r, …], as a window sees it, times wide [B, c, *space]: [r, *kernel, c]."""
    space, rows = wide.shape[2:], narrow.shape[1] * math.prod(window.kernel)
    total: Tensor | None = None
    for seen, each in zip(images(window.view(narrow, space)), images(wide), strict=True):
        for slab in slabs(space, rows, COPIES):
            unfolded = seen.narrow(-len(space), slab.start, slab.stop - slab.start).reshape(1, rows, -1)
            found = correlation(unfolded, each[:, slab].reshape(1, len(each), -1))
            total = found if total is None else total.add_(found)
    assert total is not None  # noqa: S101  batches are not empty
    return total.view(narrow.shape[1], *window.kernel, -1)


def folded_convolution(x: Tensor, weight: Tensor, window: Window, space: Sequence[int]) -> Tensor:
    """[B, i, …] ∗ [o, i, *kernel] -> [B, o, *space] for few outputs, with stride 1.

    One product gives what each position of the kernel contributes; these are added up, each where it belongs.
    """
    o, i, *_ = weight.shape
    matrix = weight.movedim((0, 1), (-2, -1)).reshape(-1, i)
    y = x.new_zeros(len(x), o, *space)
    here = steps(space)
    for each_y, each_x in zip(images(y), images(x), strict=True):
        for slab in slabs(x.shape[2:], len(matrix), PARTS):
            thick = (slab.stop - slab.start, *x.shape[3:])
            parts, there = wide_product(matrix, each_x[:, slab].reshape(i, -1)).contiguous(), steps(thick)
            first_part, first = parts.storage_offset(), each_y.storage_offset()
            for n, (sizes, begin, target) in enumerate(_folds(window, slab.start, thick, tuple(space))):
                part = parts.as_strided((o, *sizes), there, first_part + n * o * there[0] + begin)
                each_y.as_strided((o, *sizes), here, first + target).add_(part)
    return y


def steps(space: Sequence[int]) -> tuple[int, ...]:
    """Of a channel and of each dimension of an image of this size, in memory."""
    return tuple(math.prod(space[d:]) for d in range(len(space) + 1))


@lru_cache(maxsize=4096)
def _folds(
    window: Window, start: int, there: tuple[int, ...], here: tuple[int, ...]
) -> Sequence[tuple[tuple[int, ...], int, int]]:
    """For each position of the kernel the sizes of what it contributes, and where that begins in its part and in y.

    Args:
        window: of the convolution.
        start: of the slab.
        there: sizes of the slab.
        here: sizes of y.
    """
    found = []
    for _, (first, *others) in window.offsets():
        overlapping = [each[2:] for each in overlap((first - start, *others), there, here)]
        begins = (
            sum(each.start * step for each, step in zip(slices, steps(sizes)[1:], strict=True))
            for slices, sizes in zip(overlapping, (there, here), strict=True)
        )
        found.append((tuple(each.stop - each.start for each in overlapping[1]), *begins))
    return found


def scattered_product(g: Tensor, weight: Tensor, window: Window, shape: torch.Size) -> Tensor:
    """The gradient of an input of this shape [B, i, *space] from g [B, o, …] and [o, i, *kernel], with stride 1.

    For few positions: one product reads the weight as it lies, and gives what each position of g contributes through
    each of the kernel; these are added up, each where it belongs.
    """
    there, i = g.shape[2:], weight.shape[1]
    parts = product(g.movedim(1, -1).reshape(-1, len(weight)), weight.flatten(1)).view(len(g), *there, i, -1)
    parts, found = parts.movedim(-2, 1), g.new_zeros(shape)
    for position, (_, offset) in enumerate(window.offsets()):
        source, target = overlap(tuple(-each for each in offset), there, shape[2:])
        found[target].add_(parts[..., position][source])
    return found


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


SHORT_ROWS, LONG_ROWS, MANY = 1 << 11, 1 << 18, 1 << 22
"""Of rows that are neither shorter nor longer, oneDNN better takes the wide side's as rows; of a wide side with more
numbers than that, only where the narrow one fills its vectors."""


def _pays_to_turn(rows: int, length: int, numbers: int) -> bool:
    """Whether `correlation` had better take its wide side, of so many numbers, as rows of the product."""
    return SHORT_ROWS <= length < LONG_ROWS and (numbers < MANY or rows <= LANES or rows % LANES == 0)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Σ over batch of a [B, m, n] @ b [B, k, n]ᵀ, which are served."""
    first, *others = (served_product(each_a, each_b.t()) for each_a, each_b in zip(images(a), images(b), strict=True))
    return sum(others, start=first)


def correlation(g: Tensor, x: Tensor) -> Tensor:
    """Σ over batch and positions of g [B, o, n] times x [B, i, n]: [o, i].

    By BLAS in blocks of positions: as one product, a result so small would leave most cores idle.
    """
    if g.shape[1] > x.shape[1]:
        return correlation(x, g).t()
    if serves(g[0], x[0].t()):
        if _pays_to_turn(g.shape[1], g.shape[2], x[0].numel()):
            return _sum_of_products(x, g).t()
        return _sum_of_products(g, x)
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
