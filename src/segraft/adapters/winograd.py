"""Convolutions with three kernel positions in a row by Winograd's minimal filtering F(4, 3), and their gradients.

Four results y_j = Σ_k w_k d_{j+k} in a row are Aᵀ[(G w) ⊙ (Bᵀ d)]: six products in place of twelve (Winograd 1980;
Lavin and Gray 2016, equations 6 to 8). Here along one spatial dimension: over the others and over channels each product
is itself a convolution, and the six are one grouped convolution of half the operations. With x the input, g the
gradient of the output and w' the kernel reversed along that dimension,

    y = Aᵀ[(G w) ⊙ (Bᵀ x)]        dL/dx = Aᵀ[(G w') ⊙ (Bᵀ g)]        dL/dw' = Gᵀ[(A x) ⊙ (Bᵀ g)]

Rounding errors are two to six times those of the plain sums where rows are of similar size, about 1e-6 in float32.
They are relative to the largest row of a tile: beside it small ones lose digits, and one that is not finite spoils its
tile.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segraft.adapters.products import LANES, is_left_to_torch

convolve = torch.ops.aten.convolution.default
convolution_backward = torch.ops.aten.convolution_backward.default

TILE, PRODUCTS = 4, 6
SLAB = 1 << 20
"""So many numbers are transformed at a time: what a cache holds, and little memory; or twice as many as the weight has,
which each time is brought in order."""

ENOUGH_POSITIONS, LARGE, ENOUGH_FOR_LARGE = 1500, 1 << 22, 3000
SMALL, ENOUGH_FOR_SMALL = 3 << 19, 500
"""Where the alternative is torch's own code, a weight of this size pays from fewer positions on."""

ENOUGH_WORK = {3: 190.0, 9: 140.0}
"""From so many multiply-adds per number read and written, by the kernel's positions in the other dimensions, what is
saved is more than what the transforms of the activations take; from so many positions, also than the weight's takes, of
which more is needed where the weight is in no cache."""

ENOUGH_FORWARD = {3: 380.0, 9: 140.0}
"""The same of forward passes, in two dimensions oneDNN's fastest."""

G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""Of the points 0, 1, −1, 2, −2 and ∞."""


def dimension(
    shape: Sequence[int],
    weight: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    enough_work: Mapping[int, float] = ENOUGH_WORK,
) -> int | None:
    """The spatial dimension along which a convolution with stride 1 is cheaper by minimal filtering; None: none is.

    Args:
        shape: [B, C, *space] of one side.
        weight: [o, i, *kernel].
        padding: per spatial dimension.
        dilation: per spatial dimension.
        enough_work: for one of the gradients, or for the forward pass.
    """
    (batch, _, *space), (o, i, *kernel) = shape, weight
    enough = ENOUGH_POSITIONS if math.prod(weight) <= LARGE else ENOUGH_FOR_LARGE
    if math.prod(weight) <= SMALL and is_left_to_torch((batch, i, *space), weight):
        enough = ENOUGH_FOR_SMALL
    if o % LANES or i % LANES or batch * math.prod(space) < enough:
        return None
    # Not the last one: neighbours in memory cannot be added to each other at speed.
    for d in range(len(space) - 1):
        if (kernel[d], padding[d], dilation[d]) == (3, 1, 1) and space[d] % TILE == 0:
            others = math.prod(kernel) // 3
            if o * i / (o + i) * others >= enough_work.get(others, math.inf):
                return d
    return None


@dataclass(frozen=True)
class Filtering:
    """Minimal filtering along one spatial dimension, which has kernel 3, padding 1, and a multiple of 4 positions.

    Attributes:
        d: the dimension.
        padding: per spatial dimension.
        dilation: per spatial dimension.
    """

    d: int
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [B, i, *space] ∗ w [o, i, *kernel] + b [o] -> [B, o, *space]."""
        geometry = zip(x.shape[2:], weight.shape[2:], self.padding, self.dilation, strict=True)
        y = x.new_empty(len(x), len(weight), *(n + 2 * p - s * (k - 1) for n, k, p, s in geometry))
        small, each = self._filters(weight), None
        if bias is not None:
            # The point 1 counts once in each of the four results.
            each = bias.new_zeros(PRODUCTS, len(bias))
            each[1] = bias
            each = each.flatten()
        for slab in self._slabs(x, weight):
            entering = self._inputs(x, slab)
            found = convolve(entering.flatten(1, 2), small, each, *self._geometry())
            self._outputs(found.unflatten(1, (PRODUCTS, -1)), y, slab)
        return y

    def input_gradient(self, g: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Of the input, of this shape [B, i, *space]."""
        small, found = self._filters(weight, reverse=True), g.new_empty(shape)
        for slab in self._slabs(g, weight):
            sizes = [*shape[2:]]
            sizes[self.d] = slab.stop - slab.start
            entering = g.new_empty(1).expand(len(g), PRODUCTS * shape[1], *sizes)  # no more than a shape
            of_entering, *_ = convolution_backward(
                self._inputs(g, slab).flatten(1, 2), entering, small, None, *self._geometry(), [True, False, False]
            )
            self._outputs(of_entering.unflatten(1, (PRODUCTS, -1)), found, slab)
        return found

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, *, of_x: bool = True) -> tuple[Tensor | None, Tensor]:
        """Of the input, if wanted, and of the weight."""
        found = torch.empty_like(x) if of_x else None
        small = self._filters(weight, reverse=True) if of_x else self._shaped_like_filters(weight)
        total: Tensor | None = None
        for slab in self._slabs(g, weight):
            leaving, entering = self._inputs(g, slab).flatten(1, 2), self._spread(x, slab).flatten(1, 2)
            of_entering, of_small, _ = convolution_backward(
                leaving, entering, small, None, *self._geometry(), [of_x, True, False]
            )
            if found is not None:
                self._outputs(of_entering.unflatten(1, (PRODUCTS, -1)), found, slab)
            total = of_small if total is None else total.add_(of_small)
        assert total is not None  # noqa: S101  images are not empty
        return found, self._weight(total, weight.shape)

    def _geometry(self) -> tuple[Any, ...]:
        ones, none = [1] * len(self.padding), [0] * len(self.padding)
        padding = [0 if d == self.d else p for d, p in enumerate(self.padding)]
        return ones, padding, list(self.dilation), False, none, PRODUCTS

    def _slabs(self, x: Tensor, weight: Tensor) -> Iterator[slice]:
        """Of the tiles."""
        tiles, channels = x.shape[2 + self.d] // TILE, max(weight.shape[:2])
        limit = max(SLAB, 2 * weight.numel())
        size = max(1, limit * tiles * TILE // (PRODUCTS * channels * (x.numel() // x.shape[1])))
        for start in range(0, tiles, size):
            yield slice(start, min(tiles, start + size))

    def _tiles(self, x: Tensor, slab: slice) -> tuple[Tensor, ...]:
        """The four rows of the tiles: of each [B, C, *space with tiles in place of positions]."""
        at, sizes = 2 + self.d, x.shape
        tiles = x.view(*sizes[:at], -1, TILE, *sizes[at + 1 :]).narrow(at, slab.start, slab.stop - slab.start)
        return tiles.unbind(at + 1)

    def _products(self, like: Tensor) -> Tensor:
        return like.new_empty(len(like), PRODUCTS, *like.shape[1:])

    def _filters(self, weight: Tensor, *, reverse: bool = False) -> Tensor:
        """G w [6·o, i, *kernel with 1 in the dimension]."""
        matrix = weight.new_tensor(G)
        rows = weight.movedim(2 + self.d, 0)
        found = (matrix.flip(1) if reverse else matrix) @ rows.reshape(3, -1)
        return found.view(PRODUCTS * weight.shape[0], *rows.shape[2:]).unsqueeze(2 + self.d)

    def _shaped_like_filters(self, weight: Tensor) -> Tensor:
        """No more than a shape."""
        o, *others = weight.shape
        others[1 + self.d] = 1
        return weight.new_empty(1).expand(PRODUCTS * o, *others)

    def _weight(self, found: Tensor, shape: torch.Size) -> Tensor:
        """Gᵀ z, in its dimension reversed: the gradient of the weight from that of w'."""
        rows = [n for d, n in enumerate(shape) if d != 2 + self.d]
        matrix = found.new_tensor(G).flip(1).t() @ found.reshape(PRODUCTS, -1)
        return matrix.view(3, *rows).movedim(0, 2 + self.d).contiguous()

    def _inputs(self, x: Tensor, slab: slice) -> Tensor:
        """Bᵀ d: [B, 6, C, …]."""
        first, second, third, fourth = self._tiles(x, slab)
        found = self._products(first)
        v = found.unbind(1)
        a, b = torch.sub(fourth, second, alpha=4), torch.sub(third, first, alpha=4)
        torch.add(a, b, out=v[1])
        torch.sub(a, b, out=v[2])
        torch.sub(fourth, second, out=a)
        torch.sub(third, first, out=b)
        torch.add(a, b, alpha=2, out=v[3])
        torch.sub(a, b, alpha=2, out=v[4])
        # The row before the tile and the one after it are in the next tiles; outside of the image they are zero.
        at, rows, count = 2 + self.d, x.shape[2 + self.d], slab.stop - slab.start
        torch.sub(a, second, alpha=4, out=v[0])
        torch.add(third, b, alpha=4, out=v[5]).neg_()
        v[0].narrow(at, 1, count - 1).add_(fourth.narrow(at, 0, count - 1), alpha=4)
        v[5].narrow(at, 0, count - 1).add_(first.narrow(at, 1, count - 1))
        if slab.start:
            v[0].select(at, 0).add_(x.select(at, slab.start * TILE - 1), alpha=4)
        if slab.stop * TILE < rows:
            v[5].select(at, count - 1).add_(x.select(at, slab.stop * TILE))
        return found

    def _spread(self, x: Tensor, slab: slice) -> Tensor:
        """A x: [B, 6, C, …]."""
        first, second, third, fourth = self._tiles(x, slab)
        found = self._products(first)
        v = found.unbind(1)
        v[0].copy_(first)
        v[5].copy_(fourth)
        a, b = first + third, second + fourth
        torch.add(a, b, out=v[1])
        torch.sub(a, b, out=v[2])
        torch.add(first, third, alpha=4, out=a)
        torch.add(second, fourth, alpha=4, out=b)
        torch.add(a, b, alpha=2, out=v[3])
        torch.sub(a, b, alpha=2, out=v[4])
        return found

    def _outputs(self, found: Tensor, y: Tensor, slab: slice) -> None:
        """Aᵀ m, written to the tiles of y; m [B, 6, C, …] is overwritten."""
        m = found.unbind(1)
        a, c = m[1] + m[2], m[3] + m[4]
        b, d = m[1].sub_(m[2]), m[3].sub_(m[4])
        first, second, third, fourth = self._tiles(y, slab)
        torch.add(a, c, out=first).add_(m[0])
        torch.add(b, d, alpha=2, out=second)
        torch.add(a, c, alpha=4, out=third)
        torch.add(b, d, alpha=8, out=fourth).add_(m[5])
