"""SwinUNETR as MONAI computed it before version 1.5: what the published weights were trained with.

Where the Swin transformer halves the grid, it joins each 2×2×2 block of tokens. Until 1.4 MONAI took two of the eight
tokens twice and two never (its issues 4757 and 8284; it kept this so that trained weights stay valid), since 1.5 it
takes each once (pull request 8285). Names and shapes of all tensors are the same, so weights of one load into the other
without a word, and every deeper feature is another.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets.swin_unetr import PatchMerging, SwinUNETR
from torch import Tensor, nn
from torch.nn import functional

from segraft.errors import SegraftError
from segraft.networks.registry import FOREIGN_PARTS, FOREIGN_PROJECTIONS, NETWORKS

ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
"""Which token of a 2×2×2 block comes where in the joined vector."""

PATH = f"{__name__}:OriginalSwinUNETR"
"""By which `build` makes it; files record this, whose arguments have the defaults of MONAI's."""

ARGUMENT = "original_merging"
"""Of networks that join tokens either way, as the channel-wise SwinUNETR does."""

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


def built_as_before(network: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `build` makes a network of this name, with these arguments, that joins tokens as before MONAI 1.5."""
    return network in (PATH, "original_swin_unetr") or bool(arguments.get(ARGUMENT))


def named_as_before(net: nn.Module, network: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """By which name and arguments `build` makes a network like `net` that joins tokens as before MONAI 1.5.

    Args:
        net: built by the name and the arguments.
        network: the name.
        arguments: for `build`.

    Raises:
        SegraftError: a network that cannot be built so.
    """
    if ARGUMENT in inspect.signature(type(net)).parameters:
        return network, {**arguments, ARGUMENT: True}
    if type(net) in (SwinUNETR, OriginalSwinUNETR):
        known = NETWORKS[network].arguments if network in NETWORKS else {}
        return PATH, {**known, **arguments}
    raise SegraftError(
        f"the network {network} joins its tokens as MONAI since 1.5 whenever it is built, and these weights were "
        f"trained before: take swin_unetr or swin_unetr_channelwise, or let its constructor take {ARGUMENT}."
    )


def how_to_merge_as_before(net: nn.Module) -> str:
    """With which network, or which argument of it, tokens are joined so."""
    takes = ARGUMENT in inspect.signature(type(net)).parameters
    return f"with --network-args '{{\"{ARGUMENT}\": true}}'" if takes else "in the network original_swin_unetr"
