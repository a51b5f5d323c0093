"""Files of encoders: what masked pre-training leaves, to be part of a network that segments."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from segraft.errors import SegraftError
from segraft.networks.registry import outline, parameters_of
from segraft.networks.trusted import require_trusted

if TYPE_CHECKING:
    from segraft.networks.bases import Base

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


def vit_arguments(tensors: Mapping[str, Tensor], prefix: str = "vit.") -> dict[str, Any]:
    """The arguments that a ViT with these tensors was built with, as far as shapes show them; empty where it is none.

    Its image's size is known by the number of patches alone: `patches`. Sizes are lists, one number where all are it.
    """
    projection = tensors.get(f"{prefix}patch_embedding.patch_embeddings.weight")
    positions = tensors.get(f"{prefix}patch_embedding.position_embeddings")
    if projection is None or positions is None:
        return {}
    blocks = {key.split(".")[prefix.count(".") + 1] for key in tensors if key.startswith(f"{prefix}blocks.")}
    first = tensors.get(f"{prefix}blocks.0.mlp.linear1.weight")
    edges = list(projection.shape[2:])
    return {
        "in_channels": projection.shape[1],
        "patch_size": edges[0] if len(set(edges)) == 1 else edges,
        "hidden_size": projection.shape[0],
        "mlp_dim": None if first is None else first.shape[0],
        "num_layers": len(blocks),
        "patches": positions.shape[1],
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in tensors,
    }


def fixed_size(net: nn.Module) -> tuple[int, ...] | None:
    """The sizes of the only images that a network takes, as it says by `image_size`, or as MONAI's UNETR has them."""
    told = getattr(net, "image_size", None)
    if told is None and hasattr(net, "vit"):
        grid, edges = getattr(net, "feat_size", None), getattr(net, "patch_size", None)
        told = [patches * edge for patches, edge in zip(grid, edges, strict=True)] if grid and edges else None
    return None if told is None else tuple(int(size) for size in told)


def vit_of(net: nn.Module) -> dict[str, Any]:
    """The arguments of a network's ViT: what `vit_arguments` has, its heads and the size of its image, where told."""
    found = vit_arguments(net.state_dict())
    blocks = getattr(getattr(net, "vit", None), "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    size = fixed_size(net) or getattr(net, "img_size", None)
    found |= {} if heads is None else {"num_heads": int(heads)}
    return found | ({} if size is None or not found else {"img_size": list(size)})


def vit_of_base(base: "Base") -> dict[str, Any]:
    """The same of the network of a base file, by its name and arguments; empty where it has no ViT.

    Raises:
        SegraftError: the network is not one that a file may name, or cannot be built.
    """
    require_trusted(base.network, base.arguments, base.path)
    rest = dict(base.arguments)
    channels = {name: rest.pop(name) for name in ("in_channels", "out_channels")}
    return vit_of(outline(base.network, **channels, arguments=rest))


def with_sizes(
    network: str, arguments: Mapping[str, Any], weights: str | Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments of a network, with those that they leave out and an encoder file says, and a note of them.

    Args:
        network: as of `build`.
        arguments: what is given already; the network's defaults give way to the file.
        weights: that the network takes; of other files than those of encoders nothing is taken.

    Raises:
        SegraftError: no such network, the file's network cannot be built, or its patches are no cubes.
    """
    from segraft.networks.bases import FILE_NAME, read_base

    path = Path(weights) / FILE_NAME if Path(weights).is_dir() else Path(weights)
    try:
        base = read_base(path) if path.suffix == ".safetensors" else None
    except SegraftError:  # no base: who loads it says what is wrong, if anything
        return dict(arguments), ()
    if base is None or not holds_encoder(base.record):
        return dict(arguments), ()
    takes = parameters_of(network)
    if "img_size" not in takes:  # a network of another kind, whose arguments of the same names mean something else
        return dict(arguments), ()
    left = {name: value for name, value in vit_of_base(base).items() if name in takes and name not in arguments}
    taken = {name: value for name, value in left.items() if name != "in_channels" and not _same(value, takes[name])}
    if isinstance(taken.get("patch_size"), list):  # no network that segments takes it
        raise SegraftError(
            f"{path} holds an encoder whose patches of {'×'.join(map(str, taken['patch_size']))} voxels are no cubes, "
            f"as those of {network} are: pre-train one with a patch_size that is one number."
        )
    if not taken:
        return dict(arguments), ()
    told = ", ".join(f"{name} {value}" for name, value in taken.items())
    return {**arguments, **taken}, (f"arguments of {network} that are as {path} says: {told}.",)


def _same(value: object, other: object) -> bool:
    return value == (list(other) if isinstance(other, tuple) else other)
