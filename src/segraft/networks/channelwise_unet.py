"""The classic U-Net with an encoder of one channel for images of several."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from segraft.adapters import routed
from segraft.errors import SegraftError
from segraft.networks.channelwise import Channelwise, channelwise_parts
from segraft.networks.unet import CONV, UNet


class ChannelwiseUNet(Channelwise, UNet):
    """U-Net whose encoder sees one channel at a time; maps [B, C, X, Y(, Z)] to logits [B, L, X, Y(, Z)].

    Encoder, bottleneck, decoder and head are those of `UNet` with one channel, whose weights load into them; a 1×1
    convolution per level fuses what the encoder made of each channel.

    Args:
        in_channels: C, channels of the image.
        out_channels: labels, one logit each.
        spatial_dims: 2 or 3 (1 for signals).
        widths: channels of each level, from the finest.
        norm: None or `instance`; batch statistics would be those of all channels mixed.
        channel_dropout: see `Channelwise`.

    Attributes:
        size_multiple: what the sizes of an image must be multiples of.
        parts: `encoder` (with the bottleneck), `bottleneck`, `fusion`, `decoder` (with the fusion), `head`.

    Raises:
        SegraftError: as `UNet` and `Channelwise`, or batch norms.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        *,
        spatial_dims: int = 2,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: Literal["instance", "batch"] | None = None,
        channel_dropout: float = 0.0,
    ) -> None:
        if norm == "batch":
            raise SegraftError(
                "a channel-wise U-Net cannot have batch norms, whose statistics would mix the channels: give norm "
                "'instance' or none."
            )
        super().__init__(1, out_channels, spatial_dims=spatial_dims, widths=widths, norm=norm)
        self.take_channels(in_channels, channel_dropout)
        self.fusion = nn.ModuleList(CONV[spatial_dims](in_channels * width, width, 1) for width in widths)
        self.parts = channelwise_parts(**self.parts)

    def forward(self, image: Tensor) -> Tensor:
        """Logits on the grid of the image."""
        sizes, fits = image.shape[2:], self.size_multiple
        if image.ndim != self.spatial_dims + 2 or any(size % fits for size in sizes):
            raise SegraftError(
                f"this U-Net takes [batch, channels] and {self.spatial_dims} sizes that are multiples of {fits}, "
                f"not {tuple(image.shape)}: choose a patch size accordingly."
            )
        folded = self.folded(image)
        states, state = [], folded.volumes
        with routed(folded.channels):
            for level in self.encoder:
                state = level(state)
                states.append(state)
                state = self.pool(state)
            states.append(self.bottleneck(state))
        *skips, up = (fuse(folded.side_by_side(state, 1)) for fuse, state in zip(self.fusion, states, strict=True))
        for widen, level, skip in zip(self.upsampling, self.decoder, reversed(skips), strict=True):
            up = level(torch.cat([skip, widen(up)], dim=1))
        logits: Tensor = self.head(up)
        return logits
