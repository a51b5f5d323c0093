"""What a layer does with its weight, and the gradients of that.

An operator is the layer's arithmetic without its tensors. Weights are as torch stores them, x is the layer's input
and g the gradient of its output.
"""

from typing import Protocol

from torch import Tensor

from segraft.adapters.stages import Stage


class Operator(Protocol):
    """y = x ∗ w (+ b), linear in x and in w."""

    @property
    def transposed(self) -> bool:
        """The first stored dimension of the weight is the input side."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, with torch's bits."""
        ...

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output in training, up to rounding."""
        ...

    def through(self, x: Tensor, weight: Tensor) -> Tensor:
        """X ∗ w where the weight is one of the small ones of a chain."""
        ...

    def input_gradient(self, g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Of the input; of `x` itself only its shape and memory format matter."""
        ...

    def weight_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Of the weight; of `weight` itself only its shape and memory format matter."""
        ...

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> tuple[Tensor | None, Tensor]:
        """Of the input, if wanted, and of the weight."""
        ...

    def channel_sum(self, g: Tensor) -> Tensor:
        """[o] sums of something shaped like the output: the gradient of the bias."""
        ...

    def channel_products(self, g: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """[o] inner products of g and y − b, both shaped like the output, and [o] sums of g."""
        ...

    def over_channels(self, values: Tensor) -> Tensor:
        """[o] shaped to be broadcast over the output."""
        ...

    def has_adjoint(self) -> bool:
        """Whether the chain of a transposed operator can be had from its adjoint."""
        ...

    def stage(self, stage: Stage, rank: int) -> "Operator":
        """The operator of one stage of the chain that stands for the weight (transposed: for its adjoint)."""
        ...
