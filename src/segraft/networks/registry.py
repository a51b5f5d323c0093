"""Networks by name, and any other by its dotted path."""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from segraft.adapters.selection import NAMED, parts_of
from segraft.errors import SegraftError
from segraft.networks.multiview import MultiViewUNet
from segraft.networks.nested import NESTED_PARTS
from segraft.networks.nnunet import nnunet
from segraft.networks.unet import UNet


@dataclass(frozen=True)
class NetworkEntry:
    """A network by name: what builds it, and the arguments that make it what its name says.

    Attributes:
        factory: a class, or `package.module:Class`, which is imported when it is asked for.
        arguments: of it.
    """

    factory: Callable[..., nn.Module] | str
    arguments: Mapping[str, Any] = field(default_factory=dict)


NETWORKS: dict[str, NetworkEntry] = {
    "unet": NetworkEntry(UNet),
    "unet3d": NetworkEntry(UNet, {"spatial_dims": 3, "widths": (32, 64, 128, 256), "norm": "instance"}),
    "multi_view_unet": NetworkEntry(MultiViewUNet),
    # as a model folder of nnU-Net v2 says (Isensee et al. 2021)
    "nnunet": NetworkEntry(nnunet),
    # Hatamizadeh et al. 2022, as the few-shot paper takes it
    "swin_unetr": NetworkEntry("monai.networks.nets.swin_unetr:SwinUNETR", {"feature_size": 48}),
    # the same as MONAI computed it before 1.5, for weights of that time
    "original_swin_unetr": NetworkEntry("segraft.networks.swin:OriginalSwinUNETR", {"feature_size": 48}),
    # one encoder for one channel, for images of several (Dutta et al. 2025)
    "unetr_channelwise": NetworkEntry("segraft.networks.channelwise_unetr:ChannelwiseUNETR"),
    "swin_unetr_channelwise": NetworkEntry(
        "segraft.networks.channelwise_swin:ChannelwiseSwinUNETR", {"feature_size": 48}
    ),
    "unet_channelwise": NetworkEntry("segraft.networks.channelwise_unet:ChannelwiseUNet"),
    # masked auto-encoders, whose encoders are part of UNETR; sizes of Dosovitskiy et al. 2021 and Touvron et al. 2021
    "vit_small": NetworkEntry(
        "segraft.networks.mae:MaskedAutoencoder",
        {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "decoder_layers": 4},
    ),
    "vit_base": NetworkEntry("segraft.networks.mae:MaskedAutoencoder"),
    "vit_large": NetworkEntry(
        "segraft.networks.mae:MaskedAutoencoder",
        {"hidden_size": 1024, "mlp_dim": 4096, "num_layers": 24, "num_heads": 16},
    ),
}
"""To add a network, add one entry. Parts of third-party networks are in `FOREIGN_PARTS`."""

_NNUNET = {
    "encoder": ("encoder",),
    "decoder": ("decoder.stages", "decoder.transpconvs"),
    "head": ("decoder.seg_layers",),
}

FOREIGN_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": _NNUNET,
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": _NNUNET,
    "dynamic_network_architectures.architectures.unet.ResidualUNet": _NNUNET,
    "monai.networks.nets.segresnet.SegResNet": {
        "encoder": ("convInit", "down_layers"),
        "decoder": ("up_layers", "up_samples"),
        "head": ("conv_final",),
    },
    "monai.networks.nets.basic_unet.BasicUNet": {
        "encoder": ("conv_0", "down_1", "down_2", "down_3", "down_4"),
        "decoder": ("upcat_4", "upcat_3", "upcat_2", "upcat_1"),
        "head": ("final_conv",),
    },
    "monai.networks.nets.dynunet.DynUNet": {
        "encoder": ("input_block", "downsamples", "bottleneck"),
        "decoder": ("upsamples",),
        "head": ("output_block",),
    },
    "monai.networks.nets.swin_unetr.SwinUNETR": {
        "encoder": ("swinViT",),
        "decoder": (
            "encoder1",
            "encoder2",
            "encoder3",
            "encoder4",
            "encoder10",
            "decoder5",
            "decoder4",
            "decoder3",
            "decoder2",
            "decoder1",
        ),
        "head": ("out",),
    },
    "monai.networks.nets.unetr.UNETR": {
        "encoder": ("vit",),
        "decoder": ("encoder1", "encoder2", "encoder3", "encoder4", "decoder5", "decoder4", "decoder3", "decoder2"),
        "head": ("out",),
    },
}
"""Named parts of networks that do not name their own: class -> {part: module-name prefixes}; see `NESTED_PARTS`."""

_FUSED = {name: {r".*\.attn\.qkv": f"{place}/3"} for place, name in enumerate(("query", "key", "value"), start=1)}

FOREIGN_PROJECTIONS: dict[str, dict[str, dict[str, str]]] = {
    "monai.networks.nets.swin_unetr.SwinUNETR": _FUSED,
    "monai.networks.nets.unetr.UNETR": _FUSED,
}
"""Attention projections of such networks: class -> {projection: {expression on layer names: its rows, as 'j/n'}}."""

CHANNEL_NAMES: dict[str, tuple[str, ...]] = {
    "in_channels": ("input_channels", "in_chans", "n_channels"),
    "out_channels": ("num_classes", "n_classes", "classes", "out_chans", "output_channels"),
}
"""Arguments of `build` -> what constructors call them that do not take them by these names."""

NAMED["parts"].update(FOREIGN_PARTS)
NAMED["parts"].update(NESTED_PARTS)
NAMED["projections"].update(FOREIGN_PROJECTIONS)


def build(
    network: str, *, in_channels: int, out_channels: int, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network.

    Args:
        network: a key of `NETWORKS`, or `package.module:Class` of any importable `nn.Module`.
        in_channels: channels of the image; passed where the constructor takes it, or a name of `CHANNEL_NAMES`.
        out_channels: labels; likewise.
        arguments: further keyword arguments; they win over both.

    A network that names no parts gets a part `head` where only its last layer depends on the labels' number.

    Raises:
        SegraftError: an unknown name, a path that does not import, arguments that the constructor refuses.
    """
    factory, merged = constructor(network, in_channels=in_channels, out_channels=out_channels, arguments=arguments)
    try:
        net = factory(**merged)
    except SegraftError:
        raise
    except ImportError as error:  # MONAI's carries a whole traceback in its message
        raise SegraftError(
            f"network {network!r} needs a package that is not there ({str(error).partition(chr(10))[0]}): install it."
        ) from error
    except Exception as error:
        raise SegraftError(f"network {network!r} refused its arguments {merged}: {error}.") from error
    name = _called("out_channels", merged)
    if name in merged and not parts_of(net):
        _name_head(net, lambda: factory(**merged | {name: merged[name] + 1}))
    return net


def usual_names(network: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, of which those in `CHANNEL_NAMES` have the names that `build` knows them by.

    Raises:
        SegraftError: an unknown network, or one that does not import.
    """
    accepted = inspect.signature(_factory(NETWORKS.get(network) or NetworkEntry(network))).parameters
    usual = {_called(name, accepted): name for name in CHANNEL_NAMES}
    return {usual.get(name, name): value for name, value in arguments.items()}


def _called(name: str, accepted: Collection[str]) -> str:
    """What a constructor with these arguments calls one of `CHANNEL_NAMES`."""
    return next((other for other in (name, *CHANNEL_NAMES[name]) if other in accepted), name)


_REFUSALS = (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError, KeyError, IndexError)
"""What constructors raise for a number of outputs, or a device, that they do not take."""


def _name_head(net: nn.Module, with_one_more: Callable[[], nn.Module]) -> None:
    """Name the layer `head` that alone depends on the number of outputs, where there is one."""
    other: dict[str, Tensor] = {}
    for device in ("meta", "cpu"):  # constructors that compute with their weights need some
        with suppress(*_REFUSALS), torch.random.fork_rng(devices=[]), torch.device(device):
            other = other or with_one_more().state_dict()
    ours = net.state_dict()
    changed = {key for key in ours if key not in other or ours[key].shape != other[key].shape}
    layers = {key.rpartition(".")[0] for key in changed}
    if len(ours) == len(other) and len(layers) == 1:
        net.parts = {"head": (*layers,)}  # type: ignore[assignment]  # torch's stubs know tensors and modules alone


def constructor(
    network: str, *, in_channels: int, out_channels: int, arguments: Mapping[str, Any] | None = None
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """What `build` calls, and with which keyword arguments.

    Raises:
        SegraftError: an unknown name, or a path that does not import.
    """
    entry = NETWORKS.get(network) or NetworkEntry(network)
    factory = _factory(entry)
    accepted = inspect.signature(factory).parameters
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    named = {_called(name, accepted): value for name, value in channels.items()}
    given = {name: value for name, value in named.items() if name in accepted}
    return factory, {**given, **entry.arguments, **(arguments or {})}


def outline(
    network: str, *, in_channels: int, out_channels: int, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """As `build`, for looking at layers and shapes: without memory for the weights where the network allows it.

    Some compute with tensors while they are built (SwinUNETR); those get weights.
    """
    try:
        with torch.device("meta"):
            return build(network, in_channels=in_channels, out_channels=out_channels, arguments=arguments)
    except SegraftError:
        return build(network, in_channels=in_channels, out_channels=out_channels, arguments=arguments)


def parameters_of(network: str) -> dict[str, Any]:
    """The arguments that a network takes by name, with their defaults as it has them; without one: `inspect`'s empty.

    Raises:
        SegraftError: an unknown name, or a path that does not import.
    """
    entry = NETWORKS.get(network) or NetworkEntry(network)
    factory = _by_path(entry.factory) if isinstance(entry.factory, str) else entry.factory
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}
    return {**defaults, **entry.arguments}


def spatial_dims(net: nn.Module) -> int:
    """2 for a network whose convolutions are at most two-dimensional, else 3."""
    return 3 if any(isinstance(module, nn.Conv3d | nn.ConvTranspose3d) for module in net.modules()) else 2


def size_multiple(net: nn.Module) -> int:
    """What the sizes of a patch must be multiples of: as the network says, else 32, which suits the common ones."""
    return int(getattr(net, "size_multiple", 32))


def _factory(entry: NetworkEntry) -> Callable[..., nn.Module]:
    return _by_path(entry.factory) if isinstance(entry.factory, str) else entry.factory


def _by_path(network: str) -> Callable[..., nn.Module]:
    module, colon, name = network.partition(":")
    if not colon:
        raise SegraftError(
            f"unknown network {network!r}: choose {', '.join(NETWORKS)}, or give 'package.module:Class'."
        )
    try:
        factory: Callable[..., nn.Module] = getattr(import_module(module), name)
    except Exception as error:  # a module may raise anything when it is imported
        raise SegraftError(f"network {network!r} cannot be imported ({error}): is its package installed?") from error
    # Files name networks too, and must not be able to name anything that runs: only a module class is called.
    if not (isinstance(factory, type) and issubclass(factory, nn.Module)):
        raise SegraftError(f"{network!r} is no class of torch.nn.Module: give 'package.module:Class' of one.")
    return factory
