"""The vision transformer that encodes scans, under MONAI's names, and what of it runs on some of the patches alone."""

from collections.abc import Sequence

import torch
from monai.networks.nets.vit import ViT
from torch import Tensor, nn

from segraft.errors import SegraftError

Sizes = tuple[int, int, int]


def three(sizes: int | Sequence[int], what: str) -> Sizes:
    """Sizes along X, Y and Z, where one number stands for all.

    Raises:
        SegraftError: not one or three whole numbers above zero.
    """
    found = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,) * 3
    if len(found) != 3 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in found):
        raise SegraftError(f"{what} {sizes!r} is not one or three positive whole numbers: correct it.")
    x, y, z = found
    return x, y, z


def grid_of(img_size: Sizes, patch_size: Sizes) -> Sizes:
    """How many patches there are along each axis.

    Raises:
        SegraftError: they do not cover the image, or one patch does.
    """
    if any(image % patch for image, patch in zip(img_size, patch_size, strict=True)):
        raise SegraftError(
            f"an image of {shown(img_size)} voxels (img_size) cannot be cut into patches of {shown(patch_size)} "
            "voxels (patch_size): choose sizes that are multiples of it."
        )
    x, y, z = (image // patch for image, patch in zip(img_size, patch_size, strict=True))
    if x * y * z < 2:
        raise SegraftError(
            f"an image of {shown(img_size)} voxels (img_size) is a single patch: choose a larger img_size."
        )
    return x, y, z


def shown(sizes: Sequence[int]) -> str:
    """Sizes for a message."""
    return "×".join(map(str, sizes))


def build_vit(
    img_size: Sizes,
    patch_size: Sizes,
    *,
    hidden_size: int,
    mlp_dim: int,
    num_layers: int,
    num_heads: int,
    qkv_bias: bool,
    dropout_rate: float,
) -> ViT:
    """MONAI's ViT for one channel, as its UNETR builds it: the same tensors under the same names.

    Its position embeddings are trained, as there; they start as sines and cosines (He et al. 2022), so that the order
    of the patches need not be found first. The norms that newer MONAI makes for a cross attention that is not there
    stay, for their names, but are frozen.

    Raises:
        SegraftError: `hidden_size` does not divide among the heads; see also `grid_of`.
    """
    if hidden_size % num_heads:
        raise SegraftError(
            f"hidden_size {hidden_size} does not divide among {num_heads} heads (num_heads): change one."
        )
    positions = sines(grid_of(img_size, patch_size), hidden_size)
    vit = ViT(
        in_channels=1,
        img_size=img_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        mlp_dim=mlp_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        proj_type="conv",
        classification=False,
        dropout_rate=dropout_rate,
        qkv_bias=qkv_bias,
    )
    with torch.no_grad():
        vit.patch_embedding.position_embeddings.copy_(positions)
    for name, value in vit.named_parameters():
        if ".norm_cross_attn." in name:
            value.requires_grad_(requires_grad=False)
    start(vit)
    return vit


def encode(vit: ViT, image: Tensor, visible: Tensor | None = None) -> Tensor:
    """What a ViT makes of the visible patches: masked ones are taken out before its first block.

    Args:
        vit: of MONAI, without a class token.
        image: [B, 1, X, Y, Z].
        visible: [B, V] numbers of patches, x-major; None: all, and then this is the first output of `vit` itself.

    Returns:
        [B, V, hidden].
    """
    tokens = vit.patch_embedding(image)
    if visible is not None:
        tokens = taken(tokens, visible)
    for block in vit.blocks:
        tokens = block(tokens)
    encoded: Tensor = vit.norm(tokens)
    return encoded


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Of tokens [B, T, d] those at `places` [B, V]: [B, V, d]."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def patches_of(image: Tensor, patch_size: Sizes) -> Tensor:
    """The voxels of every patch.

    Args:
        image: [B, 1, X, Y, Z].
        patch_size: of which X, Y and Z are multiples.

    Returns:
        [B, T, voxels of a patch], patches x-major as a ViT numbers them, and voxels within them likewise.
    """
    x, y, z = (size // patch for size, patch in zip(image.shape[2:], patch_size, strict=True))
    p, q, r = patch_size
    cut = image.reshape(len(image), x, p, y, q, z, r).permute(0, 1, 3, 5, 2, 4, 6)
    return cut.reshape(len(image), x * y * z, p * q * r)


def image_of(patches: Tensor, grid: Sizes, patch_size: Sizes) -> Tensor:
    """`patches_of`, undone: [B, T, voxels of a patch] to [B, 1, X, Y, Z]."""
    (x, y, z), (p, q, r) = grid, patch_size
    joined = patches.reshape(len(patches), x, y, z, p, q, r).permute(0, 1, 4, 2, 5, 3, 6)
    return joined.reshape(len(patches), 1, x * p, y * q, z * r)


def sines(grid: Sizes, width: int) -> Tensor:
    """Position embeddings [1, T, width]: a third of the width for each axis, sines and cosines of its coordinate.

    What a width that is no multiple of six has left over is 0.
    """
    each = width // 6
    rates = 10_000 ** -(torch.arange(each, dtype=torch.float64) / max(1, each))
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    angles = places[:, :, None] * rates
    waves = torch.cat((angles.sin(), angles.cos()), -1).flatten(1)
    return nn.functional.pad(waves, (0, width - 6 * each)).float()[None]


def start(net: nn.Module) -> None:
    """Random weights as He et al. start them: Xavier's for linear layers, among them the projection of patches."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
