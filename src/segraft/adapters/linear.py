"""The arithmetic of linear layers."""

from dataclasses import dataclass

from torch import Tensor, nn

from segraft.adapters.layers import composing_dtype
from segraft.adapters.products import affine, product
from segraft.adapters.stages import Stage
from segraft.adapters.sums import products_and_sums


@dataclass(frozen=True)
class Dense:
    """x [..., i], weight [o, i], y [..., o]."""

    transposed: bool = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, with torch's bits."""
        return nn.functional.linear(x, weight, bias)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output in training, up to rounding."""
        return affine(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    def through(self, x: Tensor, weight: Tensor) -> Tensor:
        """X ∗ w."""
        return self.output(x, weight, None)

    def input_gradient(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        """Of the input."""
        return product(g.reshape(-1, g.shape[-1]), weight).view(*g.shape[:-1], weight.shape[1])

    def weight_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """Of the weight."""
        return product(g.reshape(-1, g.shape[-1]).t(), x.reshape(-1, x.shape[-1]))

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> tuple[Tensor | None, Tensor]:
        """Of the input, if wanted, and of the weight."""
        return self.input_gradient(g, weight, x) if of_x else None, self.weight_gradient(g, x, weight)

    def channel_sum(self, g: Tensor) -> Tensor:
        """[o] sums."""
        return g.reshape(-1, g.shape[-1]).sum(0, dtype=composing_dtype(g.dtype))

    def channel_products(self, g: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """[o] inner products of g and y − b, and [o] sums of g."""
        return products_and_sums(g.reshape(-1, g.shape[-1]), y.reshape(-1, y.shape[-1]), bias)

    def over_channels(self, values: Tensor) -> Tensor:
        """[o], as it is."""
        return values

    def has_adjoint(self) -> bool:
        """It is its matrix's transpose."""
        return True

    def stage(self, stage: Stage, rank: int) -> "Dense":  # noqa: ARG002
        """Every stage is a linear map."""
        return self
