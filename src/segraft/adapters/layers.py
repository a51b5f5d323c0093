"""Which tensors of which layers can be adapted, and where a layer's true output channels are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from segraft.errors import SegraftError


def composing_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: in bf16 the sum W0 + ΔW would lose a third of a small update."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class WeightSlot:
    """One weight of a layer: its attribute name, that of its bias, and how its dimensions are to be read.

    Attributes:
        weight: attribute of the weight, stored as [o, i/groups, *kernel], transposed as [i, o/groups, *kernel].
        bias: attribute of its bias, None where the layer has none.
        transposed: the first stored dimension is the input side.
        groups: groups of the convolution.
        bias_offset: where the weight's rows start in a bias that several weights share; None where it is the
            weight's own.
    """

    weight: str
    bias: str | None
    transposed: bool = False
    groups: int = 1
    bias_offset: int | None = None

    def bias_rows(self, rows: tuple[int, int] | None, all_rows: int) -> tuple[int, int] | None:
        """The rows of the bias that belong to these rows (None: all) of the weight; None means the whole bias."""
        if self.bias_offset is None:
            return rows
        start, stop = rows or (0, all_rows)
        return self.bias_offset + start, self.bias_offset + stop

    def edited(self, *, bias: bool) -> tuple[str, ...]:
        """The tensors that an adapter changes, with or without the bias."""
        return (self.weight, self.bias) if bias and self.bias is not None else (self.weight,)

    def channel_dim(self, dim: int | None) -> int:
        """The dimension of the weight that carries the magnitude, without groups; `dim` as below."""
        return 1 if self.transposed and dim is None else 0

    def by_output_channel(self, weight: Tensor, dim: int | None) -> Tensor:
        """View of `weight` as [g, a, c, b], where (g, c) counts the channels that carry a magnitude.

        `dim` None: true output channels. `dim` 0: the first stored dimension, which for transposed convolutions is
        the input side (as Table 3 of the haemorrhage paper counts).
        """
        if self.transposed and dim is None:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return weight.reshape(1, 1, weight.shape[0], -1)


def weight_slots(layer: nn.Module) -> tuple[WeightSlot, ...]:
    """The adaptable weights of `layer`; empty for a layer that is neither linear, convolution nor attention."""
    if isinstance(layer, nn.MultiheadAttention):
        shared = None if layer.in_proj_bias is None else "in_proj_bias"
        if layer._qkv_same_embed_dim:
            return (WeightSlot("in_proj_weight", shared),)
        apart = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(WeightSlot(name, shared, bias_offset=i * layer.embed_dim) for i, name in enumerate(apart))
    if isinstance(layer, nn.Linear):
        return (WeightSlot("weight", None if layer.bias is None else "bias"),)
    if isinstance(layer, nn.modules.conv._ConvNd):
        bias = None if layer.bias is None else "bias"
        return (WeightSlot("weight", bias, layer.transposed, layer.groups),)
    return ()


def why_not(layer: nn.Module, tensor: str) -> str | None:
    """Why `tensor` of `layer` cannot be adapted; None when it can."""
    if parametrize.is_parametrized(layer, tensor) or tensor not in layer._parameters:
        return f"its {tensor} is computed by a parametrisation (weight or spectral norm): remove that first"
    value = layer._parameters[tensor]
    if value is None:
        return f"it has no {tensor}"
    if isinstance(value, UninitializedParameter):
        return "it is lazy and has no shape yet: run one forward pass first"
    if not value.dtype.is_floating_point:
        return f"its {tensor} is {value.dtype}, not a floating-point tensor"
    if value.layout is not torch.strided:
        return f"its {tensor} is stored as {value.layout}, not as a dense tensor"
    return None


def row_block(text: str, rows: int, where: str) -> tuple[int, int]:
    """'2/3' -> the second of three equal blocks of `rows`, as (start, stop).

    Raises:
        SegraftError: not of that form, or the rows do not divide.
    """
    left, slash, right = text.partition("/")
    if not (slash and left.isdigit() and right.isdigit() and 1 <= int(left) <= int(right)):
        raise SegraftError(
            f"slice {text!r} of {where}: write 'j/n', the j-th of n equal blocks of rows, such as '2/3'."
        )
    block, blocks = int(left), int(right)
    if rows % blocks:
        raise SegraftError(f"slice {text!r} of {where}: its {rows} rows do not divide into {blocks} equal blocks.")
    size = rows // blocks
    return (block - 1) * size, block * size


def channel_norm(weight: Tensor, slot: WeightSlot, magnitude_dim: int | None) -> Tensor:
    """‖·‖ [channels]; never zero, so that a channel of zeros stays one. The same bits in every memory format."""
    view = slot.by_output_channel(weight.contiguous(), magnitude_dim)
    if view.shape[0] == 1 < view.shape[1] and view.shape[3] < POSITIONS:
        norm = _norm_of_columns(view[0])
    else:
        norm = torch.linalg.vector_norm(view, dim=(1, 3)).flatten()
    return norm.clamp_min(torch.finfo(weight.dtype).tiny)


POSITIONS = 16
"""Numbers in a row, below which sums over them and over an outer dimension are slow unless whole rows are added up."""


def _norm_of_columns(view: Tensor) -> Tensor:
    """‖·‖ [c] of [a, c, b] over a and b, row by row."""
    rows = view.flatten(1)
    squares = (rows * rows).sum(0).view(view.shape[1], -1).sum(1)
    zero = squares == 0  # of which the root has no gradient
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
