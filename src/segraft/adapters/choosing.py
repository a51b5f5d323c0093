"""Which way of executing a layer is cheapest, by a model of its operations and bytes.

Costs are in multiply-adds of a dense convolution. What the model has to tell apart differs by factors: a 3×3 layer of
512 channels at rank 8 is ten times cheaper through the chain, one of a single input channel several times dearer.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from segraft.adapters.convolution import FEW, Convolution
from segraft.adapters.linear import Dense
from segraft.adapters.operators import Operator
from segraft.adapters.phases import phase_count
from segraft.adapters.products import HAS_ONEDNN
from segraft.adapters.stages import Chain

BYTE = {"cpu": 10.0, "cuda": 10.0}
"""Multiply-adds in the time of moving one byte, in float32: cores reach 50 to 100 per ns, and memory 5 to 10 GB/s each;
an H100 reaches 30 per ps and 3.3 TB/s."""

LANES = {"cpu": 16, "cuda": 32}
"""Fewer channels than this cost as much as this many."""

LAUNCH = {"cpu": 3e6, "cuda": 1e8}
"""Of one call of a kernel, in multiply-adds."""

FILTERED = 0.6
"""Of a convolution's operations, what minimal filtering takes: half of them, and passes over the activations."""


Way = Literal["weight", "chain", "parallel"]


def cheapest(
    operator: Operator, chain: Chain, rank: int, x: Tensor, weight: tuple[int, ...], *, magnitude: bool
) -> Sequence[Way]:
    """The ways of executing a layer, cheapest first, by what they do not have in common.

    Args:
        operator: of the layer.
        chain: of its factors.
        rank: R.
        x: the layer's input.
        weight: shape of its weight.
        magnitude: with one (DoRA).
    """
    key: Any = (operator, chain, rank, tuple(x.shape), x.device.type, x.element_size(), weight, magnitude)
    return _cheapest(*key)


@lru_cache(maxsize=4096)
def _cheapest(
    operator: Operator,
    chain: Chain,
    rank: int,
    shape: tuple[int, ...],
    device: str,
    itemsize: int,
    weight: tuple[int, ...],
    magnitude: bool,  # noqa: FBT001
) -> Sequence[Way]:
    model = _Model(device, itemsize)
    o, i, *kernel = weight
    if isinstance(operator, Dense):
        x_points = g_points = math.prod(shape) // i
    else:
        assert isinstance(operator, Convolution)  # noqa: S101
        batch, *space = shape[:1] + shape[2:]
        outside, inside = math.prod(space), math.prod(space) // math.prod(operator.stride)
        if operator.transposed:
            inside, outside = outside, outside * math.prod(operator.stride)
        x_points, g_points = batch * outside, batch * inside
    strided = x_points != g_points
    # Passes over the weight: reading it is one, writing another two; products with the factors cost R per element.
    one, product = math.prod(weight) * 4 * model.byte, math.prod(weight) * rank
    composed = 3 * one + product + (3 * one if magnitude else 0)
    share = model.share(operator, shape, weight)
    formed = model.convolution(i, o, kernel, x_points, g_points, strided=strided, share=share) + 3 * one + 2 * product
    contracted = 2 * one + 2 * product if magnitude else 0
    beside = contracted + 3 * (i * x_points + o * g_points) * itemsize * model.byte * (2 if magnitude else 1)
    total, entering = 0.0, x_points
    for position, stage in enumerate(chain.stages):
        sizes = [size if mode in stage.kernel_modes else 1 for mode, size in enumerate(kernel)]
        first, last = position == 0, position == len(chain.stages) - 1
        leaving = g_points if last or (strided and stage.kernel_modes) else entering
        channels = (i if first else rank, o if last else rank)
        moves = strided and entering != leaving
        if stage.depthwise:
            total += 3 * model.depthwise(rank, sizes, entering)
        else:
            # The kernel's gradient, and either the chain's forward or its backward pass (between, or beside W0, both).
            passes = 2 if first or last else 3
            share = model.share(operator.stage(stage, rank), shape, (*channels[::-1], *sizes))
            each = model.convolution(*channels, sizes, entering, leaving, strided=moves, share=share)
            total += passes * each
            beside += (3 - passes) * each
        entering = leaving
    costs: dict[Way, float] = {
        "weight": composed + formed + (3 * one if magnitude else 0),
        "chain": composed + contracted + total,
        "parallel": beside + total,
    }
    return tuple(sorted(costs, key=lambda way: costs[way]))


class _Model:
    def __init__(self, device: str, itemsize: int) -> None:
        self.byte = BYTE.get(device, BYTE["cuda"]) * (4 / itemsize)
        self.lanes, self.launch = LANES.get(device, LANES["cuda"]), LAUNCH.get(device, LAUNCH["cuda"])
        self.itemsize, self.device = itemsize, device

    def share(self, operator: Operator, shape: tuple[int, ...], weight: tuple[int, ...]) -> float:
        """Of a convolution's operations, what is left of them by minimal filtering."""
        if self.device != "cpu" or self.itemsize != 4 or not HAS_ONEDNN or not isinstance(operator, Convolution):
            return 1.0
        return 1.0 if operator.filtering(shape, weight) is None else FILTERED

    def convolution(
        self, i: int, o: int, kernel: Sequence[int], x_points: int, g_points: int, *, strided: bool, share: float
    ) -> float:
        """One of forward pass, input's gradient and weight's gradient; `share` of its operations are done."""
        size, few = math.prod(kernel), min(i, o)
        moved = (i * x_points + o * g_points) * self.itemsize * self.byte
        if size == 1 and not strided:
            return self.launch + moved
        if few * size <= FEW and few == i:
            return self.launch + moved + 2 * i * size * g_points * self.itemsize * self.byte
        lanes = float(math.prod(self.lanes * math.ceil(channels / self.lanes) for channels in (i, o)))
        if self.device == "cpu" and not strided:
            p = phase_count(few, kernel[0])
            lanes *= (kernel[0] + p - 1) / (p * kernel[0])
        # Convolutions bring the activations into an order of their own before, strided ones also after.
        return self.launch + share * lanes * size * g_points + (3.0 if strided else 1.5) * moved

    def depthwise(self, rank: int, kernel: Sequence[int], points: int) -> float:
        """One pass of R channels by themselves."""
        size = math.prod(kernel)
        if self.device == "cpu" and len(kernel) == 3:
            # As few as a vector holds go through a dense kernel; more, through code that is far from the hardware.
            return self.launch + points * size * (self.lanes**2 if rank <= self.lanes else 100 * rank)
        return self.launch + 2 * rank * points * self.itemsize * self.byte * (1 + size / 3)
