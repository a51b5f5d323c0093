"""What of a network may stay at its start, as weights do not hold it: parts, and layers that see all channels."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from segraft.adapters.selection import parts_of
from segraft.networks.channelwise import FUSION, Channelwise
from segraft.networks.layouts import NEVER_RUN, Layout

MAY_START: dict[str, frozenset[str]] = {
    "encoder": frozenset({"decoder", "head"}),
    "all but the head": frozenset({"head"}),
    "all": frozenset(),
}
"""What a file holds -> parts of the network that may stay at their start."""

UNUSED_NORM = re.compile(r"vit\.blocks\.\d+\.norm_cross_attn\.(weight|bias)")

MONAI_TAPS = (4, 7, 10, 12)
"""After which blocks MONAI's UNETR taps its transformer."""


@dataclass(frozen=True)
class Start:
    """What of a network stays at its start.

    Attributes:
        parts: key -> part of the network, for what the file lacks.
        layers: key -> layer, for what has one channel in the file, and in the network all of the image.
        remarks: what that means, in sentences.
    """

    parts: dict[str, str]
    layers: dict[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        """Of all that stays."""
        return frozenset({*self.parts, *self.layers})


def left_at_start(net: nn.Module, wanted: Mapping[str, Tensor], used: Mapping[str, Tensor], layout: Layout) -> Start:
    """What a file of this kind may lack, and lacks.

    A network that encodes channels one at a time takes weights of the network for one channel, which have no fusion.

    Args:
        net: the network.
        wanted: its tensors.
        used: those of the file, by the same keys.
        layout: the file's kind.
    """
    single = not any(_within(key, FUSION) for key in used)
    channels = net.image_channels if isinstance(net, Channelwise) and single else 0
    # The fusion is part of the decoder too, and is told apart from it, as it may start where the decoder may not.
    may = MAY_START[layout.holds] | ({"fusion"} if channels else set())
    names = [name for name in ("fusion", "head", "decoder") if name in may]
    parts = {key: part for key in wanted if key not in used and (part := _part(net, key, names))}
    if not any(".cross_attn." in key for key in wanted):
        parts |= {key: NEVER_RUN for key in wanted if key not in used and UNUSED_NORM.fullmatch(key)}
    layers = {
        key: key.rpartition(".")[0]
        for key, value in wanted.items()
        if channels > 1 and key in used and _part(net, key, ["decoder"]) and _widened(used[key], value, channels)
    }
    return Start(parts, layers, _other_taps(net, used) if channels else ())


def untrained_notes(places: Iterable[str]) -> list[str]:
    """That parts or layers of a base were never trained, in sentences."""
    places = list(places)
    layers = [place for place in places if "." in place]
    notes = [
        f"the {part} starts at random: train it, with --train {trained_by(part, places)}."
        for part in places
        if part not in layers
    ]
    if layers:
        notes.append(
            f"what sees all channels of the image starts at random ({', '.join(layers)}): train it, with --train "
            f"{trained_by(layers[0], places)}."
        )
    return notes


def trained_by(place: str, places: Iterable[str]) -> str:
    """The part to train so that a part or layer is that starts at random, of all that do.

    The decoder has its layers and the fusion in it: one word for whoever must train more of it than the fusion.
    """
    more = any("." in other or other == "decoder" for other in places)
    return "decoder" if "." in place or (place == "fusion" and more) else place


def own_prefixes(net: nn.Module, place: str, others: Iterable[str]) -> tuple[str, ...]:
    """Where the tensors of a part or layer are, without those of smaller parts in it that are looked at by themselves.

    Args:
        net: the network.
        place: name of the part or layer.
        others: further parts and layers that are.
    """
    parts = parts_of(net)
    own = set(parts.get(place, (place,)))
    for other in others:
        within = set(parts.get(other, ()))
        own -= within if within < own else set()
    return tuple(f"{prefix}." for prefix in sorted(own))


def _within(key: str, prefixes: Iterable[str]) -> bool:
    return any(key.startswith(f"{prefix}.") for prefix in prefixes)


def _part(net: nn.Module, key: str, names: Iterable[str]) -> str | None:
    """The first of some parts of the network that a key is in."""
    parts = parts_of(net)
    return next((name for name in names if _within(key, parts.get(name, ()))), None)


def _widened(theirs: Tensor, ours: Tensor, channels: int) -> bool:
    """Whether a weight is [out, 1, …] in the file and [out, channels, …] in the network."""
    return ours.ndim > 1 and ours.shape[1] == channels and theirs.shape == (ours.shape[0], 1, *ours.shape[2:])


def _other_taps(net: nn.Module, used: Mapping[str, Tensor]) -> tuple[str, ...]:
    """That a decoder of MONAI's UNETR is given other states of the transformer than it was trained on."""
    taps = getattr(net, "taps", None)
    if taps is None or taps == MONAI_TAPS or not any(key.startswith("decoder") for key in used):
        return ()
    remark = (
        "its decoder was trained on the transformer's states after blocks "
        f"{', '.join(map(str, MONAI_TAPS))}, as MONAI's UNETR has it, and is given those after blocks "
        f"{', '.join(map(str, taps))}: give --network-args '{{\"taps\": {list(MONAI_TAPS)}}}' for the same."
    )
    return (remark,)
