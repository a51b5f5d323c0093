"""Copies of an image at other contrasts, for the mixed loss: equation 2 of the haemorrhage paper."""

from dataclasses import dataclass

from torch import Tensor

FARTHEST = 1.5
"""γ of the copies that are farthest from the image; its inverse on the other side."""
LEAST = 0.5
"""Weight of the farthest copies as a share of the image's."""


@dataclass(frozen=True)
class Contrast:
    """One contrast and its share of the loss.

    Attributes:
        gamma: intensities (0…1) become x^γ: below 1 brighter, above 1 darker, 1 the image itself.
        weight: w of equation 2.
    """

    gamma: float
    weight: float


def ladder(copies: int) -> tuple[Contrast, ...]:
    """The image, and a ladder of contrasts on both sides of it: I_0, I_1, …, I_N of equation 2.

    With K = ⌈N/2⌉ rungs on a side, copy i stands on rung k = ⌈i/2⌉, at distance d_i = k/K from the image (d_0 = 0):

        γ_i = 1.5^(∓d_i), − for odd i and + for even i        w_i = (1 − d_i/2) / Σ_j (1 − d_j/2)

    So weights fall in proportion to the change, the farthest copies count half as much as the image, and all weights
    sum to 1, which keeps the loss in its range. The paper gives neither contrasts nor weights, only that an image very
    different from I_0 has a lower weight, "proportionally to the amount of noise added". Gamma rather than a linear
    change, as that changes nothing where instance norm follows the first convolution.

    Args:
        copies: N ≥ 0; 0 gives the image alone, with weight 1. An odd N has one more on the brighter side.

    Returns:
        N + 1 contrasts, the image first.
    """
    rungs = (copies + 1) // 2
    distances = [(i + 1) // 2 / max(rungs, 1) for i in range(copies + 1)]
    shares = [1 - (1 - LEAST) * distance for distance in distances]
    return tuple(
        Contrast(FARTHEST ** (-distance if i % 2 else distance), share / sum(shares))
        for i, (distance, share) in enumerate(zip(distances, shares, strict=True))
    )


def with_contrast(image: Tensor, gamma: float) -> Tensor:
    """sign(x)·|x|^γ of every voxel, as augmentation takes some a little below 0; the image itself where γ is 1."""
    return image if gamma == 1 else image.sign() * image.abs().pow(gamma)
