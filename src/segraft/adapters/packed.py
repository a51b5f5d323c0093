"""The frozen weight of a convolution in oneDNN's own order of memory, for the gradient of the input.

oneDNN brings a weight into blocks of its own each time, which takes long where a layer has far more weights than
activations. A frozen one is mirrored and brought in order once, at the price of another copy of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from segraft.adapters.convolution import Convolution, mirror
from segraft.adapters.operators import Operator
from segraft.adapters.products import HAS_ONEDNN, is_fast, is_traced

HAS_PACKING = HAS_ONEDNN and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")
)

LARGE, TIMES = 1 << 20, 2
"""Numbers of a weight for which it pays, if they are so many times those of the layer's input and output."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen weight, mirrored.

    Attributes:
        weight: in an order that oneDNN chose for one shape of g; others it can serve too.
        padding: of the adjoint convolution.
    """

    weight: Tensor
    padding: tuple[int, ...]

    @classmethod
    def of(cls, operator: Convolution, weight: Tensor, shape: torch.Size) -> "Packed":
        """For inputs x of this shape; `pays_to_pack` says of which layers."""
        adjoint = operator.adjoint(weight)
        assert adjoint is not None  # noqa: S101  pays_to_pack has looked
        outputs = torch.Size((shape[0], weight.shape[0], *operator.outputs(weight, shape)))
        geometry = adjoint.padding, adjoint.stride, adjoint.dilation, 1
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_convolution_weight(mirror(weight.detach()), *geometry, outputs)
        return cls(packed, adjoint.padding)

    def input_gradient(self, g: Tensor) -> Tensor:
        """[B, i, …] of g [B, o, …], up to rounding."""
        ones = (1,) * len(self.padding)
        geometry = self.padding, ones, ones, 1
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(g, self.weight, None, *geometry, "none", [], "")
        return found.contiguous()


def pays_to_pack(operator: Operator, weight: Tensor, x: Tensor) -> bool:
    """Whether a layer's frozen weight had better be packed: large beside its activations, in two dimensions."""
    if not (HAS_PACKING and isinstance(operator, Convolution) and weight.numel() >= LARGE and weight.ndim == 4):
        return False
    if not (is_fast(weight) and is_fast(x) and weight.is_contiguous() and x.is_contiguous()) or is_traced(weight, x):
        return False
    if weight.is_inference():
        return False  # nobody could tell whether it has changed
    plain = operator.groups == 1 and max(operator.dilation) == 1 and x.shape[1] == weight.shape[1]
    if not plain or operator.adjoint(weight) is None or min(operator.outputs(weight, x.shape)) < 1:
        return False
    outputs = len(x) * weight.shape[0] * torch.Size(operator.outputs(weight, x.shape)).numel()
    filtered = operator.filtering(tuple(x.shape), tuple(weight.shape)) is not None
    return weight.numel() >= TIMES * (x.numel() + outputs) and not filtered
