"""A network whose outputs cannot be exchanged, with a layer on top whose outputs can."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segraft.adapters.selection import parts_of, projections_of
from segraft.networks.checkpoints import unprefixed
from segraft.networks.registry import build, outline, spatial_dims

PATH = f"{__name__}:OutputsOnTop"
"""By which `build` makes it."""

INNER, HEAD = "net", "head"
_SEQUENCE = {"0": INNER, "1": HEAD}
"""Its parts in a `torch.nn.Sequential` of the two, as it is exported."""


class OutputsOnTop(nn.Module):
    """Any network, and a 1×1 convolution from its outputs to those of a task.

    For networks in which more than the last layer depends on the number of outputs, such as MONAI's UNet with residual
    units. With weights of the network alone the convolution passes on its outputs, one by one.

    Args:
        in_channels: of the image.
        out_channels: labels, one logit each.
        network: the network, for `build`.
        outputs: that it has.
        arguments: further keyword arguments of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        network: str,
        outputs: int,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = build(network, in_channels=in_channels, out_channels=outputs, arguments=arguments)
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims(self.net)]
        self.head = convolution(outputs, out_channels, 1)
        inner = {part: tuple(f"{INNER}.{name}" for name in names) for part, names in parts_of(self.net).items()}
        self.parts = {**inner, HEAD: (*inner.get(HEAD, ()), HEAD)}
        self.projections = {
            name: {rf"{INNER}\.{layers}": rows for layers, rows in found.items()}
            for name, found in projections_of(self.net).items()
        }
        for name in ("size_multiple", "image_size"):
            if hasattr(self.net, name):
                setattr(self, name, getattr(self.net, name))

    def adopted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the network alone as those of this one, with all its outputs passed on as they are."""
        if any(key.startswith(f"{INNER}.") for key in tensors):
            return dict(tensors)
        named = {".".join((_SEQUENCE.get(first, first), rest)): value for (first, _, rest), value in _parted(tensors)}
        if named.keys() == self.state_dict().keys():
            return named
        size = self.head.weight.shape[1]
        ahead = {f"{INNER}.{key}": value for key, value in unprefixed(tensors, self.net.state_dict()).items()}
        identity = torch.eye(size).reshape(size, size, *self.head.weight.shape[2:])
        return {**ahead, f"{HEAD}.weight": identity, f"{HEAD}.bias": torch.zeros(size)}

    def forward(self, image: Tensor) -> Tensor:
        """Logits on the grid of the image."""
        logits: Tensor = self.head(self.net(image))
        return logits


def _parted(tensors: Mapping[str, Tensor]) -> list[tuple[tuple[str, str, str], Tensor]]:
    return [(key.partition("."), value) for key, value in tensors.items()]


def exchangeable(network: str, arguments: Mapping[str, Any], head: Sequence[str]) -> bool:
    """Whether no tensors of a network depend on the number of its outputs but these of its head.

    Raises:
        SegraftError: the network cannot be built.
    """
    rest = dict(arguments)
    channels, outputs = rest.pop("in_channels"), rest.pop("out_channels")
    one, other = (
        outline(network, in_channels=channels, out_channels=count, arguments=rest).state_dict()
        for count in (outputs, outputs + 1)
    )
    changed = {key for key in one if key not in other or one[key].shape != other[key].shape}
    return bool(changed) and changed <= set(head)
