"""UNETR with an encoder of one channel for images of several: the network of the channel-wise paper."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.nets.vit import ViT
from torch import Tensor, nn
from torch.nn import functional

from segraft.adapters import routed
from segraft.errors import SegraftError
from segraft.networks.channelwise import Channelwise, channelwise_parts
from segraft.networks.registry import FOREIGN_PROJECTIONS


def _as_it_is(state: Tensor) -> Tensor:
    return state


def _over_tokens(state: Tensor) -> Tensor:
    return functional.instance_norm(state.transpose(1, 2)).transpose(1, 2)


TAP_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"none": _as_it_is, "instance": _over_tokens}
"""What becomes of a tapped state [B, T, d] before it is fused, without parameters: it stays; or each of its features
gets mean 0 and variance 1 over the tokens of its image."""


class ChannelwiseUNETR(Channelwise, nn.Module):
    """UNETR whose vision transformer sees one channel at a time; maps [B, C, X, Y, Z] to logits [B, L, X, Y, Z].

    The transformer is MONAI's ViT for one channel, under `vit` as in MONAI's UNETR, so that weights of either load; the
    norms that newer MONAI has for a cross attention which is not there are buffers here, so that they keep their names
    without being parameters. Of its states four (with 16³ patches) are tapped; a linear map for each brings those of
    all channels, C·d, to d. The decoder is that of MONAI's UNETR, under its names; its skip at full size sees the
    image itself, with all its channels.

    With its defaults, four channels and three labels it has the sizes of the paper's table: 88,322,304 parameters in
    the encoder, 54,577,347 in the rest.

    Args:
        in_channels: C, channels of the image.
        out_channels: labels, one logit each.
        img_size: the sizes of every image it is given: its positions are trained, each for its place. Two sizes make
            a network for slices.
        feature_size: channels of the decoder at full size.
        hidden_size: d, width of the transformer.
        mlp_dim: width within its blocks.
        num_layers: its blocks.
        num_heads: its attention heads.
        patch_size: edge of its patches, a power of two of at least 4; the decoder has log2 of it levels.
        taps: after which blocks states are tapped, from the finest level to the coarsest, the last after the last
            block, where it is normalised; None: evenly, such as z3, z6, z9 and z12. MONAI's UNETR takes (4, 7, 10, 12).
        norm_name: of the decoder.
        conv_block: as in MONAI's UNETR.
        res_block: as in MONAI's UNETR.
        dropout_rate: within the transformer.
        qkv_bias: whether queries, keys and values have a bias.
        channel_dropout: see `Channelwise`.
        tap_norm: of tapped states, a key of `TAP_NORMS`. MONAI's UNETR has none; then most of what the decoder gets
            from an encoder that was pre-trained by masking is the same for all tokens (docs/architecture.md).

    Attributes:
        image_size: the only sizes of an image that it takes.
        size_multiple: what they are multiples of.
        parts: `encoder`, `fusion`, `decoder` (with the fusion), `head`.
        projections: queries, keys and values in the fused weights.

    Raises:
        SegraftError: sizes that do not go together, or (forward) an image of another size.
    """

    projections = FOREIGN_PROJECTIONS["monai.networks.nets.unetr.UNETR"]

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        *,
        img_size: Sequence[int] = (128, 128, 48),
        feature_size: int = 64,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        patch_size: int = 16,
        taps: Sequence[int] | None = None,
        norm_name: str = "instance",
        conv_block: bool = True,
        res_block: bool = True,
        dropout_rate: float = 0.0,
        qkv_bias: bool = False,
        channel_dropout: float = 0.0,
        tap_norm: str = "instance",
    ) -> None:
        super().__init__()
        self.take_channels(in_channels, channel_dropout)
        self.image_size, self.size_multiple = tuple(img_size), patch_size
        self.taps = _taps(self.image_size, patch_size, num_layers, taps)
        self.grid = tuple(size // patch_size for size in self.image_size)
        dims, levels = len(self.grid), len(self.taps)
        self.vit = _without_unused(
            ViT(
                in_channels=1,
                img_size=self.image_size,
                patch_size=(patch_size,) * dims,
                hidden_size=hidden_size,
                mlp_dim=mlp_dim,
                num_layers=num_layers,
                num_heads=num_heads,
                dropout_rate=dropout_rate,
                spatial_dims=dims,
                qkv_bias=qkv_bias,
            )
        )
        self.fusion = nn.ModuleList(nn.Linear(in_channels * hidden_size, hidden_size) for _ in self.taps)
        self._take_norm(tap_norm)
        common: dict[str, Any] = {
            "spatial_dims": dims,
            "kernel_size": 3,
            "norm_name": norm_name,
            "res_block": res_block,
        }
        self.encoder1 = UnetrBasicBlock(in_channels=in_channels, out_channels=feature_size, stride=1, **common)
        widths = [feature_size * 2**level for level in range(levels)]
        for level in range(1, levels):
            block = UnetrPrUpBlock(
                in_channels=hidden_size,
                out_channels=widths[level],
                num_layer=levels - 1 - level,
                stride=1,
                upsample_kernel_size=2,
                conv_block=conv_block,
                **common,
            )
            self.add_module(f"encoder{level + 1}", block)
        for level in reversed(range(levels)):
            block = UnetrUpBlock(
                in_channels=[*widths, hidden_size][level + 1],
                out_channels=widths[level],
                upsample_kernel_size=2,
                **common,
            )
            self.add_module(f"decoder{level + 2}", block)
        self.out = UnetOutBlock(spatial_dims=dims, in_channels=feature_size, out_channels=out_channels)
        blocks = [name for name, _ in self.named_children() if name.startswith(("encoder", "decoder"))]
        self.parts = channelwise_parts(encoder=("vit",), decoder=blocks, head=("out",))

    def _take_norm(self, name: str) -> None:
        """Files of networks with and without a norm have the same weights and are told apart by a mark among them."""
        if name not in TAP_NORMS:
            raise SegraftError(f"unknown tap_norm {name!r}: choose one of {', '.join(TAP_NORMS)}.")
        if name != "none" and math.prod(self.grid) < 2:
            raise SegraftError(
                f"img_size is {_shown(self.image_size)}, a single patch, and a norm over the patches of an image needs "
                'several: choose a larger img_size, or "tap_norm": "none".'
            )
        self.normed = TAP_NORMS[name]
        if name != "none":
            self.fusion.register_buffer(f"tap_norm_{name}", torch.ones((), dtype=torch.uint8))

    def forward(self, image: Tensor) -> Tensor:
        """Logits on the grid of the image."""
        if tuple(image.shape[2:]) != self.image_size:
            raise SegraftError(
                f"this UNETR takes patches of exactly {_shown(self.image_size)} voxels, its img_size, and was given "
                f"{_shown(image.shape[2:])}: choose --patch {' '.join(map(str, self.image_size))}, or another img_size "
                "among the network's arguments."
            )
        folded = self.folded(image)
        with routed(folded.channels):
            last, states = self.vit(folded.volumes)
        tapped = [*(states[tap - 1] for tap in self.taps[:-1]), last]
        fused = [
            fuse(folded.side_by_side(self.normed(state), -1)).transpose(1, 2).unflatten(2, self.grid)
            for fuse, state in zip(self.fusion, tapped, strict=True)
        ]
        skips = [self.encoder1(folded.image)]
        for level, state in enumerate(fused[:-1], start=2):
            skips.append(self.get_submodule(f"encoder{level}")(state.contiguous()))
        up = fused[-1].contiguous()
        for level, skip in reversed(list(enumerate(skips, start=2))):
            up = self.get_submodule(f"decoder{level}")(up, skip)
        logits: Tensor = self.out(up)
        return logits


def _taps(image: Sequence[int], patch: int, blocks: int, taps: Sequence[int] | None) -> tuple[int, ...]:
    """After which blocks states are tapped."""
    levels = int(math.log2(patch)) if patch >= 1 else 0
    if 2**levels != patch or levels < 2:
        raise SegraftError(f"patch_size is {patch}: it must be a power of two of at least 4, as the decoder doubles.")
    if len(image) not in (2, 3) or any(size < patch or size % patch for size in image):
        raise SegraftError(
            f"img_size is {_shown(image)}: it must be two or three sizes that are multiples of the patch_size, {patch}."
        )
    found = tuple((level + 1) * blocks // levels for level in range(levels)) if taps is None else tuple(taps)
    if len(found) != levels or found[0] < 1 or found[-1] != blocks or any(b <= a for a, b in pairwise(found)):
        raise SegraftError(
            f"taps are {found} for {blocks} blocks and a patch_size of {patch}: they must be {levels} growing numbers "
            f"of blocks, the last {blocks}."
        )
    return found


def _shown(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _without_unused(vit: ViT) -> ViT:
    """MONAI's ViT with the norms that its forward pass never reaches as buffers.

    They stay in the state dict, so that weights of MONAI's own load and are written as such; but they are neither
    counted nor trained.
    """
    for block in vit.blocks:
        norm = getattr(block, "norm_cross_attn", None)
        if norm is not None and not block.with_cross_attention:
            for name, value in list(norm.named_parameters()):
                delattr(norm, name)
                norm.register_buffer(name, value.detach())
    return vit
