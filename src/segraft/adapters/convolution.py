"""The arithmetic of convolutions and transposed convolutions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from segraft.adapters import disjoint
from segraft.adapters.layers import composing_dtype
from segraft.adapters.narrow import (
    Window,
    correlation,
    folded_convolution,
    pointwise,
    scattered_product,
    unfolded_correlation,
)
from segraft.adapters.phases import (
    convolve_in_phases,
    depthwise_as_dense,
    depthwise_weight_gradient,
    phases_for,
    weight_gradient_in_phases,
)
from segraft.adapters.products import LANES, is_fast, is_left_to_torch, is_traced
from segraft.adapters.stages import Stage
from segraft.adapters.sums import products_and_sums
from segraft.adapters.winograd import ENOUGH_FORWARD, ENOUGH_WORK, Filtering, dimension

convolve = torch.ops.aten.convolution.default
convolution_backward = torch.ops.aten.convolution_backward.default

FEW = 32
"""Up to so many channels times kernel positions on one side, the weight's gradient is a product of shifted copies."""

FOLDED = 128
"""Up to so many a convolution is a product, of which the parts are added up, where such products are fast."""

CUBE, WIDE, WIDE_BOTH, FEW_POSITIONS = 27, 128, 1 << 16, 216
"""At up to so many positions, a wide weight of 3×3×3 takes longer to be brought in order than to be used."""

MIRRORED_LARGE, MIRRORED_WIDE, MIRRORED_POSITIONS, MIRRORED_WEIGHT = 1 << 16, 128, 1 << 12, 3 << 19
"""In two dimensions the gradient of an image of so many positions is cheaper as a convolution with the mirrored kernel,
between so many channels of fewer positions too, unless mirroring so large a weight takes what is saved."""


def pays_to_unfold(wide: Tensor, channels: int, kernel: Sequence[int]) -> bool:
    """Whether to take a weight's gradient as products of the wide side with shifted copies of the narrow one."""
    copies = channels * math.prod(kernel)
    return copies <= FEW or (channels < LANES <= wide.shape[1] and copies <= 4 * wide.shape[1] and is_fast(wide))


def mirror(weight: Tensor) -> Tensor:
    """[o, i, *kernel] -> [i, o, *kernel reversed]."""
    return weight.flip(tuple(range(2, weight.ndim))).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Convolution:
    """x [B, i, *space], weight [o, i / groups, *kernel] (transposed [i, o, *kernel]), y [B, o, *space].

    Zero padding alone: a layer that pads otherwise pads x before. `forward` is torch's own, as in evaluation; the rest
    uses minimal filtering and the matrix products of `narrow` where they are cheaper than torch's.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, with torch's bits."""
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        y: Tensor = convolve(x, weight, bias, *geometry)
        return y

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output in training, up to rounding."""
        filtering = self._filtering(x, weight, ENOUGH_FORWARD)
        if filtering is None or not self._fits(x, weight):
            return self.forward(x, weight, bias)
        return filtering.convolution(x, weight, bias)

    def through(self, x: Tensor, weight: Tensor) -> Tensor:
        """X ∗ w."""
        if self._is_pointwise(x, weight):
            return pointwise(weight.flatten(1), x)
        if self._is_slow_depthwise(x, weight):
            return replace(self, groups=1).forward(x, depthwise_as_dense(weight), None)
        o, i, *kernel = weight.shape
        if self._pays_to_fold(x, i, o, kernel):
            window = self._window(weight)
            return folded_convolution(x, weight, window, window.outputs(x.shape[2:]))
        p = self._phases(x, i, o, kernel[0])
        if p > 1:
            return convolve_in_phases(x, weight, self.padding, self.dilation, p)
        return self.output(x, weight, None)

    def input_gradient(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Of the input."""
        if self._is_pointwise(g, weight):
            return pointwise(weight.flatten(1).t(), g)
        if self._is_disjoint(g, weight):
            return disjoint.input_gradient(disjoint.patches(g, weight.shape[2:]), weight, x.shape)
        adjoint = self.adjoint(weight)
        if adjoint is not None and self._is_slow_depthwise(g, weight):
            return adjoint.through(g, weight.flip((2, 3, 4)))
        o, i, *kernel = weight.shape
        if adjoint is not None and (adjoint._pays_to_fold(g, o, i, kernel) or adjoint._phases(g, o, i, kernel[0]) > 1):
            return adjoint.through(g, mirror(weight))
        if adjoint is not None and self._is_narrow_and_small(g, x, weight):
            return adjoint.forward(g, mirror(weight), None)
        if adjoint is not None and self._pays_to_mirror(g, weight):
            return adjoint.forward(g, mirror(weight), None)
        if self._pays_to_scatter(g, weight):
            return scattered_product(g, weight, self._window(weight), x.shape)
        filtering = self._filtering(g, weight)
        if filtering is not None:
            return filtering.input_gradient(g, weight, x.shape)
        return self._backward(g, x, weight, of_x=True)

    def weight_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Of the weight; where x or g has few channels, a product of shifted copies of it with the other one."""
        o, i, *kernel = weight.shape
        if self._is_slow_depthwise(x, weight):
            return depthwise_weight_gradient(g, x, weight, self.padding, self.dilation)
        if self._is_disjoint(g, weight) and x.is_contiguous():
            return disjoint.weight_gradient(disjoint.patches(g, kernel), x, weight.shape)
        if self._is_pointwise(x, weight) and g.is_contiguous() and is_fast(x):
            return correlation(g.flatten(2), x.flatten(2)).view(weight.shape)
        window = self._window(weight)
        if self._is_plain(g) and pays_to_unfold(g, i, kernel):
            return unfolded_correlation(x, g, window).movedim(-1, 0)
        if self._is_plain(x) and max(self.stride) == 1 and pays_to_unfold(x, o, kernel):
            found = unfolded_correlation(g, x, window.opposite())
            return found.flip(tuple(range(1, 1 + len(kernel)))).movedim(-1, 1)
        p = self._phases(x, i, o, kernel[0])
        if p > 1:
            return weight_gradient_in_phases(g, x, weight, self.padding, self.dilation, p)
        adjoint = self.adjoint(weight)
        p = 1 if adjoint is None else adjoint._phases(g, o, i, kernel[0])
        if adjoint is not None and p > 1:
            return mirror(weight_gradient_in_phases(x, g, mirror(weight), adjoint.padding, adjoint.dilation, p))
        filtering = self._filtering(g, weight)
        if filtering is not None and x.is_contiguous():
            return filtering.gradients(g, x, weight, of_x=False)[1]
        return self._backward(g, x, weight, of_x=False)

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> tuple[Tensor | None, Tensor]:
        """Of the input, if wanted, and of the weight."""
        if of_x and self._is_disjoint(g, weight) and x.is_contiguous():
            columns = disjoint.patches(g, weight.shape[2:])
            return disjoint.input_gradient(columns, weight, x.shape), disjoint.weight_gradient(columns, x, weight.shape)
        filtering = self._filtering(g, weight) if of_x and x.is_contiguous() else None
        if filtering is not None:
            return filtering.gradients(g, x, weight)
        return self.input_gradient(g, weight, x) if of_x else None, self.weight_gradient(g, x, weight)

    def _phases(self, x: Tensor, i: int, o: int, kernel: int) -> int:
        """How many outputs in a row `phases` can take at a time, of a kernel of this size in the first dimension."""
        if (
            self.transposed
            or self.groups > 1
            or max(self.stride) > 1
            or self.dilation[0] > 1
            or i < LANES
            or o >= LANES
        ):
            return 1
        return phases_for(x, x.shape[2] + 2 * self.padding[0] - kernel + 1, o, kernel)

    def has_adjoint(self) -> bool:
        """Whether the convolution that takes this one's output to its input's shape exists with the same geometry."""
        return all(extra < step for extra, step in zip(self.output_padding, self.stride, strict=True))

    def _is_slow_depthwise(self, x: Tensor, weight: Tensor) -> bool:
        """A depthwise kernel in three dimensions with few channels, for which oneDNN has no fast code."""
        depthwise = weight.shape[1] == 1 and 1 < self.groups == weight.shape[0] <= LANES
        plain = not self.transposed and max(self.stride) == 1 and x.is_contiguous() and x.device.type == "cpu"
        return depthwise and plain and len(self.stride) == 3

    def adjoint(self, weight: Tensor) -> "Convolution | None":
        """The convolution, with the mirrored kernel, that takes g to the gradient of x; None where there is none."""
        if self.transposed or max(self.stride) > 1:
            return None
        geometry = zip(weight.shape[2:], self.dilation, self.padding, strict=True)
        padding = tuple(d * (k - 1) - p for k, d, p in geometry)
        return None if min(padding) < 0 else replace(self, padding=padding)

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        both: tuple[Tensor, Tensor, Tensor] = convolution_backward(
            g, x, weight, None, *geometry, [of_x, not of_x, False]
        )
        return both[0] if of_x else both[1]

    def _is_pointwise(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is one matrix product over the memory of `x` as it lies."""
        plain = self.groups == 1 and not self.transposed and not any(self.padding) and max(self.stride) == 1
        return plain and weight.shape[2:].numel() == 1 and x.is_contiguous() and x.device.type == "cpu"

    def _pays_to_fold(self, x: Tensor, i: int, o: int, kernel: Sequence[int]) -> bool:
        """Whether to convolve by products, of which the parts are added up."""
        few = o < LANES <= i and o * math.prod(kernel) <= FOLDED and max(self.stride) == 1
        return few and self._is_plain(x) and is_fast(x)

    def _is_narrow_and_small(self, g: Tensor, x: Tensor, weight: Tensor) -> bool:
        """Few outputs of a small image, whose input's gradient torch would bring together from unfolded parts."""
        few = len(weight) < LANES <= weight.shape[1] and self._is_plain(g)
        return few and is_left_to_torch(x.shape, weight.shape)

    def _pays_to_mirror(self, g: Tensor, weight: Tensor) -> bool:
        """Whether the input's gradient in two dimensions is cheaper as a forward pass, for which oneDNN is faster."""
        o, i, *kernel = weight.shape
        if len(kernel) != 2 or max(kernel) == 1 or not (self._is_plain(g) and is_fast(g)):
            return False
        positions, few = len(g) * g.shape[2:].numel(), min(o, i)
        if few < MIRRORED_WIDE or positions < MIRRORED_POSITIONS:
            return few >= 2 * LANES and g.shape[2:].numel() >= MIRRORED_LARGE
        return weight.numel() <= MIRRORED_WEIGHT

    def _pays_to_scatter(self, g: Tensor, weight: Tensor) -> bool:
        """Whether the input's gradient is a product with the weight as it lies, which oneDNN would bring in order."""
        o, i, positions = *weight.shape[:2], len(g) * g.shape[2:].numel()
        wide = min(o, i) >= WIDE and o * i >= WIDE_BOTH and weight.shape[2:].numel() == CUBE
        if not (wide and positions <= FEW_POSITIONS and max(self.stride) == 1):
            return False
        return weight.is_contiguous() and self._is_plain(g) and is_fast(g) and not is_traced(g, weight)

    def _is_plain(self, wide: Tensor) -> bool:
        """Whether the side with many channels can be read as it lies."""
        return self.groups == 1 and not self.transposed and wide.is_contiguous() and wide.device.type == "cpu"

    def _filtering(
        self, wide: Tensor, weight: Tensor, enough_work: Mapping[int, float] = ENOUGH_WORK
    ) -> Filtering | None:
        """Minimal filtering, by default of a gradient, where that is cheaper."""
        if not (self._is_plain(wide) and is_fast(wide) and weight.is_contiguous()):
            return None
        found = self.filtering(tuple(wide.shape), tuple(weight.shape), enough_work)
        return None if found is None or is_traced(wide, weight) else found

    def filtering(
        self, shape: tuple[int, ...], weight: tuple[int, ...], enough_work: Mapping[int, float] = ENOUGH_WORK
    ) -> Filtering | None:
        """The same from the shapes of one side and of the weight, for float32 on a CPU."""
        if self.transposed or self.groups > 1 or max(self.stride) > 1:
            return None
        along = dimension(shape, weight, self.padding, self.dilation, enough_work)
        return None if along is None else Filtering(along, self.padding, self.dilation)

    def _is_disjoint(self, g: Tensor, weight: Tensor) -> bool:
        """Whether it is transposed and its outputs' patches neither overlap nor leave gaps, where products are fast."""
        alike = self.transposed and self.groups == 1 and self.stride == tuple(weight.shape[2:])
        plain = not any(self.padding) and not any(self.output_padding) and max(self.dilation) == 1
        return alike and plain and g.is_contiguous() and is_fast(g)

    def outputs(self, weight: Tensor, shape: Sequence[int]) -> list[int]:
        """Sizes of the output, not of a transposed convolution, for an input of this shape."""
        return self._window(weight).outputs(shape[2:])

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether torch would not refuse them, in words that speak of what the caller knows."""
        return x.shape[1] == weight.shape[1] and min(self.outputs(weight, x.shape)) > 0

    def _window(self, weight: Tensor) -> Window:
        return Window(tuple(weight.shape[2:]), self.padding, self.dilation, self.stride)

    def channel_sum(self, g: Tensor) -> Tensor:
        """[o] sums."""
        return g.sum((0, *range(2, g.ndim)), dtype=composing_dtype(g.dtype))

    def channel_products(self, g: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """[o] inner products of g and y − b, and [o] sums of g."""
        return products_and_sums(g, y, bias)

    def over_channels(self, values: Tensor) -> Tensor:
        """[o] shaped to be broadcast over the output."""
        return values.view(-1, *(1 for _ in self.stride))

    def stage(self, stage: Stage, rank: int) -> "Convolution":
        """With the geometry of the kernel modes that the stage holds; the others are of size 1 and do nothing.

        Of a transposed convolution, the stage of its adjoint.
        """
        return _of_stage(self, stage, rank)


@lru_cache(maxsize=4096)
def _of_stage(whole: Convolution, stage: Stage, rank: int) -> Convolution:
    def held(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
        return tuple(v if mode in stage.kernel_modes else otherwise for mode, v in enumerate(values))

    return Convolution(
        held(whole.stride, 1),
        held(whole.padding, 0),
        held(whole.dilation, 1),
        output_padding=(0,) * len(whole.stride),
        groups=rank if stage.depthwise else 1,
    )
