"""The classic U-Net, in two or three dimensions."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from segraft.errors import SegraftError

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
NORM: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "instance": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with same-size convolutions; maps [B, C, X, Y(, Z)] to logits [B, L, X, Y(, Z)].

    The defaults are the network of Table 3 of the haemorrhage paper: double 3×3 convolutions of 64 to 1024 channels,
    2×2 transposed convolutions, concatenated skips, a 1×1 head, no normalisation.

    Args:
        in_channels: channels of the image.
        out_channels: labels, one logit each.
        spatial_dims: 2 or 3 (1 for signals).
        widths: channels of each level, from the finest; their number is the depth.
        norm: normalisation behind each 3×3 convolution (which then has no bias); None as in the paper.

    Attributes:
        size_multiple: what the sizes of an image must be multiples of.
        parts: `encoder` (with the bottleneck), `bottleneck`, `decoder`, `head`.

    Raises:
        SegraftError: fewer than two widths, an unknown norm, or (forward) a size that the depth does not divide.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        spatial_dims: int = 2,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: Literal["instance", "batch"] | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1 or spatial_dims not in CONV or norm not in (None, *NORM):
            raise SegraftError(
                f"U-Net with widths {tuple(widths)}, {spatial_dims} dimensions and norm {norm!r}: give at least two "
                f"positive widths, 1 to 3 dimensions and a norm of None, {' or '.join(NORM)}."
            )
        self.spatial_dims = spatial_dims
        self.size_multiple = 2 ** (len(widths) - 1)
        self.parts = {
            "encoder": ("encoder", "bottleneck"),
            "bottleneck": ("bottleneck",),
            "decoder": ("upsampling", "decoder"),
            "head": ("head",),
        }

        def double(channels: int, width: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            normalise = None if norm is None else NORM[norm][spatial_dims]
            for entering in (channels, width):
                layers.append(CONV[spatial_dims](entering, width, 3, padding=1, bias=norm is None))
                if normalise is not None:
                    layers.append(normalise(width, affine=True))
                layers.append(nn.ReLU(inplace=True))
            return nn.Sequential(*layers)

        finer = list(widths[:-1])
        self.encoder = nn.ModuleList(
            double(entering, width) for entering, width in zip([in_channels, *finer], finer, strict=False)
        )
        self.pool = POOL[spatial_dims](2)
        self.bottleneck = double(finer[-1], widths[-1])
        self.upsampling = nn.ModuleList(
            TRANSPOSED[spatial_dims](coarse, width, 2, stride=2)
            for coarse, width in zip(reversed(widths), reversed(finer), strict=False)
        )
        self.decoder = nn.ModuleList(double(2 * width, width) for width in reversed(finer))
        self.head = CONV[spatial_dims](widths[0], out_channels, 1)
        for module in self.modules():
            if isinstance(module, CONV[spatial_dims]):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Logits on the grid of the image."""
        sizes, fits = image.shape[2:], self.size_multiple
        if image.ndim != self.spatial_dims + 2 or any(size % fits for size in sizes):
            raise SegraftError(
                f"this U-Net takes [batch, channels] and {self.spatial_dims} sizes that are multiples of {fits}, "
                f"not {tuple(image.shape)}: choose a patch size accordingly."
            )
        skips = []
        for level in self.encoder:
            image = level(image)
            skips.append(image)
            image = self.pool(image)
        image = self.bottleneck(image)
        for up, level, skip in zip(self.upsampling, self.decoder, reversed(skips), strict=True):
            image = level(torch.cat([skip, up(image)], dim=1))
        logits: Tensor = self.head(image)
        return logits
