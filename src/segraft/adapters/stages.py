"""A formula as what a layer can compute with: a chain of small convolutions, or a product of two matrices.

ΔW of every formula passes through R channels: `ΔW ∗ x = Q ∗ (M ∗ (P ∗ x))` with P the factor that has the input mode,
Q the one that has the output mode, and M whatever is between them. That chain gives the gradients of the factors from
the activations, without the gradient of the whole weight. Both forms are derived from the letters of the formula, and
are differentiable in the factors (which are small).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from segraft.adapters.formulas import KERNEL_LETTERS, Contraction


@dataclass(frozen=True)
class Stage:
    """One convolution of the chain.

    Attributes:
        kernel_modes: which modes of the layer's kernel it holds, the others have size 1.
        depthwise: R channels to R, each by itself.
    """

    kernel_modes: tuple[int, ...]
    depthwise: bool = False


@dataclass(frozen=True)
class Chain:
    """The stages of a formula, in the order in which they meet the input.

    Attributes:
        stages: two or three.
        equations: for each, the einsum that makes [out, in, its kernel modes] (depthwise [R, its kernel modes]) of
            the factors at `positions`.
        positions: of the factors that each stage is made of.
    """

    stages: tuple[Stage, ...]
    equations: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    kernel_dims: int

    def kernels(self, factors: list[Tensor]) -> list[Tensor]:
        """One weight [out, in, *kernel] per stage; `factors` as the formula orders them."""
        kernels = []
        for stage, equation, positions in zip(self.stages, self.equations, self.positions, strict=True):
            several = [factors[position] for position in positions]
            kernel = rearranged(equation, *several) if len(several) == 1 else torch.einsum(equation, *several)
            channels = (kernel.shape[0], 1) if stage.depthwise else tuple(kernel.shape[:2])
            sizes = kernel.shape[len(kernel.shape) - len(stage.kernel_modes) :]
            spread = dict(zip(stage.kernel_modes, sizes, strict=True))
            kernels.append(kernel.reshape(*channels, *(spread.get(d, 1) for d in range(self.kernel_dims))))
        return kernels


def rearranged(equation: str, tensor: Tensor) -> Tensor:
    """An einsum of one tensor that only orders its dimensions anew; einsum takes ten times as long to see that."""
    before, after = equation.split("->")
    return tensor if before == after else tensor.permute([before.index(letter) for letter in after])


@cache
def chain(contraction: Contraction) -> Chain:
    """Read the chain off the letters of a formula."""
    letters = contraction.factors
    last = next(position for position, each in enumerate(letters) if "o" in each)
    first = next(position for position, each in enumerate(letters) if "i" in each)
    middle = tuple(position for position in range(len(letters)) if position not in (first, last))
    kernel = [letter for letter in KERNEL_LETTERS if any(letter in each for each in letters)]

    def modes(*positions: int) -> str:
        return "".join(letter for letter in kernel if any(letter in letters[position] for position in positions))

    def bottleneck(position: int) -> str:
        (letter,) = set(letters[position]) - set("oi" + KERNEL_LETTERS)
        return letter

    entering, leaving = bottleneck(first), bottleneck(last)
    plan: list[tuple[tuple[int, ...], str, bool]] = [((first,), f"{entering}i", False)]
    if middle:
        depthwise = entering == leaving
        plan.append((middle, leaving if depthwise else leaving + entering, depthwise))
    plan.append(((last,), f"o{leaving}", False))
    stages, equations = [], []
    for positions, channels, depthwise in plan:
        held = modes(*positions)
        equations.append(f"{','.join(letters[position] for position in positions)}->{channels}{held}")
        stages.append(Stage(tuple(kernel.index(letter) for letter in held), depthwise))
    return Chain(tuple(stages), tuple(equations), tuple(positions for positions, _, _ in plan), len(kernel))


SPREAD = 96
"""Up to this ρ, a product with zeros in it costs less than to bring a weight into the order of its factors."""


@dataclass(frozen=True)
class Matrices:
    """ΔW as a product of two matrices.

    Attributes:
        left: [o·F, ρ]; F counts the positions of the kernel dimensions `held`, which is 1 where there are none.
        right: [ρ, i, *kernel], of size 1 in the dimensions held.
        held: dimensions of the weight, of the kernel, that the rows of `left` count.
    """

    left: Tensor
    right: Tensor
    held: tuple[int, ...] = ()

    def spread(self, weight: Sequence[int], up_to: int | None = None) -> "Matrices":
        """The same with none held: ρ is F times as large, and `right` is there F times, zero but in one position each.

        Args:
            weight: its shape [o, i, *kernel].
            up_to: a limit of the new ρ, above which they are left as they are.
        """
        sizes = [weight[d] for d in self.held]
        positions, (rho, inputs, *_) = math.prod(sizes), self.right.shape
        if not self.held or (up_to is not None and positions > 1 and positions * rho > up_to):
            return self
        others = [d for d in range(2, len(weight)) if d not in self.held]
        several = self.right.reshape(rho, inputs, *(self.right.shape[d] for d in others), 1)
        several = several.expand(*several.shape[:-1], positions)
        # [F, ρ, i, F, others], zero but where both are the same position
        diagonal = torch.diag_embed(several, dim1=0, dim2=3).reshape(-1, inputs, *sizes, *several.shape[2:-1])
        order = [(*self.held, *others).index(d) for d in range(2, len(weight))]
        right = diagonal.permute(0, 1, *(2 + position for position in order))
        return Matrices(self.left.reshape(len(self.left) // positions, positions * rho), right)

    def gathered(self, of_left: Tensor, of_right: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of these, from those of the same spread, or as they are."""
        if of_right.shape == self.right.shape:
            return of_left, of_right
        positions = math.prod(of_right.shape[d] for d in self.held)
        others = [d for d in range(2, of_right.ndim) if d not in self.held]
        each = of_right.permute(0, 1, *others, *self.held)
        each = each.reshape(positions, *self.right.shape[:2], *(of_right.shape[d] for d in others), positions)
        found: Tensor = each.diagonal(0, 0, -1).sum(-1)
        return of_left.reshape(self.left.shape), found.view(self.right.shape)


def matrices(contraction: Contraction, factors: list[Tensor]) -> Matrices:
    """ΔW, unscaled, as a product of two matrices that is differentiable in the factors; ρ is R.

    Where the output factor holds kernel modes (LoRA-C), its rows count them too.
    """
    product = factors[-1]
    for step, factor in zip(contraction.steps[:-1], reversed(factors[1:-1]), strict=True):
        product = torch.einsum(step, factor, product)
    output, rest = contraction.steps[-1].split("->")[0].split(",")
    kernel = [letter for letter in KERNEL_LETTERS if letter in output + rest]
    held = [letter for letter in kernel if letter in output]
    others = [letter for letter in kernel if letter in rest]
    rank = next(letter for letter in output if letter not in "o" + KERNEL_LETTERS)
    left = rearranged(f"{output}->o{''.join(held)}{rank}", factors[0])
    product = rearranged(f"{rest}->{rank}i{''.join(others)}", product)
    sizes = dict(zip(others, product.shape[2:], strict=True))
    right = product.reshape(*product.shape[:2], *(sizes.get(letter, 1) for letter in kernel))
    return Matrices(left.flatten(0, -2), right, tuple(2 + kernel.index(letter) for letter in held))
