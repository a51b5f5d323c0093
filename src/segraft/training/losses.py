"""Losses on logits [B, L, *spatial] against binary planes of the same shape, by name."""

from collections.abc import Callable

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def overlap(probability: Tensor, mask: Tensor) -> Tensor:
    """Equation 1 of the haemorrhage paper: −Σ_x L(x)·O(x) / (L(x) + O(x)), where 0/0 counts 0.

    Args:
        probability: O, in [0, 1].
        mask: L, of the same shape.
    """
    total = mask + probability
    return -(mask * probability / torch.where(total > 0, total, torch.ones_like(total))).sum()


def overlap_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Equation 1 over both classes of every label, per pixel, scaled to [−1, 0].

    The sum runs over the label *and* its background, as over the planes of the paper's pixel-wise softmax: over the
    label alone the equation does not depend on any background pixel, and a mask of ones would be its best answer.
    One pixel contributes at most 1/2, so 2/n scales the sum of n pixels.
    """
    probability = torch.sigmoid(logits)
    return (overlap(probability, mask) + overlap(1 - probability, 1 - mask)) * (2 / mask.numel())


class DiceCrossEntropy(nn.Module):
    """Soft Dice (per label, over the batch) plus binary cross-entropy, both on sigmoid probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True, batch=True)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The sum of both; ≥ 0."""
        dice: Tensor = self.dice(logits, mask)
        return dice + nn.functional.binary_cross_entropy_with_logits(logits, mask)


LOSSES: dict[str, Callable[[], Loss]] = {
    "dice_ce": DiceCrossEntropy,
    "overlap": lambda: overlap_loss,
}
"""To add a loss, add one entry."""
