"""First layers for other channels: which channel of a base each channel of an image takes the weights of.

What a channel starts with that the base has not got is told by a word, a key of `STARTS`. All keep what the base
computes from the channels that stay, as these keep their weights to the bit.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from segraft.errors import SegraftError
from segraft.networks.heads import START_SEED


def _share(weight: Tensor, left: Tensor, _channels: int, new: int) -> Tensor:
    return left.sum(0) / new if len(left) else torch.zeros_like(weight[0])


def _zero(weight: Tensor, _left: Tensor, _channels: int, _new: int) -> Tensor:
    return torch.zeros_like(weight[0])


def _mean(weight: Tensor, _left: Tensor, channels: int, _new: int) -> Tensor:
    return weight.sum(0) / channels


Start = Callable[[Tensor, Tensor, int, int], Tensor]
"""From the base's weights by the channel [C, …], those of the channels that are left out [D, …], the number of the
image's channels and how many of them are new, to the weights of each new one."""

STARTS: dict[str, Start] = {"share": _share, "zero": _zero, "mean": _mean}
"""share: the new channels share equally what the channels had that are left out, or nothing, if none is: the sum over
all channels stays as it was. For wholly other channels that is the copy, scaled by C/n, that 3D networks are inflated
with from 2D (Carreira & Zisserman 2017) and timm takes for images that are not RGB. zero: nothing: the first output is
the base's without the channels that are left out. mean: the mean of all the base's channels, scaled by C/n.
"""


@dataclass(frozen=True)
class Inputs:
    """Which channel of a base each channel of an image takes the weights of.

    Attributes:
        rows: for each channel of the image the base's, or None where it is new.
        start: of the new ones, a key of `STARTS`.
    """

    rows: tuple[int | None, ...]
    start: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self | None:
        """What the record of a base says; None where its channels are the image's."""
        said = record.get("inputs")
        return None if said is None else cls(tuple(said["channels"]), said["start"])

    def record(self) -> dict[str, Any]:
        """JSON values, for `of`."""
        return {"inputs": {"channels": list(self.rows), "start": self.start}}

    @property
    def new(self) -> tuple[int, ...]:
        """Places of the channels that are new."""
        return tuple(place for place, row in enumerate(self.rows) if row is None)

    def taken_from(self, weight: Tensor) -> Tensor:
        """The weight [o, n, …] for the image's channels, from the base's [o, C, …]."""
        by_channel = weight.transpose(0, 1)
        left = by_channel[[place for place in range(len(by_channel)) if place not in self.rows]]
        new = STARTS[self.start](by_channel, left, len(self.rows), len(self.new)) if self.new else None
        rows = [new if row is None else by_channel[row] for row in self.rows]
        return torch.stack([row for row in rows if row is not None], 1).contiguous()


def match_inputs(channels: Sequence[str], names: Sequence[str], count: int, start: str) -> Inputs | None:
    """Let channels take the weights of those of their names.

    Args:
        channels: of the image, in order, spelt so that the same are equal; empty where one has no name.
        names: of the base's, likewise; none where they are not known.
        count: how many the base has.
        start: of those that are new.

    Returns:
        None where they are the base's, in its order, or go by position: as many, of which the base's have no names.

    Raises:
        SegraftError: an unknown start; two channels of one name; not as many names as channels; nothing of the image
            would reach the network.
    """
    if start not in STARTS:
        raise SegraftError(f"unknown start {start!r} of first layers: choose {', '.join(STARTS)}.")
    if names and len(names) != count:
        raise SegraftError(f"{len(names)} channels of the base are named, but it has {count}: name each, in order.")
    known = {name: place for place, name in enumerate(names) if name}
    if len(known) != len([name for name in names if name]):
        raise SegraftError(f"two of the base's channels {', '.join(names)} are the same: name each differently.")
    if not known and len(channels) == count:
        return None
    rows = tuple(known.get(name) for name in channels)
    if rows == tuple(range(count)):
        return None
    if start == "zero" and not any(row is not None for row in rows):
        raise SegraftError(
            "the base has none of the scans' channels by name, so with first layers of zeros it would see nothing: "
            "start them with share or mean, or say with --base-channels what its channels are."
        )
    return Inputs(rows, start)


def input_weights(net: nn.Module, other: nn.Module, channels: tuple[int, int]) -> tuple[str, ...]:
    """Keys of the weights that see the image: those in which a network differs from itself for other channels.

    Args:
        net: plain, for one number of channels.
        other: the same for another; its weights may be on the device `meta`.
        channels: both numbers.

    Raises:
        SegraftError: more than such weights depends on the number of channels, or nothing does.
    """
    ours, theirs, name = net.state_dict(), other.state_dict(), type(net).__name__
    if ours.keys() != theirs.keys():
        key = min(ours.keys() ^ theirs.keys())
        raise SegraftError(_refusal(name, f"its tensor {key!r} is there for some numbers of channels alone"))
    keys = tuple(key for key in ours if ours[key].shape != theirs[key].shape)
    if not keys:
        raise SegraftError(_refusal(name, "no layer of it depends on their number"))
    for key in keys:
        layer = net.get_submodule(key.rpartition(".")[0])
        shapes = [list(tensors[key].shape) for tensors in (ours, theirs)]
        one_by_one = all(shape[1:2] == [count] for shape, count in zip(shapes, channels, strict=True))
        alike = shapes[0][:1] + shapes[0][2:] == shapes[1][:1] + shapes[1][2:]
        plain = isinstance(layer, nn.Linear | _ConvNd) and not isinstance(layer, _ConvTransposeNd)
        if not (plain and one_by_one and alike):
            raise SegraftError(_refusal(name, f"its tensor {key!r} depends on their number otherwise than by a slice"))
    return keys


def _refusal(name: str, reason: str) -> str:
    return f"{name} cannot be given other channels, as {reason}: choose a base for as many channels as the scans have."


def take_inputs(net: nn.Module, rebuilt: nn.Module, keys: Collection[str], inputs: Inputs) -> nn.Module:
    """Give a network built for other channels all weights of one, and of those that see the image what `inputs` says.

    Args:
        net: the one, plain.
        rebuilt: the same network for the image's channels, changed in place.
        keys: of the weights that see the image.
        inputs: channels to take.
    """
    tensors = net.state_dict()
    rebuilt.load_state_dict(tensors | {key: inputs.taken_from(tensors[key]) for key in keys})
    return rebuilt


def unseen(net: nn.Module, key: str, places: Collection[int]) -> list[int]:
    """Of some channels those that a weight of a grafted network has zeros for which nothing trained can move.

    By gradients, as `untrained_outputs` of heads.

    Args:
        net: grafted.
        key: of the weight.
        places: of the channels.
    """
    layer: Any = net.get_submodule(key.rpartition(".")[0])
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    still, generator = [], torch.Generator().manual_seed(START_SEED)
    with torch.enable_grad():
        weight: Tensor = layer.weight  # composed with what is grafted on
        for place in sorted(places):
            part = weight[:, place]
            if part.any():
                continue
            direction = torch.randn(part.shape, generator=generator).to(part)
            moved = (
                torch.autograd.grad(part, trained, direction, retain_graph=True, allow_unused=True)
                if trained and part.requires_grad
                else ()
            )
            if not any(gradient is not None and bool(gradient.any()) for gradient in moved):
                still.append(place)
    return still
