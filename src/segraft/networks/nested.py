"""Parts of networks of MONAI that are built level inside level, so that names depend on their depth."""

from collections.abc import Callable
from typing import Any

Parts = dict[str, tuple[str, ...]]


def unet_parts(net: Any) -> Parts:
    """Of MONAI's UNet: each level is a sequence of way down, the next level within a skip connection, and way up.

    The head is the uppermost way up: all of it has as many channels as there are outputs.
    """
    down, up, prefix, level = [], [], "model", net.model
    while _is_level(level):
        down.append(f"{prefix}.0")
        up.append(f"{prefix}.2")
        prefix, level = f"{prefix}.1.submodule", level[1].submodule
    parts = {"encoder": (*down, prefix), "decoder": tuple(up[1:]), "head": tuple(up[:1])}
    return {name: prefixes for name, prefixes in parts.items() if prefixes}  # with one level there is no decoder


def attention_unet_parts(net: Any) -> Parts:
    """Of MONAI's AttentionUnet: each level holds its gate and way up, and within it its way down and the next level."""
    down, up, prefix, level = ["model.0"], [], "model.1", net.model[1]
    while hasattr(level, "submodule"):
        up += [f"{prefix}.{name}" for name in ("attention", "upconv", "merge")]
        inside, level = f"{prefix}.submodule", level.submodule
        lowest = not hasattr(level, "__getitem__")
        down.append(inside if lowest else f"{inside}.0")
        if lowest:
            break
        prefix, level = f"{inside}.1", level[1]
    return {"encoder": tuple(down), "decoder": tuple(up), "head": ("model.2",)}


def _is_level(module: Any) -> bool:
    return hasattr(module, "__len__") and len(module) == 3 and hasattr(module[1], "submodule")


NESTED_PARTS: dict[str, Callable[[Any], Parts]] = {
    "monai.networks.nets.unet.UNet": unet_parts,
    "monai.networks.nets.attentionunet.AttentionUnet": attention_unet_parts,
}
"""Class -> what finds its parts."""
