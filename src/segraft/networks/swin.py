"""SwinUNETR as MONAI computed it before version 1.5: what the published weights were trained with.

Where the Swin transformer halves the grid, it joins each 2×2×2 block of tokens. Until 1.4 MONAI took two of the eight
tokens twice and two never (its issues 4757 and 8284; it kept this so that trained weights stay valid), since 1.5 it
takes each once (pull request 8285). Names and shapes of all tensors are the same, so weights of one load into the other
without a word, and every deeper feature is another.
"""

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets.swin_unetr import PatchMerging, SwinUNETR
from torch import Tensor, nn
from torch.nn import functional

from segraft.networks.registry import FOREIGN_PARTS, FOREIGN_PROJECTIONS

ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
"""Which token of a 2×2×2 block comes where in the joined vector."""

PATH = f"{__name__}:OriginalSwinUNETR"
"""By which `build` makes it; files record this, whose arguments have the defaults of MONAI's."""

_MONAI = f"{SwinUNETR.__module__}.{SwinUNETR.__qualname__}"


class OriginalPatchMerging(PatchMerging):  # type: ignore[misc]  # MONAI has no types
    """Joins 2×2×2 tokens as before MONAI 1.5."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, X, Y, Z, C] to [B, X/2, Y/2, Z/2, 2·C], odd sizes filled up with zeros; a slice as in MONAI."""
        if tokens.ndim != 5:
            sliced: Tensor = super().forward(tokens)
            return sliced
        x, y, z = (size % 2 for size in tokens.shape[1:4])
        if x or y or z:
            tokens = functional.pad(tokens, (0, 0, 0, z, 0, y, 0, x))
        joined = torch.cat([tokens[:, i::2, j::2, k::2] for i, j, k in ORDER], -1)
        merged: Tensor = self.reduction(self.norm(joined))
        return merged


class OriginalSwinUNETR(SwinUNETR):  # type: ignore[misc]
    """MONAI's SwinUNETR, with its arguments and tensors, computing as before MONAI 1.5."""

    parts: Mapping[str, tuple[str, ...]] = FOREIGN_PARTS[_MONAI]
    projections = FOREIGN_PROJECTIONS[_MONAI]

    def __init__(self, in_channels: int, out_channels: int, **arguments: Any) -> None:
        super().__init__(in_channels=in_channels, out_channels=out_channels, **arguments)
        merge_as_before(self)


def merge_as_before(net: nn.Module) -> bool:
    """Let a network of MONAI compute as before version 1.5; False where there was nothing to change."""
    merging = [module for module in net.modules() if type(module) is PatchMerging]
    for module in merging:
        module.__class__ = OriginalPatchMerging  # the same tensors and names, only another forward
    return bool(merging)


def merges_as_before(net: nn.Module) -> bool:
    """Whether a network joins tokens as MONAI did before 1.5."""
    return any(isinstance(module, OriginalPatchMerging) for module in net.modules())


def merges_as_now(net: nn.Module) -> bool:
    """Whether any module joins tokens as MONAI does since 1.5."""
    return any(type(module) is PatchMerging for module in net.modules())
