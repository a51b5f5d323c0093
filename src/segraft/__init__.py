"""Segraft: low-rank adapters for pre-trained medical segmentation networks.

    net = segraft.networks.UNet(in_channels=1, out_channels=1)
    segraft.graft(net, segraft.AdapterSpec("dora_c", rank=64))

Names are imported when they are first used, so that `import segraft` (and `segraft --help`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from segraft._version import __version__
from segraft.errors import SegraftError

if TYPE_CHECKING:
    from segraft import adapters, data, evaluation, jobs, networks, training
    from segraft.adapters import (
        PRESETS,
        AdapterSpec,
        activate,
        activated,
        graft,
        load,
        merge,
        parameter_table,
        save,
        ungraft,
        unmerge,
    )

_ADAPTERS = (
    "PRESETS",
    "AdapterSpec",
    "activate",
    "activated",
    "graft",
    "load",
    "merge",
    "parameter_table",
    "save",
    "ungraft",
    "unmerge",
)
_PACKAGES = ("adapters", "data", "evaluation", "jobs", "networks", "training")

__all__ = [
    "PRESETS",
    "AdapterSpec",
    "SegraftError",
    "__version__",
    "activate",
    "activated",
    "adapters",
    "data",
    "evaluation",
    "graft",
    "jobs",
    "load",
    "merge",
    "networks",
    "parameter_table",
    "save",
    "training",
    "ungraft",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"segraft.{name}")
    if name in _ADAPTERS:
        import_module("segraft.networks")  # which knows the parts of networks of others
        return getattr(import_module("segraft.adapters"), name)
    raise AttributeError(f"module 'segraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
