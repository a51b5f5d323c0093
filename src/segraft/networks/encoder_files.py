"""Files of encoders: what masked pre-training leaves, to be part of a network that segments."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segraft.errors import SegraftError

ENCODER = "encoder"
"""The key of a base file's record that says it is one of an encoder."""


def encoder_record(prefix: str, img_size: tuple[int, ...]) -> dict[str, Any]:
    """What the record of such a file says.

    Args:
        prefix: of the encoder's tensors.
        img_size: voxels along X, Y and Z that it takes.
    """
    return {ENCODER: {"prefix": prefix, "img_size": list(img_size)}}


def holds_encoder(record: Mapping[str, Any]) -> bool:
    """Whether a base file with this record holds one."""
    return ENCODER in record


def require_segmenting(path: object, record: Mapping[str, Any]) -> None:
    """Refuse a file that holds an encoder where a network is needed that segments.

    Args:
        path: of the file.
        record: of it.

    Raises:
        SegraftError: it does, with what it is for.
    """
    if not holds_encoder(record):
        return
    sizes = record[ENCODER].get("img_size")
    raise SegraftError(
        f"{path} holds an encoder from masked pre-training, which segments nothing by itself: give it as --weights of "
        f'a network with that encoder, such as --base unetr_channelwise with "img_size": {sizes} in --network-args.'
    )


def vit_arguments(tensors: Mapping[str, Tensor], prefix: str = "vit.") -> dict[str, object]:
    """The arguments that a ViT with these tensors was built with, as far as shapes show them; empty where it is none.

    Its image's size is known by the number of patches alone: `patches`.
    """
    projection = tensors.get(f"{prefix}patch_embedding.patch_embeddings.weight")
    positions = tensors.get(f"{prefix}patch_embedding.position_embeddings")
    if projection is None or positions is None:
        return {}
    blocks = {key.split(".")[2] for key in tensors if key.startswith(f"{prefix}blocks.")}
    first = tensors.get(f"{prefix}blocks.0.mlp.linear1.weight")
    return {
        "in_channels": projection.shape[1],
        "patch_size": tuple(projection.shape[2:]),
        "hidden_size": projection.shape[0],
        "mlp_dim": None if first is None else first.shape[0],
        "num_layers": len(blocks),
        "patches": positions.shape[1],
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in tensors,
    }
