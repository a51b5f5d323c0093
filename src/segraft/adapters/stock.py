"""Layers of torch's own, and their operators."""

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from segraft.adapters.convolution import Convolution
from segraft.adapters.linear import Dense
from segraft.adapters.operators import Operator

STOCK: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
"""Layers whose arithmetic is known here, with their spatial dimensions."""


def stock_class(layer_class: type[nn.Module]) -> type[nn.Module] | None:
    """The class of `STOCK` whose forward pass `layer_class` runs unchanged; None where it has one of its own."""
    for stock in STOCK:
        if issubclass(layer_class, stock) and all(
            getattr(layer_class, method, None) is getattr(stock, method, None)
            for method in ("forward", "_conv_forward", "_output_padding")
        ):
            return stock
    return None


def operator_of(layer: nn.Module, x: Tensor) -> tuple[Operator, Tensor]:
    """The arithmetic of a stock layer, and `x` padded where it does not pad with zeros on both sides alike."""
    if isinstance(layer, nn.Linear):
        return Dense(), x
    assert isinstance(layer, nn.modules.conv._ConvNd)  # noqa: S101
    padding = layer.padding
    if layer.padding_mode != "zeros" or padding == "same":
        around = layer._reversed_padding_repeated_twice
        sides = [(around[2 * d], around[2 * d + 1]) for d in reversed(range(len(around) // 2))]
        if layer.padding_mode == "zeros" and all(before == after for before, after in sides):
            padding = tuple(before for before, _ in sides)
        else:
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = nn.functional.pad(x, around, mode=mode), (0,) * len(sides)
    elif padding == "valid":
        padding = (0,) * len(layer.kernel_size)  # not weight.ndim: to read the weight is to compose it
    return _convolution(
        layer.stride, tuple(padding), layer.dilation, layer.output_padding, layer.transposed, layer.groups
    ), x


@lru_cache(maxsize=1024)
def _convolution(*geometry: Any) -> Convolution:
    return Convolution(*geometry)
