"""A chain of small convolutions, run forward and differentiated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segraft.adapters.composing import along, channels_first
from segraft.adapters.operators import Operator
from segraft.adapters.stages import Stage

CHANNELS_LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Pass:
    """The stages of one layer, with what they compute with in one call.

    Attributes:
        operators: one per stage.
        kernels: one per stage, in the dtype and memory format of the activations.
        gain: [channels] that multiplies the outputs of the last stage, already in its kernel; None: 1.
        gain_enters: whether it multiplies the inputs of the first stage instead.
        dtype: of the gradients of the kernels.
    """

    operators: Sequence[Operator]
    kernels: Sequence[Tensor]
    gain: Tensor | None
    gain_enters: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        operator: Operator,
        stages: Sequence[Stage],
        kernels: Sequence[Tensor],
        entering: Tensor,
        gain: Tensor | None = None,
        *,
        gain_enters: bool = False,
    ) -> "Pass":
        """For a layer's `operator`; of a transposed one, the stages of its adjoint."""
        rank = kernels[0].shape[0]
        small = [kernel.to(entering.dtype) for kernel in kernels]
        if gain is not None:
            at, dim = (0, 1) if gain_enters else (-1, 0)
            small[at] = along(gain, small[at], dim).to(entering.dtype) * small[at]
        # A kernel whose strides look like channels last would make torch copy the activations into that format.
        is_image = entering.ndim == small[0].ndim  # a linear layer's input may have any shape
        last = is_image and not channels_first(entering)
        memory = CHANNELS_LAST[entering.ndim] if last else torch.contiguous_format
        small = [kernel.contiguous(memory_format=memory) for kernel in small]
        return cls([operator.stage(stage, rank) for stage in stages], small, gain, gain_enters, kernels[0].dtype)

    def inputs(self, entering: Tensor) -> list[Tensor]:
        """What enters each stage."""
        inputs = [entering]
        for operator, kernel in zip(self.operators[:-1], self.kernels, strict=False):
            inputs.append(operator.through(inputs[-1], kernel))
        return inputs

    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """What leaves the last stage."""
        return self.operators[-1].through(inputs[-1], self.kernels[-1])

    def gradients(
        self, leaving: Tensor, inputs: Sequence[Tensor], *, of_entering: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Of the kernels, from the gradient of what leaves the last stage; and of what enters the first, if wanted."""
        found: list[Tensor] = []
        for position in reversed(range(len(inputs))):
            operator, kernel, entered = self.operators[position], self.kernels[position], inputs[position]
            found.append(operator.weight_gradient(leaving, entered, kernel).to(self.dtype))
            if position > 0 or of_entering:
                leaving = operator.input_gradient(leaving, kernel, entered)
        if self.gain is not None:
            at, dim = (-1, 1) if self.gain_enters else (0, 0)
            found[at] = along(self.gain, found[at], dim) * found[at]
        return found[::-1], leaving if of_entering else None
