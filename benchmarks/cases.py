"""The networks and image sizes that are measured. To add one, add a `Case`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from segraft.networks import UNet

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Case:
    """One network on one size of image.

    Attributes:
        name: by which `--networks` chooses it.
        title: of its tables.
        family: to which of the targets it belongs.
        build: makes the network; called anew for every variant.
        shape: of the image, batch and channel first.
        rounds: of the timing, unless `--rounds` says otherwise.
        evaluations: rounds of the evaluation, at least; more than of steps, as what is looked for there is a hundredth.
        precision: `bfloat16` is autocast.
        options: whether the options (autocast, memory format, compiler) are measured on it too.
    """

    name: str
    title: str
    family: Literal["2D U-Net", "3D U-Net", "SwinUNETR"]
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rounds: int
    evaluations: int = 9
    precision: Precision = "float32"
    options: bool = False


def unet3d() -> nn.Module:
    """The U-Net in three dimensions."""
    return UNet(spatial_dims=3, widths=(32, 64, 128, 256))


def swin_unetr(feature_size: int = 48) -> nn.Module:
    """MONAI's SwinUNETR."""
    from monai.networks.nets import SwinUNETR  # only its cases need MONAI

    net: nn.Module = SwinUNETR(in_channels=1, out_channels=1, feature_size=feature_size)
    return net


# Rounds: as many as fit into about ten minutes a network on four cores.
CPU = (
    Case("unet-256", "Table 3 U-Net, 256², batch 1", "2D U-Net", UNet, (1, 1, 256, 256), 9, 41, options=True),
    Case("unet-512", "Table 3 U-Net, 512², batch 2", "2D U-Net", UNet, (2, 1, 512, 512), 3),
    Case(
        "unet3d-96", "3D U-Net 32-64-128-256, 96³, batch 1", "3D U-Net", unet3d, (1, 1, 96, 96, 96), 4, 15, options=True
    ),
    Case("swin-64", "SwinUNETR, feature size 48, 64³, batch 1", "SwinUNETR", swin_unetr, (1, 1, 64, 64, 64), 3),
)

_FLOAT32 = (
    Case("unet-256", "Table 3 U-Net, 256², batch 1", "2D U-Net", UNet, (1, 1, 256, 256), 30),
    Case("unet-512", "Table 3 U-Net, 512², batch 8", "2D U-Net", UNet, (8, 1, 512, 512), 15, options=True),
    Case("unet3d-96", "3D U-Net 32-64-128-256, 96³, batch 2", "3D U-Net", unet3d, (2, 1, 96, 96, 96), 15, options=True),
    Case("swin-96", "SwinUNETR, feature size 48, 96³, batch 1", "SwinUNETR", swin_unetr, (1, 1, 96, 96, 96), 15),
)
_BFLOAT16 = tuple(
    replace(case, name=f"{case.name}-bf16", title=f"{case.title}, bf16 autocast", precision="bfloat16", options=False)
    for case in _FLOAT32
)
CUDA = (*_FLOAT32, *_BFLOAT16)

# Seconds instead of minutes, to try the benchmark itself; only run when named.
TINY = (
    Case(
        "tiny-2d", "U-Net 8-16-32, 64²", "2D U-Net", lambda: UNet(widths=(8, 16, 32)), (1, 1, 64, 64), 3, options=True
    ),
    Case(
        "tiny-3d",
        "3D U-Net 4-8-16, 16³",
        "3D U-Net",
        lambda: UNet(spatial_dims=3, widths=(4, 8, 16)),
        (1, 1, 16, 16, 16),
        3,
        options=True,
    ),
    Case("tiny-swin", "SwinUNETR, feature size 12, 64³", "SwinUNETR", lambda: swin_unetr(12), (1, 1, 64, 64, 64), 2),
)


def defaults(device: str) -> tuple[Case, ...]:
    """What is measured on a device when nothing is named."""
    return CUDA if device == "cuda" else CPU


def by_name(device: str) -> dict[str, Case]:
    """Every case of a device that can be named."""
    return {case.name: case for case in (*defaults(device), *TINY)}
