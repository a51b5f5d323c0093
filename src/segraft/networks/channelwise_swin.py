"""SwinUNETR with an encoder of one channel for images of several."""

from typing import Any

from monai.networks.blocks import UnetrBasicBlock
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from segraft.adapters import routed
from segraft.networks.channelwise import Channelwise, channelwise_parts
from segraft.networks.registry import FOREIGN_PARTS, FOREIGN_PROJECTIONS
from segraft.networks.swin import merge_as_before
from segraft.networks.unet import CONV

_MONAI = f"{SwinUNETR.__module__}.{SwinUNETR.__qualname__}"


class ChannelwiseSwinUNETR(Channelwise, SwinUNETR):  # type: ignore[misc]  # MONAI has no types
    """MONAI's SwinUNETR whose Swin transformer sees one channel at a time; maps [B, C, X, Y, Z] to [B, L, X, Y, Z].

    The transformer has the tensors of one for one channel, under their names (`swinViT`); a 1×1 convolution for each
    of its five hidden states fuses what it made of the channels, and the decoder's first block takes all of them.

    Args:
        in_channels: C, channels of the image.
        out_channels: labels, one logit each.
        channel_dropout: see `Channelwise`.
        original_merging: join tokens as MONAI before 1.5, as published weights were trained (`segraft.networks.swin`).
        arguments: of MONAI's SwinUNETR.

    Attributes:
        size_multiple: what the sizes of an image must be multiples of.
        parts: `encoder`, `fusion`, `decoder` (with the fusion), `head`.
        projections: queries, keys and values in the fused weights.
    """

    size_multiple = 32
    parts = channelwise_parts(**FOREIGN_PARTS[_MONAI])
    projections = FOREIGN_PROJECTIONS[_MONAI]

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        *,
        channel_dropout: float = 0.0,
        original_merging: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(in_channels=1, out_channels=out_channels, **arguments)
        if original_merging:
            merge_as_before(self)
        self.take_channels(in_channels, channel_dropout)
        features, dims = arguments.get("feature_size", 24), arguments.get("spatial_dims", 3)
        self.encoder1 = UnetrBasicBlock(
            spatial_dims=dims,
            in_channels=in_channels,
            out_channels=features,
            kernel_size=3,
            stride=1,
            norm_name=arguments.get("norm_name", "instance"),
            res_block=True,
        )
        self.fusion = nn.ModuleList(
            CONV[dims](in_channels * features * 2**level, features * 2**level, 1) for level in range(5)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits on the grid of the image."""
        folded = self.folded(image)
        self._check_input_size(image.shape[2:])
        with routed(folded.channels):
            states = self.swinViT(folded.volumes, self.normalize)
        fused = [fuse(folded.side_by_side(state, 1)) for fuse, state in zip(self.fusion, states, strict=True)]
        skips = [self.encoder1(folded.image), self.encoder2(fused[0]), self.encoder3(fused[1]), self.encoder4(fused[2])]
        up = self.decoder5(self.encoder10(fused[4]), fused[3])
        up = self.decoder4(up, skips[3])
        up = self.decoder3(up, skips[2])
        up = self.decoder2(up, skips[1])
        logits: Tensor = self.out(self.decoder1(up, skips[0]))
        return logits
