"""Formats of other tools that a finished adapter is written in: one table, and what an exporter is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from segraft.adapters import AdapterHeader
from segraft.data.labels import Labels
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError

FORMATS: dict[str, str] = {
    "peft": "segraft.exchange.peft_export:export_peft",
    "onnx": "segraft.exchange.onnx_export:export_onnx",
    "monai-bundle": "segraft.exchange.monai_export:write_bundle",
    "nnunet": "segraft.exchange.nnunet_export:export_nnunet",
}
"""Format -> `package.module:function`, an `Exporter`. To add a format, add one entry."""


@dataclass(frozen=True)
class Finished:
    """A finished adapter with its base, as an exporter is given it.

    Attributes:
        source: the adapter file.
        header: of it.
        base: the file that the base's weights are in.
        network: of the base, for `segraft.networks.build`.
        arguments: of the network, with the channels.
        labels: in the order of the network's outputs, which are logits, one per label.
        preparation: of the scans.
        channels: names of the image's channels, in order; ("",) for a single one without a name.
        grafted: gives a fresh network with the adapter on it, in evaluation mode.
        merged: gives a fresh plain network with the adapter merged, in evaluation mode; raises SegraftError where it
            cannot be merged.
    """

    source: Path
    header: AdapterHeader
    base: Path
    network: str
    arguments: Mapping[str, Any]
    labels: Labels
    preparation: ScanPreparation
    channels: tuple[str, ...]
    grafted: Callable[[], nn.Module] = field(repr=False)
    merged: Callable[[], nn.Module] = field(repr=False)


Exporter = Callable[[Finished, Path], tuple[str, ...]]
"""Writes into an empty folder, which takes its place only if all went well; returns notes for the user.

Raises SegraftError where the format cannot express the adapter, with the reason.
"""


def exporter(name: str) -> Exporter:
    """What writes a format.

    Raises:
        SegraftError: there is no such format.
    """
    if name not in FORMATS:
        raise SegraftError(f"unknown format {name!r}: choose {', '.join(FORMATS)}.")
    module, _, function = FORMATS[name].partition(":")
    found: Exporter = getattr(import_module(module), function)
    return found
