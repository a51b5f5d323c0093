"""Masked auto-encoder (He et al. 2022) of scans of one channel: from some of the patches, what is in the others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from monai.networks.blocks.transformerblock import TransformerBlock
from torch import Tensor, nn

from segraft.errors import SegraftError
from segraft.networks.vit import Sizes, build_vit, encode, grid_of, image_of, patches_of, shown, sines, start, three

EPSILON = 1e-6
"""Added to a patch's variance: a patch of one value is one of zeros."""

HEAD = 32
"""Width of an attention head of the decoder."""


@dataclass(frozen=True)
class Reconstruction:
    """What a masked auto-encoder makes of images.

    Attributes:
        predicted: [B, T, voxels of a patch], of every patch, each meant to have mean 0 and variance 1.
        masked: [B, T], True where the encoder did not see the patch.
    """

    predicted: Tensor
    masked: Tensor

    def blank(self) -> "Reconstruction":
        """The same with zeros predicted: each patch's mean."""
        return Reconstruction(torch.zeros_like(self.predicted), self.masked)


class MaskedAutoencoder(nn.Module):
    """A ViT under `vit.`, as in MONAI's UNETR, and a light decoder that serves the pre-training alone.

    The encoder is given the visible patches. The decoder is given what it makes of them, and one trained token in place
    of every other; where patches are it knows from fixed sines.

    Args:
        in_channels: 1.
        img_size: voxels along X, Y and Z (or one number for all): multiples of `patch_size`; None: six patches along
            each axis.
        patch_size: voxels of a patch, likewise.
        hidden_size: width of the encoder, a multiple of `num_heads`.
        mlp_dim: width within its blocks.
        num_layers: its blocks.
        num_heads: its attention heads.
        qkv_bias: whether queries, keys and values have a bias; UNETR's have none.
        dropout_rate: in the encoder.
        decoder_size: width of the decoder, a multiple of `HEAD`; None: two thirds of the encoder's, at most 512.
        decoder_layers: its blocks.

    Raises:
        SegraftError: sizes that do not go together, or more than one channel.
    """

    parts: ClassVar[dict[str, tuple[str, ...]]] = {"encoder": ("vit",), "decoder": ("mae_decoder",)}

    def __init__(
        self,
        in_channels: int = 1,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        *,
        qkv_bias: bool = False,
        dropout_rate: float = 0.0,
        decoder_size: int | None = None,
        decoder_layers: int = 8,
    ) -> None:
        super().__init__()
        if in_channels != 1:
            raise SegraftError(
                f"a masked auto-encoder is trained on one channel, not on {in_channels}: leave in_channels out, and "
                "let the encoder see the channels of a scan one by one (unetr_channelwise)."
            )
        self.patch_size = three(patch_size, "patch_size")
        self.img_size = three(img_size or tuple(6 * size for size in self.patch_size), "img_size")
        self.grid = grid_of(self.img_size, self.patch_size)
        self.size_multiple = math.lcm(*self.patch_size)
        self.vit = build_vit(
            self.img_size,
            self.patch_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            dropout_rate=dropout_rate,
        )
        width = min(512, HEAD * math.ceil(2 * hidden_size / 3 / HEAD)) if decoder_size is None else decoder_size
        self.mae_decoder = MaskedDecoder(
            self.grid, encoded=hidden_size, width=width, layers=decoder_layers, voxels=math.prod(self.patch_size)
        )

    def forward(self, image: Tensor, share: float = 0.75, generator: torch.Generator | None = None) -> Reconstruction:
        """Reconstruct images from some of their patches, drawn anew for every image.

        Args:
            image: [B, 1, *img_size].
            share: of the patches, which are masked; 0 masks none.
            generator: that draws them, on the CPU; None: the global one.

        Raises:
            SegraftError: images of another size, or a share that leaves no patch visible.
        """
        if image.shape[1:] != (1, *self.img_size):
            raise SegraftError(
                f"the network takes images of 1×{shown(self.img_size)} voxels (channel, X, Y, Z) and was given "
                f"{shown(image.shape[1:])}: its img_size must be the patch of the training."
            )
        visible, masked = draw(len(image), math.prod(self.grid), share, generator)
        visible, masked = visible.to(image.device), masked.to(image.device)
        return Reconstruction(self.mae_decoder(encode(self.vit, image, visible), visible), masked)

    def losses(self, image: Tensor, share: float = 0.75) -> Tensor:
        """Loss of every image [B]: the mean squared error over the voxels of its masked patches, each normalised.

        A patch's target has mean 0 and variance 1 (0 where all its voxels are equal), so that predicting zero costs 1.
        """
        return reconstruction_losses(self(image, share), self.targets(image)[0])

    def targets(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised patches [B, T, voxels], and the mean and the standard deviation [B, T, 1] of each."""
        patches = patches_of(image, self.patch_size).float()
        mean = patches.mean(-1, keepdim=True)
        deviation = (patches.var(-1, correction=0, keepdim=True) + EPSILON).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def completed(self, image: Tensor, made: Reconstruction) -> Tensor:
        """Images [B, 1, X, Y, Z] with the masked patches as predicted, at the true mean and contrast of each."""
        _, mean, deviation = self.targets(image)
        filled = torch.where(
            made.masked[:, :, None], made.predicted.float() * deviation + mean, patches_of(image, self.patch_size)
        )
        return image_of(filled, self.grid, self.patch_size)

    def blanked(self, image: Tensor, made: Reconstruction) -> Tensor:
        """Images [B, 1, X, Y, Z] with NaN in place of the masked patches."""
        patches = patches_of(image, self.patch_size)
        return image_of(patches.masked_fill(made.masked[:, :, None], torch.nan), self.grid, self.patch_size)


class MaskedDecoder(nn.Module):
    """From the encoder's states of the visible patches to the voxels of all.

    Args:
        grid: how many patches there are along X, Y and Z.
        encoded: width of the encoder.
        width: of the decoder.
        layers: blocks.
        voxels: of a patch.

    Raises:
        SegraftError: the width does not divide into heads.
    """

    def __init__(self, grid: Sizes, *, encoded: int, width: int, layers: int, voxels: int) -> None:
        super().__init__()
        if width < HEAD or width % HEAD:
            raise SegraftError(
                f"decoder_size {width} is no multiple of {HEAD}, the width of a head: choose one that is."
            )
        self.embed = nn.Linear(encoded, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", sines(grid, width), persistent=False)
        self.positions: Tensor
        self.blocks = nn.ModuleList(
            TransformerBlock(width, 4 * width, width // HEAD, qkv_bias=True) for _ in range(layers)
        )
        for block in self.blocks:
            block.norm_cross_attn = nn.Identity()  # weights of a cross attention that is not there
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, voxels)
        start(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """Predict [B, T, voxels of a patch] from the states [B, V, encoded] of the patches with the numbers [B, V]."""
        states = self.embed(encoded)
        places = visible[:, :, None].expand(-1, -1, states.shape[2])
        whole = self.mask_token.to(states.dtype).expand(len(states), self.positions.shape[1], -1)
        tokens = whole.scatter(1, places, states) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        predicted: Tensor = self.predict(self.norm(tokens))
        return predicted


def reconstruction_losses(made: Reconstruction, targets: Tensor) -> Tensor:
    """Mean squared error of every image [B] over its masked patches; `targets` as `predicted`."""
    errors = (made.predicted.float() - targets).square().mean(-1)
    return errors.where(made.masked, 0).sum(1) / made.masked.sum(1)


def draw(images: int, patches: int, share: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Which patches of each image are visible.

    Args:
        images: B.
        patches: T, of an image.
        share: of them to mask; their number is rounded.
        generator: on the CPU, so that devices agree; None: the global one.

    Returns:
        Their numbers [B, V], in order, and [B, T], True for those that are masked.

    Raises:
        SegraftError: no patch would be visible, or, of a share above 0, none masked.
    """
    masked = round(patches * share)
    if not 0 <= masked < patches or (share > 0 and not masked):
        what = "masks none" if share < 0.5 else "leaves none to look at"
        raise SegraftError(
            f"masking a share of {share:g} of {patches} patches {what}: choose another share between 0 and 1, or a "
            "larger image."
        )
    order = torch.rand(images, patches, generator=generator).argsort(1)
    visible = order[:, masked:].sort(1).values
    return visible, torch.ones(images, patches, dtype=torch.bool).scatter(1, visible, torch.zeros_like(visible).bool())
