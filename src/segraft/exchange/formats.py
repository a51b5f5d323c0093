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


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        exporter: `package.module:function`, an `Exporter`.
        marks: files that it always writes, by which a folder is told to be an export.
        further: files that it may write, too. A folder with any other holds more than an export.
    """

    exporter: str
    marks: tuple[str, ...]
    further: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "peft": Format(
        "segraft.exchange.peft_export:export_peft",
        ("adapter_config.json", "adapter_model.safetensors", "segraft.json"),
        ("README.md", "base_model.safetensors"),
    ),
    "onnx": Format("segraft.exchange.onnx_export:export_onnx", ("model.onnx", "model.json"), ("model.onnx.data",)),
    "monai-bundle": Format(
        "segraft.exchange.monai_export:write_bundle",
        ("configs/inference.json", "configs/metadata.json", "models/model.pt"),
        ("docs/README.md", "LICENSE"),
    ),
    "nnunet": Format(
        "segraft.exchange.nnunet_export:export_nnunet",
        ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"),
    ),
}
"""To add a format, add one entry."""


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
    module, _, function = FORMATS[name].exporter.partition(":")
    found: Exporter = getattr(import_module(module), function)
    return found


def require_replaceable(folder: Path) -> None:
    """Refuse to replace what is no earlier export, empty folders aside: what else is in a folder would be gone.

    Raises:
        SegraftError: a file, or a folder that holds something that exports do not.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SegraftError(f"{folder} is a file, and an export is a folder: choose another --out.")
    if not any(folder.iterdir()):
        return
    formats = [each for each in FORMATS.values() if all((folder / mark).is_file() for mark in each.marks)]
    why = "was not written by segraft export"
    if formats:  # other folders, which may be large, are not looked through
        found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        files = {path.relative_to(folder).as_posix() for path in found}
        others = [files - {*each.marks, *each.further} for each in formats]
        if set() in others:
            return
        why = f"holds {min(others[0])} beside an export"
    raise SegraftError(f"{folder} {why}, and all of it would be gone: choose another --out, or empty it yourself.")
