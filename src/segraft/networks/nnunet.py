"""Networks of nnU-Net v2, built as its plans say by the package dynamic-network-architectures."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import nn

from segraft.errors import SegraftError

PACKAGE = "dynamic_network_architectures"
_UNETS = f"{PACKAGE}.architectures.unet"


def nnunet(
    in_channels: int,
    out_channels: int,
    *,
    architecture: str,
    settings: Mapping[str, Any],
    classes: Mapping[str, str | None] | None = None,
) -> nn.Module:
    """A plain instance of a network class of theirs, so that its tensors have nnU-Net's names.

    Deep supervision is off, and the heads that serve it alone are left out, as nothing that trained them would be seen.

    Args:
        in_channels: of the image.
        out_channels: of the last head.
        architecture: the class by its dotted path.
        settings: JSON values of its further arguments.
        classes: further arguments that are classes of layers, by their dotted paths.

    Raises:
        SegraftError: a class that is not one of a network or layer of torch or of that package; or it is not there.
    """
    try:
        import_module(PACKAGE)
    except ImportError as error:
        raise SegraftError(f"networks of nnU-Net need the package {PACKAGE}: pip install 'segraft[nnunet]'.") from error
    layers = {name: None if path is None else _class(path, "torch.nn") for name, path in (classes or {}).items()}
    build: Any = _class(architecture)
    net: nn.Module = build(
        input_channels=in_channels, num_classes=out_channels, deep_supervision=False, **{**settings, **layers}
    )
    if hasattr(build, "initialize"):
        net.apply(build.initialize)
    heads = getattr(getattr(net, "decoder", None), "seg_layers", None)
    if isinstance(heads, nn.ModuleList):
        for place in range(len(heads) - 1):
            heads[place] = nn.Identity()
    return net


def _class(path: str, *packages: str) -> type[nn.Module]:
    """The class at a dotted path. Plans are files of others, and may name nothing else that runs."""
    module, _, name = path.rpartition(".")
    if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in (PACKAGE, *packages)):
        raise SegraftError(f"plans name the class {path!r}, and only those of torch.nn and {PACKAGE} are built.")
    found = None
    for place in dict.fromkeys((module, _UNETS)):  # where networks went that older plans have elsewhere
        with suppress(ModuleNotFoundError):
            found = found or getattr(import_module(place), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SegraftError(f"plans name {path!r}, which is no class of a network or layer: is {PACKAGE} up to date?")
    return found
