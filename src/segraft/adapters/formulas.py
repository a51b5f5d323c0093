"""Factorisations of a weight update ΔW, each one line of einsum.

To add one, add one entry to `FORMULAS`; nothing else knows their names.

Modes are those of the *stored* weight: `o` is its first dimension, `i` its second, the kernel follows. (For a
transposed convolution the first dimension is the input side, which puts the kernel on the output side of the
bottleneck, as Table 3 of the haemorrhage paper counts it.) Lower-case letters other than o and i have size R.
Three capitals stand for kernel modes, so that an entry holds for linear, 1D, 2D and 3D layers alike:

    K   all of them        F   all but the last        L   the last        *   repeat the factor, one per mode
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

KERNEL_LETTERS = "xyz"


@dataclass(frozen=True)
class Formula:
    """One factorisation.

    Attributes:
        template: factors separated by commas, in the order in which `names` names them. The first is zero at the
            start, so that ΔW = 0.
        names: what the factors are called in state dicts and adapter files.
    """

    template: str
    names: tuple[str, ...]


FORMULAS: dict[str, Formula] = {
    # LoRA, Hu et al. 2022; on kernels ConvLoRA, Aleem et al. 2024
    "lora": Formula("or,riK", ("B", "A")),
    # LoRA-C, Ding et al. 2024
    "lora_c": Formula("oFr,riL", ("B", "A")),
    # CP-LoRA, Minoccheri et al. 2025
    "cp": Formula("or,ir,*r", ("a", "b", "c", "d", "e")),
    # Tucker 1966; on kernels Kim et al. 2016
    "tucker": Formula("op,pqK,iq", ("a", "core", "b")),
}


@dataclass(frozen=True)
class Contraction:
    """A formula for a given number of kernel modes.

    Attributes:
        factors: the letters of each factor, e.g. ("oxr", "riy").
        names: one name per factor.
        steps: pairwise einsum equations, from the last factor to the first; the intermediate never exceeds
            R times the input side of the weight (left to right, CP at rank 64 would need a tensor R times the weight).
    """

    factors: tuple[str, ...]
    names: tuple[str, ...]
    steps: tuple[str, ...]

    @property
    def bottleneck(self) -> str:
        """The letter of the directions that a gate weighs: that of the first factor with size R."""
        (letter,) = set(self.factors[0]) - set("oi" + KERNEL_LETTERS)
        return letter

    def shapes(self, weight_shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], ...]:
        """The shape of each factor for a weight [o, i, *kernel]."""
        size = dict(zip("oi" + KERNEL_LETTERS, weight_shape, strict=False))
        return tuple(tuple(size.get(letter, rank) for letter in letters) for letters in self.factors)

    def __call__(self, factors: list[Tensor]) -> Tensor:
        """ΔW [o, i, *kernel], unscaled."""
        product = factors[-1]
        for step, factor in zip(self.steps, reversed(factors[:-1]), strict=True):
            product = torch.einsum(step, factor, product)
        return product


@cache
def contraction(name: str, kernel_modes: int) -> Contraction:
    """Spell out formula `name` for a weight with `kernel_modes` (0 to 3) dimensions behind its first two."""
    formula, kernel = FORMULAS[name], KERNEL_LETTERS[:kernel_modes]
    factors: list[str] = []
    for term in formula.template.split(","):
        for mode in kernel if term.startswith("*") else " ":
            letters = term.replace("*", mode).replace(" ", "")
            factors.append(letters.replace("K", kernel).replace("F", kernel[:-1]).replace("L", kernel[-1:]))
    output = "oi" + kernel
    steps, product = [], factors[-1]
    for position in range(len(factors) - 2, -1, -1):
        still_needed = set(output).union(*factors[:position])
        both = dict.fromkeys(factors[position] + product)
        kept = output if position == 0 else "".join(letter for letter in both if letter in still_needed)
        steps.append(f"{factors[position]},{product}->{kept}")
        product = kept
    return Contraction(tuple(factors), formula.names[: len(factors)], tuple(steps))


def unit_factors(
    contraction: Contraction, weight_shape: tuple[int, ...], rank: int, generator: torch.Generator
) -> list[Tensor]:
    """Gaussian factors of which each direction is a tensor of size one (in the mean), as of a singular vector pair."""
    return [
        torch.empty(shape).normal_(0, (rank / max(1, math.prod(shape))) ** 0.5, generator=generator)
        for shape in contraction.shapes(weight_shape, rank)
    ]


def initial_factors(
    contraction: Contraction, weight_shape: tuple[int, ...], rank: int, generator: torch.Generator
) -> list[Tensor]:
    """Factors for which ΔW is zero: the first is zero, the others random.

    The factor with the input mode is drawn as LoRA draws A (uniform, bound 1/√fan-in); any further one with unit
    response, so that the composed input side has the variance of LoRA's A whatever the number of factors.
    """
    factors: list[Tensor] = []
    for letters, shape in zip(contraction.factors, contraction.shapes(weight_shape, rank), strict=True):
        if not factors:
            factors.append(torch.zeros(shape))
            continue
        bound = math.sqrt((1.0 if "i" in letters else 3.0) / max(1, math.prod(shape) // rank))
        factors.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return factors
