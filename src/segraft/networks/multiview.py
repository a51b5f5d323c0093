"""The two-level multi-view U-Net, in two or three dimensions."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from segraft.errors import SegraftError
from segraft.networks.unet import CONV, NORM, POOL

DILATIONS = (1, 2, 4)


class MultiViewUNet(nn.Module):
    """Two-level multi-view U-Net; maps [B, C, X, Y(, Z)] to logits [B, L, X, Y(, Z)].

    From section 2.1, figure 1 and table 2 of the haemorrhage paper (Minoccheri et al. 2025), after Yao et al. 2020:

    - M1: two 3×3 convolutions, each with ReLU. M1.1 and M1.2 encode, M1.3 is the bottom, M1.4 and M1.5 decode.
    - M2: three 3×3 convolutions one after another, with dilations 1, 2 and 4, and their output concatenated to their
      input. M2.1 and M2.2 sit on the skip connections of the finer and the coarser level.
    - M3, behind M1.5: two 3×3 convolutions and one 1×1.

    Where the paper is silent this is as the classic U-Net: channels double from level to level (w, 2w, 4w, then 2w, w,
    with w = 64), 2×2 max pooling, padding that keeps the size, skips concatenated before what comes up. M2 and M3 keep
    the channels of their input, and ReLU follows each of their 3×3 convolutions, as in M1. Upsampling is to the nearest
    voxel and has no parameters: the classic up-convolution would belong to none of the blocks, which are all that
    "All" of table 2 trains, while M1 is two 3×3 convolutions and nothing else.

    The paper's softmax is a sigmoid per label here, on these logits, as for every network of this package.

    Args:
        in_channels: channels of the image.
        out_channels: labels, one logit each.
        width: w, channels of the finest level.
        spatial_dims: 2 or 3 (1 for signals).
        norm: normalisation behind each 3×3 convolution (which then has no bias); None as in the paper.

    Attributes:
        size_multiple: what the sizes of an image must be multiples of.
        parts: each block by the paper's name, `M1.1` … `M1.5`, `M2.1`, `M2.2`, `M3`; and the usual `encoder` (with the
            bottleneck), `bottleneck`, `decoder` (with the blocks on the skips) and `head`, which is M3. Modules are
            named alike (`M1_1`), so that `M1.*` is the expression for all blocks of a kind.

    Raises:
        SegraftError: a width, dimensions or a norm that cannot be, or (forward) a size that is no multiple of 4.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        width: int = 64,
        spatial_dims: int = 2,
        norm: Literal["instance", "batch"] | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or spatial_dims not in CONV or norm not in (None, *NORM):
            raise SegraftError(
                f"multi-view U-Net with width {width}, {spatial_dims} dimensions and norm {norm!r}: give a positive "
                f"width, 1 to 3 dimensions and a norm of None, {' or '.join(NORM)}."
            )
        normalise = None if norm is None else NORM[norm][spatial_dims]
        self.spatial_dims = spatial_dims
        self.size_multiple = 4
        self.parts = {
            **{f"M1.{i}": (f"M1_{i}",) for i in range(1, 6)},
            "M2.1": ("M2_1",),
            "M2.2": ("M2_2",),
            "M3": ("M3",),
            "encoder": ("M1_1", "M1_2", "M1_3"),
            "bottleneck": ("M1_3",),
            "decoder": ("M2_1", "M2_2", "M1_4", "M1_5"),
            "head": ("M3",),
        }

        fine, coarse, bottom = width, 2 * width, 4 * width
        self.M1_1 = _convolutions(spatial_dims, in_channels, fine, normalise)
        self.M1_2 = _convolutions(spatial_dims, fine, coarse, normalise)
        self.M1_3 = _convolutions(spatial_dims, coarse, bottom, normalise)
        self.M2_1 = _MultiView(spatial_dims, fine, normalise)
        self.M2_2 = _MultiView(spatial_dims, coarse, normalise)
        self.M1_4 = _convolutions(spatial_dims, 2 * coarse + bottom, coarse, normalise)
        self.M1_5 = _convolutions(spatial_dims, 2 * fine + coarse, fine, normalise)
        self.M3 = _convolutions(spatial_dims, fine, fine, normalise)
        self.M3.append(CONV[spatial_dims](fine, out_channels, 1))
        self.pool = POOL[spatial_dims](2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
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
                f"this multi-view U-Net takes [batch, channels] and {self.spatial_dims} sizes that are multiples of "
                f"{fits}, not {tuple(image.shape)}: choose a patch size accordingly."
            )
        fine = self.M1_1(image)
        coarse = self.M1_2(self.pool(fine))
        bottom = self.M1_3(self.pool(coarse))
        coarse = self.M1_4(torch.cat([self.M2_2(coarse), self.upsample(bottom)], dim=1))
        fine = self.M1_5(torch.cat([self.M2_1(fine), self.upsample(coarse)], dim=1))
        logits: Tensor = self.M3(fine)
        return logits


class _MultiView(nn.Sequential):
    """M2: [B, c, …] to [B, 2c, …], the input and what three dilated convolutions make of it."""

    def __init__(self, spatial_dims: int, channels: int, normalise: Callable[..., nn.Module] | None) -> None:
        super().__init__(*_convolutions(spatial_dims, channels, channels, normalise, dilations=DILATIONS))

    def forward(self, image: Tensor) -> Tensor:
        seen = image
        for layer in self:
            seen = layer(seen)
        return torch.cat([image, seen], dim=1)


def _convolutions(
    spatial_dims: int,
    channels: int,
    width: int,
    normalise: Callable[..., nn.Module] | None,
    *,
    dilations: tuple[int, ...] = (1, 1),
) -> nn.Sequential:
    """3×3 convolutions of these dilations that keep the size, each normalised where that is wanted, and with ReLU."""
    layers: list[nn.Module] = []
    for dilation in dilations:
        bias, convolution = normalise is None, CONV[spatial_dims]
        layers.append(convolution(channels, width, 3, padding=dilation, dilation=dilation, bias=bias))
        if normalise is not None:
            layers.append(normalise(width, affine=True))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*layers)
