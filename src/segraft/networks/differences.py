"""In which arguments a SwinUNETR or a ViT differs from that of a file, in words and with the cure."""

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from segraft.networks.channelwise import Channelwise
from segraft.networks.encoder_files import vit_arguments, vit_of, vit_of_base
from segraft.networks.layouts import ENCODERS

if TYPE_CHECKING:
    from segraft.networks.bases import Base

SWIN, VIT = ENCODERS["SwinUNETR"].key, ENCODERS["ViT"].key
"""Keys that tell a SwinUNETR and a network with a ViT."""

ONE_CHANNEL = "this network encodes channels one at a time: give it weights for one channel"


def in_words(
    net: nn.Module, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], base: "Base | None", *, misfit: bool
) -> list[str]:
    """How the encoder of a network differs from that of a file; nothing where it does not.

    Args:
        net: the network.
        tensors: the file's, by the network's keys.
        wanted: the network's.
        base: what the file says of itself, where it is a base of Segraft; it then tells a ViT's heads and the shape of
            its image, which shapes of tensors do not.
        misfit: tensors do not fit.
    """
    if VIT in wanted and VIT in tensors:
        return _vit_in_words(net, tensors, wanted, base)
    if not misfit or SWIN not in wanted or SWIN not in tensors:
        return []
    theirs, ours = _swin_arguments(tensors), _swin_arguments(wanted)
    other: dict[str, Any] = {name: value for name, value in theirs.items() if value != ours.get(name, value)}
    return _told(net, other, ours)


def untold(net: nn.Module, tensors: Mapping[str, Tensor], base: "Base | None") -> tuple[str, ...]:
    """What of its ViT a file that is no base does not tell, in a sentence."""
    if base is not None or VIT not in tensors:
        return ()
    ours = vit_of(net)
    known = [text for name, text in (("img_size", "images of {} voxels"), ("num_heads", "{} heads")) if name in ours]
    values = [_shown(ours[name]) for name in ("img_size", "num_heads") if name in ours]
    as_here = ", ".join(text.format(value) for text, value in zip(known, values, strict=True))
    remark = (
        "the file does not tell of what shape its vision transformer's images were, nor how many attention heads it "
        f"has: {as_here or 'those of the network'} are taken, as the network's arguments say."
    )
    return (remark,)


def _vit_in_words(
    net: nn.Module, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], base: "Base | None"
) -> list[str]:
    theirs, ours = vit_arguments(tensors), vit_arguments(wanted)
    if base is not None:
        theirs, ours = theirs | vit_of_base(base), ours | vit_of(net)
    if "img_size" in theirs and "img_size" in ours:
        theirs.pop("patches", None)  # which then says less
    return _told(net, {name: value for name, value in theirs.items() if value != ours.get(name, value)}, ours)


def _told(net: nn.Module, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Each argument that differs, with what to do about it."""
    takes = set(inspect.signature(type(net)).parameters) | set(ours if "swinViT" in dict(net.named_children()) else ())
    cures = {"patches": "give both the same img_size"}
    if isinstance(net, Channelwise):
        cures["in_channels"] = ONE_CHANNEL
    elif hasattr(net, "vit"):
        cures["in_channels"] = "take a network that encodes channels one by one (unetr_channelwise)"
    given = {name: value for name, value in theirs.items() if name in takes and name not in cures}
    fixed = [name for name in theirs if name not in given and name not in cures]
    groups = [([name], cures[name]) for name in theirs if name in cures]
    if fixed:  # then no argument helps
        groups.append((fixed, f"{type(net).__name__} has no argument for this: take unetr_channelwise"))
    elif given:
        groups.append((list(given), f"give --network-args '{json.dumps(given)}'"))
    return [f"{', '.join(_difference(name, theirs, ours) for name in names)} ({cure})" for names, cure in groups]


def _difference(name: str, theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    return f"{name.replace('_', ' ')} {_shown(theirs[name])}, this network {_shown(ours[name])}"


def _shown(value: object) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def _swin_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    features, channels, *sizes = tensors[SWIN].shape
    table = tensors.get("swinViT.layers1.0.blocks.0.attn.relative_position_bias_table")
    window = {} if table is None else {"window_size": (round(table.shape[0] ** (1 / len(sizes))) + 1) // 2}
    return {"feature_size": features, "in_channels": channels, **window}
