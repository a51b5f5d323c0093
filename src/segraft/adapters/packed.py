"""Frozen weights of convolutions in oneDNN's own order of memory.

oneDNN brings a weight into blocks of its own before it convolves, and for the gradient of the input once more, which
takes up to a third of the time where a layer has more weights than activations. A frozen one is brought in order once,
at the price of two more copies of it.
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

LARGE = 1 << 20
"""Numbers of a weight for which it pays, if the layer's input and output together have fewer."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen weight that is convolved with, and its mirror image for the gradient of the input.

    Attributes:
        output_weight: in an order that oneDNN chose for one shape of x; others it can serve too.
        input_weight: likewise.
        padding: of the convolution, and of its adjoint.
    """

    output_weight: Tensor
    input_weight: Tensor
    padding: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, operator: Convolution, weight: Tensor, shape: torch.Size) -> "Packed":
        """For inputs of this shape; `pays_to_pack` says of which layers."""
        adjoint = operator.adjoint(weight)
        assert adjoint is not None  # noqa: S101  pays_to_pack has looked
        outputs = torch.Size((shape[0], weight.shape[0], *operator.outputs(weight, shape)))
        return cls(
            _reordered(weight, operator, shape),
            _reordered(mirror(weight), adjoint, outputs),
            (operator.padding, adjoint.padding),
        )

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, o, …] of x [B, i, …], up to rounding."""
        return _convolved(x, self.output_weight, bias, self.padding[0])

    def input_gradient(self, g: Tensor) -> Tensor:
        """[B, i, …] of g [B, o, …], up to rounding."""
        return _convolved(g, self.input_weight, None, self.padding[1])


def pays_to_pack(operator: Operator, weight: Tensor, x: Tensor) -> bool:
    """Whether a layer's frozen weight had better be packed: more than its activations, in two dimensions."""
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
    return weight.numel() >= x.numel() + outputs and not filtered


def _reordered(weight: Tensor, operator: Convolution, shape: torch.Size) -> Tensor:
    with torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach(), operator.padding, operator.stride, operator.dilation, 1, shape
        )
    return packed


def _convolved(x: Tensor, packed: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    ones = (1,) * len(padding)
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, ones, ones, 1, "none", [], "")
    return y.contiguous()
